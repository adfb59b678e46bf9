"""Extended attributes through a confined daemon: what the guest sets the host has, under the name that the rules say."""

import errno
import os
import random
import socket
import struct

import pytest

from tests.support.frontend.checks import MALFORMED, NOT_FOUND, raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import own_directory
from vfsd.wire import fuse_abi as abi

MAP_ALL = ":map::user.virtiofs.:"
MAP_SECURITY = ":map:security.:user.virtiofs.:"
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # struct vfs_cap_data: CAP_NET_BIND_SERVICE, effective
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 7, 0xFFFFFFFF) for tag in (1, 4, 0x20))


@pytest.fixture
def fs(pool, handles):
    with own_directory(pool, "xattrs", Options(handles=handles, extra=("--xattr",))) as fs:
        yield fs


@pytest.fixture
def mapped(pool, handles):
    """A directory in a share with these rules."""

    def mapped(rules):
        opened = own_directory(pool, "xattrs", Options(handles=handles, extra=(f"--xattrmap={rules}",)))
        directories.append(opened)
        return opened.__enter__()

    directories = []
    yield mapped
    for opened in directories:
        opened.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_the_guest_sets_the_host_has(fs, kind):
    path = fs.path("node")
    os.mkdir(path) if kind == "directory" else fs.put("node")
    nodeid, client = fs.lookup(b"node"), fs.client
    value = random.Random(1).randbytes(2000)
    client.setxattr(nodeid, b"user.a", value)
    client.setxattr(nodeid, b"user.empty", b"", os.XATTR_CREATE)
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == {"user.a": value, "user.empty": b""}
    assert client.getxattr(nodeid, b"user.a") == value
    assert client.listxattr(nodeid) == {b"user.a", b"user.empty"}
    client.removexattr(nodeid, b"user.a")
    assert os.listxattr(path) == ["user.empty"]
    with raises(errno.ENODATA):
        client.getxattr(nodeid, b"user.a")
    with raises(errno.ENODATA):
        client.removexattr(nodeid, b"user.a")
    with raises(errno.EEXIST):
        client.setxattr(nodeid, b"user.empty", b"", os.XATTR_CREATE)
    with raises(errno.ENODATA):
        client.setxattr(nodeid, b"user.a", b"", os.XATTR_REPLACE)


def test_lengths_and_buffers_that_are_too_small(fs):
    os.setxattr(fs.put("file"), "user.x", b"12345")
    nodeid, client = fs.lookup(b"file"), fs.client
    assert (client.xattr_bytes(nodeid, b"user.x"), client.xattr_bytes(nodeid)) == (5, len(b"user.x\0"))
    assert client.getxattr(nodeid, b"user.x", 5) == b"12345"
    with raises(errno.ERANGE):
        client.getxattr(nodeid, b"user.x", 4)
    with raises(errno.ERANGE):
        client.listxattr(nodeid, 6)


def test_special_files_are_as_on_the_host(fs):
    """No user attributes, and none of what a symlink leads to; a fifo without a writer is not waited for."""
    os.setxattr(fs.put("file"), "user.x", b"the file's")
    os.symlink("file", fs.path("link"))
    os.mkfifo(fs.path("fifo"))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fsdecode(fs.path("socket")))
    for name in (b"link", b"fifo", b"socket"):
        nodeid = fs.lookup(name)
        assert fs.client.listxattr(nodeid) == set()
        with raises(errno.ENODATA):
            fs.client.getxattr(nodeid, b"user.x")
        with raises(errno.EPERM):
            fs.client.setxattr(nodeid, b"user.x", b"")
        with raises(errno.EPERM, errno.ENODATA):
            fs.client.removexattr(nodeid, b"user.x")


def test_labels_that_the_daemon_may_not_set_are_enotsup(fs):
    fs.put("file")
    nodeid = fs.lookup(b"file")
    for name in (b"security.nobodys", b"trusted.overlay.opaque"):  # of security.selinux a host with SELinux decides itself
        with raises(errno.ENOTSUP):
            fs.client.setxattr(nodeid, name, b"x")
        with raises(errno.ENODATA):
            fs.client.getxattr(nodeid, name)
    for name in (b"nonsense.x", b"user"):
        with raises(errno.ENOTSUP):
            fs.client.setxattr(nodeid, name, b"x")


def test_file_capabilities_are_the_hosts(fs):
    path = fs.put("file", b"program")
    nodeid = fs.lookup(b"file")
    fs.client.setxattr(nodeid, b"security.capability", CAPABILITY)
    assert os.getxattr(path, "security.capability") == CAPABILITY
    fs.client.setattr(nodeid, size=3)
    assert os.listxattr(path) == []


def test_acls_are_hidden_without_the_option(fs):
    os.setxattr(fs.host, "system.posix_acl_default", ACL)
    assert fs.client.listxattr(fs.dir) == set()
    for act in (
        lambda: fs.client.getxattr(fs.dir, b"system.posix_acl_default"),
        lambda: fs.client.setxattr(fs.dir, b"system.posix_acl_access", ACL),
        lambda: fs.client.removexattr(fs.dir, b"system.posix_acl_default"),
    ):
        with raises(errno.EOPNOTSUPP):
            act()
    assert os.getxattr(fs.host, "system.posix_acl_default") == ACL


