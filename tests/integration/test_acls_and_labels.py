"""POSIX ACLs and security labels: agreed on or not, kept by the host's file system, and there from a new file's beginning."""

import errno
import os
import stat
import struct
import threading

import pytest

from tests.support.frontend.checks import raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import LINUX_INIT_FLAGS, ROOT
from tests.support.frontend.serving import own_directory
from vfsd.wire import fuse_abi as abi

ACL_FLAGS = abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK | abi.FUSE_SETXATTR_EXT
ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 1, 2, 4, 0x10, 0x20
NO_ID = 0xFFFFFFFF
LABEL_NAME, LABEL = b"security.selinux", b"system_u:object_r:container_file_t:s0\0"
HOST_NAME = "user.virtiofs.security.selinux"
MAP_LABELS = "--xattrmap=:prefix:all:security.:user.virtiofs.: :ok:all:::"


def acl(*entries):
    """(tag, permissions) or (tag, permissions, id), as the kernel's struct posix_acl_xattr_header and its entries."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry, *([NO_ID] if len(entry) == 2 else [])) for entry in entries)


WITH_USER = acl((USER_OBJ, 7), (USER, 6, 1000), (GROUP_OBJ, 5), (MASK, 7), (OTHER, 0))


def label(value=LABEL, name=LABEL_NAME):
    """What Linux sends behind the names: a struct fuse_secctx_header with one context."""
    body = abi.fuse_secctx.pack(len(value)) + name + b"\0" + value
    body = body.ljust(abi.FUSE_REC_ALIGN(len(body)), b"\0")
    return abi.fuse_secctx_header.pack(abi.fuse_secctx_header.size + len(body), 1) + body


def groups(*gids):
    body = struct.pack(f"<I{len(gids)}I", len(gids), *gids)
    body = body.ljust(abi.FUSE_REC_ALIGN(len(body)), b"\0")
    return abi.fuse_ext_header.pack(abi.fuse_ext_header.size + len(body), abi.FUSE_EXT_GROUPS) + body


@pytest.fixture
def fs(pool, handles):
    with own_directory(pool, "acls", Options(handles=handles, extra=("--posix-acl",)), mode=0o777) as fs:
        yield fs


@pytest.fixture
def labelled(pool, handles):
    with own_directory(pool, "labels", Options(handles=handles, extra=("--security-label", MAP_LABELS))) as fs:
        yield fs


def mode_of(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


# What is agreed on


@pytest.mark.parametrize(
    ("option", "flags"),
    [("posix-acl", ACL_FLAGS), ("security-label", abi.FUSE_SECURITY_CTX)],
)
def test_a_guest_that_cannot_is_refused_or_served_without(serve, option, flags):
    strict = serve(Options(extra=(f"--{option}",)), init=False)
    for lacking in (flags, flags & -flags):
        with raises(errno.EPROTO):
            strict.client.init(flags=LINUX_INIT_FLAGS & ~lacking)
        strict.wait_for_new_log(f"--{option}: the guest's kernel cannot do it; use --{option}=auto")
    assert strict.client.init().flags & flags == flags
    lenient = serve(Options(extra=(f"--{option}=auto",)), init=False)
    assert lenient.client.init(flags=LINUX_INIT_FLAGS & ~flags).flags & flags == 0
    lenient.client.mkdir(ROOT, b"without", 0o777, umask=0o022)
    lenient.client.destroy()
    assert lenient.client.init().flags & flags == flags
    assert lenient.unexpected_log() == []
    assert mode_of(lenient.share / "without") == 0o755


def test_neither_is_agreed_on_unasked(plain_fs):
    plain_fs.client.destroy()
    assert plain_fs.client.init().flags & (abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK | abi.FUSE_SECURITY_CTX) == 0


# ACLs


def test_an_acl_is_the_hosts_own_and_sets_the_mode(fs):
    path = fs.put("file", mode=0o600)
    nodeid, client = fs.lookup(b"file"), fs.client
    client.setxattr(nodeid, ACCESS, WITH_USER, own_flags=0)
    assert os.getxattr(path, ACCESS) == WITH_USER == client.getxattr(nodeid, ACCESS)
    assert client.attr(nodeid).mode & 0o777 == mode_of(path) == 0o770
    assert client.listxattr(nodeid) == {ACCESS}
    client.removexattr(nodeid, ACCESS)
    assert os.listxattr(path) == []
    with raises(errno.EINVAL, errno.EOPNOTSUPP):
        client.setxattr(nodeid, ACCESS, b"\x02\0\0\0short", own_flags=0)


@pytest.mark.parametrize(("kill", "mode"), [(0, 0o2770), (abi.FUSE_SETXATTR_ACL_KILL_SGID, 0o770)])
def test_property_37_kill_sgid_takes_the_bit_away_and_the_thread_stays_who_and_where_it_was(fs, kill, mode):
    path = fs.put("file", b"content", mode=0o2777)
    nodeid, client = fs.lookup(b"file"), fs.client
    with client.acting_as(1000, 1000):
        client.setxattr(nodeid, ACCESS, WITH_USER, own_flags=kill)
    assert mode_of(path) == mode
    assert client.attr(nodeid).mode & 0o7777 == mode
    # Errors on every way, then requests that need the thread's own uid, capabilities and working directory.
    for bad in (b"nonsense", acl((USER_OBJ, 7)), acl((USER_OBJ, 7), (USER, 7, 1000), (GROUP_OBJ, 7), (OTHER, 7))):
        with raises(errno.EINVAL, errno.EOPNOTSUPP):
            client.setxattr(nodeid, ACCESS, bad, own_flags=kill)
    os.chown(path, 5, 5)
    os.chmod(path, 0o000)
    assert client.read_file(nodeid) == b"content"
    client.setxattr(nodeid, b"user.x", b"1", own_flags=0)
    assert client.getxattr(nodeid, b"user.x") == b"1"


def made(client, parent, how, mode, umask):
    """A new node of some kind, as uid 1000."""
    with client.acting_as(1000, 1000):
        if how == "mkdir":
            client.mkdir(parent, b"new", mode, umask=umask)
        elif how == "mknod":
            client.mknod(parent, b"new", stat.S_IFREG | mode, umask=umask)
        elif how == "fifo":
            client.mknod(parent, b"new", stat.S_IFIFO | mode, umask=umask)
        elif how == "create":
            client.create(parent, b"new", mode, umask=umask)
        else:
            entry, _opened = client.tmpfile(parent, mode, umask=umask)
            client.link(entry.nodeid, parent, b"new")


@pytest.mark.parametrize("how", ["mkdir", "mknod", "fifo", "create", "tmpfile"])
def test_the_umask_is_applied_by_the_host_where_no_default_acl_says_otherwise(fs, how):
    made(fs.client, fs.dir, how, 0o777, 0o027)
    assert mode_of(fs.path("new")) == 0o750
    assert os.lstat(fs.path("new")).st_uid == 1000


@pytest.mark.parametrize("how", ["mkdir", "mknod", "fifo", "create", "tmpfile"])
def test_a_default_acl_is_inherited_and_replaces_the_umask(fs, how):
    fs.client.setxattr(fs.dir, DEFAULT, WITH_USER, own_flags=0)
    made(fs.client, fs.dir, how, 0o777, 0o077)
    assert mode_of(fs.path("new")) == 0o770
    assert os.getxattr(fs.path("new"), ACCESS) == WITH_USER
    if how == "mkdir":
        assert os.getxattr(fs.path("new"), DEFAULT) == WITH_USER


def test_the_umask_of_one_request_is_not_that_of_the_next(fs):
    made(fs.client, fs.dir, "mkdir", 0o777, 0o077)
    os.rmdir(fs.path("new"))
    made(fs.client, fs.dir, "mkdir", 0o777, 0)
    assert mode_of(fs.path("new")) == 0o777


@pytest.mark.parametrize("how", ["mkdir", "mknod", "fifo", "create", "tmpfile"])
def test_without_the_agreement_the_umask_has_been_applied(plain_fs, how):
    """A guest that has not agreed to DONT_MASK tells the umask all the same, in a mode that lacks those bits already."""
    plain_fs.host.chmod(0o777)
    made(plain_fs.client, plain_fs.dir, how, 0o777, 0o027)
    assert mode_of(plain_fs.path("new")) == 0o750


# Labels


@pytest.mark.parametrize("extensions", [label(), label() + groups(27), groups(27) + label()], ids=["6.1", "6.3", "turned round"])
@pytest.mark.parametrize("how", ["mkdir", "mknod", "create", "tmpfile"])
def test_a_new_file_has_the_guests_label(labelled, how, extensions):
    fs, client = labelled, labelled.client
    fs.host.chmod(0o777)
    with client.acting_as(1000, 1000):
        if how == "mkdir":
            entry = client.mkdir(fs.dir, b"new", 0o750, extensions=extensions)
        elif how == "mknod":
            entry = client.mknod(fs.dir, b"new", stat.S_IFREG | 0o750, extensions=extensions)
        elif how == "create":
            entry, opened = client.create(fs.dir, b"new", 0o750, extensions=extensions)
            assert client.write(entry.nodeid, opened.fh, 0, b"data") == 4
        else:
            entry, _opened = client.tmpfile(fs.dir, 0o750, extensions=extensions)
            client.link(entry.nodeid, fs.dir, b"new")
    assert os.getxattr(fs.path("new"), HOST_NAME) == LABEL
    assert client.getxattr(entry.nodeid, LABEL_NAME) == LABEL
    assert client.lookup(fs.dir, b"new").nodeid == entry.nodeid
    seen = os.lstat(fs.path("new"))
    assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (1000, 1000, 0o750)


def test_a_guest_without_a_label_for_it_sends_none(labelled):
    labelled.client.mkdir(labelled.dir, b"new", extensions=abi.fuse_secctx_header.pack(8, 0))
    assert os.listxattr(labelled.path("new")) == []


def test_what_cannot_have_its_label_is_enotsup_and_not_made(labelled):
    """user.* attributes are for regular files and directories only; other names may be anything at all."""
    fs, client = labelled, labelled.client
    for act in (
        lambda: client.symlink(fs.dir, b"new", b"target", extensions=label()),
        lambda: client.mknod(fs.dir, b"new", stat.S_IFIFO | 0o644, extensions=label()),
        lambda: client.mkdir(fs.dir, b"new", extensions=label(name=b"trusted.x")),
        lambda: client.mknod(fs.dir, b"new", stat.S_IFREG | 0o644, extensions=label(name=b"trusted.x")),
        lambda: client.create(fs.dir, b"new", extensions=label(name=b"nonsense.x")),
    ):
        with raises(errno.ENOTSUP):
            act()
    assert os.listdir(fs.host) == []


def test_labels_that_do_not_add_up_are_einval(labelled):
    fs, client = labelled, labelled.client
    good = label()
    for bad in (good[:-8], good[:12], abi.fuse_secctx_header.pack(8, 2), bytes(4), good + b"\0", label(value=b"")):
        with raises(errno.EINVAL):
            client.mkdir(fs.dir, b"new", extensions=bad)
        with raises(errno.EINVAL):
            client.create(fs.dir, b"new", extensions=bad)
    assert os.listdir(fs.host) == []


def test_a_name_that_exists_keeps_its_label(labelled):
    fs, client = labelled, labelled.client
    path = fs.put("new", b"old")
    with raises(errno.EEXIST):
        client.create(fs.dir, b"new", flags=os.O_RDWR | os.O_EXCL, extensions=label())
    with raises(errno.EEXIST):
        client.mknod(fs.dir, b"new", stat.S_IFREG | 0o644, extensions=label())
    entry, opened = client.create(fs.dir, b"new", flags=os.O_RDWR, extensions=label())
    assert client.read(entry.nodeid, opened.fh, 0, 10) == b"old"
    assert os.listxattr(path) == []


def test_a_labelled_file_is_never_seen_without_its_label(labelled):
    """The host looks on while files are made: each has its label from the moment it has its name."""
    fs, client = labelled, labelled.client
    seen, unlabelled, done = set(), set(), threading.Event()

    def look_on():
        while not done.is_set():
            for name in set(os.listdir(fs.host)) - seen:
                seen.add(name)
                if HOST_NAME not in os.listxattr(fs.host / name):
                    unlabelled.add(name)

    onlooker = threading.Thread(target=look_on)
    onlooker.start()
    try:
        for number in range(300):
            client.mknod(fs.dir, b"%d" % number, stat.S_IFREG | 0o644, extensions=label())
    finally:
        done.set()
        onlooker.join()
    assert len(seen) > 1
    assert unlabelled == set()
