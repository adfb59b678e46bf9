"""STATX, TMPFILE, COPY_FILE_RANGE_64 and IOCTL: operations that the C and the Rust daemon do not have."""

import errno
import fcntl
import os
import stat
import struct

import pytest

from tests.support.frontend.checks import raises
from vfsd.sandbox import filecalls
from vfsd.wire import fuse_abi as abi

FS_NODUMP_FL, FS_NOATIME_FL, FS_IMMUTABLE_FL, FS_APPEND_FL = 0x40, 0x80, 0x10, 0x20
BTIME = 0x800


# STATX


def test_the_birth_time_is_the_hosts(fs):
    fs.put("file", b"abc")
    (mask, _blksize, _attributes, nlink, _uid, _gid, mode, ino, size, *_rest) = seen = fs.client.statx(fs.lookup(b"file"))
    fd = os.open(fs.host / "file", os.O_PATH)
    host = filecalls.statx(fd)
    os.close(fd)
    assert mask & BTIME
    assert seen[13:15] == (host.btime, host.btime_nsec)
    assert (nlink, mode, ino, size) == (host.nlink, host.mode, host.ino, 3)


def test_the_hosts_mount_id_is_not_told(fs):
    fs.put("file")
    assert fs.client.statx(fs.lookup(b"file"))[0] & filecalls.STATX_MNT_ID == 0


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_statx_of_what_cannot_be_opened(fs, kind):
    {"symlink": lambda path: path.symlink_to("nowhere"), "fifo": os.mkfifo, "directory": os.mkdir}[kind](fs.host / "x")
    assert fs.client.statx(fs.lookup(b"x"))[6] == os.lstat(fs.host / "x").st_mode


# TMPFILE


def test_a_file_without_a_name_is_used_and_goes_with_its_last_close(fs):
    entry, opened = fs.client.tmpfile(fs.dir, 0o640)
    assert (stat.S_IMODE(entry.attr.mode), entry.attr.nlink) == (0o640, 0)
    assert fs.client.write(entry.nodeid, opened.fh, 0, b"secret") == 6
    assert fs.client.read(entry.nodeid, opened.fh, 0, 100) == b"secret"
    assert os.listdir(fs.host) == []
    fs.client.release(entry.nodeid, opened.fh)


def test_a_file_without_a_name_can_be_given_one(fs):
    entry, opened = fs.client.tmpfile(fs.dir)
    fs.client.write(entry.nodeid, opened.fh, 0, b"now visible")
    linked = fs.client.link(entry.nodeid, fs.dir, b"name")
    assert (linked.nodeid, linked.attr.nlink) == (entry.nodeid, 1)
    assert fs.get("name") == b"now visible"
    fs.client.release(entry.nodeid, opened.fh)


def test_an_exclusive_file_without_a_name_never_gets_one(fs):
    entry, opened = fs.client.tmpfile(fs.dir, flags=os.O_RDWR | os.O_EXCL)
    with raises(errno.ENOENT):
        fs.client.link(entry.nodeid, fs.dir, b"name")
    fs.client.release(entry.nodeid, opened.fh)


def test_a_file_without_a_name_belongs_to_who_made_it(fs):
    os.chmod(fs.host, 0o777)
    with fs.client.acting_as(1000, 1001):
        entry, opened = fs.client.tmpfile(fs.dir)
    assert (entry.attr.uid, entry.attr.gid) == (1000, 1001)
    fs.client.release(entry.nodeid, opened.fh)


def test_a_file_without_a_name_must_be_writable(fs):
    with raises(errno.EINVAL):
        fs.client.tmpfile(fs.dir, flags=os.O_RDONLY)


def test_a_file_is_no_place_for_another(fs):
    fs.put("file")
    with raises(errno.ENOTDIR):
        fs.client.tmpfile(fs.lookup(b"file"))


# COPY_FILE_RANGE_64


def test_a_copy_with_the_long_answer(fs):
    fs.put("source", b"0123456789")
    source = fs.lookup(b"source")
    fh = fs.client.open(source).fh
    entry, opened = fs.client.create(fs.dir, b"target")
    assert fs.client.copy_file_range_64((source, fh, 2), (entry.nodeid, opened.fh, 1), 5) == 5
    assert fs.get("target") == b"\00023456"
    fs.client.release(source, fh)
    fs.client.release(entry.nodeid, opened.fh)


# IOCTL


@pytest.fixture
def opened(fs):
    fs.put("file", b"abc")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid).fh
    yield nodeid, fh
    fs.client.release(nodeid, fh)


