"""GETATTR, SETATTR, ACCESS and STATFS say and do what the host's own calls would."""

import errno
import os
import socket
import stat
import time

import pytest

from tests.support.frontend.checks import NOT_FOUND, assert_same, raises
from tests.support.frontend.fuse_client import ROOT
from vfsd.wire import fuse_abi as abi

NS = 1_000_000_000
NO_SUCH_NODEID = 0x7777_7777


def make_all_types(fs):
    """One entry of each file type, made by the host: name -> type bits."""
    fs.put("regular", b"content")
    os.mkdir(fs.path("directory"))
    os.symlink("regular", fs.path("symlink"))
    os.mkfifo(fs.path("fifo"))
    os.mknod(fs.path("char"), stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(fs.path("block"), stat.S_IFBLK | 0o600, os.makedev(0x123, 0x45678))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(fs.path("socket"))
    return {
        b"regular": stat.S_IFREG,
        b"directory": stat.S_IFDIR,
        b"symlink": stat.S_IFLNK,
        b"fifo": stat.S_IFIFO,
        b"char": stat.S_IFCHR,
        b"block": stat.S_IFBLK,
        b"socket": stat.S_IFSOCK,
    }


def test_every_file_type_has_the_attributes_that_the_host_sees(fs):
    for name, kind in make_all_types(fs).items():
        entry = fs.client.lookup(fs.dir, name)
        assert stat.S_IFMT(entry.attr.mode) == kind
        assert_same(entry.attr, fs.path(name))
        assert_same(fs.client.attr(entry.nodeid), fs.path(name))


def test_the_root_has_the_attributes_of_the_shared_directory(fs):
    assert_same(fs.client.attr(ROOT), fs.served.share)


def test_attributes_follow_what_the_host_changes(fs):
    path = fs.put("file", b"a")
    nodeid = fs.lookup(b"file")
    os.chmod(path, 0o4751)
    os.chown(path, 12, 34)
    os.truncate(path, 100_000)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    os.link(path, fs.path("other"))
    assert_same(fs.client.attr(nodeid), path)


def test_attributes_by_open_file_are_the_same(fs):
    path = fs.put("file", b"abc")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid, os.O_RDWR).fh
    fs.client.write(nodeid, fh, 3, b"def")
    assert_same(fs.client.getattr(nodeid, fh).attr, path)
    for _ in range(5):  # often enough that the daemon may answer from a descriptor it holds
        assert_same(fs.client.attr(nodeid), path)
    fs.client.release(nodeid, fh)


def test_times_before_1970_and_far_in_the_future_survive(fs):
    path = fs.put("file")
    nodeid = fs.lookup(b"file")
    for atime, mtime in [(-1, -2 * NS + 5), (4_000_000_000 * NS + 999_999_999, 1)]:
        os.utime(path, ns=(atime, mtime))
        attr = fs.client.attr(nodeid)
        assert (attr.atime_ns, attr.mtime_ns) == (atime, mtime)


def test_attributes_of_a_dead_nodeid_are_refused(fs):
    with raises(*NOT_FOUND):
        fs.client.getattr(NO_SUCH_NODEID)


# SETATTR


@pytest.mark.parametrize("kind", ["regular", "directory", "fifo", "char", "socket"])
def test_chmod_and_chown_reach_the_host(fs, kind):
    make_all_types(fs)
    nodeid = fs.lookup(kind.encode())
    reply = fs.client.setattr(nodeid, mode=0o640)
    assert stat.S_IMODE(reply.attr.mode) == 0o640
    reply = fs.client.setattr(nodeid, uid=1234, gid=5678)
    assert (reply.attr.uid, reply.attr.gid) == (1234, 5678)
    assert_same(reply.attr, fs.path(kind))


def test_chown_of_one_id_leaves_the_other(fs):
    path = fs.put("file")
    nodeid = fs.lookup(b"file")
    fs.client.setattr(nodeid, uid=1000)
    fs.client.setattr(nodeid, gid=1001)
    assert (os.stat(path).st_uid, os.stat(path).st_gid) == (1000, 1001)


def test_chown_of_a_symlink_changes_the_link_itself(fs):
    target = fs.put("target")
    os.symlink("target", fs.path("link"))
    fs.client.setattr(fs.lookup(b"link"), uid=77, gid=78)
    assert (os.lstat(fs.path("link")).st_uid, os.stat(target).st_uid) == (77, 0)


def test_all_mode_bits_can_be_set(fs):
    path = fs.put("file")
    nodeid = fs.lookup(b"file")
    for mode in (0o7777, 0, 0o4755, 0o2755, 0o1777):
        fs.client.setattr(nodeid, mode=mode)
        assert stat.S_IMODE(os.stat(path).st_mode) == mode


