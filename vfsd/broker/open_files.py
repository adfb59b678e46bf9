"""The guest's open files and directories: fh → the description the broker keeps.

The broker keeps its own descriptor of every open file: fsync must reach the description whose errors it reports, and a
worker that lost its copy gets another. An fh outlives the worker it was opened through and dies with RELEASE or the session.
fhs are counters, never reused. fh and nodeid must belong together: a worker cannot reach a file by its fh alone.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from fcntl import F_UNLCK
from types import TracebackType
from typing import Self

from vfsd.broker.set_id_bits import SetIdBits
from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls
from vfsd.wire.broker_messages import TRAIT_FLUSH


class OpenFile:
    """One open file. `holders` are the indexes, as bits, of the workers that hold a copy."""

    __slots__ = (
        "_table", "closing", "fd", "fh", "flocked", "holders", "is_directory", "is_writable", "mount_key", "nodeid", "traits", "users",
    )  # fmt: skip

    def __init__(
        self, table: OpenFiles, fh: int, nodeid: int, fd: OwnedFd, traits: int, mount_key: int, *, is_directory: bool, is_writable: bool
    ) -> None:
        self._table = table
        self.fh = fh
        self.nodeid = nodeid
        self.fd = fd
        self.traits = traits
        self.mount_key = mount_key
        self.is_directory = is_directory
        self.is_writable = is_writable
        self.holders = 0
        self.users = 0
        self.closing = False
        self.flocked = False  # a flock may have been taken on its description

    def duplicate(self) -> OwnedFd:
        """A descriptor of the same description, to be donated."""
        return OwnedFd(os.dup(self.fd.fileno()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._table.unpin(self)


class OpenFiles:
    """Thread-safe; shares the inode store's lock, so that grants and drops are ordered with forgets."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._files: dict[int, OpenFile] = {}
        self._last_fh = 0
        self._session = 0
        self.set_id = SetIdBits()

    def __len__(self) -> int:
        return len(self._files)

    def add(
        self, session: int, nodeid: int, fd: OwnedFd, traits: int, mount_key: int, *, is_directory: bool, is_writable: bool = False
    ) -> OpenFile:
        """Takes over `fd`; ESTALE (fd closed) if the session has ended meanwhile."""
        with self._lock:
            current = session == self._session
            if current:
                self._last_fh += 1
                opened = OpenFile(
                    self, self._last_fh, nodeid, fd, traits, mount_key, is_directory=is_directory, is_writable=is_writable
                )  # fmt: skip
                self._files[opened.fh] = opened
                if is_writable:
                    self.set_id.hold(nodeid)
        if not current:
            fd.close()
            raise ReplyErrno(errno.ESTALE)
        return opened

    def pin(self, nodeid: int, fh: int, session: int) -> OpenFile:
        """Hold an open file through a `with` block; EBADF if there is none of that nodeid and fh, ESTALE in another session."""
        with self._lock:
            if session != self._session:
                raise ReplyErrno(errno.ESTALE)
            opened = self._files.get(fh)
            if opened is None or opened.nodeid != nodeid:
                raise ReplyErrno(errno.EBADF)
            opened.users += 1
            return opened

    def unpin(self, opened: OpenFile) -> None:
        with self._lock:
            opened.users -= 1
            close = opened.closing and opened.users == 0
        if close:
            opened.fd.close()

    def alive(self, fh: int) -> bool:
        """Whether the guest has it open. The caller holds the lock."""
        return fh in self._files

    def grant(self, fh: int, worker: int) -> None:
        """Note that a worker gets a copy. The caller holds the lock and has checked `alive`."""
        self._files[fh].holders |= 1 << worker

    def release(self, nodeid: int, fh: int, session: int) -> int:
        """Close an open file; returns the holders (bits). An unknown one is no error: RELEASE has no answer."""
        with self._lock:
            opened = self._files.get(fh)
            if session != self._session or opened is None or opened.nodeid != nodeid:
                return 0
            self._retire(opened)
            opened.users += 1
        with opened:
            # It would last as long as any copy of the description. Where a server keeps it, the call may wait, which RELEASE must not.
            if opened.flocked and not opened.traits & TRAIT_FLUSH:
                _drop_flock(opened)
        return opened.holders

    def begin_session(self, session: int) -> None:
        """Close everything. Nothing if a later session has begun."""
        with self._lock:
            if session < self._session:
                return
            self._session = session
            idle = [opened for opened in list(self._files.values()) if self._retire(opened)]
        for opened in idle:
            opened.fd.close()

    def _retire(self, opened: OpenFile) -> bool:
        """Take it out of the table; True if nobody uses it, so that the caller closes it. Under the lock."""
        del self._files[opened.fh]
        if opened.is_writable:
            self.set_id.let_go(opened.nodeid)
        opened.closing = True
        return opened.users == 0


def _drop_flock(opened: OpenFile) -> None:
    with suppress(OSError):  # a server that cannot be told
        filecalls.flock(opened.fd.fileno(), F_UNLCK)
