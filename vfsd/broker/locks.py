"""The guest's POSIX locks: for each lock owner of an inode a description of its own, which holds its locks on the host.

Locks of an open file description (F_OFD_SETLK) are seen by all: other owners of this guest, other guests, programs of the
host. The descriptions are never donated, and counted in the guest's budget of descriptors. One is closed, its locks dropped,
when its owner closes any descriptor of the file (FLUSH); when the file through which it last locked is released (locks that
the guest's own F_OFD_SETLK took see no FLUSH); when the inode is forgotten; with the session. Until then it is kept even
without a lock: who has locked once mostly locks again.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from fcntl import F_UNLCK
from types import TracebackType
from typing import Self

from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls

LAST_OFFSET = (1 << 63) - 1


class LockOwner:
    """One owner's description; through a `with` block it stays open. `fh`: the open file through which it last locked.

    `remote`: a server keeps the locks, and to drop one may wait for it.
    """

    __slots__ = ("_locks", "closing", "fd", "fh", "nodeid", "owner", "remote", "users")

    def __init__(self, locks: Locks, nodeid: int, owner: int, fd: OwnedFd, *, remote: bool) -> None:
        self._locks = locks
        self.nodeid = nodeid
        self.owner = owner
        self.fd = fd
        self.remote = remote
        self.fh = 0
        self.users = 0
        self.closing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._locks.unpin(self)


def _nobody_waits(_nodeid: int) -> None:
    return


class Locks:
    """Thread-safe. `freed(nodeid)` hears that a lock there may have become free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_inode: dict[int, dict[int, LockOwner]] = {}
        self._count = 0
        self._session = 0
        self.freed: Callable[[int], None] = _nobody_waits

    def __len__(self) -> int:
        """How many descriptions are open."""
        return self._count

    def find(self, nodeid: int, owner: int) -> LockOwner | None:
        """Hold an owner's description through a `with` block, if it has one."""
        with self._lock:
            found = self._by_inode.get(nodeid, {}).get(owner)
            if found is not None:
                found.users += 1
            return found

    def add(self, session: int, nodeid: int, owner: int, fd: OwnedFd, *, remote: bool) -> LockOwner:
        """Hold an owner's new description through a `with` block; the one it has, if another thread was first.

        Takes over `fd`. ESTALE if the session has ended. The caller has pinned the inode: nobody can be forgetting it.
        """
        with self._lock:
            owners = self._by_inode.setdefault(nodeid, {}) if session == self._session else {}
            found = owners.get(owner)
            if found is None and session == self._session:
                found = owners[owner] = LockOwner(self, nodeid, owner, fd, remote=remote)
                self._count += 1
            if found is not None:
                found.users += 1
        if found is None or found.fd is not fd:
            fd.close()
        if found is None:
            raise ReplyErrno(errno.ESTALE)
        return found

    def unpin(self, owner: LockOwner) -> None:
        with self._lock:
            owner.users -= 1
            close = owner.closing and owner.users == 0
        if close:
            owner.fd.close()

    def drop_owner(self, nodeid: int, owner: int) -> None:
        """FLUSH: when this returns, none of this owner's locks on the inode is left."""
        found = self.find(nodeid, owner)
        if found is not None:
            self._drop(found)

    def drop_file(self, nodeid: int, fh: int) -> None:
        """RELEASE: what was last locked through this file and outlived every FLUSH belongs to the file itself."""
        if nodeid not in self._by_inode:
            return
        with self._lock:
            found = [owner for owner in self._by_inode.get(nodeid, {}).values() if owner.fh == fh]
            for owner in found:
                owner.users += 1
        for owner in found:
            self._drop(owner, unlock=not owner.remote)  # RELEASE has no answer that could wait: the closer ends these

    def _drop(self, owner: LockOwner, *, unlock: bool = True) -> None:
        """Let go of a held one. Its locks by a call of its own: some descriptors are closed by the closer, some time later."""
        with owner:
            with self._lock:
                self._retire(owner)
            if unlock:
                with suppress(OSError):  # a server that cannot be told: its locks end with the descriptor
                    filecalls.set_lock(owner.fd.fileno(), F_UNLCK, 0, LAST_OFFSET)
        self.freed(owner.nodeid)

    def drop_inode(self, nodeid: int) -> None:
        """The inode is forgotten."""
        if nodeid not in self._by_inode:
            return
        with self._lock:
            idle = [owner for owner in list(self._by_inode.get(nodeid, {}).values()) if self._retire(owner)]
        for owner in idle:
            owner.fd.close()

    def begin_session(self, session: int) -> None:
        """Drop everything. Nothing if a later session has begun."""
        with self._lock:
            if session < self._session:
                return
            self._session = session
            everyone = [owner for owners in self._by_inode.values() for owner in owners.values()]
            idle = [owner for owner in everyone if self._retire(owner)]
        for owner in idle:
            owner.fd.close()

    def _retire(self, owner: LockOwner) -> bool:
        """Take it out of the table; True if nobody uses it, so that the caller closes it. Under the lock."""
        if not owner.closing:
            owner.closing = True
            self._count -= 1
            owners = self._by_inode[owner.nodeid]
            del owners[owner.owner]
            if not owners:
                del self._by_inode[owner.nodeid]
        return owner.users == 0
