"""From chain to reply: every request is answered once, whatever its handler does, and what hangs can be given up."""

import errno
import gc
import os
import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.broker import Bench
from tests.support.worker import Worker, pack_request
from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker import opcodes
from vfsd.worker.file_system import NO_REPLY, Placed
from vfsd.worker.io_pool import THREADS, Job

STATFS = abi.FUSE_STATFS


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def worker(bench):
    worker = Worker(bench)
    yield worker
    worker.close()


@pytest.fixture
def session(worker):
    worker.begin()
    return worker


@pytest.fixture
def handler(session, monkeypatch):
    """Put a handler in the place of STATFS's; returns what calls it."""

    def handler(function, **how):
        monkeypatch.setitem(opcodes.HANDLERS, STATFS, function)
        return session.call(STATFS, **how)

    return handler


def asking(message, then=lambda given: b""):
    def handle(_fs, _request):
        given = yield message
        return then(given)

    return handle


# --- what a handler may return and raise ----------------------------------------------------------------------------


def test_a_body_is_sent_as_it_is(handler):
    assert handler(lambda _fs, _request: b"body") == (0, b"body")


def test_data_that_is_placed_is_counted(handler):
    def place(_fs, request):
        (view,) = request.room(5)
        view[:] = b"12345"
        return Placed(5)

    assert handler(place) == (0, b"12345")


@pytest.mark.parametrize("error", [ReplyErrno(errno.EXDEV), OSError(errno.EXDEV, "text")])
def test_an_errno_is_the_guests(handler, error):
    def fail(_fs, _request):
        raise error

    def fail_later(_fs, _request):
        yield wire.StatFs(1)
        raise error

    def fail_on_the_pool(_fs, request):
        return (yield Job(1, lambda: fail(_fs, request)))

    for function in (fail, fail_later, fail_on_the_pool):
        assert handler(function) == (errno.EXDEV, b"")


@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), OSError("without an errno"), KeyError(1)])
def test_a_bug_of_ours_is_one_eio_and_a_line_in_the_log(handler, session, error):
    def fail(_fs, _request):
        raise error

    def fail_later(_fs, _request):
        yield wire.StatFs(1)
        raise error

    for function in (fail, fail_later):
        assert handler(function) == (errno.EIO, b"")
        (line,) = session.log.bugs
        assert type(error).__name__ in line
        session.log.lines.clear()


def test_an_errno_of_the_broker_is_raised_where_the_handler_waits(handler):
    def handle(_fs, _request):
        try:
            yield wire.Lookup(1, b"missing")
        except ReplyErrno as error:
            return b"it was %d" % error.errno

    assert handler(handle) == (0, b"it was 2")


def test_a_handler_may_wait_many_times(handler):
    def handle(_fs, _request):
        total = 0
        for number in range(20):
            given = yield wire.StatFs(1)
            total += len(given.fields)
            total += yield Job(number % 3, lambda: 1)
        return b"%d" % total

    assert handler(handle) == (0, b"%d" % (20 * 9))


def test_a_reply_that_does_not_fit_is_e2big(handler):
    assert handler(lambda _fs, _request: b"12345", room=20) == (errno.E2BIG, b"")


# --- what is owed a reply -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [0, 7, 19, 200, 2**32 - 1, abi.FUSE_POLL, abi.FUSE_BMAP])
def test_an_opcode_that_is_not_served_is_enosys(session, opcode):
    assert session.call(opcode, bytes(200)) == (errno.ENOSYS, b"")


@pytest.mark.parametrize("opcode", sorted(opcodes.WITHOUT_REPLY))
@pytest.mark.parametrize("body", [b"", bytes(8), bytes(100)])
def test_some_opcodes_are_owed_no_reply_whatever_happens(worker, opcode, body):
    assert worker.call(opcode, body) is None, "before a session"
    worker.begin()
    assert worker.call(opcode, body) is None
    assert worker.call(opcode, body, length=5000) is None, "of a wrong length"


@pytest.mark.parametrize("opcode", sorted(set(opcodes.HANDLERS) - opcodes.WITHOUT_REPLY - {abi.FUSE_INIT}))
def test_before_a_session_there_is_no_file_system(worker, opcode):
    assert worker.call(opcode, bytes(200)) == (errno.EIO, b"")


@pytest.mark.parametrize("size", [1, 39])
def test_less_than_a_header_is_completed_without_a_reply(session, size):
    assert session.finish(session.submit(bytes(size))) is None


def test_a_chain_without_room_for_a_reply_is_completed(session):
    for opcode in (STATFS, abi.FUSE_GETATTR, 999):
        assert session.call(opcode, bytes(100), room=0) is None
        assert session.call(opcode, bytes(100), room=15) is None


@pytest.mark.parametrize("opcode", sorted(set(opcodes.HANDLERS) - opcodes.WITHOUT_REPLY))
def test_a_request_without_its_arguments_is_an_error_and_no_bug(session, opcode):
    reply = session.call(opcode)
    if opcode in (abi.FUSE_SETXATTR, abi.FUSE_GETXATTR, abi.FUSE_LISTXATTR, abi.FUSE_REMOVEXATTR):
        assert reply.errno == errno.ENOSYS  # without --xattr
    elif opcode in (STATFS, abi.FUSE_SYNCFS, abi.FUSE_DESTROY, abi.FUSE_READLINK):  # they need none
        assert reply.errno in (0, errno.ENOENT, errno.EINVAL)
    else:
        assert reply.errno == errno.EINVAL


