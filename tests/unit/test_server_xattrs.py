"""Extended attributes and labels through the broker: on every type of file, by every way of keeping inodes."""

import errno
import os
import socket
import stat
import struct

import pytest

from tests.support.broker import Bench, changed
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls
from vfsd.wire import attr
from vfsd.wire import broker_messages as wire

ME = os.getuid(), os.getgid()
BY_NAME = ":prefix:all:security.:user.virtiofs.: :ok:all:::"
CAPABILITY = "user.virtiofs.security.capability"
EVERYBODY_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, 0xFFFFFFFF) for tag, permissions in ((1, 7), (4, 7), (0x20, 7))
)


@pytest.fixture(autouse=True)
def in_proc_self_fd(monkeypatch):
    """As each thread of the broker's pool."""
    monkeypatch.chdir("/proc/self/fd")


@pytest.fixture(params=["never", pytest.param("mandatory", marks=pytest.mark.root)])
def make_worker(request, tmp_path):
    """A worker of a broker with these settings, in a session with ACLs."""

    def make_worker(**settings):
        bench = Bench(tmp_path, inode_file_handles=request.param, **({"xattr": True} | settings))
        request.addfinalizer(bench.close)
        worker = bench.add(0)
        bench.begin_session(wire.SESSION_POSIX_ACL)
        return worker

    return make_worker


@pytest.fixture
def worker(make_worker):
    return make_worker()


def listed(worker, nodeid):
    return set(worker.ask_ok(wire.ListXattr(nodeid)).fields[0].split(b"\0")[:-1])


def get(worker, nodeid, name):
    return worker.ask_ok(wire.GetXattr(nodeid, name)).fields[0]


def make_node(path, kind):
    if kind == "file":
        path.write_bytes(b"content")
    elif kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.fspath(path))


# --- the four calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_set_get_list_and_remove(worker, tmp_path, kind):
    make_node(tmp_path / "node", kind)
    nodeid = worker.lookup(b"node")
    value = bytes(range(256)) * 4
    worker.ask_ok(wire.SetXattr(nodeid, b"user.a", value, 0, 0))
    worker.ask_ok(wire.SetXattr(nodeid, b"user.b", b"", os.XATTR_CREATE, 0))
    assert os.getxattr(tmp_path / "node", "user.a") == value
    assert get(worker, nodeid, b"user.a") == value
    assert get(worker, nodeid, b"user.b") == b""
    assert listed(worker, nodeid) == {b"user.a", b"user.b"}
    worker.ask_ok(wire.RemoveXattr(nodeid, b"user.a"))
    assert os.listxattr(tmp_path / "node") == ["user.b"]
    assert worker.errno_of(wire.GetXattr(nodeid, b"user.a")) == errno.ENODATA
    assert worker.errno_of(wire.RemoveXattr(nodeid, b"user.a")) == errno.ENODATA


@pytest.mark.root
@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo", "socket"])
def test_every_type_of_file_has_its_own(worker, tmp_path, kind):
    """A symlink's are the symlink's, not those of what it leads to, and a fifo is not opened."""
    make_node(tmp_path / "node", kind)
    nodeid = worker.lookup(b"node")
    worker.ask_ok(wire.SetXattr(nodeid, b"trusted.x", b"here", 0, 0))
    assert os.getxattr(tmp_path / "node", "trusted.x", follow_symlinks=False) == b"here"
    assert get(worker, nodeid, b"trusted.x") == b"here"
    assert listed(worker, nodeid) == {b"trusted.x"}
    worker.ask_ok(wire.RemoveXattr(nodeid, b"trusted.x"))
    assert os.listxattr(tmp_path / "node", follow_symlinks=False) == []


@pytest.mark.parametrize("kind", ["symlink", "fifo", "socket"])
def test_user_attributes_of_special_files_are_eperm_as_on_the_host(worker, tmp_path, kind):
    make_node(tmp_path / "node", kind)
    nodeid = worker.lookup(b"node")
    assert worker.errno_of(wire.SetXattr(nodeid, b"user.x", b"x", 0, 0)) == errno.EPERM
    assert worker.errno_of(wire.GetXattr(nodeid, b"user.x")) == errno.ENODATA


