"""READDIR and READDIRPLUS over a real directory: all entries once, in any portions, and lookups counted as listed."""

import errno
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.broker import Bench
from tests.support.worker import Worker
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.ops_dirs import Entry, decode_entries
from vfsd.worker.request import OUT_HEADER_BYTES

NAMES = [b"n" * 255, b"\xff\xfe", b"a", *[b"file%d" % number for number in range(300)]]


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def worker(bench):
    worker = Worker(bench)
    worker.begin()
    yield worker
    worker.close()


@pytest.fixture
def directory(tmp_path):
    """A directory of many files, a directory and a link, inside the share."""
    path = os.fsencode(tmp_path / "directory")
    os.mkdir(path)
    for name in NAMES:
        with open(os.path.join(path, name), "wb"):
            pass
    os.mkdir(os.path.join(path, b"subdirectory"))
    os.symlink(b"nowhere", os.path.join(path, b"link"))
    return path


def decode(body, plus):
    """[(nodeid or None, ino, offset, kind, name)]."""
    found, position = [], 0
    while position < len(body):
        nodeid = None
        if plus:
            nodeid = abi.fuse_entry_out.unpack_from(body, position)[0]
            position += abi.fuse_entry_out.size
        ino, offset, length, kind = abi.fuse_dirent.unpack_from(body, position)
        start = position + abi.FUSE_NAME_OFFSET
        found.append((nodeid, ino, offset, kind, body[start : start + length]))
        padding = body[start + length : position + abi.FUSE_REC_ALIGN(abi.FUSE_NAME_OFFSET + length)]
        assert set(padding) <= {0}
        position += abi.FUSE_REC_ALIGN(abi.FUSE_NAME_OFFSET + length)
    assert position == len(body)
    return found


def ask(worker, nodeid, fh, offset, size, *, plus=False, room=None):
    body = abi.fuse_read_in.pack(fh, offset, size, 0, 0, 0)
    opcode = abi.FUSE_READDIRPLUS if plus else abi.FUSE_READDIR
    return worker.call(opcode, body, nodeid=nodeid, room=OUT_HEADER_BYTES + (size if room is None else room))


def list_all(worker, nodeid, fh, size, *, plus=False):
    found, offset = [], 0
    while True:
        reply = ask(worker, nodeid, fh, offset, size, plus=plus)
        assert reply.errno == 0
        assert len(reply.body) <= size
        page = decode(reply.body, plus)
        if not page:
            return found
        found += page
        offset = page[-1][2]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [512, 4096, 1 << 20])
def test_every_entry_is_listed_once_in_any_portions(worker, directory, size, plus):
    nodeid = worker.lookup(b"directory")
    found = list_all(worker, nodeid, worker.opendir(nodeid), size, plus=plus)
    expected = {entry.name: entry for entry in os.scandir(directory)}
    assert sorted(name for *_rest, name in found) == sorted([*expected, b".", b".."])
    for _nodeid, ino, _offset, kind, name in found:
        if name in expected:
            assert ino == expected[name].inode()
            assert kind == stat.S_IFMT(os.lstat(os.path.join(directory, name)).st_mode) >> 12


def test_reading_goes_on_from_the_offset_that_is_asked_for(worker, directory):
    nodeid = worker.lookup(b"directory")
    fh = worker.opendir(nodeid)
    first = decode(ask(worker, nodeid, fh, 0, 1000).body, plus=False)
    rest = decode(ask(worker, nodeid, fh, first[-1][2], 1 << 16).body, plus=False)
    assert decode(ask(worker, nodeid, fh, 0, 1000).body, plus=False) == first, "back to the start"
    assert decode(ask(worker, nodeid, fh, first[2][2], 1 << 16).body, plus=False) == first[3:] + rest


@pytest.mark.parametrize("cached", [True, False])
def test_a_directory_opened_by_another_worker_is_read_too(bench, worker, directory, cached):
    nodeid = worker.lookup(b"directory")
    fh = worker.opendir(nodeid)
    if not cached:
        worker.fs.files.clear()
    assert len(list_all(worker, nodeid, fh, 4096)) == len(NAMES) + 4


def test_plus_counts_one_lookup_for_each_entry_it_lists(bench, worker, directory):
    nodeid = worker.lookup(b"directory")
    before = len(bench.share.store)
    found = list_all(worker, nodeid, worker.opendir(nodeid), 4096, plus=True)
    listed = {number for number, *_rest, name in found if name not in (b".", b"..")}
    assert len(bench.share.store) == before + len(listed)
    assert {number for number, *_rest, name in found if name in (b".", b"..")} == {0}
    for number in listed:
        worker.call(abi.FUSE_FORGET, abi.fuse_forget_in.pack(1), nodeid=number)
    worker.turn()
    assert len(bench.share.store) == before, "one forget undoes it: nothing was looked up that was not listed"


