"""The vhost-user device, message by message, with workers that only take notes."""

import contextlib
import os
import struct
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.log import Logger
from vfsd.wire import vhost_user as vu
from vfsd.wire.inflight import TABLE_STRIDE_BYTES
from vfsd.worker.device import FEATURES, Device
from vfsd.worker.memory_table import MemoryTable
from vfsd.worker.worker_links import WorkerRefused
from vfsd.worker.worker_port import FdReply

NEED_REPLY = vu.VHOST_USER_NEED_REPLY_MASK
OK, REFUSED = 0, 1
RAM = vu.MemoryRegion(0, 0x100000, 0x7F0000000000, 0)


def inflight(queues, size=0):
    return struct.pack("<QQHH", size, 0, queues, 128)


class Notes(Logger):
    def __init__(self):
        super().__init__(5)
        self.lines = []

    def _emit(self, level, text):
        self.lines.append(text)


class FakeWorkers:
    """Does everything at once and remembers it; `refuse` makes a call fail, `last_avail` is what a stop reports."""

    def __init__(self):
        self.calls = []
        self.refuse = set()
        self.last_avail = 0
        self.tables = None

    def _note(self, name, *details):
        if name in self.refuse:
            raise WorkerRefused(f"{name} refused")
        self.calls.append((name, *details))

    def need_for(self, queue_index):
        if ("need", queue_index) not in self.calls:
            self.calls.append(("need", queue_index))

    def add_memory(self, region, fd):
        os.fstat(fd.fileno())
        self._note("add", region.gpa)

    def remove_memory(self, region):
        self._note("remove", region.gpa)

    def clear_memory(self):
        self._note("clear")

    def start_ring(self, ring, *, event_idx):
        self._note("start", ring.index, ring.size, ring.base, event_idx)
        assert ring.lies_in(self.memory)

    def stop_ring(self, queue_index):
        self._note("stop", queue_index)
        return self.last_avail

    def replace_kick(self, queue_index, fd):
        self._note("kick", queue_index, fd is not None)

    def replace_call(self, queue_index, fd):
        self._note("call", queue_index, fd is not None)

    def replace_err(self, queue_index, fd):
        self._note("err", queue_index, fd is not None)

    def inflight_memory(self):
        self._note("inflight")
        self.tables = self.tables or OwnedFd(os.eventfd(0))
        return self.tables

    def close(self):
        if self.tables is not None:
            self.tables.close()

    def adopt_inflight(self, fd, offset, size_bytes, queues):
        fd.close()
        self._note("adopt", offset, size_bytes, queues)

    def take(self, *names):
        """The calls so far of these kinds (default: all but need), forgotten afterwards."""
        calls = [call for call in self.calls if (call[0] in names if names else call[0] != "need")]
        self.calls.clear()
        return calls


