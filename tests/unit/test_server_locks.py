"""Locks through the broker: what the workers are told, what waits and how it ends, what is given back."""

import errno
import fcntl
import os

import pytest

from tests.support.broker import Bench
from vfsd.broker import lock_waits
from vfsd.wire import broker_messages as wire

READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
LAST = (1 << 63) - 1


class Clock:
    """Stands still until a test moves it."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lock_waits, "time", clock)
    return clock


@pytest.fixture
def bench(tmp_path, clock):
    bench = Bench(tmp_path)
    yield bench
    assert all(link.unanswered == 0 for link in bench.server.links._by_fd.values())
    bench.close()
    assert len(bench.server._locks.waits) == 0
    assert len(bench.share.locks) == 0


@pytest.fixture
def worker(bench):
    worker = bench.add(0)
    bench.begin_session()
    return worker


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    return path


@pytest.fixture
def file(worker, path):
    """(nodeid, fh), the locks of the session in use."""
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    use_locks(worker, nodeid, fh)
    return nodeid, fh


def use_locks(worker, nodeid, fh):
    (number,) = worker.send(set_lock((nodeid, fh), 99, READ))
    worker.bench.pump()
    acknowledge(*worker.bench.workers)
    assert worker.replies.pop(number).errno == 0
    worker.ask_ok(wire.Flush(nodeid, fh, 99))


def acknowledge(*workers):
    for worker in workers:
        worker.read()
        assert wire.LocksNotice(worker.session) in worker.notices
        worker.send(wire.LocksAck(worker.session))
        worker.bench.pump()
        worker.read()
    for worker in workers:
        worker.read()


def set_lock(file, owner, kind, start=0, end=LAST, *, flock=0, wait=0):
    return wire.SetLock(*file, owner, start, end, kind, flock, wait)


def waiting(worker, *messages):
    """Send lock requests that must wait; their ids."""
    numbers = worker.send(*messages)
    worker.bench.pump()
    worker.read()
    assert not set(numbers) & set(worker.replies)
    return numbers


def answer(worker, number):
    """The errno of a late answer."""
    worker.bench.pump()
    worker.read()
    return worker.replies.pop(number).errno


def answered(worker, number):
    worker.bench.pump()
    worker.read()
    return number in worker.replies


# Who must know


def test_the_first_lock_waits_until_every_worker_asks_for_flushes(bench, worker, path):
    other = bench.add(1)
    bench.begin_session()
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    first, second = waiting(worker, set_lock((nodeid, fh), 1, WRITE, 0, 9), set_lock((nodeid, fh), 2, READ, 10, 19, wait=1))
    assert len(bench.share.locks) == 0
    acknowledge(worker)
    assert not answered(worker, first)
    acknowledge(other)
    assert [answer(worker, number) for number in (first, second)] == [0, 0]
    assert other.ask_ok(set_lock((nodeid, fh), 3, READ, 20, 29)), "from now on at once"
    assert [notice for notice in other.notices if isinstance(notice, wire.LocksNotice)] == [wire.LocksNotice(worker.session)]


@pytest.mark.parametrize("message", [{"kind": UNLOCK}, {"kind": WRITE, "flock": 1}], ids=["unlock", "flock"])
def test_what_no_flush_drops_concerns_nobody(bench, worker, path, message):
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    worker.ask_ok(set_lock((nodeid, fh), 1, **message))
    assert not any(isinstance(notice, wire.LocksNotice) for notice in worker.notices)


def test_a_worker_that_comes_later_hears_it_with_the_session(bench, worker, file):
    late = bench.add(1, greet=False)
    session, flags = late.ask_ok(wire.Hello(wire.PROTOCOL_VERSION)).fields
    assert (session, flags & wire.SESSION_LOCKS) == (worker.session, wire.SESSION_LOCKS)
    bench.begin_session()
    assert bench.share.session_flags & wire.SESSION_LOCKS == 0


def test_a_worker_that_does_not_say_so_is_ended(bench, worker, path, monkeypatch):
    deaf = bench.add(1)
    bench.begin_session()
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    (number,) = waiting(worker, set_lock((nodeid, fh), 1, WRITE))
    acknowledge(worker)
    bench.server.tick(float("inf"))
    assert answer(worker, number) == 0
    deaf.read()
    assert deaf.gone
    assert bench.silent == [(1, "has not acknowledged that locks are in use")]


def test_a_session_that_ends_meanwhile_refuses_the_lock(bench, worker, path):
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    (number,) = waiting(worker, set_lock((nodeid, fh), 1, WRITE))
    bench.begin_session()
    assert answer(worker, number) == errno.ESTALE


# Waiting


def test_who_waits_is_tried_again_by_the_clock(worker, file, path, clock):
    with open(path, "r+b") as host:
        fcntl.flock(host, fcntl.LOCK_EX)
        (number,) = waiting(worker, set_lock(file, 1, WRITE, flock=1, wait=1))
        clock.now += 0.002
        assert not answered(worker, number)
    assert not answered(worker, number), "nobody told the broker"
    clock.now += 0.002
    assert answer(worker, number) == 0


@pytest.mark.parametrize("how", ["unlock", "downgrade", "flush", "release"])
def test_who_waits_is_tried_again_when_the_broker_drops_a_lock(worker, file, how):
    again, fd = worker.open(file[0])
    fd.close()
    worker.ask_ok(set_lock((file[0], again), 1, WRITE))
    first, second = waiting(worker, set_lock(file, 2, READ, wait=1), set_lock(file, 3, READ, wait=1))
    if how == "release":
        worker.send(wire.Release(file[0], again))
    else:
        message = {"unlock": set_lock(file, 1, UNLOCK), "downgrade": set_lock(file, 1, READ), "flush": wire.Flush(file[0], again, 1)}[how]
        worker.ask_ok(message)
    assert [answer(worker, number) for number in (first, second)] == [0, 0]


def test_a_waiting_request_keeps_no_packet_and_no_answer_waiting(worker, file):
    worker.ask_ok(set_lock(file, 1, WRITE))
    (waits,) = waiting(worker, set_lock(file, 2, WRITE, wait=1))
    link = worker.bench.server.links.by_index[0]
    assert link.unanswered == 0
    for _ in range(2 * wire.MAX_OUTSTANDING_PACKETS):
        worker.ask_ok(wire.StatFs(1))
    worker.ask_ok(wire.Flush(*file, 1))
    assert answer(worker, waits) == 0
    assert link.unanswered == 0


def test_a_cancelled_wait_is_answered_eagain_and_leaves_no_lock(worker, file):
    worker.ask_ok(set_lock(file, 1, WRITE))
    (number,) = waiting(worker, set_lock(file, 2, WRITE, wait=1))
    worker.send(wire.CancelLock(number))
    assert answer(worker, number) == errno.EAGAIN
    worker.send(wire.CancelLock(number), wire.CancelLock(10**9))
    worker.ask_ok(wire.Flush(*file, 1))
    worker.ask_ok(set_lock(file, 3, WRITE))


def test_a_worker_that_is_gone_gets_no_lock(bench, worker, file):
    other = bench.add(1)
    worker.ask_ok(set_lock(file, 1, WRITE))
    waiting(other, set_lock(file, 2, WRITE, wait=1))
    other.socket.close()
    bench.workers.remove(other)
    worker.ask_ok(wire.Flush(*file, 1))
    worker.ask_ok(set_lock(file, 3, WRITE))
    assert len(bench.server._locks.waits) == 0


def test_one_request_id_is_one_request(worker, file):
    worker.ask_ok(set_lock(file, 1, WRITE))
    (number,) = waiting(worker, set_lock(file, 2, WRITE, wait=1))
    worker._next_id -= 1
    assert worker.errno_of(set_lock(file, 2, WRITE, wait=1)) == errno.EINVAL
    worker.ask_ok(wire.Flush(*file, 1))
    assert answer(worker, number) == 0


def test_a_file_that_is_released_meanwhile_is_locked_by_nobody(worker, file):
    again, fd = worker.open(file[0])
    fd.close()
    worker.ask_ok(set_lock(file, 1, WRITE))
    (number,) = waiting(worker, set_lock((file[0], again), 2, WRITE, wait=1))
    worker.send(wire.Release(file[0], again))
    assert answer(worker, number) == errno.EBADF


# What a lock costs, and what is given back


def test_an_owners_description_is_kept_until_it_closes_the_file(bench, worker, file):
    for _ in range(3):
        worker.ask_ok(set_lock(file, 1, WRITE))
        worker.ask_ok(set_lock(file, 1, UNLOCK))
        assert len(bench.share.locks) == 1
    assert worker.errno_of(set_lock(file, 2, READ)) == 0
    assert len(bench.share.locks) == 2
    worker.ask_ok(wire.Flush(*file, 7))
    worker.ask_ok(wire.Flush(*file, 1))
    assert len(bench.share.locks) == 1
    worker.send(wire.Forget([file[0], 1]))
    bench.pump()
    assert len(bench.share.locks) == 0


def test_asking_and_unlocking_open_nothing(bench, worker, file):
    worker.ask_ok(set_lock(file, 1, UNLOCK, 5, 9))
    assert worker.ask_ok(wire.GetLock(*file, 1, 0, LAST, WRITE)).fields == [0, LAST, UNLOCK, 0]
    assert len(bench.share.locks) == 0


def test_no_more_owners_than_the_budget_has_descriptors(tmp_path, clock, path):
    bench = Bench(tmp_path, most_guest_fds=6, inode_file_handles="never")
    worker = bench.add(0)
    bench.begin_session()
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    use_locks(worker, nodeid, fh)
    errnos = [worker.errno_of(set_lock((nodeid, fh), owner, READ)) for owner in range(6)]
    assert errnos.count(0) == 6 - len(bench.share.files) - bench.share.store.fd_count
    assert set(errnos) == {0, errno.ENOLCK}
    assert worker.errno_of(wire.Open(nodeid, os.O_RDWR)) == errno.ENFILE
    worker.ask_ok(wire.Flush(nodeid, fh, 0))
    worker.ask_ok(set_lock((nodeid, fh), 5, READ))
    bench.close()


def test_a_directory_takes_no_posix_lock(worker, file):
    opened = worker.ask_ok(wire.OpenDir(1))
    opened.fd.close()
    assert worker.errno_of(set_lock((1, opened.fields[0]), 1, READ)) == errno.EBADF


@pytest.mark.parametrize("message", [set_lock((1, 1), 1, READ, 9, 8), wire.GetLock(1, 1, 1, 9, 8, READ)])
def test_a_range_that_ends_before_it_begins(worker, file, message):
    assert worker.errno_of(message) == errno.EINVAL
