"""Guest memory as the frontend shares it: regions of files, mapped here, and views of them.

Trust: where a region lies (guest address, frontend address, offset, size, file) is said by the frontend and checked by `add`;
the addresses asked for by `slices` and `table` come from the guest, those asked for by `contiguous` from the frontend; the bytes
behind every view belong to the guest and change at will. A file that shrinks under its mapping ends this process by SIGBUS:
it is respawned (a frontend that wants to avoid that seals its memory).

**Who owns the views.** CPython does not unmap memory that any memoryview still shows: `mmap.close()` raises BufferError, and a
view cannot be taken back from whoever keeps it. So views are lent, and only three places may keep one: a region its master view,
a `Virtqueue` its rings (until `close()`), a `Chain` its buffers (until `release()`, which `Virtqueue.push()` and `close()` call).
What an operation slices from a chain's views ends with the operation. With the rings stopped and closed nothing is left, and
`remove` and `clear` unmap at once; a view that somebody still keeps (a blocked preadv, or an exception whose traceback was
stored) makes them raise BufferError, and the memory stays mapped, rather than vanish under its user.

**Syscalls**, for the seccomp policy (CPython 3.11, glibc 2.36): `add` makes preadv2 of one byte, then inside `mmap.mmap` fstat,
fcntl(F_DUPFD_CLOEXEC) and mmap(NULL, …, PROT_READ|PROT_WRITE, MAP_SHARED, fd, offset); unmapping makes close of that duplicate and
munmap. Since glibc 2.33 that fstat is newfstatat(fd, "", …, AT_EMPTY_PATH): a policy that has no newfstatat must answer it
with an errno, which `mmap` takes to mean "size unknown" and goes on; it must not kill. Each region holds one descriptor, the duplicate.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right

from vfsd.errors import NOT_SHARED, FrontendBreach, GuestBreach

_ADDRESS_SPACE = 1 << 64
_LONGEST_FILE = (1 << 63) - 1


class _Region:
    """One mapped region; the owner of its mapping and of the view from which all others are cut."""

    __slots__ = ("_mapping", "_skip_bytes", "gpa", "size", "uva", "view")

    def __init__(self, fd: int, gpa: int, size: int, uva: int, mmap_offset: int) -> None:
        self.gpa = gpa
        self.size = size
        self.uva = uva
        # mmap(2) wants a page-aligned offset; the frontend may share from any.
        self._skip_bytes = mmap_offset % mmap.ALLOCATIONGRANULARITY
        self._mapping = mmap.mmap(
            fd,
            size + self._skip_bytes,
            mmap.MAP_SHARED,
            mmap.PROT_READ | mmap.PROT_WRITE,
            offset=mmap_offset - self._skip_bytes,
        )
        self.view = self._whole_view()

    def _whole_view(self) -> memoryview:
        with memoryview(self._mapping) as mapped:
            return mapped[self._skip_bytes :]

    def unmap(self) -> None:
        """Unmap, or raise BufferError and stay usable."""
        self.view.release()
        try:
            self._mapping.close()
        except BufferError:
            self.view = self._whole_view()
            raise BufferError(f"{self} cannot be unmapped: a view of it is still in use") from None

    def __str__(self) -> str:
        return f"memory region of {self.size} bytes at guest address {self.gpa:#x}"


class GuestMemory:
    """The regions of one connection. Not thread-safe: the ring thread's; the views it lends may be used by any thread."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []  # ascending by gpa, none overlapping
        self._starts: list[int] = []  # their gpas, for bisect
        # The region used last. At first, and after an unmapping, one of no bytes, in which no buffer lies.
        self._last_gpa = 0
        self._last_size = 0
        self._last_view = memoryview(b"")

    def add(self, fd: int, gpa: int, size: int, uva: int, mmap_offset: int) -> None:
        """Map `size` bytes of `fd` from `mmap_offset`; the guest calls them `gpa`, the frontend `uva`.

        The caller keeps and closes `fd`. FrontendBreach if the region cannot be what a correct frontend shares.
        """
        _check_range("guest address", gpa, size)
        _check_range("user address", uva, size)
        position = bisect_right(self._starts, gpa)
        self._check_neighbours(position, gpa, size)
        _check_file_size(fd, mmap_offset, size)
        try:
            region = _Region(fd, gpa, size, uva, mmap_offset)
        except (OSError, ValueError) as error:  # ValueError: mmap's own look at the file's size, if it shrank meanwhile
            raise FrontendBreach(f"memory region of {size} bytes at offset {mmap_offset} cannot be mapped: {error}") from None
        self._regions.insert(position, region)
        self._starts.insert(position, gpa)

    def remove(self, gpa: int, size: int, uva: int) -> None:
        """Unmap the region that was added with just these numbers. Stop and close the rings first: see the module's docstring."""
        for region in self._regions:
            if (region.gpa, region.size, region.uva) == (gpa, size, uva):
                self._drop([region])
                return
        raise FrontendBreach(f"there is no memory region of {size} bytes at guest address {gpa:#x}, user address {uva:#x}")

    def clear(self) -> None:
        """Unmap all regions, as `remove` does; one that is still in use does not keep the others."""
        self._drop(list(self._regions))

    def slices(self, gpa: int, length: int) -> list[memoryview]:
        """The `length` >= 1 bytes at guest address `gpa`, one view per region they touch, or GuestBreach."""
        views: list[memoryview] = []
        self.gather(gpa, length, views)
        return views

    def gather(self, gpa: int, length: int, into: list[memoryview]) -> None:
        """`slices`, appended to a list: the form that the virtqueue calls once per descriptor."""
        # Nearly always the buffer lies in the region of the one before: most guests have one or two.
        if gpa >= self._last_gpa:
            offset = gpa - self._last_gpa
            if offset <= self._last_size and length <= self._last_size - offset:
                into.append(self._last_view[offset : offset + length])
                return
        at, left = gpa, length
        while left > 0:
            region = self._find(at)
            if region is None:
                raise GuestBreach(f"{length} bytes at guest address {gpa:#x} are not in guest memory")
            self._last_gpa, self._last_size, self._last_view = region.gpa, region.size, region.view
            offset = at - region.gpa
            taken = min(left, region.size - offset)
            into.append(region.view[offset : offset + taken])
            at += taken
            left -= taken

    def table(self, gpa: int, length: int) -> memoryview | bytes:
        """The bytes of an indirect descriptor table: the guest's own where they lie in one region, else a copy."""
        views = self.slices(gpa, length)
        return views[0] if len(views) == 1 else b"".join(views)

    def contiguous(self, uva: int, length: int) -> memoryview:
        """The `length` bytes at the frontend's address `uva`, within one region: a ring's place. FrontendBreach if there is none."""
        if not self._regions:
            raise FrontendBreach(NOT_SHARED)
        for region in self._regions:
            offset = uva - region.uva
            if 0 <= offset <= region.size and length <= region.size - offset:
                return region.view[offset : offset + length]
        raise FrontendBreach(f"a ring of {length} bytes at user address {uva:#x} does not lie in one memory region")

    def _find(self, gpa: int) -> _Region | None:
        position = bisect_right(self._starts, gpa) - 1
        if position < 0:
            return None
        region = self._regions[position]
        return region if gpa - region.gpa < region.size else None

    def _check_neighbours(self, position: int, gpa: int, size: int) -> None:
        """FrontendBreach if a region put at `position` of the list would overlap the one before or after it."""
        before = self._regions[position - 1] if position > 0 else None
        after = self._regions[position] if position < len(self._regions) else None
        overlapped = None
        if before is not None and gpa - before.gpa < before.size:
            overlapped = before
        elif after is not None and after.gpa - gpa < size:
            overlapped = after
        if overlapped is not None:
            raise FrontendBreach(f"memory region of {size} bytes at guest address {gpa:#x} overlaps the {overlapped}")

    def _drop(self, regions: list[_Region]) -> None:
        self._last_gpa, self._last_size, self._last_view = 0, 0, memoryview(b"")
        still_used: list[str] = []
        for region in regions:
            try:
                region.unmap()
            except BufferError as error:
                still_used.append(str(error))
            else:
                self._regions.remove(region)
        self._starts = [region.gpa for region in self._regions]
        if still_used:
            raise BufferError("; ".join(still_used))


def _check_range(what: str, start: int, size: int) -> None:
    if size <= 0:
        raise FrontendBreach(f"memory region of {size} bytes")
    if not 0 <= start < _ADDRESS_SPACE or size > _ADDRESS_SPACE - start:
        raise FrontendBreach(f"memory region of {size} bytes at {what} {start:#x} does not fit in 64 bits")


def _check_file_size(fd: int, mmap_offset: int, size: int) -> None:
    """FrontendBreach unless the file reaches to the region's end: an access beyond it would be a SIGBUS.

    By reading the last byte, because a worker has preadv2 but no stat call that Python can reach (see the module's docstring).
    """
    if mmap_offset < 0 or size > _LONGEST_FILE - mmap_offset:
        raise FrontendBreach(f"memory region of {size} bytes at file offset {mmap_offset}: no file is so long")
    try:
        reached = os.preadv(fd, [bytearray(1)], mmap_offset + size - 1)
    except OSError as error:
        raise FrontendBreach(f"the file of a memory region cannot be read: {error.strerror}") from None
    if reached == 0:
        raise FrontendBreach(f"memory region of {size} bytes at offset {mmap_offset}: the file is smaller")