def test_truncate_by_nodeid_and_by_open_file(fs):
    path = fs.put("file", b"0123456789")
    nodeid = fs.lookup(b"file")
    assert fs.client.setattr(nodeid, size=4).attr.size == 4
    assert fs.get("file") == b"0123"
    fh = fs.client.open(nodeid, os.O_RDWR).fh
    reply = fs.client.setattr(nodeid, size=1 << 33, fh=fh)
    assert_same(reply.attr, path)
    fs.client.release(nodeid, fh)


def test_truncate_of_what_is_no_regular_file_is_refused_and_opens_nothing(fs):
    make_all_types(fs)
    for name in (b"fifo", b"char", b"block", b"socket", b"symlink"):
        with raises(errno.EBADF, errno.EINVAL):
            fs.client.setattr(fs.lookup(name), size=0)
    with raises(errno.EISDIR, errno.EINVAL, errno.EBADF):
        fs.client.setattr(fs.lookup(b"directory"), size=0)
    assert fs.put("regular", b"content")


def test_times_can_be_set_to_a_value_or_to_now(fs):
    path = fs.put("file")
    nodeid = fs.lookup(b"file")
    fs.client.setattr(nodeid, atime_ns=3 * NS + 4, mtime_ns=-5 * NS + 6)
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (3 * NS + 4, -5 * NS + 6)
    before = time.time_ns() - NS
    fs.client.setattr(nodeid, mtime_ns=0, extra_valid=abi.FATTR_MTIME_NOW)
    status = os.stat(path)
    assert status.st_atime_ns == 3 * NS + 4
    assert before < status.st_mtime_ns < time.time_ns() + NS


def test_times_of_a_symlink_are_set_on_the_link_itself(fs):
    target = fs.put("target")
    os.symlink("target", fs.path("link"))
    fs.client.setattr(fs.lookup(b"link"), mtime_ns=123 * NS)
    assert os.lstat(fs.path("link")).st_mtime_ns == 123 * NS
    assert os.stat(target).st_mtime_ns != 123 * NS


def test_several_attributes_in_one_request(fs):
    path = fs.put("file", b"0123456789")
    reply = fs.client.setattr(fs.lookup(b"file"), mode=0o600, uid=1, gid=2, size=5, mtime_ns=9 * NS)
    status = os.stat(path)
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns) == (0o600, 1, 2, 5, 9 * NS)
    assert_same(reply.attr, path)


def test_setattr_of_nothing_returns_the_attributes(fs):
    path = fs.put("file")
    nodeid = fs.lookup(b"file")
    assert_same(fs.client.setattr(nodeid).attr, path)
    fs.client.setattr(nodeid, ctime_ns=5)  # the guest may not choose ctime: ignored
    assert os.stat(path).st_ctime_ns != 5


def test_setattr_with_a_bad_fh_or_nodeid_is_refused(fs):
    fs.put("file", b"x")
    with raises(*NOT_FOUND):
        fs.client.setattr(NO_SUCH_NODEID, mode=0o600)
    with raises(errno.EBADF):
        fs.client.setattr(fs.lookup(b"file"), size=0, fh=0x1234_5678)
    assert fs.get("file") == b"x"


# ACCESS and STATFS


def test_access_checks_the_callers_permission_bits(fs):
    fs.put("file", mode=0o640)
    os.chown(fs.path("file"), 1000, 1001)
    nodeid = fs.lookup(b"file")
    fs.client.access(nodeid, os.F_OK)
    fs.client.access(nodeid, os.R_OK | os.W_OK)
    with raises(errno.EACCES):
        fs.client.access(nodeid, os.X_OK)  # not even root may execute what nobody may
    for caller, may_read, may_write in [((1000, 1), True, True), ((2000, 1001), True, False), ((2000, 2000), False, False)]:
        with fs.client.acting_as(*caller):
            for mask, may in ((os.R_OK, may_read), (os.W_OK, may_write)):
                if may:
                    fs.client.access(nodeid, mask)
                else:
                    with raises(errno.EACCES):
                        fs.client.access(nodeid, mask)


def test_access_of_a_dead_nodeid_is_refused(fs):
    with raises(*NOT_FOUND):
        fs.client.access(NO_SUCH_NODEID, os.F_OK)


def test_statfs_is_the_hosts(fs):
    fs.put("file")
    for nodeid in (ROOT, fs.dir, fs.lookup(b"file")):
        guest, host = fs.client.statfs(nodeid), os.statvfs(fs.host)
        assert (guest.blocks, guest.files, guest.bsize, guest.frsize) == (host.f_blocks, host.f_files, host.f_bsize, host.f_frsize)
        assert guest.namelen == host.f_namemax
        assert abs(guest.bavail - host.f_bavail) * host.f_frsize < 1 << 30  # others use this disk too
    with raises(*NOT_FOUND):
        fs.client.statfs(NO_SUCH_NODEID)