def test_requests_that_no_kernel_sends(fs):
    fs.put("file")
    nodeid, client, rng = fs.lookup(b"file"), fs.client, random.Random(2)
    opcodes = {abi.FUSE_SETXATTR: 8, abi.FUSE_GETXATTR: 8, abi.FUSE_LISTXATTR: 8, abi.FUSE_REMOVEXATTR: 0}
    for opcode, head in opcodes.items():
        for size in range(head):
            assert client.raw(client.header(opcode, nodeid, size) + bytes(size))[0] in MALFORMED
        if opcode != abi.FUSE_LISTXATTR:
            body = bytes(head) + b"user.without-end"
            assert client.raw(client.header(opcode, nodeid, len(body)) + body)[0] in MALFORMED
        for size in (0, 1, 9, 40, 300, 5000, 70000):
            body = rng.randbytes(size)
            assert client.raw(client.header(opcode, nodeid, size) + body) is not None
        body = bytes(head) + b"user.x\0"
        assert client.raw(client.header(opcode, 0x77777777, len(body)) + body)[0] in NOT_FOUND
    assert os.listxattr(fs.path("file")) == []


@pytest.mark.parametrize("opcode", [abi.FUSE_SETXATTR, abi.FUSE_GETXATTR, abi.FUSE_LISTXATTR, abi.FUSE_REMOVEXATTR])
def test_without_the_option_the_guest_need_not_ask_again(plain_fs, opcode):
    client = plain_fs.client
    assert client.raw(client.header(opcode, ROOT, 107) + b"user.x\0" + bytes(100)) == (errno.ENOSYS, b"")


def test_a_read_only_share_is_read_only(serve):
    served = serve(Options(readonly=True, extra=("--xattr",)))
    os.setxattr(served.share, "user.x", b"1")
    assert served.client.getxattr(ROOT, b"user.x") == b"1"
    for act in (lambda: served.client.setxattr(ROOT, b"user.y", b""), lambda: served.client.removexattr(ROOT, b"user.x")):
        with raises(errno.EROFS):
            act()


@pytest.mark.parametrize("sandbox", ["chroot", "none"])
def test_in_every_sandbox(serve, sandbox):
    """The path of these calls is relative to a directory that each broker thread enters before it is confined."""
    served = serve(Options(sandbox=sandbox, extra=("--xattr",)))
    served.client.setxattr(ROOT, b"user.x", b"1")
    assert os.getxattr(served.share, "user.x") == b"1"
    assert served.unexpected_log() == []


# Rules


def test_everything_under_another_name(mapped):
    fs = mapped(MAP_ALL)
    path = fs.put("file")
    os.setxattr(path, "user.hosts", b"hidden")
    nodeid = fs.lookup(b"file")
    for name in (b"user.x", b"security.selinux", b"trusted.overlay.opaque", b"nonsense.x"):
        fs.client.setxattr(nodeid, name, name)
        assert os.getxattr(path, b"user.virtiofs." + name) == name
        assert fs.client.getxattr(nodeid, name) == name
    assert fs.client.listxattr(nodeid) == {b"user.x", b"security.selinux", b"trusted.overlay.opaque", b"nonsense.x"}
    with raises(errno.ENODATA):
        fs.client.getxattr(nodeid, b"user.hosts")
    fs.client.removexattr(nodeid, b"security.selinux")
    assert "user.virtiofs.security.selinux" not in os.listxattr(path)


def test_some_names_under_others_and_the_rest_as_they_are(mapped):
    fs = mapped(MAP_SECURITY)
    path = fs.put("file")
    nodeid = fs.lookup(b"file")
    fs.client.setxattr(nodeid, b"security.selinux", b"label")
    fs.client.setxattr(nodeid, b"user.x", b"plain")
    assert set(os.listxattr(path)) == {"user.virtiofs.security.selinux", "user.x"}
    assert fs.client.listxattr(nodeid) == {b"security.selinux", b"user.x"}
    with raises(errno.EPERM):
        fs.client.setxattr(nodeid, b"user.virtiofs.security.x", b"")
    with raises(errno.ENODATA):
        fs.client.getxattr(nodeid, b"user.virtiofs.security.selinux")


def test_what_the_rules_refuse(mapped):
    fs = mapped(":unsupported:all:security.:security.: :bad:all:user.secret.:user.secret.: :ok:all:user.:user.:")
    path = fs.put("file")
    os.setxattr(path, "user.secret.x", b"1")
    os.setxattr(path, "user.x", b"2")
    nodeid = fs.lookup(b"file")
    assert fs.client.listxattr(nodeid) == {b"user.x"}
    for name, got, changed in (
        (b"security.selinux", errno.ENOTSUP, errno.ENOTSUP),
        (b"user.secret.x", errno.ENODATA, errno.EPERM),
        (b"trusted.x", errno.ENODATA, errno.EPERM),
    ):
        with raises(got):
            fs.client.getxattr(nodeid, name)
        with raises(changed):
            fs.client.setxattr(nodeid, name, b"")
        with raises(changed):
            fs.client.removexattr(nodeid, name)
    assert os.getxattr(path, "user.secret.x") == b"1"


def test_remapped_capabilities_go_when_the_file_changes(mapped):
    fs = mapped(MAP_SECURITY)
    path = fs.put("file", b"program")
    nodeid, client = fs.lookup(b"file"), fs.client
    for change in (
        lambda: client.setattr(nodeid, size=3),
        lambda: client.setattr(nodeid, uid=1, gid=1),
        lambda: client.release(nodeid, client.open(nodeid, os.O_WRONLY | os.O_TRUNC).fh),
        lambda: client.fallocate(nodeid, client.open(nodeid, os.O_RDWR).fh, 0, 100),
        lambda: client.write(nodeid, client.open(nodeid, os.O_RDWR).fh, 0, b"changed"),
        lambda: client.copy_file_range((nodeid, (fh := client.open(nodeid, os.O_RDWR).fh), 0), (nodeid, fh, 50), 5),
    ):
        client.setxattr(nodeid, b"security.capability", CAPABILITY)
        assert os.getxattr(path, "user.virtiofs.security.capability") == CAPABILITY
        change()
        assert client.listxattr(nodeid) == set()
