"""The descriptors the broker donated to this worker: of open files by fh, and O_PATH ones of inodes by nodeid.

Both are caches: an entry that is missing (opened through another worker, evicted, dropped) is asked for again. Used by the
ring thread alone; a pool thread works on an entry that the ring thread has pinned for it, and a pinned entry's descriptor
stays open until it is unpinned.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from vfsd.fds import TempFd

SLOW_CALL_SECONDS = 0.002  # a call that took longer shows that its file system waits for a device,
POOLED_SECONDS = 1.0  # and for so long its calls go to the pool
NODE_IDLE_SECONDS = 1.0


class Mount:
    """What this worker has learnt about one mount of the host."""

    __slots__ = ("key", "nowait_reads", "pooled_until", "slow")

    def __init__(self, key: int) -> None:
        self.key = key
        self.slow = False  # the broker says: its calls wait for a network
        self.nowait_reads = True  # until it answers RWF_NOWAIT with EOPNOTSUPP
        self.pooled_until = 0.0

    def pooled(self) -> bool:
        """Whether calls go to the pool at the moment."""
        return self.slow or (self.pooled_until > 0.0 and time.monotonic() < self.pooled_until)

    def took(self, started: float) -> None:
        """Note how long an inline call took, from its time.monotonic()."""
        now = time.monotonic()
        if now - started > SLOW_CALL_SECONDS:
            self.pooled_until = now + POOLED_SECONDS


class Mounts:
    """By the broker's mount key. One entry per mount that files were opened on."""

    def __init__(self) -> None:
        self._mounts: dict[int, Mount] = {}

    def get(self, key: int) -> Mount:
        mount = self._mounts.get(key)
        if mount is None:
            mount = self._mounts[key] = Mount(key)
        return mount

    def clear(self) -> None:
        self._mounts.clear()


class OpenFile:
    """One open file or directory. `position_lock`: a directory's position is set and read under it."""

    __slots__ = ("_discard", "_dropped", "_fd", "_users", "fh", "mount", "nodeid", "position_lock", "traits")

    def __init__(self, fh: int, nodeid: int, fd: TempFd, mount: Mount, traits: int, discard: Callable[[Mount, TempFd], None]) -> None:
        """`discard` closes the descriptor, or has it closed where that may wait."""
        self._discard = discard
        self.fh = fh
        self.nodeid = nodeid
        self.mount = mount
        self.traits = traits
        self.position_lock = threading.Lock()
        self._fd = fd
        self._users = 0
        self._dropped = False

    @property
    def fd(self) -> int:
        return self._fd.fileno()

    def pin(self) -> None:
        self._users += 1

    def unpin(self) -> None:
        self._users -= 1
        if self._dropped and not self._users:
            self._discard(self.mount, self._fd)

    def drop(self) -> None:
        self._dropped = True
        if not self._users:
            self._discard(self.mount, self._fd)

    @property
    def in_use(self) -> bool:
        return self._users > 0


class OpenFiles:
    """fh → descriptor, least recently used ones closed beyond `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._files: OrderedDict[int, OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, nodeid: int, fh: int) -> OpenFile | None:
        """The entry if it is here and belongs to that nodeid; otherwise the broker is to be asked."""
        found = self._files.get(fh)
        if found is None or found.nodeid != nodeid:
            return None
        self._files.move_to_end(fh)
        return found

    def add(self, opened: OpenFile) -> None:
        self.drop(opened.fh)
        self._files[opened.fh] = opened
        while len(self._files) > self._most:
            self._files.popitem(last=False)[1].drop()

    def drop(self, fh: int) -> None:
        found = self._files.pop(fh, None)
        if found is not None:
            found.drop()

    def clear(self) -> None:
        for opened in self._files.values():
            opened.drop()
        self._files.clear()


class _Node:
    __slots__ = ("fd", "used_at")

    def __init__(self, fd: TempFd) -> None:
        self.fd = fd
        self.used_at = time.monotonic()


class NodeFds:
    """nodeid → O_PATH descriptor, for attributes. Closed when not used for a moment: it keeps a deleted file's inode alive."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._nodes: OrderedDict[int, _Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, nodeid: int) -> int | None:
        """The descriptor's number, for use before the next call of this class."""
        node = self._nodes.get(nodeid)
        if node is None:
            return None
        node.used_at = time.monotonic()
        self._nodes.move_to_end(nodeid)
        return node.fd.fileno()

    def add(self, nodeid: int, fd: TempFd) -> None:
        self.drop(nodeid)
        self._nodes[nodeid] = _Node(fd)
        while len(self._nodes) > self._most:
            self._nodes.popitem(last=False)[1].fd.close()

    def drop(self, nodeid: int) -> None:
        node = self._nodes.pop(nodeid, None)
        if node is not None:
            node.fd.close()

    def sweep(self, now: float) -> None:
        """Close what nobody used for a moment; `now` as time.monotonic()."""
        while self._nodes:
            nodeid, node = next(iter(self._nodes.items()))
            if now - node.used_at < NODE_IDLE_SECONDS:
                return
            self.drop(nodeid)

    def clear(self) -> None:
        for node in self._nodes.values():
            node.fd.close()
        self._nodes.clear()
