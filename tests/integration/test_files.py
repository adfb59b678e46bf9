"""Open files: contents, flags, sizes, holes, syncs, and what stays when the name is gone."""

import errno
import hashlib
import os
import random
import stat

import pytest

from tests.support.frontend.checks import NOT_FOUND, assert_same, raises
from vfsd.wire import fuse_abi as abi

MIB = 1 << 20
BAD_FH = 0x1234_5678_9ABC
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def pattern(size, seed=0):
    return random.Random(seed).randbytes(size)


# READ and WRITE


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65536, MIB - 1, MIB, 3 * MIB + 17])
def test_contents_are_equal_both_ways(fs, size):
    data = pattern(size)
    fs.client.write_file(fs.dir, b"from-guest", data)
    assert fs.get("from-guest") == data
    fs.put("from-host", data)
    assert fs.client.read_file(fs.lookup(b"from-host")) == data


def test_reads_at_odd_offsets_and_sizes(fs):
    data = pattern(200_000)
    fs.put("file", data)
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid).fh
    rng = random.Random(1)
    for _ in range(200):
        offset, size = rng.randrange(len(data) + 100), rng.randrange(1, 70_000)
        assert fs.client.read(nodeid, fh, offset, size) == data[offset : offset + size]
    fs.client.release(nodeid, fh)


def test_a_read_at_or_behind_the_end_is_empty(fs):
    fs.put("file", b"abc")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid).fh
    assert fs.client.read(nodeid, fh, 3, 100) == b""
    assert fs.client.read(nodeid, fh, 1 << 40, 100) == b""
    assert fs.client.read(nodeid, fh, 2, 100) == b"c"
    fs.client.release(nodeid, fh)


def test_a_read_never_gives_more_than_asked_for(fs):
    """Even if the guest's buffer is larger than the size it asks for."""
    fs.put("file", pattern(65536))
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid).fh
    pending = fs.client.send(abi.FUSE_READ, nodeid, abi.fuse_read_in.pack(fh, 0, 4096, 0, 0, 0), 65520)
    assert fs.client.finish(pending) == pattern(65536)[:4096]
    fs.client.release(nodeid, fh)


def test_writes_at_odd_offsets_overwrite_and_extend(fs):
    expected = bytearray()
    entry, opened = fs.client.create(fs.dir, b"file")
    rng = random.Random(2)
    for step in range(100):
        offset, data = rng.randrange(100_000), pattern(rng.randrange(1, 30_000), step)
        assert fs.client.write(entry.nodeid, opened.fh, offset, data) == len(data)
        expected += bytes(max(0, offset + len(data) - len(expected)))
        expected[offset : offset + len(data)] = data
    fs.client.release(entry.nodeid, opened.fh)
    assert fs.get("file") == expected


def test_host_and_guest_see_each_others_writes_at_once(fs):
    fs.put("file", b"aaaa")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid, os.O_RDWR).fh
    fs.client.write(nodeid, fh, 1, b"GG")
    assert fs.get("file") == b"aGGa"
    with open(fs.path("file"), "r+b") as file:
        file.write(b"H")
    assert fs.client.read(nodeid, fh, 0, 10) == b"HGGa"
    fs.client.release(nodeid, fh)


def test_a_sparse_file_beyond_4_gib(fs):
    entry, opened = fs.client.create(fs.dir, b"file")
    far = 5 * (1 << 30) + 123
    fs.client.write(entry.nodeid, opened.fh, far, b"end")
    assert fs.client.read(entry.nodeid, opened.fh, far - 5, 100) == bytes(5) + b"end"
    assert_same(fs.client.attr(entry.nodeid), fs.path("file"))
    assert os.stat(fs.path("file")).st_blocks < 1000
    fs.client.release(entry.nodeid, opened.fh)


def test_many_reads_and_writes_in_flight(fs):
    chunk, count = 16384, 100
    entry, opened = fs.client.create(fs.dir, b"file")
    writes = [fs.client.send_write(entry.nodeid, opened.fh, i * chunk, pattern(chunk, i)) for i in range(60)]
    fs.client.finish_all(writes)
    writes += [fs.client.send_write(entry.nodeid, opened.fh, i * chunk, pattern(chunk, i), kick=i == count - 1) for i in range(60, count)]
    fs.client.finish_all(writes)
    assert [fs.client.result(write) for write in writes] == [abi.fuse_write_out.pack(chunk)] * count
    for start in range(0, count, 50):
        reads = [fs.client.send_read(entry.nodeid, opened.fh, i * chunk, chunk) for i in range(start, start + 50)]
        fs.client.finish_all(reads)
        assert [fs.client.result(read) for read in reads] == [pattern(chunk, i) for i in range(start, start + 50)]
    fs.client.release(entry.nodeid, opened.fh)


