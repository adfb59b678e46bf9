"""The guest's RAM, as a frontend owns it: memfds, guest addresses, user addresses and an allocator.

Guest addresses (gpa), user addresses (uva) and offsets in the memfd are all different on purpose: a daemon that mixes them up
does not work by accident.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import defaultdict
from dataclasses import dataclass, field

MIB = 1 << 20
_SMALLEST = 64


@dataclass
class Region:
    """One piece of guest RAM, as SET_MEM_TABLE and ADD_MEM_REG describe it."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int
    fd: int
    map: mmap.mmap = field(repr=False)
    next_free: int = 0

    @property
    def end(self) -> int:
        return self.gpa + self.size

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class GuestRam:
    """Guest RAM in one or several regions; an allocator that hands out every piece aligned and never twice at once."""

    def __init__(self, sizes: tuple[int, ...] = (64 * MIB,), *, first_gpa: int = 0x1000_0000, gap: int = 0x1000_0000) -> None:
        self.regions: list[Region] = []
        self.prefer: Region | None = None  # allocate here, and nowhere else, while it is set
        self._lock = threading.Lock()  # each ring may be driven by a thread of its own
        self._free: dict[int, list[int]] = defaultdict(list)  # size class -> gpas given back
        gpa = first_gpa
        for size in sizes:
            self.add_region(size, gpa)
            gpa += size + gap

    def add_region(self, size: int, gpa: int, *, mmap_offset: int = 0) -> Region:
        """More RAM, here only: the daemon learns of it from the caller's message."""
        fd = os.memfd_create(f"guest-{gpa:x}", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap_offset + size)
        # mmap() wants page-aligned offsets, which a legal mmap_offset is.
        view = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=mmap_offset)
        region = Region(gpa, size, 0x7F00_0000_0000 + 2 * gpa, mmap_offset, fd, view)
        self.regions.append(region)
        return region

    def remove_region(self, region: Region) -> None:
        """Forget a region that nothing is allocated in any more."""
        self.regions.remove(region)
        self._free.clear()
        region.close()

    def close(self) -> None:
        for region in self.regions:
            region.close()
        self.regions.clear()

    # Allocation

    def alloc(self, size: int) -> int:
        """The gpa of `size` bytes, aligned to the next power of two up to a page. Contents: whatever was there."""
        bucket = max(_SMALLEST, 1 << (size - 1).bit_length())
        with self._lock:
            if self.prefer is None and self._free[bucket]:
                return self._free[bucket].pop()
            return self._carve(size, bucket)

    def _carve(self, size: int, bucket: int) -> int:
        align = min(bucket, 4096)
        for region in [self.prefer] if self.prefer else self.regions:
            start = (region.next_free + align - 1) & -align
            if bucket <= region.size - start:
                region.next_free = start + bucket
                return region.gpa + start
        raise MemoryError(f"no {size} bytes of guest RAM left")

    def free(self, gpa: int, size: int) -> None:
        """Give back what alloc(size) gave."""
        self._free[max(_SMALLEST, 1 << (size - 1).bit_length())].append(gpa)

    # Access

    def region_of(self, gpa: int, length: int) -> Region:
        for region in self.regions:
            if region.gpa <= gpa and length <= region.end - gpa:
                return region
        raise ValueError(f"{length} bytes at {gpa:#x} are not guest RAM")

    def read(self, gpa: int, length: int) -> bytes:
        region = self.region_of(gpa, 1)
        if length > region.end - gpa:  # into the next region
            return self.read(gpa, region.end - gpa) + self.read(region.end, length - (region.end - gpa))
        start = gpa - region.gpa
        return region.map[start : start + length]

    def write(self, gpa: int, data: bytes) -> None:
        region = self.region_of(gpa, 1)
        if len(data) > region.end - gpa:
            self.write(region.end, data[region.end - gpa :])
            data = data[: region.end - gpa]
        start = gpa - region.gpa
        region.map[start : start + len(data)] = data

    def uva(self, gpa: int) -> int:
        """Where the frontend says this guest address lies in its own address space."""
        region = self.region_of(gpa, 1)
        return gpa - region.gpa + region.uva
