"""The broker as a worker meets it: a real Server and Share in this process, workers that are real sockets. Protocol and sessions."""

import errno
import gc
import os
import socket

import msgpack
import pytest

from tests.support.broker import Bench
from vfsd.broker import server as module
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.requests import HANDLERS
from vfsd.broker.session_change import ACKNOWLEDGE_SECONDS
from vfsd.broker.whereabouts import NOWHERE, Place
from vfsd.broker.worker_link import UNREAD_SECONDS
from vfsd.wire import broker_messages as wire

GETATTR = wire.GetAttr(ROOT_NODEID)


@pytest.fixture(params=["never", pytest.param("prefer", marks=pytest.mark.root)])
def bench(request, tmp_path):
    bench = Bench(tmp_path, inode_file_handles=request.param)
    yield bench
    bench.close()


@pytest.fixture
def worker(bench):
    """A worker in a session of its own."""
    worker = bench.add(0)
    bench.begin_session()
    return worker


def broken(bench, worker):
    """Whether the broker has thrown the worker out, and told why."""
    return told_of(bench, worker, bench.breaches)


def silent(bench, worker):
    """The same, for a worker that does not do its part."""
    return told_of(bench, worker, bench.silent)


def told_of(bench, worker, told):
    bench.pump()
    worker.read()
    return worker.gone and [index for index, _text in told] == [worker.index]


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_every_message_has_a_handler_or_is_the_servers():
    assert {spec.message for spec in wire.REQUESTS if spec.in_session} == set(HANDLERS)


def test_hello_tells_the_session_that_is_under_way(bench):
    worker = bench.add(0, greet=False)
    assert worker.ask(wire.Hello(wire.PROTOCOL_VERSION)) == (0, [0, 0], None)
    session = bench.begin_session(0x100)
    assert bench.add(1).ask(wire.Hello(wire.PROTOCOL_VERSION)) == (0, [session, 0x100 | wire.SESSION_ACTIVE], None)


def test_hello_of_another_version_is_refused(bench):
    assert bench.add(0, greet=False).errno_of(wire.Hello(wire.PROTOCOL_VERSION + 1)) == errno.EPROTO


@pytest.mark.parametrize("message", [GETATTR, wire.SessionStart(0), wire.SessionAck(0), wire.Forget([1, 1])])
def test_the_first_message_must_be_hello(bench, message):
    worker = bench.add(0, greet=False)
    worker.send(message)
    assert broken(bench, worker)
    assert "Hello" in bench.breaches[0][1]


@pytest.mark.parametrize(
    "packet",
    [b"\xc1", msgpack.packb([0, []]), msgpack.packb([0, [[99, 1]]]), msgpack.packb([0, [[True, 1, 1]]]), bytes(wire.MAX_PACKET_BYTES + 1)],
    ids=["no msgpack", "empty", "unknown tag", "True for a tag", "too long"],
)
def test_a_breach_costs_the_worker_its_link_and_nobody_else_anything(bench, worker, packet):
    other = bench.add(1)
    worker.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    worker.socket.send(packet)
    assert broken(bench, worker)
    assert len(bench.log.errors) == 1
    assert other.errno_of(GETATTR, session=worker.session) == 0


def test_descriptors_are_a_breach(bench, worker):
    with open("/dev/null", "rb") as file:
        socket.send_fds(worker.socket, [msgpack.packb([0, [[1, 1, 1]]])], [file.fileno()])
    assert broken(bench, worker)


def test_a_worker_that_leaves_is_no_breach(bench, worker):
    worker.socket.close()
    bench.pump()
    assert bench.server.links.by_index == {}
    assert bench.breaches == []
    assert bench.log.errors == []


def test_many_requests_in_a_packet_are_answered_in_one(bench, worker):
    before = len(worker.packets)
    ids = worker.send(*[wire.StatFs(ROOT_NODEID)] * 40, wire.Lookup(ROOT_NODEID, b"missing"))
    bench.pump()
    worker.read()
    assert len(worker.packets) == before + 1
    assert [worker.replies.pop(number).errno for number in ids] == [0] * 40 + [errno.ENOENT]


def test_messages_without_an_answer_are_acknowledged_in_time(bench, worker):
    """The worker may have four packets outstanding; it must hear of their being consumed although none is answered."""
    already = bench.server.links.by_index[0].consumed
    for _ in range(wire.MAX_OUTSTANDING_PACKETS):
        worker.send(wire.Forget([77, 1]))
        bench.pump()
    worker.read()
    assert worker.packets[-1].replies == []
    assert worker.packets[-1].consumed > already