def test_a_large_value_goes_both_ways(tmp_path, worker):
    """ext4 keeps what fits a block; a packet of the channel carries the largest that the kernel has."""
    (tmp_path / "file").touch()
    nodeid = worker.lookup(b"file")
    worker.ask_ok(wire.SetXattr(nodeid, b"user.large", b"v" * 3000, 0, 0))
    assert get(worker, nodeid, b"user.large") == b"v" * 3000
    assert worker.errno_of(wire.SetXattr(nodeid, b"user.large", b"v" * 65536, 0, 0)) in (0, errno.ENOSPC, errno.E2BIG)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (lambda node: wire.SetXattr(node, b"user.a", b"", os.XATTR_CREATE, 0), errno.EEXIST),
        (lambda node: wire.SetXattr(node, b"user.b", b"", os.XATTR_REPLACE, 0), errno.ENODATA),
        (lambda node: wire.SetXattr(node, b"user.b", b"", 4, 0), errno.EINVAL),
        (lambda node: wire.SetXattr(node, b"user.b", b"", 0xFFFFFFFF, 0), errno.EINVAL),
        (lambda node: wire.SetXattr(node, b"", b"", 0, 0), errno.ERANGE),
        (lambda node: wire.GetXattr(node, b""), errno.ERANGE),
        (lambda node: wire.RemoveXattr(node, b""), errno.ERANGE),
        (lambda node: wire.GetXattr(node, b"user.a\0b"), errno.EINVAL),
        (lambda node: wire.SetXattr(node, b"user.a\0b", b"", 0, 0), errno.EINVAL),
        (lambda node: wire.SetXattr(node, b"nonsense", b"", 0, 0), errno.EOPNOTSUPP),
        (lambda node: wire.GetXattr(node + 77, b"user.a"), errno.EBADF),
    ],
)
def test_what_cannot_be_is_refused_with_the_kernels_errno(worker, tmp_path, message, expected):
    (tmp_path / "file").touch()
    os.setxattr(tmp_path / "file", "user.a", b"")
    assert worker.errno_of(message(worker.lookup(b"file"))) == expected
    assert os.listxattr(tmp_path / "file") == ["user.a"]


def test_without_the_option_the_broker_refuses_what_a_worker_asks(make_worker, tmp_path):
    (tmp_path / "file").touch()
    os.setxattr(tmp_path / "file", "user.a", b"")
    worker = make_worker(xattr=False)
    nodeid = worker.lookup(b"file")
    for message in (
        wire.GetXattr(nodeid, b"user.a"), wire.SetXattr(nodeid, b"user.b", b"", 0, 0), wire.ListXattr(nodeid),
        wire.RemoveXattr(nodeid, b"user.a"), wire.MkDir(ROOT_NODEID, b"new", 0o755, *ME, 0, [], b"user.l", b"label"),
    ):  # fmt: skip
        assert worker.errno_of(message) == errno.ENOSYS, message
    assert os.listxattr(tmp_path / "file") == ["user.a"]
    assert sorted(os.listdir(tmp_path)) == ["file"]


# --- rules ----------------------------------------------------------------------------------------------------------