@given(st.sampled_from(sorted(opcodes.HANDLERS)), st.integers(0, 5), st.binary(max_size=160), st.integers(0, 300), st.integers(0, 2**32))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_arguments_of_any_opcode_are_answered_once(session, opcode, nodeid, body, room, seed):
    """The share is real, so what these bytes say is done; afterwards the session must still work."""
    session.finish(session.submit(pack_request(opcode, body, nodeid=nodeid), room, random.Random(seed)))
    if not session.fs.active:
        session.begin()
    assert session.call(STATFS).errno == 0


# --- giving up ------------------------------------------------------------------------------------------------------


def test_what_waits_for_the_broker_can_be_given_up_and_its_answer_is_ignored(session, monkeypatch):
    monkeypatch.setitem(opcodes.HANDLERS, STATFS, asking(wire.StatFs(1)))
    head = session.submit(pack_request(STATFS))
    assert session.dispatcher.give_up(session.ring) is True
    assert session.queue.chains == {}
    assert session._decode(bytes(session._buffers[head]), session.queue.pushed[-1][1]) == (errno.EIO, b"")
    pushed = list(session.queue.pushed)
    session.turn()
    assert session.queue.pushed == pushed, "the broker's answer came, and was not replied a second time"


def test_a_descriptor_that_comes_for_what_was_given_up_is_kept_or_closed(session, tmp_path):
    (tmp_path / "file").touch()
    nodeid = session.lookup(b"file")
    session.submit(pack_request(abi.FUSE_OPEN, abi.fuse_open_in.pack(os.O_RDWR, 0), nodeid=nodeid))
    session.dispatcher.give_up(session.ring)
    session.turn()
    session.begin()
    assert len(session.fs.files) == 0


def test_what_was_given_up_may_go_on_without_a_bug(session, tmp_path):
    """Its chain is the guest's again: a read that had to fetch its file first must not touch it, and not call that a bug."""
    (tmp_path / "file").write_bytes(b"content")
    nodeid = session.lookup(b"file")
    fh = session.open(nodeid)
    session.fs.files.clear()
    head = session.submit(pack_request(abi.FUSE_READ, abi.fuse_read_in.pack(fh, 0, 100, 0, 0, 0), nodeid=nodeid), 200)
    session.dispatcher.give_up(session.ring)
    written = bytes(session._buffers[head])
    session.turn()
    while session.dispatcher._waiting:
        session.pool.wait()
    assert bytes(session._buffers[head]) == written
    assert session.log.bugs == []


def test_what_a_pool_thread_does_cannot_be_given_up(session, monkeypatch):
    go = threading.Event()

    def handle(_fs, _request):
        yield Job(1, lambda: go.wait(20))
        return b"done"

    monkeypatch.setitem(opcodes.HANDLERS, STATFS, handle)
    head = session.submit(pack_request(STATFS))
    assert session.dispatcher.give_up(session.ring) is False
    assert head in session.queue.chains
    go.set()
    assert session.finish(head) == (0, b"done")
    assert session.dispatcher.give_up(session.ring) is True


def test_what_waits_for_its_turn_on_the_pool_can_be_given_up(session, monkeypatch):
    go, ran = threading.Event(), []

    def handle(_fs, request):
        yield Job(1, lambda: (ran.append(request), go.wait(20)))
        return b"done"

    monkeypatch.setitem(opcodes.HANDLERS, STATFS, handle)
    running = [session.submit(pack_request(STATFS)) for _ in range(THREADS // 2)]
    waiting = [session.submit(pack_request(STATFS)) for _ in range(3)]
    assert session.dispatcher.give_up(session.ring) is False, "some run"
    assert set(session.queue.chains) == set(running)
    for head in waiting:
        assert session._decode(bytes(session._buffers[head]), dict(session.queue.pushed)[head]) == (errno.EIO, b"")
    go.set()
    for head in running:
        assert session.finish(head) == (0, b"done")
    assert len(ran) == len(running)


def test_another_rings_requests_are_not_given_up(session, monkeypatch):
    monkeypatch.setitem(opcodes.HANDLERS, STATFS, asking(wire.StatFs(1), lambda _given: b"done"))
    head = session.submit(pack_request(STATFS))
    assert session.dispatcher.give_up(object()) is True
    assert session.finish(head) == (0, b"done")


def test_no_reply_is_none_also_from_a_handler_that_waited(handler):
    def handle(_fs, _request):
        yield wire.StatFs(1)
        return NO_REPLY

    assert handler(handle) is None


def test_failing_requests_leave_no_garbage(session):
    """The collector is off in a worker, and what an error's frames hold are views of guest memory."""
    requests = [
        (abi.FUSE_LOOKUP, b"missing\0"),
        (abi.FUSE_OPEN, b""),
        (999, b""),
        (abi.FUSE_GETATTR, bytes(16)),
        (abi.FUSE_READ, bytes(40)),
    ]
    for opcode, body in requests:
        session.call(opcode, body, nodeid=77)
    gc.collect()
    gc.disable()
    try:
        for opcode, body in requests:
            assert session.call(opcode, body, nodeid=77).errno
        assert gc.collect() == 0
    finally:
        gc.enable()
