"""The ring thread with real rings in real memory, a real broker and real channels; control and supervisor are the test."""

import errno
import os
import socket
import threading

import pytest

from tests.support.event_loop import PATIENCE, Loop, copy_of
from tests.support.frontend.ring import LINUX, Descriptor, Ring
from tests.support.worker import pack_request
from vfsd.channel import ChannelClosed
from vfsd.wire import channel as wire
from vfsd.wire import fuse_abi
from vfsd.worker import opcodes, ring_table
from vfsd.worker.broker_client import BrokerGone
from vfsd.worker.io_pool import Job

INIT = pack_request(fuse_abi.FUSE_INIT, fuse_abi.fuse_init_in.pack(7, 38, 0, 0xFFFFFFFF, 0))
STATFS = pack_request(fuse_abi.FUSE_STATFS)


@pytest.fixture
def loop(tmp_path):
    loop = Loop(tmp_path)
    yield loop
    loop.close()


@pytest.fixture
def ring(loop):
    """A started ring, in a session."""
    loop.share_memory()
    ring = loop.ring(1)
    assert loop.start(ring) == wire.Done(loop.seq, 0)
    assert loop.call(ring, INIT) == 0
    return ring


# --- serving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [True, False])
def test_requests_are_answered(loop, event_idx):
    loop.share_memory()
    ring = loop.ring(1, event_idx=event_idx)
    loop.start(ring)
    assert loop.call(ring, STATFS) == errno.EIO, "before INIT"
    assert loop.call(ring, INIT) == 0
    for _ in range(3 * ring.size):
        assert loop.call(ring, STATFS) == 0


def test_a_request_from_before_the_start_needs_no_kick(loop):
    loop.share_memory()
    ring = loop.ring(1)
    submission = ring.submit(INIT, 4096, LINUX)
    loop.start(ring)
    loop.until(lambda: submission.done)


def test_more_than_a_batch_is_served_with_one_kick(loop):
    loop.share_memory()
    ring = loop.rings[1] = Ring(loop.memory, 1, 512)
    loop.start(ring)
    assert loop.call(ring, INIT) == 0
    submissions = [ring.submit(STATFS, 4096) for _ in range(200)]
    ring.kick()
    loop.until(lambda: all(submission.done for submission in submissions))
    assert ring.kicks <= 2


def test_rings_are_served_side_by_side(loop, ring):
    other = loop.ring(2)
    loop.start(other)
    assert loop.call(other, STATFS) == 0
    assert loop.call(ring, STATFS) == 0


def test_what_the_brokers_socket_does_not_take_goes_when_it_is_read(loop, ring):
    loop.broker._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    loop.pumping = False
    submissions = []
    for number in range(3):
        submissions += [ring.submit(pack_request(fuse_abi.FUSE_LOOKUP, b"%d" % number * 250 + b"\0"), 200) for _ in range(10)]
        ring.kick()
        loop.until(lambda asked=10 * number + 10: len(loop.broker._asked) == asked)
    loop.until(lambda: loop.broker.blocked)
    assert not any(submission.done for submission in submissions)
    loop.pumping = True
    loop.until(lambda: all(submission.done for submission in submissions))


# --- what control asks ----------------------------------------------------------------------------------------------


def test_a_stopped_ring_says_where_it_stopped_and_goes_on_from_there(loop, ring):
    for _ in range(4):
        loop.call(ring, STATFS)
    assert loop.ask(wire.RingStop, 1) == wire.Done(loop.seq, 5)
    waiting = ring.submit(STATFS, 4096)
    ring.force_kick()
    assert isinstance(loop.ask(wire.RingStop, 1), wire.Refused), "it is not running"
    assert not waiting.done
    assert loop.start(ring, last_avail=5) == wire.Done(loop.seq, 0)
    loop.until(lambda: waiting.done)


def test_a_ring_stops_when_what_is_in_flight_is_done(loop, ring):
    loop.pumping = False
    submission = ring.submit(STATFS, 4096)
    ring.kick()
    loop.seq += 1
    loop.until(lambda: loop.fs.broker._sent > loop.fs.broker._consumed)
    loop.control.send(wire.RingStop(loop.seq, 1))
    loop.pumping = True
    loop.until(lambda: loop.answers)
    assert loop.answers == [wire.Done(loop.seq, 2)]
    assert submission.done


def test_what_the_broker_does_not_answer_in_time_is_given_up(loop, ring, monkeypatch):
    monkeypatch.setattr(ring_table, "DRAIN_SECONDS", 0.0)
    loop.pumping = False
    submission = ring.submit(STATFS, 4096)
    ring.kick()
    loop.until(lambda: loop.fs.broker._sent > loop.fs.broker._consumed)
    assert loop.ask(wire.RingStop, 1) == wire.Done(loop.seq, 2)
    loop.until(lambda: submission.done)
    assert fuse_abi.fuse_out_header.unpack_from(submission.reply)[1] == -errno.EIO
    assert isinstance(loop.ask(wire.MemoryClear), wire.Done), "nothing of the guest's memory is held"
    loop.pumping = True


def test_what_hangs_in_the_hosts_file_system_cannot_be_given_up(loop, ring, monkeypatch):
    go = threading.Event()

    def hang(_fs, _request):
        yield Job(1, lambda: go.wait(PATIENCE))
        return b""

    monkeypatch.setitem(opcodes.HANDLERS, fuse_abi.FUSE_STATFS, hang)
    monkeypatch.setattr(ring_table, "DRAIN_SECONDS", 0.0)
    submission = ring.submit(STATFS, 4096)
    ring.kick()
    loop.until(lambda: loop.pool._running)
    refused = loop.ask(wire.RingStop, 1)
    assert isinstance(refused, wire.Refused)
    assert b"1 requests hang" in refused.text
    assert ring.error_signalled()
    assert isinstance(loop.ask(wire.MemoryClear), wire.Refused), "a thread is still in the guest's memory"
    go.set()
    loop.until(lambda: submission.done)
    assert isinstance(loop.ask(wire.RingStop, 1), wire.Done)