def test_what_nobody_foresaw_is_one_eio_and_a_line_in_the_log(bench, worker, monkeypatch):
    def fail(*_arguments):
        raise ZeroDivisionError

    monkeypatch.setitem(HANDLERS, wire.StatFs, HANDLERS[wire.StatFs]._replace(handler=fail))
    assert worker.errno_of(wire.StatFs(ROOT_NODEID)) == errno.EIO
    assert worker.errno_of(GETATTR) == 0
    (line,) = bench.log.bugs
    assert "StatFs" in line
    assert "ZeroDivisionError" in line
    bench.log.lines.clear()


def test_an_error_of_the_host_is_the_guests(bench, worker, monkeypatch):
    def fail(*_arguments):
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setitem(HANDLERS, wire.StatFs, HANDLERS[wire.StatFs]._replace(handler=fail))
    assert worker.errno_of(wire.StatFs(ROOT_NODEID)) == errno.EDQUOT


def test_a_late_answer_goes_out_by_itself(bench, worker):
    (number,) = worker.send(GETATTR)
    (task,) = bench.server.next_turn()
    deliver = bench.server.run(task)
    bench.server.finish_turn()
    worker.read()
    assert number not in worker.replies
    deliver(True)
    worker.read()
    assert worker.replies.pop(number).errno == 0


# --- who does not read ----------------------------------------------------------------------------------------------


def flood(bench, worker):
    """Ask without reading until the broker's answers no longer fit the socket."""
    link = bench.server.links.by_index[worker.index]
    while not link.has_queue:
        worker.send(*[wire.LookupMany(ROOT_NODEID, [b"missing"] * 200)] * 20)
        bench.pump()
    return link


def test_what_is_refused_is_answered_stale_without_being_done(bench, worker, tmp_path):
    (number,) = worker.send(wire.MkDir(ROOT_NODEID, b"never", 0o755, 0, 0))
    (task,) = bench.server.next_turn()
    bench.server.finish_turn()
    assert not bench.server.is_outdated(task)
    before = bench.server.generation
    bench.begin_session()
    assert bench.server.generation > before
    assert bench.server.is_outdated(task)
    bench.server.refuse(task)
    worker.read()
    assert worker.replies.pop(number).errno == errno.ESTALE
    assert task.link.unanswered == 0
    assert os.listdir(tmp_path) == []


def test_of_a_worker_that_is_gone_nothing_goes_on_waiting(bench, worker):
    worker.send(GETATTR)
    (task,) = bench.server.next_turn()
    bench.server.finish_turn()
    before = bench.server.generation
    worker.socket.shutdown(socket.SHUT_RDWR)
    bench.pump()
    assert bench.server.generation > before
    assert bench.server.is_outdated(task)
    bench.server.refuse(task)
    assert task.link.unanswered == 0


def test_a_request_is_where_its_first_inode_is_and_at_the_name_it_looks_up(bench, worker, tmp_path):
    (tmp_path / "directory").mkdir()
    nodeid = worker.lookup(b"directory")
    mount = bench.share.store.mount_of(nodeid)
    expected = [
        (wire.Lookup(nodeid, b"name"), Place(mount, nodeid, b"name")),
        (wire.Unlink(nodeid, b"name"), Place(mount, nodeid, b"name")),
        (wire.LookupMany(nodeid, [b"a", b"b"]), Place(mount, nodeid, b"")),
        (wire.GetAttr(nodeid), Place(mount, nodeid, None)),
        (wire.GetAttr(1 << 40), Place(0, 1 << 40, None)),
        (wire.Forget([nodeid, 0]), NOWHERE),
        (wire.Release(nodeid, 1), NOWHERE),
        (wire.SessionAck(1), NOWHERE),
        (wire.SessionEnd(), NOWHERE),
    ]
    for message, place in expected:
        spec = next(spec for spec in wire.REQUESTS if spec.message is type(message))
        assert bench.server.place_of(module.Task(None, 0, spec, 1, message)) == place


def test_a_worker_that_does_not_read_is_not_read_and_goes_on_when_it_reads(bench, worker):
    link = flood(bench, worker)
    while not link.congested:
        worker.send(*[wire.LookupMany(ROOT_NODEID, [b"missing"] * 200)] * 20)
        bench.pump()
    (number,) = worker.send(wire.StatFs(ROOT_NODEID))
    bench.pump()
    consumed = link.consumed
    bench.pump()
    assert link.consumed == consumed, "it is not read"
    while number not in worker.replies:
        worker.read()
        bench.pump()
    assert worker.replies[number].errno == 0
    assert not link.congested


