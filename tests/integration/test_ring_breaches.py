"""Rings that no driver lays out: that ring is stopped, with its err eventfd and a log line; the process and the other rings go on."""

import os
import struct

import pytest

from tests.support.frontend.checks import assert_same, eventually, eventually_stable
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.ring import (
    DESC_BYTES,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    Descriptor,
)
from tests.support.frontend.sequences import QEMU_10
from tests.support.frontend.serving import start
from vfsd.wire import fuse_abi as abi

NEXT, WRITE, INDIRECT = VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT
LOG = r"(?i)(queue|ring) ?1\b"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Two workers: what happens to one ring must not matter to a ring of the same process, nor to one of another."""
    served = start(tmp_path_factory.mktemp("breaches"), Options(request_queues=2), queues=3)
    yield served
    served.close()


@pytest.fixture
def served(running):
    """The rings as after a reset by the guest: a broken one can be used again."""
    yield running
    device = running.device
    QEMU_10.stop(device)
    device.reset_rings()
    for ring in device.rings:
        clear(ring.err_fd)
    QEMU_10.cont(device)
    running.client.init()
    assert_same(running.client.attr(ROOT), running.share)
    running.log_mark = len(running.daemon.log)
    running.expected_log.clear()


def clear(eventfd):
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return


class Hostile:
    """A GETATTR in guest memory, and places to put descriptors of it."""

    def __init__(self, served):
        self.ring = served.device.rings[1]
        self.ram = served.device.ram
        message = served.client.header(abi.FUSE_GETATTR, ROOT, 16) + bytes(16)
        self.request = Descriptor(self.ram.alloc(4096), len(message))
        self.ram.write(self.request.addr, message)
        self.reply = Descriptor(self.ram.alloc(4096), 120, WRITE)
        self.end_of_ram = self.ram.regions[-1].end

    def table(self, *descriptors):
        gpa = self.ram.alloc(4096)
        self.ram.write(gpa, b"".join(descriptor.pack() for descriptor in descriptors))
        return Descriptor(gpa, DESC_BYTES * len(descriptors), INDIRECT)


def linked(descriptor, to, extra=0):
    return Descriptor(descriptor.addr, descriptor.length, descriptor.flags | NEXT | extra, to)


def with_address(descriptor, addr, length=None):
    return Descriptor(addr, descriptor.length if length is None else length, descriptor.flags, descriptor.next)


# Each: descriptors of the ring, and the head to make available
DIRECT = {
    "a descriptor linked to itself": lambda h: ({0: linked(h.request, 0)}, 0),
    "a loop of two": lambda h: ({0: linked(h.request, 1), 1: linked(h.request, 0)}, 0),
    "a loop after a proper beginning": lambda h: ({0: linked(h.request, 1), 1: linked(h.reply, 2), 2: linked(h.reply, 1)}, 0),
    "a next outside the table": lambda h: ({0: linked(h.request, h.ring.size)}, 0),
    "the last possible next": lambda h: ({0: linked(h.request, 0xFFFF)}, 0),
    "a head outside the table": lambda h: ({0: h.request}, h.ring.size),
    "the last possible head": lambda h: ({0: h.request}, 0xFFFF),
    "an address outside memory": lambda h: ({0: with_address(h.request, 0x10)}, 0),
    "an address behind memory": lambda h: ({0: with_address(h.request, h.end_of_ram)}, 0),
    "a buffer over the end of memory": lambda h: ({0: with_address(h.request, h.end_of_ram - 8)}, 0),
    "a buffer that wraps round": lambda h: ({0: with_address(h.request, (1 << 64) - 8, 56)}, 0),
    "the largest buffer": lambda h: ({0: with_address(h.request, h.request.addr, 0xFFFF_FFFF)}, 0),
    "a writable buffer outside memory": lambda h: ({0: linked(h.request, 1), 1: with_address(h.reply, 0x10)}, 0),
    "readable after writable": lambda h: ({0: linked(h.reply, 1), 1: h.request}, 0),
    "readable between writable": lambda h: ({0: linked(h.request, 1), 1: linked(h.reply, 2), 2: linked(h.request, 3), 3: h.reply}, 0),
    "a buffer of no bytes": lambda h: ({0: linked(h.request, 1), 1: with_address(h.reply, h.reply.addr, 0)}, 0),
    "a first buffer of no bytes": lambda h: ({0: linked(with_address(h.request, h.request.addr, 0), 1), 1: h.reply}, 0),
    "an indirect table in an indirect table": lambda h: ({0: h.table(h.table(h.request))}, 0),
    "an indirect table with a next": lambda h: ({0: linked(h.table(h.request, h.reply), 1), 1: h.reply}, 0),
    "an indirect table of no bytes": lambda h: ({0: with_address(h.table(h.request), h.request.addr, 0)}, 0),
    "an indirect table of half a descriptor": lambda h: ({0: with_address(h.table(h.request), h.request.addr, 24)}, 0),
    "an indirect table outside memory": lambda h: ({0: Descriptor(0x10, 32, INDIRECT)}, 0),
    "an indirect table over the end of memory": lambda h: ({0: Descriptor(h.end_of_ram - 16, 32, INDIRECT)}, 0),
    "a next outside the indirect table": lambda h: ({0: h.table(linked(h.request, 2), h.reply)}, 0),
    "a loop in an indirect table": lambda h: ({0: h.table(linked(h.request, 1), linked(h.reply, 0))}, 0),
    "a gigantic indirect table": lambda h: ({0: Descriptor(h.request.addr, 0xFFFF_FFF0, INDIRECT)}, 0),
}


def others_go_on(served):
    """hiprio is served by the same worker, request queue 2 by another one."""
    served.client.forget(0x7777, 1)
    assert_same(served.client.attr(ROOT, queue=2), served.share)


def assert_ring_is_stopped(served):
    ring = served.device.rings[1]
    assert ring.error_signalled(), f"no signal on the err eventfd; {served.daemon.describe()}"
    served.wait_for_new_log(LOG)
    assert served.daemon.running
    used = eventually_stable(lambda: ring.used_idx, quiet=0.1)  # what was taken before the breach may still be completed
    others_go_on(served)
    ring.force_kick()  # a stopped ring stays stopped, whatever the guest does
    others_go_on(served)
    assert ring.used_idx == used


@pytest.mark.parametrize("breach", DIRECT)
def test_a_chain_that_cannot_be_stops_its_ring(served, breach):
    hostile = Hostile(served)
    hostile.ring.submit_raw(*DIRECT[breach](hostile))
    assert_ring_is_stopped(served)
    assert not served.device.rings[0].error_signalled(0)
    assert not served.device.rings[2].error_signalled(0)


@pytest.mark.parametrize("jump", [129, 1000, 0x7FFF, 0x8000, 0xFFFF])
def test_an_avail_index_that_jumps_stops_the_ring(served, jump):
    ring = served.device.rings[1]
    ring.write_avail_idx(ring.avail_idx + jump)
    ring.force_kick()
    assert_ring_is_stopped(served)


def test_a_head_that_is_in_flight_already_stops_the_ring(served):
    hostile = Hostile(served)
    ring = hostile.ring
    ring.write_descriptor(0, linked(hostile.request, 1))
    ring.write_descriptor(1, hostile.reply)
    ring.publish([0, 0])
    ring.force_kick()
    assert_ring_is_stopped(served)


def test_what_was_in_flight_before_the_breach_is_harmless(served):
    for _ in range(20):
        served.client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104, kick=False)
    ring = served.device.rings[1]
    ring.write_avail_idx(ring.avail_idx + 500)
    ring.force_kick()
    assert_ring_is_stopped(served)


def test_breaches_on_hiprio_leave_the_request_queues_alone(served):
    ring = served.device.rings[0]
    ring.submit_raw({0: Descriptor(0x10, 16, 0)}, 0)
    assert ring.error_signalled()
    served.wait_for_new_log(r"(?i)(queue|ring) ?0\b")
    assert_same(served.client.attr(ROOT), served.share)
    assert_same(served.client.attr(ROOT, queue=2), served.share)


def test_only_descriptors_and_no_readable_bytes_is_no_breach_but_no_request(served):
    """A chain that is all writable is well formed; there is just no request in it."""
    hostile = Hostile(served)
    hostile.ring.submit_raw({0: hostile.reply}, 0)
    assert eventually(lambda: hostile.ring.used_idx == hostile.ring.avail_idx or hostile.ring.error_signalled(0))
    if hostile.ring.error_signalled(0):
        served.wait_for_new_log(LOG)
    others_go_on(served)


def test_the_used_ring_is_written_only_inside_its_bounds(served):
    """What lies behind the three parts of a ring stays untouched through a thousand requests."""
    ring = served.device.rings[1]
    behind = [(ring.used + 6 + 8 * ring.size, 64), (ring.desc + DESC_BYTES * ring.size, 64)]
    for gpa, length in behind:
        served.device.ram.write(gpa, b"\x5a" * length)
    for _ in range(1000):
        served.client.getattr(ROOT)
    for gpa, length in behind:
        assert served.device.ram.read(gpa, length) == b"\x5a" * length
    assert struct.unpack("<H", served.device.ram.read(ring.used, 2))[0] in (0, 1)