def test_64_mib_go_through_with_equal_checksums(plain_fs):
    fs = plain_fs
    data = pattern(MIB)
    digest = hashlib.sha256()
    entry, opened = fs.client.create(fs.dir, b"big")
    for i in range(64):
        piece = i.to_bytes(8, "little") + data[8:]
        digest.update(piece)
        assert fs.client.write(entry.nodeid, opened.fh, i * MIB, piece) == MIB
    fs.client.fsync(entry.nodeid, opened.fh)
    fs.client.release(entry.nodeid, opened.fh)
    with open(fs.path("big"), "rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == digest.digest()
    assert hashlib.sha256(fs.client.read_file(entry.nodeid)).digest() == digest.digest()


# OPEN and CREATE


def test_open_flags_hold(fs):
    fs.put("file", b"0123456789")
    nodeid = fs.lookup(b"file")
    read_only, write_only = fs.client.open(nodeid, os.O_RDONLY).fh, fs.client.open(nodeid, os.O_WRONLY).fh
    with raises(errno.EBADF):
        fs.client.write(nodeid, read_only, 0, b"x")
    with raises(errno.EBADF):
        fs.client.read(nodeid, write_only, 0, 1)
    appending = fs.client.open(nodeid, os.O_WRONLY | os.O_APPEND).fh
    fs.client.write(nodeid, appending, 10, b"+++")
    assert fs.get("file") == b"0123456789+++"
    truncating = fs.client.open(nodeid, os.O_RDWR | os.O_TRUNC).fh
    assert fs.get("file") == b""
    for fh in (read_only, write_only, appending, truncating):
        fs.client.release(nodeid, fh)


def test_an_append_goes_to_the_end_though_the_host_has_written_meanwhile(fs):
    fs.put("file", b"guest")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid, os.O_WRONLY | os.O_APPEND).fh
    with open(fs.path("file"), "ab") as file:
        file.write(b"host")
    fs.client.write(nodeid, fh, 5, b"guest", open_flags=os.O_APPEND)
    assert fs.get("file") == b"guesthostguest"
    fs.client.release(nodeid, fh)


def test_o_direct_is_not_passed_on(fs):
    fs.put("file", b"0123456789")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid, os.O_RDWR | os.O_DIRECT).fh
    assert fs.client.read(nodeid, fh, 3, 4) == b"3456"
    fs.client.write(nodeid, fh, 1, b"x")
    fs.client.release(nodeid, fh)


@pytest.mark.parametrize("flags", [os.O_CREAT, os.O_TMPFILE & ~os.O_DIRECTORY | os.O_DIRECTORY, os.O_CREAT | os.O_EXCL])
def test_open_that_would_create_is_refused(fs, flags):
    fs.put("file")
    for nodeid in (fs.lookup(b"file"), fs.dir):
        with raises(errno.EINVAL, errno.EISDIR, errno.ENOTDIR):
            fs.client.open(nodeid, os.O_RDWR | flags)
    assert os.listdir(fs.host) == ["file"]


def test_an_open_with_strange_flag_bits_harms_nobody(fs):
    fs.put("file", b"x")
    nodeid = fs.lookup(b"file")
    for flags in (0xFFFF_FFFF, os.O_PATH, os.O_NOFOLLOW | os.O_NONBLOCK, 0o3, os.O_NOATIME, os.O_ASYNC):
        try:
            opened = fs.client.open(nodeid, flags)
        except OSError:
            continue
        fs.client.release(nodeid, opened.fh)
    assert fs.get("file") in (b"x", b"")


