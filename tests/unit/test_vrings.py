"""The state of one vring: what makes it complete, what may change while it runs, who closes its descriptors."""

import os
from itertools import permutations

import pytest

from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.wire.vhost_user import MemoryRegion, VringAddr
from vfsd.worker.memory_table import MemoryTable
from vfsd.worker.vrings import Vring

ADDRESSES = VringAddr(index=1, flags=0, desc=0x10000, used=0x12000, avail=0x11000, log=0)


def some_fd():
    return OwnedFd(os.eventfd(0))


@pytest.fixture
def ring():
    ring = Vring(1)
    yield ring
    ring.close()


def enable(ring):
    ring.enabled = True


STEPS = [
    lambda ring: ring.set_size(128),
    lambda ring: ring.set_addresses(ADDRESSES),
    lambda ring: ring.set_kick(None),
    enable,
]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_it_wants_to_run_after_the_last_step_in_any_order(ring, order):
    for position in order:
        assert not ring.wants_to_run
        STEPS[position](ring)
    assert ring.wants_to_run
    ring.running = True
    assert not ring.wants_to_run


@pytest.mark.parametrize("size", [0, 3, 65536, 2**31, 1000])
def test_a_size_that_no_split_ring_has_is_a_breach(ring, size):
    with pytest.raises(FrontendBreach, match="power of two"):
        ring.set_size(size)


@pytest.mark.parametrize("change", [{"desc": 0x10008}, {"avail": 0x11001}, {"used": 0x12002}])
def test_misaligned_parts_are_a_breach(ring, change):
    with pytest.raises(FrontendBreach, match="misaligned"):
        ring.set_addresses(VringAddr(**{"index": 1, "flags": 0, "desc": 0x10000, "used": 0x12000, "avail": 0x11000, "log": 0, **change}))


def test_a_base_has_16_bits(ring):
    ring.set_base(65535)
    with pytest.raises(FrontendBreach, match="16 bits"):
        ring.set_base(65536)


def test_a_running_ring_keeps_its_shape(ring):
    for step in STEPS:
        step(ring)
    ring.running = True
    ring.set_size(128)
    ring.set_addresses(VringAddr(index=1, flags=1, desc=0x10000, used=0x12000, avail=0x11000, log=0))  # only logging changes
    for change in (
        lambda: ring.set_size(256),
        lambda: ring.set_base(0),
        lambda: ring.set_addresses(VringAddr(index=1, flags=0, desc=0x20000, used=0x12000, avail=0x11000, log=0)),
    ):
        with pytest.raises(FrontendBreach, match="is running"):
            change()


def test_a_stop_needs_a_new_kick_and_a_reset_everything(ring):
    for step in STEPS:
        step(ring)
    ring.set_base(7)
    ring.set_call(some_fd())
    ring.stop()
    assert not ring.wants_to_run
    ring.set_kick(None)
    assert ring.wants_to_run
    assert ring.base == 7
    ring.reset()
    assert (ring.size, ring.addresses, ring.base, ring.enabled) == (0, None, 0, False)
    assert ring.call is not None


def test_a_broken_ring_waits_for_a_stop(ring):
    for step in STEPS:
        step(ring)
    ring.broken = True
    assert not ring.wants_to_run
    ring.stop()
    ring.set_kick(None)
    assert ring.wants_to_run


def test_replaced_descriptors_are_closed_once(ring):
    for setter in (ring.set_kick, ring.set_call, ring.set_err):
        first, second = some_fd(), some_fd()
        setter(first)
        setter(second)
        assert first.closed
        assert not second.closed
        setter(None)
        assert second.closed


def test_it_lies_in_memory_only_with_all_of_its_parts(ring):
    table = MemoryTable()
    ring.set_size(128)
    assert not ring.lies_in(table)
    ring.set_addresses(ADDRESSES)
    table.add(MemoryRegion(0, 0x1000, 0x10000, 0), some_fd())
    table.add(MemoryRegion(0x1000, 0x1000, 0x11000, 0), some_fd())
    assert not ring.lies_in(table)
    table.add(MemoryRegion(0x2000, 6 + 8 * 128, 0x12000, 0), some_fd())
    assert ring.lies_in(table)
    ring.set_size(256)
    assert not ring.lies_in(table)
    table.clear()