def test_plus_gives_what_a_lookup_gives(worker, directory):
    nodeid = worker.lookup(b"directory")
    reply = ask(worker, nodeid, worker.opendir(nodeid), 0, 1 << 20, plus=True)
    position = 0
    for number, *_rest, name in decode(reply.body, plus=True):
        entry = reply.body[position : position + abi.fuse_entry_out.size]
        position += abi.fuse_entry_out.size + abi.FUSE_REC_ALIGN(abi.FUSE_NAME_OFFSET + len(name))
        if number:
            assert worker.ok(abi.FUSE_LOOKUP, name + b"\0", nodeid=nodeid) == entry
        else:
            assert entry == bytes(abi.fuse_entry_out.size)


def test_a_name_that_cannot_be_looked_up_is_listed_without_a_node(bench, worker, directory, monkeypatch):
    nodeid = worker.lookup(b"directory")
    fh = worker.opendir(nodeid)
    bench.share.store._max_inodes = len(bench.share.store) + 5
    found = decode(ask(worker, nodeid, fh, 0, 1 << 20, plus=True).body, plus=True)
    assert len(found) > 100
    assert sum(1 for number, *_rest in found if number) == 5


def test_nothing_is_above_the_root(worker, tmp_path, directory):
    own = tmp_path.stat().st_ino
    for plus in (False, True):
        found = list_all(worker, 1, worker.opendir(1), 4096, plus=plus)
        assert {name: ino for _nodeid, ino, _offset, _kind, name in found if name in (b".", b"..")} == {b".": own, b"..": own}
    nodeid = worker.lookup(b"directory")
    found = list_all(worker, nodeid, worker.opendir(nodeid), 4096)
    assert {name: ino for _nodeid, ino, _offset, _kind, name in found}[b".."] == own


def test_a_reply_fills_no_more_than_the_guests_room(worker, directory):
    nodeid = worker.lookup(b"directory")
    fh = worker.opendir(nodeid)
    assert 0 < len(ask(worker, nodeid, fh, 0, 1 << 20, room=700).body) <= 700
    assert ask(worker, nodeid, fh, 0, 0).errno == errno.EINVAL
    assert ask(worker, nodeid, fh, 0, 4096, room=0).errno == errno.EINVAL


@pytest.mark.parametrize(("plus", "size"), [(False, 24), (True, 24), (True, 32), (True, 151)])
def test_room_for_no_entry_is_an_error_and_not_the_end(worker, directory, plus, size):
    """An empty reply means that the directory ends here: the guest would believe it."""
    nodeid = worker.lookup(b"directory")
    assert ask(worker, nodeid, worker.opendir(nodeid), 0, size, plus=plus).errno == errno.EINVAL


def test_a_file_cannot_be_listed_and_an_fh_of_another_inode_is_none(worker, directory, tmp_path):
    (tmp_path / "file").touch()
    file, nodeid = worker.lookup(b"file"), worker.lookup(b"directory")
    fh, directory_fh = worker.open(file), worker.opendir(nodeid)
    assert ask(worker, file, fh, 0, 4096).errno == errno.ENOTDIR
    assert ask(worker, nodeid, fh, 0, 4096).errno == errno.EBADF
    assert ask(worker, file, directory_fh, 0, 4096).errno == errno.EBADF
    assert ask(worker, nodeid, 77, 0, 4096).errno == errno.EBADF


def test_any_offset_is_an_answer(worker, directory):
    nodeid = worker.lookup(b"directory")
    fh = worker.opendir(nodeid)
    for offset in (1, 2**31, 2**63 - 1, 2**63, 2**64 - 1):
        assert ask(worker, nodeid, fh, offset, 4096).errno in (0, errno.EINVAL)
    assert len(list_all(worker, nodeid, fh, 4096)) == len(NAMES) + 4


def test_a_directory_on_a_slow_mount_is_read_by_the_pool(worker, directory, monkeypatch):
    nodeid = worker.lookup(b"directory")
    fh = worker.opendir(nodeid)
    worker.fs.files.get(nodeid, fh).mount.slow = True
    jobs = []
    submit = worker.pool.submit
    monkeypatch.setattr(worker.pool, "submit", lambda job, waiter: jobs.append(job) or submit(job, waiter))
    assert len(list_all(worker, nodeid, fh, 1 << 16, plus=True)) == len(NAMES) + 4
    assert jobs


@given(st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 15), st.binary(min_size=1, max_size=255))
def test_an_entry_is_a_padded_fuse_dirent(ino, offset, kind, name):
    encoded = Entry(ino, offset, kind, name).encode()
    assert len(encoded) == abi.FUSE_REC_ALIGN(abi.FUSE_NAME_OFFSET + len(name))
    assert decode(encoded, plus=False) == [(None, ino, offset % 2**64, kind, name)]


def test_the_kernels_entries_are_decoded(tmp_path):
    assert decode_entries(b"") == []


def test_a_batch_of_names_fits_one_message(worker, directory):
    """More entries than one message takes are looked up by several."""
    assert len(NAMES) > wire.MAX_NAMES_PER_LOOKUP
    nodeid = worker.lookup(b"directory")
    found = decode(ask(worker, nodeid, worker.opendir(nodeid), 0, 1 << 20, plus=True).body, plus=True)
    assert len(found) == len(NAMES) + 4
    assert sum(1 for number, *_rest in found if number) == len(NAMES) + 2