def test_open_of_what_is_no_regular_file_opens_nothing_on_the_host(fs):
    os.mkfifo(fs.path("fifo"))
    os.mknod(fs.path("char"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.symlink("fifo", fs.path("link"))
    for name in (b"fifo", b"char", b"link"):
        nodeid = fs.lookup(name)
        for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR | os.O_NONBLOCK):
            with raises(errno.EBADF):
                fs.client.open(nodeid, flags)
        with raises(errno.EBADF, errno.ENOTDIR):
            fs.client.opendir(nodeid)
    with raises(errno.EBADF, errno.EINVAL):
        fs.client.fsync(fs.lookup(b"fifo"), 0xFFFF_FFFF_FFFF_FFFF)
    # A FIFO that somebody reads can be opened for writing; ENXIO says that nobody does.
    with raises(errno.ENXIO):
        os.open(fs.path("fifo"), os.O_WRONLY | os.O_NONBLOCK)


def test_create_opens_what_exists_unless_it_must_not(fs):
    path = fs.put("file", b"old", mode=0o600)
    known = fs.lookup(b"file")
    entry, opened = fs.client.create(fs.dir, b"file", 0o644, os.O_RDWR | os.O_CREAT)
    assert entry.nodeid == known
    assert fs.client.read(entry.nodeid, opened.fh, 0, 10) == b"old"
    fs.client.release(entry.nodeid, opened.fh)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    entry, opened = fs.client.create(fs.dir, b"file", 0o644, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    assert fs.get("file") == b""
    fs.client.release(entry.nodeid, opened.fh)
    with raises(errno.EEXIST):
        fs.client.create(fs.dir, b"file", 0o644, os.O_RDWR | os.O_CREAT | os.O_EXCL)


def test_create_does_not_follow_symlinks_or_open_special_files(fs):
    outside = fs.served.daemon.socket.parent / "outside"
    os.symlink(outside, fs.path("link"))
    os.mkfifo(fs.path("fifo"))
    with raises(errno.EBADF, errno.ELOOP, errno.EEXIST):
        fs.client.create(fs.dir, b"link", 0o644, os.O_RDWR | os.O_CREAT)
    with raises(errno.EBADF, errno.EEXIST):
        fs.client.create(fs.dir, b"fifo", 0o644, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    assert not outside.exists()


def test_a_file_created_unreadable_can_be_written_through_its_fh(fs):
    entry, opened = fs.client.create(fs.dir, b"file", 0o000, os.O_RDWR)
    fs.client.write(entry.nodeid, opened.fh, 0, b"abc")
    assert fs.client.read(entry.nodeid, opened.fh, 0, 3) == b"abc"
    fs.client.release(entry.nodeid, opened.fh)


def test_bad_fhs_are_ebadf(fs):
    fs.put("file", b"x")
    nodeid = fs.lookup(b"file")
    client = fs.client
    for operation in (
        lambda: client.read(nodeid, BAD_FH, 0, 10),
        lambda: client.write(nodeid, BAD_FH, 0, b"x"),
        lambda: client.fsync(nodeid, BAD_FH),
        lambda: client.flush(nodeid, BAD_FH),
        lambda: client.lseek(nodeid, BAD_FH, 0, os.SEEK_DATA),
        lambda: client.fallocate(nodeid, BAD_FH, 0, 10),
        lambda: client.copy_file_range((nodeid, BAD_FH, 0), (nodeid, BAD_FH, 0), 1),
        lambda: client.readdir(fs.dir, BAD_FH),
        lambda: client.fsyncdir(fs.dir, BAD_FH),
    ):
        with raises(errno.EBADF):
            operation()


def test_an_fh_ends_with_its_release(fs):
    fs.put("file", b"x")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid).fh
    fs.client.release(nodeid, fh)
    with raises(errno.EBADF):
        fs.client.read(nodeid, fh, 0, 1)


def test_two_opens_are_two_fhs(fs):
    fs.put("file", b"x")
    nodeid = fs.lookup(b"file")
    first, second = fs.client.open(nodeid).fh, fs.client.open(nodeid).fh
    assert first != second
    fs.client.release(nodeid, first)
    assert fs.client.read(nodeid, second, 0, 1) == b"x"
    fs.client.release(nodeid, second)


# Files whose name is gone


@pytest.mark.parametrize("remover", ["guest", "host"])
def test_an_unlinked_open_file_lives_on_until_its_release(fs, remover):
    entry, opened = fs.client.create(fs.dir, b"file")
    nodeid, fh = entry.nodeid, opened.fh
    fs.client.write(nodeid, fh, 0, b"before")
    if remover == "guest":
        fs.client.unlink(fs.dir, b"file")
    else:
        os.unlink(fs.path("file"))
    fs.client.write(nodeid, fh, 6, b"+after")
    assert fs.client.read(nodeid, fh, 0, 100) == b"before+after"
    for attr in (fs.client.attr(nodeid), fs.client.getattr(nodeid, fh).attr):
        assert (attr.nlink, attr.size) == (0, 12)
    assert fs.client.setattr(nodeid, size=3, fh=fh).attr.size == 3
    fs.client.fsync(nodeid, fh)
    fs.client.release(nodeid, fh)
    with raises(errno.ENOENT):
        fs.client.lookup(fs.dir, b"file")


# suid and sgid


# FLUSH, FSYNC, SYNCFS


def test_flush_fsync_and_syncfs_succeed(fs):
    entry, opened = fs.client.create(fs.dir, b"file")
    fs.client.write(entry.nodeid, opened.fh, 0, b"x")
    fs.client.flush(entry.nodeid, opened.fh)
    fs.client.fsync(entry.nodeid, opened.fh)
    fs.client.fsync(entry.nodeid, opened.fh, datasync=True)
    fs.client.release(entry.nodeid, opened.fh)
    fh = fs.client.opendir(fs.dir).fh
    fs.client.fsyncdir(fs.dir, fh)
    fs.client.fsyncdir(fs.dir, fh, datasync=True)
    fs.client.releasedir(fs.dir, fh)
    fs.client.syncfs(fs.dir)
    with raises(*NOT_FOUND):
        fs.client.syncfs(0x7777_7777)


# LSEEK, FALLOCATE, COPY_FILE_RANGE


def test_data_and_holes_are_where_the_host_has_them(fs):
    entry, opened = fs.client.create(fs.dir, b"file")
    nodeid, fh = entry.nodeid, opened.fh
    for offset in (0, MIB, 5 * MIB):
        fs.client.write(nodeid, fh, offset, pattern(65536))
    fs.client.setattr(nodeid, size=8 * MIB, fh=fh)
    with open(fs.path("file"), "rb") as file:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for offset in (0, 1, 65536, MIB - 1, MIB, MIB + 7, 3 * MIB, 5 * MIB + 70_000, 8 * MIB - 1):
                try:
                    expected = os.lseek(file.fileno(), offset, whence)
                except OSError as error:
                    with raises(error.errno):
                        fs.client.lseek(nodeid, fh, offset, whence)
                else:
                    assert fs.client.lseek(nodeid, fh, offset, whence) == expected
    with raises(errno.ENXIO):
        fs.client.lseek(nodeid, fh, 8 * MIB, os.SEEK_DATA)
    with raises(errno.EINVAL):
        fs.client.lseek(nodeid, fh, 0, 77)
    assert fs.client.read(nodeid, fh, 0, 10) == pattern(65536)[:10]  # the position moved, reads do not use it
    fs.client.release(nodeid, fh)


def test_fallocate_extends_keeps_and_punches(fs):
    entry, opened = fs.client.create(fs.dir, b"file")
    nodeid, fh = entry.nodeid, opened.fh
    fs.client.fallocate(nodeid, fh, 0, MIB)
    assert os.stat(fs.path("file")).st_size == MIB
    fs.client.fallocate(nodeid, fh, MIB, MIB, FALLOC_FL_KEEP_SIZE)
    assert os.stat(fs.path("file")).st_size == MIB
    assert os.stat(fs.path("file")).st_blocks * 512 >= 2 * MIB
    fs.client.write(nodeid, fh, 0, b"x" * MIB)
    fs.client.fallocate(nodeid, fh, 4096, 8192, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
    assert fs.get("file")[4095 : 4096 + 8193] == b"x" + bytes(8192) + b"x"
    with raises(errno.EOPNOTSUPP, errno.EINVAL):
        fs.client.fallocate(nodeid, fh, 0, 4096, 0x8000)
    with raises(errno.EINVAL):
        fs.client.fallocate(nodeid, fh, 0, 0)
    fs.client.release(nodeid, fh)


def test_copy_file_range_copies_between_and_within_files(fs):
    data = pattern(300_000)
    fs.put("source", data)
    source = fs.lookup(b"source")
    source_fh = fs.client.open(source).fh
    target, opened = fs.client.create(fs.dir, b"target")
    copied = fs.client.copy_file_range((source, source_fh, 1000), (target.nodeid, opened.fh, 50), 200_000)
    assert 0 < copied <= 200_000
    assert fs.get("target") == bytes(50) + data[1000 : 1000 + copied]
    same = fs.client.copy_file_range((target.nodeid, opened.fh, 50), (target.nodeid, opened.fh, 500_000), 100)
    assert fs.get("target")[500_000 : 500_000 + same] == data[1000 : 1000 + same]
    assert fs.client.copy_file_range((source, source_fh, 400_000), (target.nodeid, opened.fh, 0), 10) == 0
    with raises(errno.EBADF):
        fs.client.copy_file_range((source, source_fh, 0), (source, source_fh, 1000), 10)
    with raises(errno.EINVAL):
        fs.client.copy_file_range((source, source_fh, 0), (target.nodeid, opened.fh, 0), 10, flags=1)
    fs.client.release(source, source_fh)
    fs.client.release(target.nodeid, opened.fh)