class Frontend:
    """Speaks to a Device as a frontend would; `tell` gives the reply's number, bytes, or None."""

    def __init__(self, request_queues=2, tag=None):
        self.workers = FakeWorkers()
        self.log = Notes()
        self.workers.memory = MemoryTable()
        self.device = Device(self.workers, self.log, self.workers.memory, request_queues=request_queues, tag=tag)
        self.given = []

    def fd(self):
        fd = OwnedFd(os.eventfd(0))
        self.given.append(fd)
        return fd

    def tell(self, request, payload=b"", fds=(), flags=0):
        reply = self.device.handle(vu.Message(request, vu.VHOST_USER_VERSION | flags, payload), list(fds))
        if reply is None:
            return None
        if isinstance(reply, FdReply):
            reply = reply.data
        answered, reply_flags, size = vu.HEADER.unpack_from(reply)
        assert (answered, reply_flags, size) == (request, vu.VHOST_USER_VERSION | vu.VHOST_USER_REPLY_MASK, len(reply) - 12)
        return struct.unpack("<Q", reply[12:])[0] if size == 8 and request != vu.VHOST_USER_GET_VRING_BASE else reply[12:]

    def features(self, features=FEATURES):
        return self.tell(vu.VHOST_USER_SET_FEATURES, struct.pack("<Q", features))

    def protocol(self, *bits):
        return self.tell(vu.VHOST_USER_SET_PROTOCOL_FEATURES, struct.pack("<Q", sum(1 << bit for bit in bits)))

    def add_region(self, region=RAM, flags=0):
        return self.tell(vu.VHOST_USER_ADD_MEM_REG, bytes(8) + struct.pack("<QQQQ", *region), [self.fd()], flags)

    def state(self, request, index, num=0, flags=0):
        return self.tell(request, struct.pack("<II", index, num), (), flags)

    def num(self, index=1, size=128):
        return self.state(vu.VHOST_USER_SET_VRING_NUM, index, size)

    def base(self, index=1, base=5):
        return self.state(vu.VHOST_USER_SET_VRING_BASE, index, base)

    def addr(self, index=1, start=RAM.uva):
        start += 0x4000 * index
        payload = struct.pack("<IIQQQQ", index, 0, start, start + 0x2000, start + 0x1000, 0)
        return self.tell(vu.VHOST_USER_SET_VRING_ADDR, payload)

    def ring_fd(self, request, index=1, present=True):
        return self.tell(request, struct.pack("<Q", index | (0 if present else 0x100)), [self.fd()] if present else [])

    def kick(self, index=1, present=True):
        return self.ring_fd(vu.VHOST_USER_SET_VRING_KICK, index, present)

    def enable(self, index=1, on=1, flags=0):
        return self.state(vu.VHOST_USER_SET_VRING_ENABLE, index, on, flags)

    def get_base(self, index=1):
        return struct.unpack("<II", self.state(vu.VHOST_USER_GET_VRING_BASE, index))

    def run(self, index=1):
        self.num(index)
        self.base(index)
        self.addr(index)
        self.kick(index)
        self.enable(index)


@pytest.fixture
def frontend():
    frontend = Frontend()
    yield frontend
    frontend.device.close()
    frontend.workers.close()
    assert all(fd.closed for fd in frontend.given), "every descriptor is closed exactly once"


