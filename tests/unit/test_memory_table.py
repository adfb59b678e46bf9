"""The memory regions that control keeps for the workers."""

import os

import pytest

from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.wire.vhost_user import MemoryRegion
from vfsd.worker.memory_table import MAX_MEM_SLOTS, MemoryTable


def some_fd():
    return OwnedFd(os.open("/dev/null", os.O_RDONLY))


def region(gpa, size=0x1000, uva=None, mmap_offset=0):
    return MemoryRegion(gpa, size, 0x7F0000000000 + gpa if uva is None else uva, mmap_offset)


@pytest.fixture
def table():
    table = MemoryTable()
    yield table
    table.clear()


def test_it_owns_the_descriptors(table):
    first, second = some_fd(), some_fd()
    table.add(region(0), first)
    table.add(region(0x1000), second)
    assert [slot.region for slot in table] == [region(0), region(0x1000)]
    table.remove(region(0))
    assert first.closed
    assert not second.closed
    table.clear()
    assert second.closed
    assert len(table) == 0


@pytest.mark.parametrize("other", [region(0x1FFF), region(0x1001, 1), region(0, 0x10000), region(0x1000)])
def test_regions_that_overlap_in_guest_memory_are_a_breach(table, other):
    table.add(region(0x1000), some_fd())
    refused = some_fd()
    with pytest.raises(FrontendBreach, match="overlaps"):
        table.add(other, refused)
    assert refused.closed
    assert len(table) == 1


def test_the_number_of_slots_is_bounded(table):
    for index in range(MAX_MEM_SLOTS):
        table.add(region(index * 0x1000), some_fd())
    with pytest.raises(FrontendBreach, match="more than 509"):
        table.add(region(0x10000000), some_fd())


def test_removing_ignores_the_mmap_offset_and_nothing_else(table):
    table.add(region(0x1000, mmap_offset=0x5000), some_fd())
    for wrong in (region(0x2000), region(0x1000, 0x2000), region(0x1000, uva=1)):
        with pytest.raises(FrontendBreach, match="no memory region"):
            table.remove(wrong)
    assert table.remove(region(0x1000)).mmap_offset == 0x5000


def test_coverage_ends_where_the_region_ends(table):
    table.add(MemoryRegion(0, 0x1000, 0x5000, 0), some_fd())
    table.add(MemoryRegion(0x1000, 0x1000, 2**64 - 0x1000, 0), some_fd())
    assert table.covers(0x5000, 0x1000)
    assert table.covers(0x5FFF, 1)
    assert table.covers(2**64 - 1, 1)
    for uva, length in ((0x4FFF, 1), (0x5FFF, 2), (0x5000, 0x1001), (2**64 - 1, 2), (0, 1)):
        assert not table.covers(uva, length)
