"""Closes descriptors whose close may wait: on NFS, CIFS and FUSE it runs the file system's flush method.

Whoever is done with such a descriptor may hold a lock, or lead; so it only hands it over. If the server is dead, this thread
waits for it and the descriptors behind wait too; the guest's budget of open files bounds how many that are.
"""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue

from vfsd.fds import OwnedFd


class Closer:
    """One thread; `start` it before the filter is loaded."""

    def __init__(self) -> None:
        self._fds: SimpleQueue[int] = SimpleQueue()

    def start(self) -> None:
        threading.Thread(target=self._close_all, name="closer", daemon=True).start()

    def own(self, fd: int) -> OwnedFd:
        """An OwnedFd that this thread closes."""
        return _DeferredFd(fd, self._fds)

    def _close_all(self) -> None:
        while True:
            try:
                os.close(self._fds.get())
            except OSError:  # an error of writing back is fsync's to report: it has the same description
                continue


class _DeferredFd(OwnedFd):
    __slots__ = ("_queue",)

    def __init__(self, fd: int, queue: SimpleQueue[int]) -> None:
        super().__init__(fd)
        self._queue = queue

    def close(self) -> None:
        if not self.closed:
            self._queue.put(self.detach())
