"""Attributes through the broker: what SETATTR changes, who may, and what a read-only share refuses."""

import errno
import os
import time

import pytest

from tests.support.broker import Bench, attributes, changed, naming
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.requests import HANDLERS
from vfsd.sandbox import filecalls
from vfsd.wire import attr
from vfsd.wire import broker_messages as wire

ME = os.getuid(), os.getgid()


@pytest.fixture(params=["never", pytest.param("mandatory", marks=pytest.mark.root)])
def handles(request):
    return request.param


@pytest.fixture
def bench(tmp_path, handles):
    bench = Bench(tmp_path, inode_file_handles=handles)
    yield bench
    bench.close()


@pytest.fixture
def worker(bench):
    worker = bench.add(0)
    bench.begin_session()
    return worker


# --- attributes -----------------------------------------------------------------------------------------------------


def test_setattr_changes_what_it_names_and_nothing_else(worker, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    nodeid = worker.lookup(b"file")
    noise = {"size": 3, "atime": 5, "mtime": 6, "atime_nsec": 7, "mtime_nsec": 8, "mode": 0o777, "uid": ME[0], "gid": ME[1]}
    before = path.stat()
    worker.ask_ok(changed(nodeid, 0, **noise))
    assert (path.stat().st_size, path.stat().st_mode, path.stat().st_mtime_ns) == (10, before.st_mode, before.st_mtime_ns)
    got = attributes(worker.ask_ok(changed(nodeid, attr.SET_SIZE | attr.SET_MODE, **noise)).fields[0])
    assert (got["size"], got["mode"] & 0o7777) == (3, 0o777)
    got = attributes(worker.ask_ok(changed(nodeid, attr.SET_ATIME, **noise)).fields[0])
    assert (got["atime"], got["atime_nsec"]) == (5, 7)
    assert got["mtime"] > 6
    worker.ask_ok(changed(nodeid, attr.SET_MTIME, mtime=-1, mtime_nsec=5))
    assert path.stat().st_mtime_ns == -(10**9) + 5
    worker.ask_ok(changed(nodeid, attr.SET_MTIME_NOW | attr.SET_MTIME, mtime=1))
    assert path.stat().st_mtime_ns > before.st_mtime_ns - 10**9
    assert path.stat().st_mtime_ns < time.time_ns() + 10**9


def test_setattr_works_on_a_symlink_itself(worker, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    before = (tmp_path / "file").stat()
    worker.ask_ok(changed(worker.lookup(b"link"), attr.SET_MTIME | attr.SET_UID | attr.SET_GID, mtime=77, uid=ME[0], gid=ME[1]))
    assert os.lstat(tmp_path / "link").st_mtime == 77
    assert (tmp_path / "file").stat().st_mtime_ns == before.st_mtime_ns


def test_truncating_what_is_no_file_opens_nothing(worker, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert worker.errno_of(changed(worker.lookup(b"fifo"), attr.SET_SIZE)) == errno.EBADF


def test_truncating_by_an_open_file_needs_no_permission_of_the_name(worker, tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    (tmp_path / "file").chmod(0)
    worker.ask_ok(changed(nodeid, attr.SET_SIZE, fh=fh, size=4))
    assert (tmp_path / "file").stat().st_size == 4


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "mask", "expected"),
    [
        (0o640, 1000, 1000, 4, 0), (0o640, 1000, 1000, 6, 0), (0o640, 1000, 1000, 1, errno.EACCES),
        (0o640, 7, 1000, 4, 0), (0o640, 7, 1000, 2, errno.EACCES), (0o640, 7, 7, 4, errno.EACCES), (0o641, 7, 7, 1, 0),
        (0o077, 1000, 1000, 4, errno.EACCES), (0, 0, 0, 6, 0), (0, 0, 0, 1, errno.EACCES), (0o100, 0, 0, 1, 0),
        (0, 7, 7, 0, 0), (0o777, 7, 7, 8, errno.EINVAL),
    ],
)  # fmt: skip
@pytest.mark.root
def test_access_goes_by_the_mode_bits(worker, tmp_path, mode, uid, gid, mask, expected):
    (tmp_path / "file").touch()
    os.chown(tmp_path / "file", 1000, 1000)
    (tmp_path / "file").chmod(mode)
    assert worker.errno_of(wire.Access(worker.lookup(b"file"), mask, uid, gid)) == expected


def test_the_file_systems_figures_are_the_hosts(worker, tmp_path):
    fields = worker.ask_ok(wire.StatFs(ROOT_NODEID)).fields
    seen = os.statvfs(tmp_path)
    assert (fields[0], fields[3], fields[5:]) == (seen.f_blocks, seen.f_files, [seen.f_bsize, seen.f_namemax, seen.f_frsize])


def test_syncfs_reaches_the_file_system(worker):
    assert worker.errno_of(wire.SyncFs(ROOT_NODEID)) == 0


# --- a read-only share ----------------------------------------------------------------------------------------------


def test_a_read_only_share_refuses_whatever_writes(tmp_path, handles):
    (tmp_path / "ok").write_bytes(b"content")
    (tmp_path / "dir").mkdir()
    bench = Bench(tmp_path, readonly=True, inode_file_handles=handles)
    worker = bench.add(0)
    bench.begin_session()
    file = worker.lookup(b"ok")
    fh, fd = worker.open(file, os.O_RDONLY)
    fd.close()
    before = {path: path.lstat() for path in (tmp_path, *tmp_path.rglob("*"))}
    writing = [message for message in naming(b"x") if not isinstance(message, wire.Lookup)] + [
        changed(file, attr.SET_MODE), changed(file, 0), wire.Link(file, ROOT_NODEID, b"x"), wire.FAllocate(file, fh, 0, 0, 1),
        wire.AfterWrite(file, fh, 0o6000),
        wire.Open(file, os.O_WRONLY), wire.Open(file, os.O_RDWR), wire.Open(file, os.O_RDONLY | os.O_TRUNC), wire.Open(file, os.O_ACCMODE),
        wire.Access(file, 2, *ME), wire.TmpFile(ROOT_NODEID, os.O_RDWR, 0o600, *ME),
        wire.SetXattr(file, b"user.x", b"", 0, 0), wire.RemoveXattr(file, b"user.x"),
        wire.Ioctl(file, fh, filecalls.FS_IOC_SETFLAGS, bytes(4)), wire.Ioctl(file, fh, filecalls.FS_IOC_FSSETXATTR, bytes(28)),
    ]  # fmt: skip
    covered = {type(message) for message in writing}
    assert {message for message, row in HANDLERS.items() if row.writes} <= covered
    assert [worker.errno_of(message) for message in writing] == [errno.EROFS] * len(writing)
    assert {path: path.lstat() for path in before} == before
    reading = [
        wire.GetAttr(file),
        wire.Lookup(ROOT_NODEID, b"ok"),
        wire.OpenDir(ROOT_NODEID),
        wire.Fetch(file, fh),
        wire.Access(file, 4, *ME),
    ]
    assert [worker.errno_of(message) for message in reading] == [0] * len(reading)
    bench.close()