@pytest.fixture
def running(frontend):
    frontend.protocol(vu.VHOST_USER_PROTOCOL_F_MQ, vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    frontend.add_region()
    frontend.features()
    frontend.run()
    frontend.workers.calls.clear()
    return frontend


def test_what_is_offered(frontend):
    assert frontend.tell(vu.VHOST_USER_GET_FEATURES) == 1 << 32 | 1 << 28 | 1 << 29 | 1 << 30
    assert frontend.tell(vu.VHOST_USER_GET_PROTOCOL_FEATURES) == 1 << 0 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 15
    assert frontend.tell(vu.VHOST_USER_GET_QUEUE_NUM) == 3
    assert frontend.tell(vu.VHOST_USER_GET_MAX_MEM_SLOTS) == 509


def test_config_is_offered_only_with_a_tag(frontend):
    tagged = Frontend(tag=b"t")
    assert tagged.tell(vu.VHOST_USER_GET_PROTOCOL_FEATURES) & 1 << 9
    with pytest.raises(FrontendBreach, match=r"VHOST_USER_GET_CONFIG: .*--tag"):
        frontend.tell(vu.VHOST_USER_GET_CONFIG, struct.pack("<III", 0, 4, 0) + bytes(4))


def test_any_window_of_the_configuration_space():
    frontend = Frontend(request_queues=3, tag=b"myfs")
    space = b"myfs".ljust(36, b"\0") + struct.pack("<I", 3)
    for offset in range(42):
        for size in range(42):
            reply = frontend.tell(vu.VHOST_USER_GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(size))
            window = struct.pack("<III", offset, size, 0) + space[offset : offset + size]
            assert reply == (window if offset + size <= 40 else b"")


def test_the_configuration_space_is_read_only():
    frontend = Frontend(tag=b"t")
    payload = struct.pack("<III", 0, 4, 0) + b"evil"
    with pytest.raises(FrontendBreach, match="read-only"):
        frontend.tell(vu.VHOST_USER_SET_CONFIG, payload)
    frontend.protocol(vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    assert frontend.tell(vu.VHOST_USER_SET_CONFIG, payload, (), NEED_REPLY) == REFUSED


# Not those where the base comes last: the ring is complete without it (0), and a base then belongs to a running ring.
_ORDERS = [order for order in permutations(["num", "base", "addr", "kick", "enable"]) if order[-1] != "base"]


@pytest.mark.parametrize("order", _ORDERS)
def test_a_ring_starts_once_it_is_complete_in_any_order(frontend, order):
    frontend.add_region()
    frontend.features()
    for step in order:
        getattr(frontend, step)()
    assert frontend.workers.take("start", "stop") == [("start", 1, 128, 5, True)]


def test_features_may_come_last(frontend):
    frontend.add_region()
    frontend.run()
    assert frontend.workers.take("start") == []
    frontend.features(FEATURES & ~(1 << 29))
    assert frontend.workers.take("start") == [("start", 1, 128, 5, False)]


def test_without_protocol_features_the_kick_starts_the_ring(frontend):
    frontend.add_region()
    frontend.features(FEATURES & ~(1 << 30))
    frontend.num()
    frontend.addr()
    frontend.kick(present=False)
    assert frontend.workers.take("start") == [("start", 1, 128, 0, True)]


def test_an_acknowledgement_is_given_only_where_it_was_negotiated(frontend):
    assert frontend.tell(vu.VHOST_USER_SET_OWNER, b"", (), NEED_REPLY) is None
    frontend.protocol(vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    assert frontend.tell(vu.VHOST_USER_SET_OWNER, b"", (), NEED_REPLY) == OK
    assert frontend.tell(vu.VHOST_USER_SET_OWNER) is None


def test_setting_protocol_features_is_itself_acknowledged(frontend):
    payload = struct.pack("<Q", 1 << vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    assert frontend.tell(vu.VHOST_USER_SET_PROTOCOL_FEATURES, payload, (), NEED_REPLY) == OK


def test_a_message_with_a_reply_of_its_own_is_not_acknowledged_too(running):
    reply = running.tell(vu.VHOST_USER_GET_VRING_BASE, struct.pack("<II", 1, 0), (), NEED_REPLY)
    assert len(reply) == 8
    assert running.tell(vu.VHOST_USER_GET_FEATURES, b"", (), NEED_REPLY) == FEATURES


def test_get_vring_base_stops_the_ring_and_tells_where_it_stands(running):
    running.workers.last_avail = 77
    assert running.get_base() == (1, 77)
    assert running.workers.take() == [("stop", 1)]
    assert running.get_base() == (1, 77)
    running.enable()
    assert running.workers.take() == []
    running.kick()
    assert running.workers.take() == [("start", 1, 128, 77, True)]


def test_get_vring_base_of_a_ring_that_never_ran(frontend):
    frontend.base(2, 9)
    assert frontend.get_base(2) == (2, 9)


def test_disable_and_enable_go_on_where_it_stopped(running):
    running.workers.last_avail = 6
    running.enable(on=0)
    running.enable(on=0)
    running.enable(on=1)
    running.enable(on=1)
    assert running.workers.take() == [("stop", 1), ("start", 1, 128, 6, True)]


def test_stop_and_cont_without_new_memory(running):
    running.enable(on=0)
    running.get_base()
    running.ring_fd(vu.VHOST_USER_SET_VRING_CALL)
    assert running.workers.take() == [("stop", 1)]
    running.features()
    running.run()
    assert running.workers.take() == [("start", 1, 128, 5, True)]


def test_a_reset_forgets_rings_and_features_but_not_memory(running):
    running.tell(vu.VHOST_USER_RESET_DEVICE)
    assert running.workers.take() == [("stop", 1)]
    running.run()
    assert running.workers.take() == []
    running.features()
    assert running.workers.take() == [("start", 1, 128, 5, True)]


def test_reset_owner_disables_all_rings(running):
    running.tell(vu.VHOST_USER_RESET_OWNER)
    assert running.workers.take() == [("stop", 1)]
    running.enable()
    assert running.workers.take("start")


@pytest.mark.parametrize(
    ("request_number", "name"),
    [(vu.VHOST_USER_SET_VRING_CALL, "call"), (vu.VHOST_USER_SET_VRING_ERR, "err"), (vu.VHOST_USER_SET_VRING_KICK, "kick")],
)
def test_descriptors_are_replaced_while_the_ring_runs(running, request_number, name):
    running.ring_fd(request_number)
    running.ring_fd(request_number, present=False)
    assert running.workers.take() == [(name, 1, True), (name, 1, False)]


def test_call_and_err_before_anything_else(frontend):
    for index in range(3):
        frontend.ring_fd(vu.VHOST_USER_SET_VRING_CALL, index)
        frontend.ring_fd(vu.VHOST_USER_SET_VRING_ERR, index)
    assert frontend.workers.calls == [("need", 0), ("need", 1), ("need", 2)]


def test_the_backend_request_descriptor_is_kept_and_replaced(frontend):
    first, second = frontend.fd(), frontend.fd()
    frontend.tell(vu.VHOST_USER_SET_BACKEND_REQ_FD, b"", [first])
    assert not first.closed
    frontend.tell(vu.VHOST_USER_SET_BACKEND_REQ_FD, b"", [second])
    assert first.closed
    assert not second.closed


def mem_table(frontend, regions, fds=None, padding=0, flags=0):
    payload = struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<QQQQ", *region) for region in regions) + bytes(padding)
    given = [frontend.fd() for _ in range(len(regions) if fds is None else fds)]
    return frontend.tell(vu.VHOST_USER_SET_MEM_TABLE, payload, given, flags)


def test_a_memory_table_replaces_all_memory_while_rings_pause(running):
    running.workers.last_avail = 8
    mem_table(running, [RAM, vu.MemoryRegion(0x200000, 0x1000, 0x10000, 0)])
    assert running.workers.take() == [("stop", 1), ("clear",), ("add", 0), ("add", 0x200000), ("start", 1, 128, 8, True)]


def test_the_padded_memory_table_of_user_mode_linux(frontend):
    mem_table(frontend, [RAM], padding=32)
    assert frontend.workers.take() == [("clear",), ("add", 0)]


def test_a_memory_table_needs_a_descriptor_for_each_region(frontend):
    with pytest.raises(FrontendBreach, match="VHOST_USER_SET_MEM_TABLE: 1 descriptors for 2 memory regions"):
        mem_table(frontend, [RAM, vu.MemoryRegion(0x200000, 0x1000, 0x10000, 0)], fds=1)


def test_removing_the_memory_of_a_ring_pauses_it_until_memory_comes_back(running):
    payload = bytes(8) + struct.pack("<QQQQ", *RAM)
    running.tell(vu.VHOST_USER_REM_MEM_REG, payload)
    assert running.workers.take() == [("stop", 1), ("remove", 0)]
    running.add_region()
    assert running.workers.take() == [("add", 0), ("start", 1, 128, 0, True)]


def test_old_frontends_send_a_descriptor_with_rem_mem_reg(running):
    other = vu.MemoryRegion(0x200000, 0x1000, 0x10000, 0)
    running.add_region(other)
    running.workers.calls.clear()
    running.tell(vu.VHOST_USER_REM_MEM_REG, bytes(8) + struct.pack("<QQQQ", *other), [running.fd()])
    assert running.workers.take() == [("stop", 1), ("remove", 0x200000), ("start", 1, 128, 0, True)]


def test_ram_that_is_not_shared_gets_an_error_that_helps(frontend):
    frontend.features()
    with pytest.raises(FrontendBreach, match=r"VHOST_USER_SET_VRING_ENABLE: .*not shared memory.*memory-backend-memfd.*share=on"):
        frontend.run()


def test_a_ring_outside_of_memory_is_a_breach(frontend):
    frontend.add_region(vu.MemoryRegion(0, 0x1000, 0x1000, 0))
    frontend.features()
    with pytest.raises(FrontendBreach, match="ring 1 does not lie"):
        frontend.run()


def test_memory_that_a_worker_cannot_map_is_refused_and_forgotten(frontend):
    frontend.protocol(vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    frontend.workers.refuse = {"add"}
    assert frontend.add_region(flags=NEED_REPLY) == REFUSED
    assert frontend.given[-1].closed
    assert frontend.log.lines == ["VHOST_USER_ADD_MEM_REG failed: add refused"]
    frontend.workers.refuse = set()
    assert frontend.add_region(flags=NEED_REPLY) == OK


def test_a_refusal_that_nobody_would_hear_of_ends_the_connection(frontend):
    frontend.workers.refuse = {"add"}
    with pytest.raises(FrontendBreach, match="VHOST_USER_ADD_MEM_REG: add refused"):
        frontend.add_region()


def test_a_ring_that_a_worker_will_not_start_is_refused(frontend):
    frontend.protocol(vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    frontend.add_region()
    frontend.features()
    frontend.num()
    frontend.addr()
    frontend.kick()
    frontend.workers.refuse = {"start"}
    assert frontend.enable(flags=NEED_REPLY) == REFUSED
    frontend.workers.refuse = set()
    assert frontend.enable(flags=NEED_REPLY) == OK
    assert frontend.workers.take("start") == [("start", 1, 128, 0, True)]


def test_a_ring_that_cannot_be_drained_ends_the_connection(running):
    running.workers.refuse = {"stop"}
    with pytest.raises(FrontendBreach, match="ring 1 could not be drained"):
        running.get_base()


def test_a_broken_ring_is_logged_and_stops_alone(running):
    running.run(2)
    running.device.ring_broken(1, "a loop")
    running.device.ring_broken(0, "not running: ignored")
    running.device.ring_broken(99, "no such ring: ignored")
    assert running.log.lines == ["queue 1 is stopped, the guest's driver broke it: a loop"]
    running.workers.calls.clear()
    running.workers.refuse = {"stop"}
    assert running.get_base(1) == (1, 5)
    running.workers.refuse = set()
    running.workers.last_avail = 6
    assert running.get_base(2) == (2, 6)
    running.run(1)
    assert ("start", 1, 128, 5, True) in running.workers.take()


@pytest.mark.parametrize(
    ("breach", "text"),
    [
        (lambda f: f.tell(99), "vhost-user request 99"),
        (lambda f: f.tell(vu.VHOST_USER_SET_LOG_BASE, bytes(16), [f.fd()]), "VHOST_USER_SET_LOG_BASE"),
        (lambda f: f.tell(vu.VHOST_USER_SET_OWNER, b"", [f.fd()]), "VHOST_USER_SET_OWNER: 1 descriptors"),
        (lambda f: f.tell(vu.VHOST_USER_SET_OWNER, b"x"), "VHOST_USER_SET_OWNER: payload of 1 bytes"),
        (lambda f: f.tell(vu.VHOST_USER_ADD_MEM_REG, bytes(40)), "VHOST_USER_ADD_MEM_REG: 0 descriptors"),
        (lambda f: f.tell(vu.VHOST_USER_ADD_MEM_REG, bytes(40), [f.fd()]), "VHOST_USER_ADD_MEM_REG: empty"),
        (lambda f: f.tell(vu.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 1)), "VHOST_USER_SET_VRING_KICK: 0 descriptors"),
        (lambda f: f.tell(vu.VHOST_USER_SET_VRING_CALL, struct.pack("<Q", 0x101), [f.fd()]), "VHOST_USER_SET_VRING_CALL: 1 descriptors"),
        (lambda f: f.tell(vu.VHOST_USER_GET_INFLIGHT_FD, bytes(21)), "VHOST_USER_GET_INFLIGHT_FD: payload of 21 bytes"),
        (lambda f: f.tell(vu.VHOST_USER_GET_INFLIGHT_FD, inflight(0)), "VHOST_USER_GET_INFLIGHT_FD: in-flight tables of 0 queues"),
        (lambda f: f.tell(vu.VHOST_USER_GET_INFLIGHT_FD, inflight(4)), "in-flight tables of 4 queues, there are 3"),
        (lambda f: f.tell(vu.VHOST_USER_SET_INFLIGHT_FD, inflight(1)), "VHOST_USER_SET_INFLIGHT_FD: 0 descriptors"),
        (lambda f: f.tell(vu.VHOST_USER_SET_INFLIGHT_FD, inflight(1, size=2**64 - 1), [f.fd()]), "of a file"),
        (lambda f: f.num(3), "VHOST_USER_SET_VRING_NUM: there is no queue 3"),
        (lambda f: f.num(2**32 - 1), "there is no queue 4294967295"),
        (lambda f: f.num(1, 100), "VHOST_USER_SET_VRING_NUM: a size of 100"),
        (lambda f: f.base(1, 65536), "VHOST_USER_SET_VRING_BASE"),
        (lambda f: f.addr(1, 8), "VHOST_USER_SET_VRING_ADDR: misaligned"),
        (lambda f: f.enable(1, 2), "VHOST_USER_SET_VRING_ENABLE: 2 is neither"),
        (lambda f: f.features(FEATURES | 1 << 26), "VHOST_USER_SET_FEATURES: bits 0x4000000 were not offered"),
        (lambda f: f.protocol(1), "VHOST_USER_SET_PROTOCOL_FEATURES: bits 0x2 were not offered"),
        (lambda f: f.tell(vu.VHOST_USER_REM_MEM_REG, bytes(8) + struct.pack("<QQQQ", *RAM)), "VHOST_USER_REM_MEM_REG: there is no"),
    ],
)
def test_a_breach_names_message_and_reason(frontend, breach, text):
    with pytest.raises(FrontendBreach) as error:
        breach(frontend)
    assert text in str(error.value)


@pytest.mark.parametrize("padding", [0, 4])
def test_in_flight_tables_are_given_and_taken_back(frontend, padding):
    reply = frontend.tell(vu.VHOST_USER_GET_INFLIGHT_FD, inflight(3) + bytes(padding))
    assert reply == inflight(3, size=3 * TABLE_STRIDE_BYTES) + bytes(padding)
    assert frontend.tell(vu.VHOST_USER_SET_INFLIGHT_FD, reply, [frontend.fd()]) is None
    assert frontend.workers.take() == [("inflight",), ("adopt", 0, 3 * TABLE_STRIDE_BYTES, 3)]


def test_other_in_flight_tables_while_rings_run_are_a_breach(running):
    with pytest.raises(FrontendBreach, match="while rings run"):
        running.tell(vu.VHOST_USER_SET_INFLIGHT_FD, inflight(1), [running.fd()])


def test_another_event_idx_while_rings_run_is_a_breach(running):
    with pytest.raises(FrontendBreach, match="EVENT_IDX"):
        running.features(FEATURES & ~(1 << 29))
    running.features()


_REQUESTS = st.integers(0, 45)
_PAYLOADS = st.one_of(
    st.binary(max_size=80),
    st.tuples(st.integers(0, 4), st.integers(0, 300)).map(lambda pair: struct.pack("<II", *pair)),
    st.tuples(st.integers(0, 3), st.booleans()).map(lambda pair: struct.pack("<Q", pair[0] | (0x100 if pair[1] else 0))),
    st.sampled_from([RAM, RAM._replace(gpa=2**63)]).map(lambda region: bytes(8) + struct.pack("<QQQQ", *region)),
    st.integers(0, 5).map(inflight),
    st.sampled_from([FEATURES, 1 << 3, 0]).map(lambda number: struct.pack("<Q", number)),
)


@given(st.lists(st.tuples(_REQUESTS, _PAYLOADS, st.integers(0, 3), st.sampled_from([0, NEED_REPLY])), max_size=12))
def test_any_messages_are_handled_or_a_breach_and_leak_nothing(messages):
    frontend = Frontend(tag=b"t")
    for request, payload, fds, flags in messages:
        with contextlib.suppress(FrontendBreach):
            frontend.tell(request, payload, [frontend.fd() for _ in range(fds)], flags)
    frontend.device.close()
    frontend.workers.close()
    assert all(fd.closed for fd in frontend.given)