@pytest.mark.parametrize("changed", [{"size": 3}, {"size": 0}, {"desc_uva": 1 << 60}])
def test_a_ring_that_cannot_be_is_refused_and_leaves_nothing(loop, changed):
    loop.share_memory()
    ring = loop.ring(1)
    fds = loop.fds()
    answer = loop.start(ring, **changed)
    assert isinstance(answer, wire.Refused)
    assert loop.fds() == fds
    assert isinstance(loop.start(ring), wire.Done)


def test_a_start_index_far_from_the_drivers_breaks_the_ring(loop):
    loop.share_memory()
    assert isinstance(loop.start(loop.ring(1), last_avail=1000), wire.Done)
    loop.until(lambda: loop.answers)
    assert isinstance(loop.answers[0], wire.RingBroken)


def test_a_running_ring_is_not_started_again(loop, ring):
    fds = loop.fds()
    assert isinstance(loop.start(ring), wire.Refused)
    assert loop.fds() == fds
    assert loop.call(ring, STATFS) == 0


def test_a_kick_descriptor_that_cannot_be_waited_for_is_refused(loop, ring, tmp_path):
    with open(tmp_path / "file", "wb") as file:
        for message, index in ((wire.RingKick, 1), (wire.RingKick, 7)):
            assert isinstance(loop.ask(message, index, True, fds=[copy_of(file.fileno())]), wire.Refused)


def test_memory_is_not_taken_from_under_a_running_ring(loop, ring):
    (region,) = loop.memory.regions
    assert isinstance(loop.ask(wire.MemoryClear), wire.Refused)
    assert isinstance(loop.ask(wire.MemoryRemove, region.gpa, region.size, region.uva), wire.Refused)
    assert loop.call(ring, STATFS) == 0
    loop.ask(wire.RingStop, 1)
    assert isinstance(loop.ask(wire.MemoryRemove, region.gpa, region.size, region.uva), wire.Done)
    assert isinstance(loop.ask(wire.MemoryRemove, region.gpa, region.size, region.uva), wire.Refused)


def test_eventfds_are_replaced_while_the_ring_runs(loop, ring):
    for name, message in (("kick_fd", wire.RingKick), ("call_fd", wire.RingCall), ("err_fd", wire.RingErr)):
        fresh = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        assert isinstance(loop.ask(message, 1, True, fds=[copy_of(fresh)]), wire.Done)
        os.close(getattr(ring, name))
        setattr(ring, name, fresh)
    calls = ring.calls
    assert loop.call(ring, STATFS) == 0
    loop.until(lambda: ring.calls > calls)  # it comes a moment after the reply


def test_a_kick_to_the_old_descriptor_is_not_lost(loop, ring):
    submission = ring.submit(STATFS, 4096)
    fresh = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    loop.ask(wire.RingKick, 1, True, fds=[copy_of(fresh)])
    os.close(ring.kick_fd)
    ring.kick_fd = fresh
    loop.until(lambda: submission.done)


def test_a_ring_without_eventfds_is_served_when_control_says_so(loop, ring):
    for message in (wire.RingCall, wire.RingErr):
        assert isinstance(loop.ask(message, 1, False), wire.Done)
    submission = ring.submit(STATFS, 4096)
    assert isinstance(loop.ask(wire.RingKick, 1, False), wire.Done)
    loop.until(lambda: submission.done)


# --- breaches and ends ----------------------------------------------------------------------------------------------


def test_a_broken_ring_is_reported_and_the_others_go_on(loop, ring):
    other = loop.ring(2)
    loop.start(other)
    other.write_descriptor(0, Descriptor(1 << 60, 100))
    other.publish([0])
    other.force_kick()
    loop.until(lambda: loop.answers)
    (broken,) = loop.answers
    assert isinstance(broken, wire.RingBroken)
    assert broken.queue_index == 2
    assert other.error_signalled()
    assert len(loop.log.errors) == 1
    assert loop.call(ring, STATFS) == 0
    loop.answers.clear()
    assert isinstance(loop.ask(wire.RingStop, 2), wire.Done), "it can be stopped, and started anew"


def test_stop_ends_the_loop(loop):
    loop.supervisor.send(wire.Stop())
    loop.thread.join(PATIENCE)
    assert not loop.thread.is_alive()
    assert loop.raised is None


@pytest.mark.parametrize("who", ["supervisor", "control", "broker"])
def test_a_peer_that_is_gone_ends_the_loop(loop, who):
    if who == "broker":
        (link,) = loop.bench.server.links._by_fd.values()
        loop.bench.server.remove(link)
    else:
        getattr(loop, who).close()
    loop.thread.join(PATIENCE)
    assert not loop.thread.is_alive()
    assert isinstance(loop.raised, {"supervisor": ChannelClosed, "control": type(None), "broker": BrokerGone}[who])


def test_when_control_is_gone_what_was_taken_is_completed_and_nothing_more(loop, ring):
    loop.pumping = False
    taken = ring.submit(STATFS, 4096)
    ring.kick()
    loop.until(lambda: loop.fs.broker._sent > loop.fs.broker._consumed)
    loop.control.close()
    loop.gone = True
    loop.until(lambda: loop.loop._rings.draining)
    late = ring.submit(STATFS, 4096)
    ring.force_kick()
    loop.pumping = True
    loop.until(lambda: taken.done)
    loop.thread.join(PATIENCE)
    assert not loop.thread.is_alive()
    assert not late.done