def test_names_go_by_the_rules_in_both_directions(make_worker, tmp_path):
    (tmp_path / "file").touch()
    for name in ("user.plain", "user.secret.x", "user.virtiofs.security.selinux"):
        os.setxattr(tmp_path / "file", name, name.encode())
    worker = make_worker(
        xattrmap=":unsupported:client:user.no.:: :bad:all:user.secret.:user.secret.: :bad:client:user.virtiofs.:: " + BY_NAME
    )
    nodeid = worker.lookup(b"file")
    assert listed(worker, nodeid) >= {b"user.plain", b"security.selinux"}
    assert not any(b"secret" in name or b"virtiofs" in name for name in listed(worker, nodeid))
    assert get(worker, nodeid, b"security.selinux") == b"user.virtiofs.security.selinux"
    for name, got, changed_ in (
        (b"user.secret.x", errno.ENODATA, errno.EPERM), (b"user.no.x", errno.ENOTSUP, errno.ENOTSUP),
        (b"user.virtiofs.security.selinux", errno.ENODATA, errno.EPERM),
    ):  # fmt: skip
        assert worker.errno_of(wire.GetXattr(nodeid, name)) == got, name
        assert worker.errno_of(wire.SetXattr(nodeid, name, b"new", 0, 0)) == changed_, name
        assert worker.errno_of(wire.RemoveXattr(nodeid, name)) == changed_, name
    worker.ask_ok(wire.SetXattr(nodeid, b"security.new", b"1", 0, 0))
    worker.ask_ok(wire.RemoveXattr(nodeid, b"security.selinux"))
    assert set(os.listxattr(tmp_path / "file")) == {"user.plain", "user.secret.x", "user.virtiofs.security.new"}


def test_a_label_that_the_host_cannot_keep_is_enotsup(make_worker, tmp_path):
    """As user.virtiofs.* it is for regular files and directories only."""
    (tmp_path / "link").symlink_to("nowhere")
    worker = make_worker(xattrmap=BY_NAME)
    nodeid = worker.lookup(b"link")
    assert worker.errno_of(wire.SetXattr(nodeid, b"security.selinux", b"x", 0, 0)) == errno.ENOTSUP
    assert worker.errno_of(wire.RemoveXattr(nodeid, b"security.selinux")) == errno.ENOTSUP
    assert worker.errno_of(wire.SetXattr(nodeid, b"user.x", b"x", 0, 0)) == errno.EPERM


@pytest.mark.root
def test_a_label_of_a_file_that_may_not_be_changed_is_eperm(make_worker, tmp_path):
    """No privilege is missing there, and the guest would not get further with another daemon."""
    (tmp_path / "file").touch()
    worker = make_worker(xattrmap=BY_NAME)
    nodeid = worker.lookup(b"file")
    immutable = 0x10
    with OwnedFd(os.open(tmp_path / "file", os.O_RDONLY)) as file:
        filecalls.ioctl(file.fileno(), filecalls.FS_IOC_SETFLAGS, immutable.to_bytes(4, "little"))
        try:
            assert worker.errno_of(wire.SetXattr(nodeid, b"security.selinux", b"x", 0, 0)) == errno.EPERM
        finally:
            filecalls.ioctl(file.fileno(), filecalls.FS_IOC_SETFLAGS, bytes(4))


# --- file capabilities under another name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda node: changed(node, attr.SET_SIZE, size=3),
        lambda node: changed(node, attr.SET_UID, uid=ME[0]),
        lambda node: changed(node, attr.SET_GID, gid=ME[1]),
        lambda node: wire.Open(node, os.O_WRONLY | os.O_TRUNC),
        lambda _node: wire.Create(ROOT_NODEID, b"file", os.O_WRONLY | os.O_TRUNC, 0o644, *ME),
    ],
    ids=["size", "uid", "gid", "open", "create"],
)
def test_a_change_takes_remapped_capabilities_away(make_worker, tmp_path, change):
    (tmp_path / "file").write_bytes(b"content")
    os.setxattr(tmp_path / "file", CAPABILITY, b"all of them")
    os.setxattr(tmp_path / "file", "user.other", b"")
    worker = make_worker(xattrmap=BY_NAME)
    assert worker.errno_of(change(worker.lookup(b"file"))) == 0
    assert os.listxattr(tmp_path / "file") == ["user.other"]


@pytest.mark.parametrize("rules", [None, ":ok:all:::", BY_NAME])
def test_what_changes_no_contents_leaves_them(make_worker, tmp_path, rules):
    (tmp_path / "file").touch()
    os.setxattr(tmp_path / "file", CAPABILITY, b"all of them")
    worker = make_worker(xattrmap=rules)
    nodeid = worker.lookup(b"file")
    if rules == BY_NAME:
        unchanging = [changed(nodeid, attr.SET_MODE, mode=0o600), changed(nodeid, attr.SET_MTIME_NOW), wire.Open(nodeid, os.O_RDWR)]
    else:  # under a name that is not the capability's, it is nobody's business
        unchanging = [changed(nodeid, attr.SET_SIZE, size=3), wire.Open(nodeid, os.O_WRONLY | os.O_TRUNC)]
    for message in unchanging:
        assert worker.errno_of(message) == 0
    assert os.listxattr(tmp_path / "file") == [CAPABILITY]


