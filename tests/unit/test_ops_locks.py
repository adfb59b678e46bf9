"""Locks in a worker: how many of a ring wait, what ends them, and which FLUSH goes to the broker."""

import errno
import fcntl
import os

import pytest

from tests.support.broker import Bench
from tests.support.worker import Worker, pack_request
from vfsd.config import Features
from vfsd.fds import TempFd
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.ring import Ring

READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
LAST = (1 << 63) - 1


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()
    assert len(bench.server._locks.waits) == 0


@pytest.fixture
def worker(bench):
    worker = Worker(bench)
    worker.begin()
    yield worker
    assert worker.dispatcher._lock_waits._waits == {}
    worker.close()


@pytest.fixture
def file(worker, tmp_path):
    """(nodeid, fh)."""
    (tmp_path / "file").write_bytes(bytes(100))
    nodeid = worker.lookup(b"file")
    return nodeid, worker.open(nodeid)


def lock_body(fh, owner, kind=WRITE, start=0, end=LAST, flags=0):
    return abi.fuse_lk_in.pack(fh, owner, start, end, kind, 1, flags)


def set_lock(worker, file, owner, kind=WRITE, **how):
    return worker.call(abi.FUSE_SETLK, lock_body(file[1], owner, kind, **how), nodeid=file[0]).errno


def wait(worker, file, owner, ring=None):
    """A SETLKW that must wait; its head."""
    before, worker.ring = worker.ring, ring or worker.ring
    head = worker.submit(pack_request(abi.FUSE_SETLKW, lock_body(file[1], owner), nodeid=file[0]))
    worker.ring = before
    worker.turn()
    return head


def asked(worker, monkeypatch):
    """What goes to the broker from now on."""
    messages = []
    ask, tell = worker.broker.ask, worker.broker.tell
    monkeypatch.setattr(worker.broker, "ask", lambda message, *how: messages.append(message) or ask(message, *how))
    monkeypatch.setattr(worker.broker, "tell", lambda message, *how: messages.append(message) or tell(message, *how))
    return messages


def flush(worker, file, owner=1):
    return worker.call(abi.FUSE_FLUSH, abi.fuse_flush_in.pack(file[1], owner), nodeid=file[0]).errno


def test_a_flush_needs_the_broker_from_the_first_posix_lock_of_the_session_on(worker, file, monkeypatch):
    messages = asked(worker, monkeypatch)
    assert set_lock(worker, file, 1, flags=abi.FUSE_LK_FLOCK) == 0
    messages.clear()
    assert flush(worker, file) == 0
    assert messages == []
    assert set_lock(worker, file, 1) == 0
    assert wire.LocksAck(worker.broker.session) in messages
    messages.clear()
    assert flush(worker, file) == 0
    assert messages == [wire.Flush(*file, 1)]
    worker.begin()
    file = worker.lookup(b"file"), worker.open(worker.lookup(b"file"))
    messages.clear()
    assert flush(worker, file) == 0
    assert messages == []


def test_another_worker_asks_too(bench, worker, file, monkeypatch):
    other = Worker(bench, index=1)
    head = worker.submit(pack_request(abi.FUSE_SETLK, lock_body(file[1], 1), nodeid=file[0]))
    worker.turn()
    assert head in worker.queue.chains, "the other does not know yet"
    other.turn()
    worker.finish(head)
    messages = asked(other, monkeypatch)
    other.fs.keep_open(*file, 0, 0, TempFd(os.open(os.devnull, os.O_RDONLY)))
    assert flush(other, file) == 0
    assert messages == [wire.Flush(*file, 1)]
    late = Worker(bench, index=2)
    assert late.fs.locks_in_use
    for one in (other, late):
        one.close()


def test_news_of_an_old_session_changes_nothing(worker):
    worker.begin()
    worker.fs.noticed(wire.LocksNotice(worker.broker.session - 1))
    assert not worker.fs.locks_in_use


