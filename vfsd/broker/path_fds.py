"""An O_PATH descriptor for a pinned inode: its own, a recently used one, or one opened by handle for this once.

Names are resolved relative to directories, so directories known by handle keep their descriptor for a moment: a lookup in
a hot directory costs no open_by_handle_at(2). Only directories, only within a budget, and only while they are in use: a
descriptor that stays would keep a deleted directory alive and the host's umount busy. A directory deleted on the host
shows it by a link count of 0 (`refuse_deleted`): by handle it would have been ESTALE, so it is here. What the guest itself
removes may be kept for that moment on purpose (`keep`).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from types import TracebackType
from typing import Self

from vfsd.broker.file_handles import FileHandles
from vfsd.broker.inode_store import Pin
from vfsd.sandbox import filecalls
from vfsd.sandbox.filecalls import Statx

IDLE_SECONDS = 1.0


class _Cached:
    __slots__ = ("doomed", "fd", "kept", "used_at", "users")

    def __init__(self, fd: int, *, kept: bool) -> None:
        self.fd = fd
        self.kept = kept
        self.users = 1
        self.used_at = time.monotonic()
        self.doomed = False


class PathFd:
    """A descriptor lent for the length of a `with` block; inside it the inode stays pinned by the caller."""

    __slots__ = ("_cached", "_close", "_owner", "fd")

    def __init__(self, owner: PathFds, fd: int, *, close: bool, cached: _Cached | None) -> None:
        self._owner = owner
        self.fd = fd
        self._close = close
        self._cached = cached

    def refuse_deleted(self) -> None:
        """ESTALE if this is a remembered directory that the host has deleted meanwhile."""
        if self._cached is not None:
            self.statx()

    def statx(self) -> Statx:
        """Attributes of the inode; ESTALE as `refuse_deleted`."""
        seen = filecalls.statx(self.fd)
        if self._cached is not None and seen.nlink == 0 and not self._cached.kept:
            self._cached.doomed = True
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return seen

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._close:
            os.close(self.fd)
        elif self._cached is not None:
            self._owner.give_back(self._cached)


class PathFds:
    """Thread-safe; no system call under its lock."""

    def __init__(self, handles: FileHandles, budget: int) -> None:
        self._handles = handles
        self._budget = budget
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, _Cached] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recent)

    def of(self, inode: Pin) -> PathFd:
        """Errors of open_by_handle_at(2) pass: ESTALE where the inode is gone."""
        if inode.fd >= 0:
            return PathFd(self, inode.fd, close=False, cached=None)
        with self._lock:
            cached = self._recent.get(inode.nodeid)
            if cached is not None:
                cached.users += 1
                self._recent.move_to_end(inode.nodeid)
                return PathFd(self, cached.fd, close=False, cached=cached)
        if inode.handle_key is None:  # the store keeps one of the two
            raise OSError(errno.EIO, "inode without reference")
        fd = self._handles.open(inode.handle_key, os.O_PATH)
        if not inode.is_directory:
            return PathFd(self, fd, close=True, cached=None)
        return PathFd(self, fd, close=False, cached=self._remember(inode.nodeid, fd))

    def keep(self, inode: Pin, fd: int) -> None:
        """Let an inode outlive its last name for a moment. Takes over `fd`, an O_PATH descriptor of it."""
        if inode.fd >= 0:
            os.close(fd)
        else:
            self.give_back(self._remember(inode.nodeid, fd, kept=True))

    def _remember(self, nodeid: int, fd: int, *, kept: bool = False) -> _Cached:
        made = _Cached(fd, kept=kept)
        with self._lock:
            known = self._recent.get(nodeid)
            if known is not None:  # another thread was first; ours lives as long as its user
                known.kept |= kept
                made.doomed = True
                return made
            self._recent[nodeid] = made
            evicted = self._recent.popitem(last=False)[1] if len(self._recent) > self._budget else None
            close = evicted is not None and self._doom(evicted)
        if evicted is not None and close:
            os.close(evicted.fd)
        return made

    def _doom(self, cached: _Cached) -> bool:
        """Mark as no longer remembered; True if nobody uses it, so that the caller closes it. Under the lock."""
        cached.doomed = True
        return cached.users == 0

    def give_back(self, cached: _Cached) -> None:
        with self._lock:
            cached.users -= 1
            cached.used_at = time.monotonic()
            close = cached.doomed and cached.users == 0
            if close:
                self._discard(cached)
        if close:
            os.close(cached.fd)

    def _discard(self, cached: _Cached) -> None:
        """Take an entry that was doomed while in use out of the table, if it is still there. Rare, so it may search."""
        for nodeid, other in self._recent.items():
            if other is cached:
                del self._recent[nodeid]
                return

    def drop(self, nodeid: int) -> None:
        """The inode is forgotten."""
        with self._lock:
            cached = self._recent.pop(nodeid, None)
            close = cached is not None and self._doom(cached)
        if cached is not None and close:
            os.close(cached.fd)

    def drop_all(self) -> None:
        """All inodes are forgotten."""
        with self._lock:
            idle = [cached.fd for cached in self._recent.values() if self._doom(cached)]
            self._recent.clear()
        for fd in idle:
            os.close(fd)

    def sweep(self, now: float) -> None:
        """Close what nobody used for a moment; `now` as time.monotonic()."""
        with self._lock:
            idle = [
                (nodeid, cached.fd) for nodeid, cached in self._recent.items() if not cached.users and now - cached.used_at >= IDLE_SECONDS
            ]
            for nodeid, _fd in idle:
                del self._recent[nodeid]
        for _nodeid, fd in idle:
            os.close(fd)
