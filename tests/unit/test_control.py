"""The control process's loop over real sockets; the test is its supervisor, its workers and its frontend."""

import contextlib
import os
import select
import socket
import struct
import threading
import time
from dataclasses import replace

import pytest

from vfsd.channel import Channel, ChannelClosed, close_all
from vfsd.config import ControlConfig
from vfsd.fds import OwnedFd, sealed_memfd
from vfsd.log import DEBUG, ChildLog
from vfsd.sandbox.lockdown import Confinement
from vfsd.wire import vhost_user as vu
from vfsd.wire.channel import (
    CONTROL_TO_SUPERVISOR,
    CONTROL_TO_WORKER,
    SUPERVISOR_TO_CHILD,
    AddWorker,
    Connection,
    Done,
    FrontendGone,
    InflightGiven,
    KillWorker,
    Log,
    MemoryAdd,
    MemoryClear,
    MemoryRemove,
    NeedInflight,
    NeedWorker,
    Refused,
    RingBroken,
    RingCall,
    RingStart,
    RingStop,
    Stop,
)
from vfsd.wire.inflight import TABLE_STRIDE_BYTES
from vfsd.worker import worker_links, workers
from vfsd.worker.control import Control
from vfsd.worker.device import FEATURES
from vfsd.worker.inflight_memory import InflightMemory
from vfsd.worker.workers import worker_of

UVA, SIZE = 0x7F0000000000, 0x100000
NEED_REPLY = vu.VHOST_USER_NEED_REPLY_MASK
CONFINEMENT = Confinement(
    role="control", sandbox="none", seccomp_filter=b"", uid=None, gid=None, capabilities=(), landlock=False, nofile=None, supervisor_pidfd=None
)  # fmt: skip