def test_a_worker_that_does_not_read_for_ten_seconds_is_reported(bench, worker):
    link = flood(bench, worker)
    since = link._blocked_since
    bench.server.tick(since + UNREAD_SECONDS)
    bench.pump()
    assert bench.silent == []
    bench.server.tick(since + UNREAD_SECONDS + 0.01)
    bench.pump()
    assert [index for index, _ in bench.silent] == [0]
    assert bench.breaches == [], "its successor may serve"
    assert bench.server.links._by_fd == {}


# --- sessions -------------------------------------------------------------------------------------------------------


def test_a_session_begins_when_every_worker_has_acknowledged_it(bench):
    first, second, third = (bench.add(index) for index in range(3))
    (number,) = first.send(wire.SessionStart(0x500))
    bench.pump()
    for worker in (first, second, third):
        worker.read()
        assert worker.notices == [wire.SessionNotice(1, 0x500 | wire.SESSION_ACTIVE)]
    bench.acknowledge(first, third)
    assert number not in first.replies
    bench.acknowledge(second)
    first.read()
    assert first.replies.pop(number) == (0, [1], None)


def test_the_end_of_a_session_is_announced_likewise(bench, worker):
    (number,) = worker.send(wire.SessionEnd())
    bench.pump()
    bench.acknowledge()
    assert worker.notices[-1] == wire.SessionNotice(2, 0)
    assert worker.replies.pop(number) == (0, [], None)


def test_a_worker_that_does_not_acknowledge_is_reported_and_the_session_begins(bench):
    first, second = bench.add(0), bench.add(1)
    (number,) = first.send(wire.SessionStart(0))
    bench.pump()
    bench.acknowledge(first)
    bench.server.tick(bench.server._changes._deadline)
    bench.pump()
    assert number not in first.replies
    bench.server.tick(bench.server._changes._deadline + 0.01)
    bench.pump()
    first.read()
    assert first.replies.pop(number).errno == 0
    assert silent(bench, second)
    assert ACKNOWLEDGE_SECONDS <= 1.0


def test_a_worker_that_leaves_need_not_acknowledge(bench):
    first, second = bench.add(0), bench.add(1)
    (number,) = first.send(wire.SessionStart(0))
    bench.pump()
    bench.acknowledge(first)
    second.socket.close()
    bench.pump()
    first.read()
    assert first.replies.pop(number).errno == 0


def test_a_worker_that_leaves_just_as_the_session_changes_need_not_acknowledge(bench, monkeypatch):
    """Between the look at who is there and the beginning of the wait."""
    first, second = bench.add(0), bench.add(1)
    begin, link = bench.server._changes.begin, bench.server.links.by_index[1]

    def begin_a_moment_later(*arguments):
        bench.server.remove(link)
        return begin(*arguments)

    monkeypatch.setattr(bench.server._changes, "begin", begin_a_moment_later)
    (number,) = first.send(wire.SessionStart(0))
    bench.pump()
    bench.acknowledge(first)
    second.read()
    bench.server.tick(bench.server._changes._deadline + 0.01)
    bench.pump()
    first.read()
    assert number in first.replies, "the guest's INIT is never answered"


def test_a_newer_session_supersedes_one_that_is_beginning(bench):
    first, second = bench.add(0), bench.add(1)
    (old,) = first.send(wire.SessionStart(0))
    bench.pump()
    (new,) = second.send(wire.SessionStart(0))
    bench.pump()
    bench.acknowledge()
    assert first.replies.pop(old).errno == errno.ESTALE
    assert second.replies.pop(new) == (0, [2], None)


def test_two_changes_at_once_leave_one_session(bench, monkeypatch):
    """A wipe of many inodes takes long enough for another thread to lead, and to be told of the next session."""
    files = bench.share.files
    begin = files.begin_session

    def begin_late(session):
        monkeypatch.setattr(files, "begin_session", begin)
        bench.share.begin_session(wire.SESSION_ACTIVE)
        begin(session)

    monkeypatch.setattr(files, "begin_session", begin_late)
    bench.share.begin_session(wire.SESSION_ACTIVE)
    assert bench.share.session == 2
    assert (bench.share.store.session, files._session) == (2, 2), "every request of the new session would be ESTALE"


