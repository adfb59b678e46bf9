"""READ, WRITE and their kin over real files, with descriptors the broker donated."""

import errno
import os
import random

import pytest

from tests.support.broker import Bench
from tests.support.worker import Worker, pack_request
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi

CONTENT = random.Random(1).randbytes(100_000)


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
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def file(worker, path):
    """(nodeid, fh) of the file, open for both."""
    nodeid = worker.lookup(b"file")
    return nodeid, worker.open(nodeid)


def lose(worker, nodeid, fh):
    worker.fs.files.clear()


def slow_down(worker, nodeid, fh):
    worker.fs.files.get(nodeid, fh).mount.slow = True


def without_nowait(worker, nodeid, fh):
    worker.fs.files.get(nodeid, fh).mount.nowait_reads = False


@pytest.fixture(params=[lambda *_file: None, lose, slow_down, without_nowait], ids=["inline", "fetched", "pooled", "no RWF_NOWAIT"])
def prepared(request, worker, file):
    """The file, in each way a worker may have to read and write it."""
    request.param(worker, *file)
    return file


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (99_990, 100), (100_000, 10), (1 << 40, 10), (0, 1 << 20), (5, 0), (4095, 4098)])
def test_a_read_is_what_the_file_holds(worker, prepared, offset, size):
    assert worker.read(*prepared, offset, size) == (0, CONTENT[offset : offset + size])


@pytest.mark.parametrize(
    ("offset", "size", "jobs"),
    [(0, 5000, 1), (99_990, 100, 1), (99_997, 100, 0), (100_000, 10, 0)],
    ids=["in the middle", "before the end", "at the end", "beyond the end"],
)
def test_a_short_count_is_the_end_only_where_the_file_ends(worker, file, monkeypatch, offset, size, jobs):
    """A read that does not wait stops where the page cache has a hole."""
    preadv, submit, submitted = os.preadv, worker.pool.submit, []

    def three_bytes_at_once(fd, views, position, flags=0):
        return preadv(fd, [views[0][:3]] if flags & os.RWF_NOWAIT else views, position)

    monkeypatch.setattr(os, "preadv", three_bytes_at_once)
    monkeypatch.setattr(worker.pool, "submit", lambda job, waiter: submitted.append(job) or submit(job, waiter))
    assert worker.read(*file, offset, size) == (0, CONTENT[offset : offset + size])
    assert len(submitted) == jobs


def test_a_read_that_would_wait_goes_to_the_pool(worker, file, monkeypatch):
    preadv = os.preadv

    def would_wait(fd, views, position, flags=0):
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "would wait")
        return preadv(fd, views, position)

    monkeypatch.setattr(os, "preadv", would_wait)
    assert worker.read(*file, 0, 5000) == (0, CONTENT[:5000])
    assert worker.fs.files.get(*file).mount.nowait_reads


def test_a_file_system_that_cannot_read_without_waiting_is_asked_once(worker, file, monkeypatch):
    preadv, asked = os.preadv, []

    def refuse(fd, views, position, flags=0):
        asked.append(flags)
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return preadv(fd, views, position)

    monkeypatch.setattr(os, "preadv", refuse)
    for _ in range(2):
        assert worker.read(*file, 0, 5000) == (0, CONTENT[:5000])
    assert asked.count(os.RWF_NOWAIT) == 1


def test_a_read_ends_at_the_guests_room(worker, prepared):
    nodeid, fh = prepared
    body = abi.fuse_read_in.pack(fh, 7, 5000, 0, 0, 0)
    assert worker.call(abi.FUSE_READ, body, nodeid=nodeid, room=16 + 100) == (0, CONTENT[7:107])
    assert worker.call(abi.FUSE_READ, body, nodeid=nodeid, room=16) == (0, b"")