def packet_pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class World:
    """A Control in a thread, and everybody around it."""

    def __init__(self, request_queues=3, *, keep_listening=False):
        ours, theirs = packet_pair()
        self.supervisor = Channel(ours, CONTROL_TO_SUPERVISOR)
        self._control_channel = Channel(theirs, SUPERVISOR_TO_CHILD)
        config = ControlConfig(
            channel_fd=0, supervisor_pidfd=0, confinement=CONFINEMENT, sandbox="none", log_level=DEBUG, tag=None,
            request_queues=request_queues, keep_listening=keep_listening,
        )  # fmt: skip
        self._control = Control(config, self._control_channel, ChildLog(self._control_channel, DEBUG), InflightMemory(request_queues + 1))
        self.error = None
        self.logs = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.workers = {}
        self.frontend = socket.socket()
        self.add_worker(0)
        self.connect()

    def connect(self):
        self.frontend.close()
        self.frontend, backend = socket.socketpair()
        self.frontend.settimeout(5)
        with OwnedFd(backend.detach()) as owned:
            self.supervisor.send(Connection(), [owned])

    def _run(self):
        try:
            self._control.run()
        except BaseException as error:  # noqa: BLE001  # raised again by close
            self.error = error
        finally:
            self._control_channel.close()

    def add_worker(self, index):
        if index in self.workers:
            self.workers[index].close()
        ours, theirs = packet_pair()
        self.workers[index] = Channel(ours, CONTROL_TO_WORKER)
        with OwnedFd(theirs.detach()) as end:
            self.supervisor.send(AddWorker(index), [end])

    def close(self):
        with contextlib.suppress(ChannelClosed):
            if self.supervisor.fileno() >= 0:
                self.supervisor.send(Stop())
        self.thread.join(5)
        assert not self.thread.is_alive()
        self.supervisor.close()
        for worker in self.workers.values():
            worker.close()
        self.frontend.close()
        if self.error is not None:
            raise self.error

    def tell(self, request, payload=b"", fds=(), flags=0):
        socket.send_fds(self.frontend, [vu.HEADER.pack(request, 1 | flags, len(payload)) + payload], list(fds))

    def reply(self):
        request, flags, size = vu.HEADER.unpack(self.frontend.recv(12))
        assert flags == 1 | vu.VHOST_USER_REPLY_MASK
        return request, self.frontend.recv(size)

    def heard(self, expected=None, seconds=5):
        """The next message to the supervisor that is not a log line; or None if nothing comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.supervisor], [], [], left)[0]:
                message = self.supervisor.receive().message
                if not isinstance(message, Log):
                    return message
                self.logs.append(message.text.decode())
        return None

    def asked(self, index, seconds=5):
        """The next request to this worker; its descriptors are closed."""
        if not select.select([self.workers[index]], [], [], seconds)[0]:
            return None
        received = self.workers[index].receive()
        close_all(received.fds)
        return received.message

    def answers(self, index, value=0):
        """Take one request and say Done."""
        message = self.asked(index)
        self.workers[index].send(Done(message.seq, value))
        return message

    def set_up(self, ring=1, worker=0):
        """A frontend up to the ENABLE that waits for its acknowledgement."""
        self.tell(vu.VHOST_USER_SET_PROTOCOL_FEATURES, struct.pack("<Q", 1 << vu.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        self.tell(vu.VHOST_USER_SET_FEATURES, struct.pack("<Q", FEATURES))
        memory = os.memfd_create("ram")
        self.tell(vu.VHOST_USER_ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", 0, SIZE, UVA, 0), [memory], NEED_REPLY)
        os.close(memory)
        assert self.answers(0) == MemoryAdd(1, 0, SIZE, UVA, 0)
        assert self.reply() == (vu.VHOST_USER_ADD_MEM_REG, bytes(8))
        self.describe(ring)
        self.tell(vu.VHOST_USER_SET_VRING_ENABLE, struct.pack("<II", ring, 1), [], NEED_REPLY)

    def describe(self, ring):
        self.tell(vu.VHOST_USER_SET_VRING_NUM, struct.pack("<II", ring, 128))
        self.tell(vu.VHOST_USER_SET_VRING_BASE, struct.pack("<II", ring, 3))
        self.tell(vu.VHOST_USER_SET_VRING_ADDR, struct.pack("<IIQQQQ", ring, 0, UVA, UVA + 0x2000, UVA + 0x1000, 0))
        kick = os.eventfd(0)
        self.tell(vu.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", ring), [kick])
        os.close(kick)


@pytest.fixture
def world():
    world = World()
    yield world
    world.close()


def test_queues_are_spread_over_workers():
    assert [worker_of(queue) for queue in range(5)] == [0, 0, 1, 2, 3]


def test_an_acknowledgement_waits_until_the_ring_really_runs(world):
    world.set_up()
    start = world.asked(0)
    assert start == RingStart(2, 1, 128, 3, UVA, UVA + 0x1000, UVA + 0x2000, True, True, False, False, 1)
    assert not select.select([world.frontend], [], [], 0.1)[0]
    world.workers[0].send(Done(start.seq, 0))
    assert world.reply() == (vu.VHOST_USER_SET_VRING_ENABLE, bytes(8))


def test_a_worker_is_asked_for_when_its_queue_is_named_and_given_memory_when_it_serves(world):
    world.set_up(ring=3)
    assert world.heard() == NeedWorker(2)
    world.add_worker(2)
    assert world.answers(2) == MemoryClear(1)
    assert world.answers(2) == MemoryAdd(2, 0, SIZE, UVA, 0)
    assert isinstance(world.answers(2), RingStart)
    assert world.reply()[0] == vu.VHOST_USER_SET_VRING_ENABLE
    assert world.asked(2, seconds=0.1) is None


def test_memory_goes_to_all_workers_that_serve_or_to_none(world):
    world.set_up(ring=2)
    world.heard()
    world.add_worker(1)
    for _ in range(3):
        world.answers(1)
    world.reply()
    memory = os.memfd_create("ram")
    world.tell(vu.VHOST_USER_ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", SIZE, SIZE, 0x1000, 0), [memory], NEED_REPLY)
    os.close(memory)
    assert isinstance(world.answers(0), MemoryAdd)
    refused = world.asked(1)
    world.workers[1].send(Refused(refused.seq, b"cannot map"))
    assert isinstance(world.answers(0), MemoryRemove)
    assert world.reply() == (vu.VHOST_USER_ADD_MEM_REG, struct.pack("<Q", 1))


def test_get_vring_base_answers_what_the_worker_said(world):
    world.set_up()
    world.answers(0)
    world.reply()
    world.tell(vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 0))
    assert world.answers(0, 41) == RingStop(3, 1)
    assert world.reply() == (vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 41))


def test_a_call_descriptor_replaced_at_run_time_reaches_the_worker(world):
    world.set_up()
    world.answers(0)
    world.reply()
    call = os.eventfd(0)
    world.tell(vu.VHOST_USER_SET_VRING_CALL, struct.pack("<Q", 1), [call], NEED_REPLY)
    received = None
    while received is None:
        received = world.workers[0].receive()
    assert received.message == RingCall(3, 1, True)
    with received.fds[0] as copy:
        os.eventfd_write(copy.fileno(), 7)
    assert os.eventfd_read(call) == 7
    os.close(call)
    world.workers[0].send(Done(3, 0))
    assert world.reply()[0] == vu.VHOST_USER_SET_VRING_CALL


def test_a_frontend_that_leaves_is_reported_as_clean(world):
    world.frontend.close()
    assert world.heard() == FrontendGone(b"", True)


def test_a_breach_closes_the_connection_and_says_why(world):
    world.tell(99)
    gone = world.heard()
    assert not gone.clean
    assert gone.text.startswith(b"vhost-user request 99")
    assert world.frontend.recv(1) == b""


def test_a_worker_that_does_not_answer_ends_the_connection(world, monkeypatch):
    monkeypatch.setattr(worker_links, "ANSWER_SECONDS", 0.2)
    world.set_up()
    gone = world.heard()
    assert not gone.clean
    assert b"worker 0 did not answer RingStart" in gone.text


def test_a_worker_that_may_still_be_starting_has_longer_for_its_first_answer(world, monkeypatch):
    monkeypatch.setattr(worker_links, "ANSWER_SECONDS", 0.0)
    world.set_up()  # of which the first answer is one
    assert b"worker 0 did not answer RingStart" in world.heard().text


def test_a_worker_that_never_comes_ends_the_connection(world, monkeypatch):
    monkeypatch.setattr(worker_links, "ANSWER_SECONDS", 0.2)
    world.set_up(ring=2)
    assert world.heard() == NeedWorker(1)
    assert b"worker 1 was not started" in world.heard().text


@pytest.mark.parametrize("answer", [Done(77, 0), Refused(77, b"no")])
def test_an_answer_to_another_question_ends_the_connection(world, answer):
    world.set_up()
    world.asked(0)
    world.workers[0].send(answer)
    assert b"worker 0 answered what was not asked" in world.heard().text


def test_an_answer_without_a_question_ends_the_connection(world):
    world.workers[0].send(Done(1, 0))
    assert b"worker 0 answered what was not asked" in world.heard().text


def test_stop_is_heard_while_a_worker_is_waited_for(world):
    world.set_up()
    world.asked(0)
    world.supervisor.send(Stop())
    world.thread.join(2)
    assert not world.thread.is_alive()


def test_a_broken_ring_is_logged_and_the_connection_lives(world):
    world.set_up()
    start = world.asked(0)
    world.workers[0].send(Done(start.seq, 0))
    world.reply()
    world.workers[0].send(RingBroken(1, b"a loop"))
    world.tell(vu.VHOST_USER_GET_QUEUE_NUM)
    assert world.reply() == (vu.VHOST_USER_GET_QUEUE_NUM, struct.pack("<Q", 4))
    world.heard(seconds=0.2)
    assert "queue 1 is stopped, the guest's driver broke it: a loop" in world.logs


def serving(world):
    """A world in which worker 0 serves ring 1; its RingStart."""
    world.set_up()
    start = world.answers(0)
    world.reply()
    return start


def restored(world, *, start):
    """Be the successor of worker 0 until it has what its predecessor had."""
    assert world.answers(0) == MemoryClear(1)
    assert world.answers(0) == MemoryAdd(2, 0, SIZE, UVA, 0)
    assert world.answers(0) == replace(start, seq=3)


def test_a_successor_gets_memory_and_rings_by_the_same_start(world):
    start = serving(world)
    world.workers[0].close()
    world.add_worker(0)
    restored(world, start=start)
    world.tell(vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 0))
    assert world.answers(0, 12) == RingStop(4, 1)
    assert world.reply() == (vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 12))


def test_the_frontend_is_served_while_there_is_no_worker_and_what_needs_one_waits(world):
    start = serving(world)
    world.workers[0].close()
    world.tell(vu.VHOST_USER_GET_QUEUE_NUM)
    assert world.reply() == (vu.VHOST_USER_GET_QUEUE_NUM, struct.pack("<Q", 4))
    world.tell(vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 0))
    assert not select.select([world.frontend], [], [], 0.1)[0]
    world.add_worker(0)
    restored(world, start=start)
    assert world.answers(0, 41) == RingStop(4, 1)
    assert world.reply() == (vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 41))


def test_a_worker_that_dies_while_it_is_asked_to_stop_a_ring_is_asked_again_as_its_successor(world):
    start = serving(world)
    world.tell(vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 0))
    world.asked(0)
    world.workers[0].close()
    world.add_worker(0)
    restored(world, start=start)
    assert world.answers(0, 41) == RingStop(4, 1)
    assert world.reply() == (vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 41))


def test_a_worker_that_dies_while_it_starts_a_ring_leaves_it_to_its_successor(world):
    world.set_up()
    start = world.asked(0)
    world.workers[0].close()
    world.add_worker(0)
    restored(world, start=start)
    assert world.reply() == (vu.VHOST_USER_SET_VRING_ENABLE, bytes(8))


def test_a_successor_that_dies_too_has_a_successor(world):
    start = serving(world)
    world.workers[0].close()
    world.add_worker(0)
    world.asked(0)
    world.workers[0].close()
    world.add_worker(0)
    restored(world, start=start)
    world.tell(vu.VHOST_USER_GET_QUEUE_NUM)
    assert world.reply() == (vu.VHOST_USER_GET_QUEUE_NUM, struct.pack("<Q", 4))


def test_a_region_that_is_added_while_the_worker_dies_is_given_to_the_successor_once(world):
    start = serving(world)
    memory = os.memfd_create("ram")
    world.tell(vu.VHOST_USER_ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", SIZE, SIZE, 0x1000, 0), [memory], NEED_REPLY)
    os.close(memory)
    assert isinstance(world.asked(0), MemoryAdd)
    world.workers[0].close()
    world.add_worker(0)
    assert world.answers(0) == MemoryClear(1)
    assert world.answers(0) == MemoryAdd(2, 0, SIZE, UVA, 0)
    assert world.answers(0) == MemoryAdd(3, SIZE, SIZE, 0x1000, 0)
    assert world.answers(0) == replace(start, seq=4)
    assert world.reply() == (vu.VHOST_USER_ADD_MEM_REG, bytes(8))


def test_a_call_descriptor_that_is_replaced_while_the_worker_dies_reaches_the_successor_with_its_ring(world):
    start = serving(world)
    call = os.eventfd(0)
    world.tell(vu.VHOST_USER_SET_VRING_CALL, struct.pack("<Q", 1), [call], NEED_REPLY)
    os.close(call)
    assert isinstance(world.asked(0), RingCall)
    world.workers[0].close()
    world.add_worker(0)
    restored(world, start=replace(start, has_call=True))
    assert world.reply()[0] == vu.VHOST_USER_SET_VRING_CALL


def test_a_stopped_ring_is_not_given_to_a_successor(world):
    serving(world)
    world.tell(vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 0))
    world.answers(0, 41)
    world.reply()
    world.workers[0].close()
    world.add_worker(0)
    assert world.answers(0) == MemoryClear(1)
    assert world.answers(0) == MemoryAdd(2, 0, SIZE, UVA, 0)
    assert world.asked(0, seconds=0.1) is None


def test_a_ring_that_the_successor_refuses_is_broken_and_the_connection_lives(world):
    serving(world)
    world.workers[0].close()
    world.add_worker(0)
    world.answers(0)
    world.answers(0)
    again = world.asked(0)
    world.workers[0].send(Refused(again.seq, b"used.idx jumped"))
    world.tell(vu.VHOST_USER_GET_QUEUE_NUM)
    assert world.reply() == (vu.VHOST_USER_GET_QUEUE_NUM, struct.pack("<Q", 4))
    world.heard(seconds=0.2)
    assert "queue 1 is stopped, the guest's driver broke it: used.idx jumped" in world.logs


def ask_for_base(world):
    world.tell(vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 0))


BASE_41 = (vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 41))


def test_a_worker_that_cannot_let_go_is_killed_and_its_successor_gives_up_what_hung(world):
    start = serving(world)
    ask_for_base(world)
    world.workers[0].send(Refused(world.asked(0).seq, b"2 requests hang"))
    assert world.heard() == KillWorker(0, b"2 requests hang")
    assert not select.select([world.frontend], [], [], 0.1)[0], "it is not answered before the worker is dead"
    world.add_worker(0)
    restored(world, start=replace(start, give_up=True))
    assert world.answers(0, 41) == RingStop(4, 1)
    assert world.reply() == BASE_41


def test_a_worker_that_is_silent_is_killed(world, monkeypatch):
    monkeypatch.setattr(workers, "STOP_SECONDS", 0.2)
    start = serving(world)
    ask_for_base(world)
    world.asked(0)
    assert world.heard() == KillWorker(0, b"worker 0 did not answer RingStop in time")
    monkeypatch.undo()
    world.add_worker(0)
    restored(world, start=replace(start, give_up=True))
    world.answers(0, 41)
    assert world.reply() == BASE_41


def test_a_worker_that_does_not_die_ends_the_connection(world, monkeypatch):
    monkeypatch.setattr(worker_links, "REPLACED_SECONDS", 0.2)
    serving(world)
    ask_for_base(world)
    world.workers[0].send(Refused(world.asked(0).seq, b"hangs"))
    assert isinstance(world.heard(), KillWorker)
    gone = world.heard()
    assert (gone.text, gone.clean) == (b"worker 0 was killed, and does not die", False)


def test_a_successor_that_cannot_let_go_either_ends_the_connection(world):
    serving(world)
    ask_for_base(world)
    world.workers[0].send(Refused(world.asked(0).seq, b"hangs"))
    world.heard()
    world.add_worker(0)
    for _ in range(3):
        world.answers(0)
    world.workers[0].send(Refused(world.asked(0).seq, b"hangs again"))
    assert b"could not be drained: hangs again" in world.heard().text


@pytest.fixture
def kept():
    world = World(keep_listening=True)
    yield world
    world.close()


def test_of_a_frontend_that_is_gone_no_ring_and_no_memory_is_left_and_another_may_come(kept):
    for _ in range(2):
        serving(kept)
        kept.frontend.close()
        assert kept.answers(0, 7) == RingStop(3, 1)
        assert kept.answers(0) == MemoryClear(4)
        assert kept.heard() == FrontendGone(b"", True)
        kept.workers[0].close()
        kept.add_worker(0)
        kept.connect()


def test_a_worker_that_keeps_a_frontends_memory_is_replaced_before_another_one_is_served(kept):
    serving(kept)
    kept.frontend.close()
    kept.answers(0, 7)
    kept.workers[0].send(Refused(kept.asked(0).seq, b"still in use"))
    assert kept.heard() == KillWorker(0, b"still in use")
    assert kept.heard() == FrontendGone(b"", True)
    kept.add_worker(0)
    kept.connect()
    serving(kept)


def adopt_tables(world, queues):
    """GET_INFLIGHT_FD and SET_INFLIGHT_FD of the same memory, as a frontend does; its descriptor."""
    world.tell(vu.VHOST_USER_GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, queues, 128))
    assert world.heard() == NeedInflight()
    with sealed_memfd("tables", 4 * TABLE_STRIDE_BYTES) as memory:
        world.supervisor.send(InflightGiven(), [memory])
    reply, (fd,), _, _ = socket.recv_fds(world.frontend, 36, 1)
    world.tell(vu.VHOST_USER_SET_INFLIGHT_FD, reply[12:], [fd])
    return fd


def test_the_frontends_tables_are_adopted_at_the_first_start_only_and_by_successors_of_that(world):
    os.close(adopt_tables(world, 2))
    start = serving(world)
    assert (start.adopted, start.table_offset) == (True, TABLE_STRIDE_BYTES)
    world.workers[0].close()
    world.add_worker(0)
    restored(world, start=start)
    world.tell(vu.VHOST_USER_SET_VRING_ENABLE, struct.pack("<II", 1, 0))
    world.answers(0, 9)
    world.tell(vu.VHOST_USER_SET_VRING_ENABLE, struct.pack("<II", 1, 1), [], NEED_REPLY)
    again = world.answers(0)
    assert (again.adopted, again.table_offset) == (False, TABLE_STRIDE_BYTES)
    world.reply()


def test_a_frontend_that_asks_for_tables_again_gets_the_same(world):
    first = adopt_tables(world, 2)
    world.tell(vu.VHOST_USER_GET_INFLIGHT_FD, struct.pack("<QQHH4x", 0, 0, 3, 128))
    reply, (second,), _, _ = socket.recv_fds(world.frontend, 36, 1)
    assert struct.unpack_from("<QQH", reply, 12) == (3 * TABLE_STRIDE_BYTES, 0, 3)
    assert os.path.sameopenfile(first, second)
    for fd in (first, second):
        os.close(fd)


def test_a_queue_without_a_table_of_the_frontends_has_one_of_vfsds_own(world):
    os.close(adopt_tables(world, 1))
    start = serving(world)
    assert (start.adopted, start.table_offset) == (False, 0)


def test_a_ring_that_begins_anew_has_another_number(world):
    first = serving(world)
    world.tell(vu.VHOST_USER_SET_VRING_ENABLE, struct.pack("<II", 1, 0))
    world.answers(0, 9)
    world.tell(vu.VHOST_USER_SET_VRING_ENABLE, struct.pack("<II", 1, 1), [], NEED_REPLY)
    second = world.answers(0)
    assert second.start_number != first.start_number
    world.reply()


def test_the_end_of_the_supervisor_is_the_end(world):
    world.supervisor.close()
    world.thread.join(2)
    assert not world.thread.is_alive()
