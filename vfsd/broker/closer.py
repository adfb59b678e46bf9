"""Closes descriptors whose close may wait: on NFS, CIFS and FUSE it runs the file system's flush method.

Whoever is done with such a descriptor may hold a lock, or lead, or have a session to end; so it only hands it over. A mount
is served by one thread at a time: if its server is dead, that thread waits for it and the mount's descriptors wait behind,
but not those of other mounts. The guest's budget of open files bounds how many wait.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from queue import SimpleQueue

from vfsd.fds import OwnedFd

THREADS = 4  # so many mounts may be dead until closing waits on all; nothing else does


class Closer:
    """`start` it before the filter is loaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fds: dict[int, deque[int]] = {}  # by mount; a mount that is here has a thread, or waits for one
        self._mounts: SimpleQueue[int] = SimpleQueue()
        self._count = 0

    def start(self) -> None:
        for index in range(THREADS):
            threading.Thread(target=self._close_all, name=f"closer{index}", daemon=True).start()

    def own(self, fd: int, mount: int) -> OwnedFd:
        """An OwnedFd that one of these threads closes."""
        return _DeferredFd(fd, mount, self)

    def __len__(self) -> int:
        """How many descriptors wait to be closed: they count as the guest's."""
        return self._count

    def take(self, fd: int, mount: int) -> None:
        """Close it soon."""
        with self._lock:
            self._count += 1
            waiting = self._fds.get(mount)
            if waiting is not None:
                waiting.append(fd)
                return
            self._fds[mount] = deque([fd])
        self._mounts.put(mount)

    def _close_all(self) -> None:
        while True:
            mount = self._mounts.get()
            while (fd := self._next_of(mount)) is not None:
                try:
                    os.close(fd)
                except OSError:  # an error of writing back is fsync's to report: it has the same description
                    continue

    def _next_of(self, mount: int) -> int | None:
        with self._lock:
            waiting = self._fds[mount]
            if waiting:
                self._count -= 1
                return waiting.popleft()
            del self._fds[mount]
            return None


class _DeferredFd(OwnedFd):
    __slots__ = ("_closer", "_mount")

    def __init__(self, fd: int, mount: int, closer: Closer) -> None:
        super().__init__(fd)
        self._mount = mount
        self._closer = closer

    def close(self) -> None:
        if not self.closed:
            self._closer.take(self.detach(), self._mount)