@pytest.mark.parametrize("seed", range(10))
def test_reading_and_writing_over_any_cut_of_the_memory(worker, prepared, path, seed):
    nodeid, fh = prepared
    rng = random.Random(seed)
    head = worker.submit(pack_request(abi.FUSE_READ, abi.fuse_read_in.pack(fh, 1000, 5000, 0, 0, 0), nodeid=nodeid), 5016, rng)
    assert worker.finish(head) == (0, CONTENT[1000:6000])
    data = rng.randbytes(5000)
    body = abi.fuse_write_in.pack(fh, 2000, len(data), 0, 0, 0) + data
    head = worker.submit(pack_request(abi.FUSE_WRITE, body, nodeid=nodeid), 100, rng)
    assert worker.finish(head) == (0, abi.fuse_write_out.pack(5000))
    assert path.read_bytes() == CONTENT[:2000] + data + CONTENT[7000:]


def test_a_write_lands_where_it_was_aimed(worker, prepared, path):
    assert worker.write(*prepared, 200_000, b"far") == (0, abi.fuse_write_out.pack(3))
    assert path.read_bytes() == CONTENT + bytes(100_000) + b"far"


def test_an_append_goes_to_the_end_whatever_its_offset(worker, prepared, path):
    assert worker.write(*prepared, 0, b"end", flags=os.O_APPEND | os.O_RDWR).errno == 0
    assert path.read_bytes() == CONTENT + b"end"


def test_a_write_from_the_guests_page_cache_goes_where_it_says(worker, prepared, path):
    reply = worker.write(*prepared, 0, b"start", flags=os.O_APPEND | os.O_RDWR, write_flags=abi.FUSE_WRITE_CACHE)
    assert reply.errno == 0
    assert path.read_bytes() == b"start" + CONTENT[5:]


def test_a_write_must_bring_as_much_as_it_says(worker, file, path):
    nodeid, fh = file
    for size in (2, 4, 2**32 - 1):
        body = abi.fuse_write_in.pack(fh, 0, size, 0, 0, 0) + b"abc"
        assert worker.call(abi.FUSE_WRITE, body, nodeid=nodeid).errno == errno.EIO
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("offset", [2**63 - 5, 2**63, 2**64 - 1])
def test_an_offset_beyond_all_files_is_einval(worker, file, offset):
    assert worker.read(*file, offset, 10).errno == errno.EINVAL
    assert worker.write(*file, offset, b"0123456789").errno == errno.EINVAL


def test_a_read_of_more_than_was_agreed_is_einval(worker, file):
    nodeid, fh = file
    body = abi.fuse_read_in.pack(fh, 0, (1 << 20) + 1, 0, 0, 0)
    assert worker.call(abi.FUSE_READ, body, nodeid=nodeid).errno == errno.EINVAL


def test_the_access_a_file_was_opened_with_holds(worker, file, path):
    nodeid, _fh = file
    reading, writing = worker.open(nodeid, os.O_RDONLY), worker.open(nodeid, os.O_WRONLY)
    assert worker.write(nodeid, reading, 0, b"x").errno == errno.EBADF
    assert worker.read(nodeid, writing, 0, 10).errno == errno.EBADF
    assert path.read_bytes() == CONTENT


def test_an_fh_belongs_to_its_inode(worker, file, tmp_path):
    (tmp_path / "other").write_bytes(b"secret")
    other = worker.lookup(b"other")
    nodeid, fh = file
    assert worker.read(other, fh, 0, 10).errno == errno.EBADF
    assert worker.read(nodeid, worker.open(other), 0, 10).errno == errno.EBADF
    assert worker.read(nodeid, 12345, 0, 10).errno == errno.EBADF


def test_a_released_file_is_closed_here_and_there(bench, worker, file):
    nodeid, fh = file
    worker.ok(abi.FUSE_RELEASE, abi.fuse_release_in.pack(fh, 0, 0, 0), nodeid=nodeid)
    assert len(worker.fs.files) == 0
    assert len(bench.share.files) == 0
    assert worker.read(nodeid, fh, 0, 10).errno == errno.EBADF


def test_a_release_that_names_another_inode_closes_nothing(bench, worker, file):
    nodeid, fh = file
    worker.ok(abi.FUSE_RELEASE, abi.fuse_release_in.pack(fh, 0, 0, 0), nodeid=1)
    assert worker.read(nodeid, fh, 0, 3) == (0, CONTENT[:3])
    assert len(bench.share.files) == 1