def test_a_quarter_of_a_ring_may_wait(worker, file):
    assert set_lock(worker, file, 1) == 0
    heads = [wait(worker, file, owner) for owner in range(2, 6)]
    assert worker.finish(wait(worker, file, 6)) == (errno.ENOLCK, b"")
    other = Ring(worker.queue, None, None, None)
    heads.append(wait(worker, file, 7, other))
    assert set(heads) <= set(worker.queue.chains)
    assert set_lock(worker, file, 1, UNLOCK) == 0
    owners = dict(zip(heads, (2, 3, 4, 5, 7), strict=True))
    while owners:  # whose time had come before the unlock is tried first
        granted = worker.finish_one_of(owners)
        assert flush(worker, file, owners.pop(granted)) == 0


def test_a_ring_that_stops_ends_its_own_waits_and_no_others(worker, file):
    assert set_lock(worker, file, 1) == 0
    other = Ring(worker.queue, None, None, None)
    head, stays = wait(worker, file, 2), wait(worker, file, 3, other)
    worker.dispatcher.end_lock_waits(worker.ring)
    assert worker.finish(head) == (errno.EAGAIN, b"")
    assert stays in worker.queue.chains
    assert flush(worker, file, 1) == 0
    assert worker.finish(stays) == (0, b"")
    assert set_lock(worker, file, 2) == errno.EAGAIN


def test_a_lock_that_is_granted_as_the_ring_stops_is_had(worker, file):
    assert set_lock(worker, file, 1) == 0
    head = wait(worker, file, 2)
    body = lock_body(file[1], 1, UNLOCK)
    unlock = worker.submit(pack_request(abi.FUSE_SETLK, body, nodeid=file[0]))
    worker.dispatcher.end_lock_waits(worker.ring)
    assert worker.finish(unlock).errno == 0
    assert worker.finish(head) == (0, b"")
    assert set_lock(worker, file, 3) == errno.EAGAIN


def test_a_lock_that_comes_after_the_request_was_given_up_is_given_back(worker, file):
    assert set_lock(worker, file, 1) == 0
    head = wait(worker, file, 2)
    assert worker.dispatcher.give_up(worker.ring)
    assert worker.finish(head) == (errno.EIO, b"")
    assert flush(worker, file, 1) == 0
    worker.turn()
    assert set_lock(worker, file, 3) == 0


@pytest.mark.parametrize(("features", "flock"), [(Features(posix_lock=False), False), (Features(flock=False), True)])
def test_a_kind_that_is_switched_off_is_refused_without_asking(worker, file, monkeypatch, features, flock):
    worker.fs.features = features
    messages = asked(worker, monkeypatch)
    body = lock_body(file[1], 1, flags=abi.FUSE_LK_FLOCK if flock else 0)
    for opcode in (abi.FUSE_SETLK, abi.FUSE_SETLKW, abi.FUSE_GETLK):
        assert worker.call(opcode, body, nodeid=file[0]).errno == errno.ENOLCK
    assert messages == []


@pytest.mark.parametrize(
    "lock", [{"kind": 3}, {"kind": 1 << 31}, {"start": 9, "end": 8}, {"start": 1 << 63, "end": (1 << 64) - 1}, {"end": 1 << 63}]
)
@pytest.mark.parametrize("opcode", [abi.FUSE_SETLK, abi.FUSE_SETLKW, abi.FUSE_GETLK])
def test_what_is_no_lock_is_not_asked_for(worker, file, monkeypatch, opcode, lock):
    messages = asked(worker, monkeypatch)
    assert worker.call(opcode, lock_body(file[1], 1, **lock), nodeid=file[0]).errno == errno.EINVAL
    assert worker.call(opcode, lock_body(file[1], 1)[:47], nodeid=file[0]).errno == errno.EINVAL
    assert messages == []


def test_the_answer_names_the_lock_in_the_way(worker, file):
    assert set_lock(worker, file, 1, start=10, end=19) == 0
    reply = worker.ok(abi.FUSE_GETLK, lock_body(file[1], 2), nodeid=file[0])
    assert abi.fuse_lk_out.unpack(reply) == (10, 19, WRITE, 0)
