"""The memory of in-flight tables: which table each vring has, and a worker's view of one.

Control makes one for each vring at start and keeps it. A frontend that negotiated INFLIGHT_SHMFD is given memory for the same
tables, and hands it back when it connects again: then those are the tables. That memory is hostile: it must be sealed against
shrinking, for a page that is gone would be a worker's death; what stands in it is InflightTable's to doubt.

All are memfds that can neither grow nor shrink: a worker that was taken over can fill one, but it can neither fill the host's
memory through it nor make its successor die of a page that is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import NamedTuple

from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd, sealed_memfd
from vfsd.wire.inflight import TABLE_BYTES, TABLE_STRIDE_BYTES, InflightTable

_MAX_START_NUMBER = 2**32 - 1


class Start(NamedTuple):
    """The start of a ring: its number, and where the ring's table is; `adopted`: what it says of an earlier connection holds."""

    number: int
    fd: OwnedFd
    offset: int = 0
    adopted: bool = False


class _Buffer(NamedTuple):
    """What the frontend handed over, for the first so many queues."""

    fd: OwnedFd
    offset: int
    queues: int


class InflightMemory:
    """Control's: to be made before its lock-down, which leaves it no call that makes a memfd."""

    def __init__(self, queues: int) -> None:
        self._fds = [sealed_memfd("vfsd-inflight", TABLE_BYTES) for _ in range(queues)]
        self._starts = 0
        self.given: OwnedFd | None = None  # what the frontend got when it asked: what stands there was done on this connection
        self._buffer: _Buffer | None = None
        self._seen: set[int] = set()  # queues that were started on this connection: what was taken of them since was completed

    def of(self, queue_index: int) -> OwnedFd:
        """To be lent to the worker that serves the queue."""
        return self._fds[queue_index]

    def next_start(self) -> int:
        """A number for a ring that begins anew. A worker that finds another one in the table knows that what it says is over."""
        self._starts = self._starts % _MAX_START_NUMBER + 1
        return self._starts

    def start(self, queue_index: int) -> Start:
        """A ring is started: with the table that the frontend handed over, if there is one, which the first time is adopted."""
        buffer, adopted = self._buffer, queue_index not in self._seen
        self._seen.add(queue_index)
        if buffer is None or queue_index >= buffer.queues:
            return Start(self.next_start(), self.of(queue_index))
        return Start(self.next_start(), buffer.fd, buffer.offset + TABLE_STRIDE_BYTES * queue_index, adopted)

    def adopt(self, fd: OwnedFd, offset: int, size_bytes: int, queues: int) -> None:
        """SET_INFLIGHT_FD, while no ring runs. Takes the descriptor, also when it raises FrontendBreach."""
        try:
            _check_buffer(fd, offset, size_bytes, queues)
        except FrontendBreach:
            fd.close()
            raise
        self._drop_buffer()
        self._buffer = _Buffer(fd, offset, queues)

    def forget_frontend(self) -> None:
        """The one that handed tables over is gone."""
        self._drop_buffer()
        self._drop_given()
        self._seen.clear()

    def _drop_buffer(self) -> None:
        if self._buffer is not None:
            self._buffer.fd.close()
            self._buffer = None

    def _drop_given(self) -> None:
        if self.given is not None:
            self.given.close()
            self.given = None

    def close(self) -> None:
        self._drop_buffer()
        self._drop_given()
        for fd in self._fds:
            fd.close()


def _check_buffer(fd: OwnedFd, offset: int, size_bytes: int, queues: int) -> None:
    """That it is long enough is for the worker to check, which maps it: control has no call that tells."""
    if offset % TABLE_STRIDE_BYTES:
        raise FrontendBreach(f"in-flight tables at offset {offset:#x}, which is none that was given out")
    if size_bytes < queues * TABLE_STRIDE_BYTES:
        raise FrontendBreach(f"{size_bytes} bytes for the in-flight tables of {queues} queues, which take {TABLE_STRIDE_BYTES} each")
    try:
        seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
    except OSError as error:
        raise FrontendBreach(f"the descriptor of in-flight tables is no memfd: {error.strerror}") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise FrontendBreach("the memfd of in-flight tables is not sealed against shrinking")


class MappedTable(InflightTable):
    """A worker's view of one of them. The caller keeps and closes `fd`. FrontendBreach if it is none: to touch it would be a SIGBUS."""

    __slots__ = ("_mapping",)

    def __init__(self, fd: int, offset: int = 0) -> None:
        try:
            if not os.preadv(fd, [bytearray(1)], offset + TABLE_BYTES - 1):
                raise FrontendBreach("an in-flight table in a file that is too short")
            self._mapping = mmap.mmap(fd, TABLE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        except (ValueError, OverflowError) as error:  # an offset that no file has; mmap's own look at the file
            raise FrontendBreach(f"an in-flight table cannot be mapped: {error}") from None
        super().__init__(memoryview(self._mapping))

    def close(self) -> None:
        super().close()
        self._mapping.close()