def test_a_file_released_through_another_worker_is_dropped_here(bench, worker, file):
    other = Worker(bench, index=1)
    nodeid, fh = file
    assert other.read(nodeid, fh, 0, 3) == (0, CONTENT[:3])
    assert (len(worker.fs.files), len(other.fs.files)) == (1, 1)
    other.ok(abi.FUSE_RELEASE, abi.fuse_release_in.pack(fh, 0, 0, 0), nodeid=nodeid)
    worker.turn()
    assert (len(worker.fs.files), len(other.fs.files)) == (0, 0)
    other.close()


def test_more_files_than_the_cache_holds_still_work(bench, tmp_path):
    worker = Worker(bench, most_files=4)
    worker.begin()
    opened = []
    for number in range(12):
        (tmp_path / str(number)).write_text(f"content{number}")
        nodeid = worker.lookup(b"%d" % number)
        opened.append((nodeid, worker.open(nodeid)))
    for number in (*range(12), *range(11, -1, -1)):
        assert worker.read(*opened[number], 0, 100) == (0, b"content%d" % number)
    assert len(worker.fs.files) == 4
    worker.close()


def test_flush_asks_the_broker_only_where_the_file_system_wants_it(worker, file, monkeypatch):
    nodeid, fh = file
    asked = []
    ask = worker.broker.ask
    monkeypatch.setattr(worker.broker, "ask", lambda message, *how: asked.append(message) or ask(message, *how))
    worker.ok(abi.FUSE_FLUSH, abi.fuse_flush_in.pack(fh, 0), nodeid=nodeid)
    assert asked == []
    worker.fs.files.get(nodeid, fh).traits = wire.TRAIT_FLUSH
    worker.ok(abi.FUSE_FLUSH, abi.fuse_flush_in.pack(fh, 0), nodeid=nodeid)
    assert asked == [wire.Flush(nodeid, fh)]
    lose(worker, nodeid, fh)
    worker.ok(abi.FUSE_FLUSH, abi.fuse_flush_in.pack(fh, 0), nodeid=nodeid)
    assert worker.call(abi.FUSE_FLUSH, abi.fuse_flush_in.pack(77, 0), nodeid=nodeid).errno == errno.EBADF


def test_fsync_is_the_brokers(worker, file):
    nodeid, fh = file
    for opcode in (abi.FUSE_FSYNC, abi.FUSE_FSYNCDIR):
        for flags in (0, abi.FUSE_FSYNC_FDATASYNC):
            worker.ok(opcode, abi.fuse_fsync_in.pack(fh, flags), nodeid=nodeid)
    assert worker.call(abi.FUSE_FSYNC, abi.fuse_fsync_in.pack(77, 0), nodeid=nodeid).errno == errno.EBADF


def test_allocating_reaches_no_further_than_files_do(worker, file, path):
    nodeid, fh = file
    worker.ok(abi.FUSE_FALLOCATE, abi.fuse_fallocate_in.pack(fh, 100_000, 5_000, 0), nodeid=nodeid)
    assert path.stat().st_size == 105_000
    for offset, length in ((2**63 - 1, 1), (0, 2**63), (2**64 - 1, 2**64 - 1)):
        reply = worker.call(abi.FUSE_FALLOCATE, abi.fuse_fallocate_in.pack(fh, offset, length, 0), nodeid=nodeid)
        assert reply.errno == errno.EFBIG


@pytest.mark.parametrize("prepare", [lambda *_file: None, lose, slow_down])
def test_a_range_is_copied_from_file_to_file(worker, file, tmp_path, prepare):
    (tmp_path / "copy").write_bytes(b"0123456789")
    target = worker.lookup(b"copy")
    target_fh = worker.open(target)
    nodeid, fh = file
    prepare(worker, nodeid, fh)
    body = abi.fuse_copy_file_range_in.pack(fh, 10, target, target_fh, 5, 50_000, 0)
    assert worker.ok(abi.FUSE_COPY_FILE_RANGE, body, nodeid=nodeid) == abi.fuse_write_out.pack(50_000)
    assert (tmp_path / "copy").read_bytes() == b"01234" + CONTENT[10:50_010]
    for changes in (
        (fh, 2**63, target, target_fh, 0, 1, 0),
        (fh, 0, target, target_fh, 2**64 - 1, 1, 0),
        (fh, 0, target, target_fh, 0, 1, 1),
    ):
        assert worker.call(abi.FUSE_COPY_FILE_RANGE, abi.fuse_copy_file_range_in.pack(*changes), nodeid=nodeid).errno == errno.EINVAL
    wrong = abi.fuse_copy_file_range_in.pack(fh, 0, nodeid, target_fh, 0, 1, 0)
    assert worker.call(abi.FUSE_COPY_FILE_RANGE, wrong, nodeid=nodeid).errno == errno.EBADF