def host_flags(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return struct.unpack("I", fcntl.ioctl(fd, filecalls.FS_IOC_GETFLAGS, bytes(4)))[0]
    finally:
        os.close(fd)


def test_inode_flags_are_read_and_written(fs, opened):
    nodeid, fh = opened
    (before,) = struct.unpack("I", fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_GETFLAGS, out_size=4))
    assert before == host_flags(fs.host / "file")
    fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_SETFLAGS, struct.pack("I", before | FS_NODUMP_FL | FS_NOATIME_FL))
    assert host_flags(fs.host / "file") == before | FS_NODUMP_FL | FS_NOATIME_FL


def test_inode_flags_of_a_directory(fs):
    fh = fs.client.opendir(fs.dir).fh
    (flags,) = struct.unpack("I", fs.client.ioctl(fs.dir, fh, filecalls.FS_IOC_GETFLAGS, out_size=4, flags=abi.FUSE_IOCTL_DIR))
    assert flags == host_flags(fs.host)
    fs.client.releasedir(fs.dir, fh)


def test_project_ids_are_read_and_written_back(fs, opened):
    nodeid, fh = opened
    record = fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_FSGETXATTR, out_size=28)
    fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_FSSETXATTR, record)
    assert fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_FSGETXATTR, out_size=28) == record


def test_a_file_cannot_be_made_immutable(fs, opened):
    """That takes CAP_LINUX_IMMUTABLE, which the broker does not have: the host could not remove the file."""
    nodeid, fh = opened
    with raises(errno.EPERM):
        fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_SETFLAGS, struct.pack("I", FS_IMMUTABLE_FL))


@pytest.mark.parametrize("command", [0x5401, 0x40049409, 0xC020660B, 0, 0xFFFF_FFFF], ids=["TCGETS", "FICLONE", "FIEMAP", "0", "all bits"])
def test_every_other_command_is_unknown(fs, opened, command):
    nodeid, fh = opened
    with raises(errno.ENOTTY):
        fs.client.ioctl(nodeid, fh, command, bytes(4), 4)


@pytest.mark.parametrize("flags", [abi.FUSE_IOCTL_UNRESTRICTED, abi.FUSE_IOCTL_COMPAT | abi.FUSE_IOCTL_32BIT, 1 << 31])
def test_other_layouts_of_the_argument_are_refused(fs, opened, flags):
    nodeid, fh = opened
    with raises(errno.ENOTTY):
        fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_GETFLAGS, out_size=4, flags=flags)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_an_argument_of_the_wrong_size_is_invalid(fs, opened, size):
    nodeid, fh = opened
    with raises(errno.EINVAL):
        fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_SETFLAGS, bytes(size))


@pytest.mark.parametrize("room", [0, 2, 4])
def test_no_more_comes_back_than_the_guest_has_room_for(fs, opened, room):
    nodeid, fh = opened
    assert len(fs.client.ioctl(nodeid, fh, filecalls.FS_IOC_GETFLAGS, out_size=room)) == room


def test_an_ioctl_needs_an_open_file(fs):
    fs.put("file")
    with raises(errno.EBADF):
        fs.client.ioctl(fs.lookup(b"file"), 4711, filecalls.FS_IOC_GETFLAGS, out_size=4)


# Append-only files (chattr +a)


def set_host_flags(path, flags):
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, filecalls.FS_IOC_SETFLAGS, struct.pack("I", flags))
    finally:
        os.close(fd)


def test_an_append_only_file_can_be_appended_to_and_not_written_otherwise(fs):
    fs.put("log", b"one,")
    nodeid = fs.lookup(b"log")
    flags = host_flags(fs.host / "log")
    set_host_flags(fs.host / "log", flags | FS_APPEND_FL)
    try:
        with raises(errno.EPERM):
            fs.client.open(nodeid, os.O_WRONLY)
        fh = fs.client.open(nodeid, os.O_WRONLY | os.O_APPEND).fh
        fs.client.write(nodeid, fh, 4, b"two", open_flags=os.O_WRONLY | os.O_APPEND)
        fs.client.release(nodeid, fh)
        assert fs.get("log") == b"one,two"
    finally:
        set_host_flags(fs.host / "log", flags)


# RENAME_WHITEOUT


def test_a_whiteout_belongs_to_who_renamed(fs):
    """As overlayfs's upper layer needs it: a character device 0:0 in the old place."""
    os.chmod(fs.host, 0o777)
    fs.put("file", b"abc")
    os.chown(fs.host / "file", 1000, 1001)
    with fs.client.acting_as(1000, 1001):
        fs.client.rename2(fs.dir, b"file", fs.dir, b"moved", 4)
    left = os.lstat(fs.host / "file")
    assert (stat.S_IFMT(left.st_mode), left.st_rdev, left.st_uid, left.st_gid) == (stat.S_IFCHR, 0, 1000, 1001)
    assert fs.get("moved") == b"abc"
