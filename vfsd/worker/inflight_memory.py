"""The memory of in-flight tables: control makes it at start and keeps it, workers map it. Each vring has its own, for good.

A memfd that can neither grow nor shrink: a worker that was taken over can fill it, but it can neither fill the host's memory
through it nor make its successor die of a page that is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.wire.inflight import TABLE_BYTES, InflightTable

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_MAX_START_NUMBER = 2**32 - 1


class InflightMemory:
    """Control's: to be made before its lock-down, which leaves it no call that makes a memfd."""

    def __init__(self, queues: int) -> None:
        self._fds = [_sealed_memfd() for _ in range(queues)]
        self._starts = 0

    def of(self, queue_index: int) -> OwnedFd:
        """To be lent to the worker that serves the queue."""
        return self._fds[queue_index]

    def next_start(self) -> int:
        """A number for a ring that begins anew. A worker that finds another one in the table knows that what it says is over."""
        self._starts = self._starts % _MAX_START_NUMBER + 1
        return self._starts

    def close(self) -> None:
        for fd in self._fds:
            fd.close()


def _sealed_memfd() -> OwnedFd:
    memfd = OwnedFd(os.memfd_create("vfsd-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(memfd.fileno(), TABLE_BYTES)
    fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    return memfd


class MappedTable(InflightTable):
    """A worker's view of one of them. The caller keeps and closes `fd`. FrontendBreach if it is none: to touch it would be a SIGBUS."""

    __slots__ = ("_mapping",)

    def __init__(self, fd: int) -> None:
        if not os.preadv(fd, [bytearray(1)], TABLE_BYTES - 1):
            raise FrontendBreach("an in-flight table in a file that is too short")
        self._mapping = mmap.mmap(fd, TABLE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        super().__init__(memoryview(self._mapping))

    def close(self) -> None:
        super().close()
        self._mapping.close()