def test_a_pinned_source_survives_a_cache_of_one(bench, tmp_path, path):
    """Fetching the target pushes the source out of the cache while it is about to be copied from."""
    worker = Worker(bench, most_files=1)
    worker.begin()
    (tmp_path / "copy").touch()
    source, target = worker.lookup(b"file"), worker.lookup(b"copy")
    fh, target_fh = worker.open(source), worker.open(target)
    body = abi.fuse_copy_file_range_in.pack(fh, 0, target, target_fh, 0, 1000, 0)
    assert worker.ok(abi.FUSE_COPY_FILE_RANGE, body, nodeid=source) == abi.fuse_write_out.pack(1000)
    assert (tmp_path / "copy").read_bytes() == CONTENT[:1000]
    worker.close()


@pytest.mark.parametrize(
    ("offset", "whence", "expected"),
    [
        (5, os.SEEK_SET, (0, 5)), (0, os.SEEK_END, (0, 100_000)), (0, os.SEEK_DATA, (0, 0)), (0, os.SEEK_HOLE, (0, 100_000)),
        (100_000, os.SEEK_DATA, (errno.ENXIO, None)), (0, 5, (errno.EINVAL, None)), (2**63, os.SEEK_SET, (errno.EINVAL, None)),
    ],
)  # fmt: skip
def test_lseek_finds_data_and_holes(worker, file, offset, whence, expected):
    nodeid, fh = file
    reply = worker.call(abi.FUSE_LSEEK, abi.fuse_lseek_in.pack(fh, offset, whence), nodeid=nodeid)
    assert reply.errno == expected[0]
    if reply.errno == 0:
        assert abi.fuse_lseek_out.unpack(reply.body) == (expected[1],)


def test_a_slow_inline_call_sends_the_mount_to_the_pool(worker, file, monkeypatch):
    mount = worker.fs.files.get(*file).mount
    without_nowait(worker, *file)
    monkeypatch.setattr(mount.__class__, "took", lambda self, _started: setattr(self, "pooled_until", float("inf")))
    assert worker.read(*file, 0, 10) == (0, CONTENT[:10])
    jobs = []
    submit = worker.pool.submit
    monkeypatch.setattr(worker.pool, "submit", lambda job, waiter: jobs.append(job.mount_key) or submit(job, waiter))
    assert worker.read(*file, 0, 10) == (0, CONTENT[:10])
    assert worker.write(*file, 0, b"x").errno == 0
    assert jobs == [mount.key, mount.key]


# --- set-id bits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch, path):
    """Writes take set-id bits away, as from a worker; the test's own process may be root."""
    pwritev, copy_file_range = os.pwritev, os.copy_file_range

    def strip(fd):
        os.fchmod(fd, os.fstat(fd).st_mode & 0o1777)

    def write(fd, views, *rest):
        strip(fd)
        return pwritev(fd, views, *rest)

    def copy(source, target, *rest):
        strip(target)
        return copy_file_range(source, target, *rest)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "copy_file_range", copy)


@pytest.fixture
def asked(worker, monkeypatch):
    """The bits of every AfterWrite that is sent."""
    ask, bits = worker.broker.ask, []

    def noting(message, *how):
        if isinstance(message, wire.AfterWrite):
            bits.append(message.set_id_bits)
        ask(message, *how)

    monkeypatch.setattr(worker.broker, "ask", noting)
    return bits


