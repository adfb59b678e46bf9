"""The set-user-id and set-group-id bits of files that are open for writing: what a worker's write took away comes back.

A worker is nobody, so the kernel takes these bits away at each of its writes, also where the writer in the guest may keep
them. The worker then says which bits it saw before (AfterWrite), and the broker puts back those that it had itself seen and
that nobody took away meanwhile through it.

A record lives while its inode is open for writing, or its mode is being changed. Its lock is held across the change of mode,
which no other lock is: chmod(2) sets all the bits at once, so of two at the same time one would undo the other. It only holds
up who changes the mode of that very inode.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SET_ID_BITS = stat.S_ISUID | stat.S_ISGID


class Record:
    """`known`: the bits the inode has, as far as the broker has seen. Read and changed under `lock`."""

    __slots__ = ("known", "lock", "users")

    def __init__(self) -> None:
        self.known = 0
        self.lock = threading.Lock()
        self.users = 0


class SetIdBits:
    """nodeid → record; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[int, Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def hold(self, nodeid: int) -> Record:
        """The inode's record, until `let_go`."""
        with self._lock:
            record = self._records.get(nodeid)
            if record is None:
                record = self._records[nodeid] = Record()
            record.users += 1
            return record

    def let_go(self, nodeid: int) -> None:
        with self._lock:
            record = self._records[nodeid]
            record.users -= 1
            if not record.users:
                del self._records[nodeid]

    @contextmanager
    def changing(self, nodeid: int) -> Iterator[Record]:
        """Change the inode's mode, or what is known of it, inside the block."""
        record = self.hold(nodeid)
        try:
            with record.lock:
                yield record
        finally:
            self.let_go(nodeid)

    def learn(self, nodeid: int, fd: int) -> None:
        """Look at a file that was opened for writing. A bit that is missing may come back a moment later: it stays known."""
        with self.changing(nodeid) as record:
            record.known |= os.fstat(fd).st_mode & SET_ID_BITS

    def restore(self, nodeid: int, fd: int, asked: int, proc_self_fd: int) -> None:
        """Put back what is known of the bits that are asked for."""
        with self.changing(nodeid) as record:
            wanted = record.known & asked
            mode = os.fstat(fd).st_mode
            if wanted & ~mode:
                os.chmod(b"%d" % fd, stat.S_IMODE(mode) | wanted, dir_fd=proc_self_fd)