@pytest.mark.parametrize("difference", [-1, 1, 2**40])
def test_a_message_of_another_session_is_stale(bench, worker, difference):
    bench.begin_session()
    fh, fd = worker.open(ROOT_NODEID, os.O_RDONLY)
    fd.close()
    stale = worker.session + difference
    for message in (GETATTR, wire.Lookup(ROOT_NODEID, b"x"), wire.Open(ROOT_NODEID, 0), wire.Fetch(ROOT_NODEID, fh)):
        assert worker.errno_of(message, session=stale) == errno.ESTALE
    worker.send(wire.Release(ROOT_NODEID, fh), session=stale)
    bench.pump()
    assert worker.errno_of(wire.FSync(ROOT_NODEID, fh, 0)) == 0, "the release was not of this session"


def test_a_session_leaves_nothing_to_the_next(bench, worker, tmp_path):
    (tmp_path / "file").touch()
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    fds = len(os.listdir("/proc/self/fd"))
    bench.begin_session()
    assert len(os.listdir("/proc/self/fd")) < fds
    assert worker.errno_of(wire.GetAttr(nodeid)) == errno.EBADF
    assert worker.errno_of(wire.FSync(nodeid, fh, 0)) == errno.EBADF
    assert worker.errno_of(GETATTR) == 0
    again = worker.lookup(b"file")
    assert again != nodeid
    new_fh, fd = worker.open(again)
    fd.close()
    assert new_fh != fh


def test_a_successor_of_the_same_index_outlives_its_predecessor(bench):
    """The old link ends after the new one has come: that must not take the new one out of the books."""
    first, old = bench.add(0), bench.add(1)
    new = bench.add(1, greet=False)
    old.socket.close()
    bench.pump()
    new.ask_ok(wire.Hello(wire.PROTOCOL_VERSION))
    first.send(wire.SessionStart(0))
    bench.pump()
    new.read()
    assert [type(notice) for notice in new.notices] == [wire.SessionNotice]


def test_the_limits_stand_where_the_design_says():
    assert (UNREAD_SECONDS, module.UNREAD_SECONDS) == (10.0, 10.0)


def test_failing_requests_leave_no_garbage(bench, worker):
    """The collector is off in the broker."""
    messages = [
        wire.Lookup(ROOT_NODEID, b"missing"),
        wire.GetAttr(77),
        wire.Open(ROOT_NODEID, os.O_CREAT),
        wire.Lookup(ROOT_NODEID, b"a/b"),
    ]
    for message in messages:
        worker.errno_of(message)
    gc.collect()
    gc.disable()
    try:
        for message in messages:
            assert worker.errno_of(message)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_breach_that_the_supervisor_cannot_be_told_now_is_told_later(bench, worker):
    """An offender that is not reported would live on without being served, and the guest would hang."""
    bench.deaf = True
    worker.socket.send(b"nonsense")
    bench.pump()
    assert bench.breaches == []
    bench.deaf = False
    bench.server.tick(0.0)
    bench.pump()
    assert [index for index, _text in bench.breaches] == [worker.index]


def test_a_successor_is_heard_when_all_that_its_predecessor_sent_is_done(bench, tmp_path):
    first = bench.add(0)
    successor = bench.add(0, greet=False)
    (hello,) = successor.send(wire.Hello(wire.PROTOCOL_VERSION))
    first.send(wire.GetAttr(ROOT_NODEID))
    bench.pump()
    successor.read()
    assert successor.replies == {}
    first.send(wire.MkDir(ROOT_NODEID, b"one", 0o755, os.getuid(), os.getgid()))
    first.send(wire.MkDir(ROOT_NODEID, b"two", 0o755, os.getuid(), os.getgid()))
    first.socket.close()  # replies lie in it unread: the broker gets ECONNRESET before what was sent
    bench.pump()
    successor.read()
    assert successor.replies.pop(hello).errno == 0
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    successor.session = bench.share.session
    assert successor.lookup(b"one")


def test_a_successor_that_dies_before_it_was_heard_leaves_its_place_to_the_next(bench):
    first = bench.add(0)
    bench.add(0, greet=False).socket.close()
    third = bench.add(0, greet=False)
    (hello,) = third.send(wire.Hello(wire.PROTOCOL_VERSION))
    first.socket.close()
    bench.pump()
    third.read()
    assert third.replies.pop(hello).errno == 0