def test_a_file_without_them_and_one_that_cannot_have_them_change_owner(make_worker, tmp_path):
    worker = make_worker(xattrmap=BY_NAME)
    for kind in ("file", "directory", "symlink", "fifo"):
        make_node(tmp_path / kind, kind)
        nodeid = worker.lookup(kind.encode())
        assert worker.errno_of(changed(nodeid, attr.SET_UID | attr.SET_GID, uid=ME[0], gid=ME[1])) == 0, kind


# --- ACLs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "session_flags"), [(False, wire.SESSION_POSIX_ACL), (True, 0)])
def test_acls_are_not_there_unless_both_sides_want_them(tmp_path, request, option, session_flags):
    os.setxattr(tmp_path, "system.posix_acl_default", EVERYBODY_ACL)
    os.setxattr(tmp_path, "user.x", b"")
    bench = Bench(tmp_path, xattr=True, posix_acl=option)
    request.addfinalizer(bench.close)
    worker = bench.add(0)
    bench.begin_session(session_flags)
    for name in (b"system.posix_acl_default", b"system.posix_acl_access"):
        assert worker.errno_of(wire.GetXattr(ROOT_NODEID, name)) == errno.EOPNOTSUPP
        assert worker.errno_of(wire.SetXattr(ROOT_NODEID, name, EVERYBODY_ACL, 0, 0)) == errno.EOPNOTSUPP
        assert worker.errno_of(wire.RemoveXattr(ROOT_NODEID, name)) == errno.EOPNOTSUPP
    assert listed(worker, ROOT_NODEID) == {b"user.x"}
    assert os.getxattr(tmp_path, "system.posix_acl_default") == EVERYBODY_ACL


def test_acls_are_the_hosts_own(make_worker, tmp_path):
    worker = make_worker(posix_acl=True)
    worker.ask_ok(wire.SetXattr(ROOT_NODEID, b"system.posix_acl_default", EVERYBODY_ACL, 0, 0))
    assert os.getxattr(tmp_path, "system.posix_acl_default") == EVERYBODY_ACL == get(worker, ROOT_NODEID, b"system.posix_acl_default")
    assert listed(worker, ROOT_NODEID) == {b"system.posix_acl_default"}
    worker.ask_ok(wire.RemoveXattr(ROOT_NODEID, b"system.posix_acl_default"))
    assert listed(worker, ROOT_NODEID) == set()


def test_property_37_an_acl_takes_the_set_group_id_bit_away_only_where_asked_to(make_worker, tmp_path):
    """Where the guest's kernel says that the caller is not in the group; and no thread stays anywhere else than it was."""
    worker = make_worker(posix_acl=True)
    (tmp_path / "file").touch()
    nodeid = worker.lookup(b"file")
    here = os.getcwd()
    for name, kill, expected in (
        (b"system.posix_acl_access", 0, 0o2777),
        (b"user.x", 1, 0o2777),
        (b"system.posix_acl_access", 1, 0o777),
        (b"system.posix_acl_access", 1, 0o777),
    ):
        if expected & stat.S_ISGID:
            (tmp_path / "file").chmod(0o2777)
        worker.ask_ok(wire.SetXattr(nodeid, name, EVERYBODY_ACL, 0, kill))
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected, (name, kill)
    for message in (wire.SetXattr(nodeid, b"system.posix_acl_access", b"nonsense", 0, 1), wire.GetXattr(nodeid, b"user.none")):
        assert worker.errno_of(message) in (errno.EINVAL, errno.ENODATA, errno.EOPNOTSUPP)
    assert (os.getcwd(), os.geteuid(), os.getegid()) == (here, *ME)
