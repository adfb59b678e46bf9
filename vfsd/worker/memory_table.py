"""The guest's memory regions as the frontend described them: what control keeps so that any worker can be given them.

Who controls the numbers: the frontend. The codec has checked that no region is empty or wraps round; here they are checked
against each other. Nothing is mapped: control never looks into guest memory. No I/O beyond closing descriptors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.wire.vhost_user import MemoryRegion

MAX_MEM_SLOTS = 509  # what virtiofsd and KVM offer; each slot is a descriptor here and a mapping in every worker


class Slot(NamedTuple):
    """One region and the descriptor of the memory behind it."""

    region: MemoryRegion
    fd: OwnedFd


class MemoryTable:
    """All regions; owns their descriptors."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, region: MemoryRegion, fd: OwnedFd) -> Slot:
        """Takes the descriptor, also when it raises FrontendBreach."""
        try:
            self._check(region)
        except FrontendBreach:
            fd.close()
            raise
        slot = Slot(region, fd)
        self._slots.append(slot)
        return slot

    def remove(self, region: MemoryRegion) -> MemoryRegion:
        """Found by guest address, size and user address; the specification ignores the mmap offset here."""
        for slot in self._slots:
            if slot.region[:3] == region[:3]:
                self._slots.remove(slot)
                slot.fd.close()
                return slot.region
        raise FrontendBreach(f"there is no memory region of {region.size:#x} bytes at {region.gpa:#x}")

    def clear(self) -> None:
        for slot in self._slots:
            slot.fd.close()
        self._slots.clear()

    def covers(self, uva: int, length: int) -> bool:
        """Whether these bytes of the frontend's address space lie in one region."""
        return any(region.uva <= uva and length <= region.size and uva - region.uva <= region.size - length for region, _ in self._slots)

    def _check(self, region: MemoryRegion) -> None:
        if len(self._slots) == MAX_MEM_SLOTS:
            raise FrontendBreach(f"more than {MAX_MEM_SLOTS} memory regions")
        for other, _ in self._slots:
            if _overlap(region.gpa, region.size, other.gpa, other.size):
                raise FrontendBreach(f"the memory region at guest address {region.gpa:#x} overlaps the one at {other.gpa:#x}")


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size