def set_mode(worker, nodeid, path, mode):
    """As a chmod in the guest, so that the broker knows."""
    body = abi.fuse_setattr_in.pack(abi.FATTR_MODE, *(0,) * 9, mode, 0, 0)
    worker.ok(abi.FUSE_SETATTR, body, nodeid=nodeid)
    assert path.stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize(("mode", "asks"), [(0o6755, [0o6000]), (0o4755, [0o4000]), (0o755, [])])
def test_set_id_bits_are_back_when_a_write_is_answered(worker, prepared, path, nobody, asked, mode, asks):
    set_mode(worker, prepared[0], path, mode)
    assert worker.write(*prepared, 0, b"new") == (0, abi.fuse_write_out.pack(3))
    assert path.stat().st_mode & 0o7777 == mode
    assert asked == asks


def test_a_write_that_is_to_kill_asks_nothing(worker, prepared, path, nobody, asked):
    set_mode(worker, prepared[0], path, 0o6755)
    assert worker.write(*prepared, 0, b"new", write_flags=abi.FUSE_WRITE_KILL_SUIDGID).errno == 0
    assert path.stat().st_mode & 0o7777 == 0o755
    assert asked == []


def test_a_write_that_fails_gives_the_bits_back_too(worker, prepared, path, nobody, monkeypatch):
    """The kernel takes them before it looks for space."""
    set_mode(worker, prepared[0], path, 0o4755)
    strip_and_write = os.pwritev

    def full(fd, views, *rest):
        strip_and_write(fd, [b""], *rest)
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwritev", full)
    assert worker.write(*prepared, 0, b"new").errno == errno.ENOSPC
    assert path.stat().st_mode & 0o7777 == 0o4755


def test_a_write_is_answered_also_if_the_bits_cannot_come_back(worker, prepared, path, nobody, monkeypatch):
    set_mode(worker, prepared[0], path, 0o4755)

    def refuse(*_arguments):
        raise OSError(errno.EPERM, "immutable")

    monkeypatch.setattr(worker.bench.share.files.set_id, "restore", refuse)
    assert worker.write(*prepared, 0, b"new") == (0, abi.fuse_write_out.pack(3))
    assert path.read_bytes()[:3] == b"new"


def write_at(worker, nodeid, fh, offset):
    """Send a WRITE of one byte, and wait for nothing."""
    body = abi.fuse_write_in.pack(fh, offset, 1, 0, 0, 0) + b"x"
    return worker.submit(pack_request(abi.FUSE_WRITE, body, nodeid=nodeid))


def test_bits_that_come_back_between_anothers_look_and_its_write_come_back_again(worker, file, path, nobody, monkeypatch):
    set_mode(worker, file[0], path, 0o4755)
    first = write_at(worker, *file, 0)
    assert path.stat().st_mode & 0o7777 == 0o755
    strip_and_write, looked = os.pwritev, []

    def late(*arguments):
        looked.append(path.stat().st_mode & 0o7777)
        worker.broker.flush()
        worker.bench.pump()  # the broker answers the first
        looked.append(path.stat().st_mode & 0o7777)
        return strip_and_write(*arguments)

    monkeypatch.setattr(os, "pwritev", late)
    second = write_at(worker, *file, 5)
    for head in (first, second):
        assert worker.finish(head).errno == 0
    assert looked == [0o755, 0o4755]
    assert path.stat().st_mode & 0o7777 == 0o4755
    assert len(worker.fs.keepers) == 0


@pytest.mark.parametrize(("uid", "kept"), [(0, True), (1000, False)])
def test_a_copy_keeps_the_bits_for_root_alone(worker, prepared, path, nobody, uid, kept):
    nodeid, fh = prepared
    set_mode(worker, nodeid, path, 0o6755)
    body = abi.fuse_copy_file_range_in.pack(fh, 10, nodeid, fh, 0, 5, 0)
    assert worker.ok(abi.FUSE_COPY_FILE_RANGE, body, nodeid=nodeid, uid=uid) == abi.fuse_write_out.pack(5)
    assert path.stat().st_mode & 0o7777 == (0o6755 if kept else 0o755)
