"""The inodes the guest knows: nodeid → packed record, found again by file handle or by (ino, dev, mount id).

**Trust.** nodeids and counts come from workers and may be anything; every access goes through `pin`, which refuses what
is not there. The records hold only what the broker itself found out.

**Invariants.**
* A nodeid is never used twice. It is (generation << 24 | slot); a slot's generation grows each time it is freed, and all
  generations grow with each session. Root is 1.
* `by_handle` holds every inode that has a file handle. `by_ids` holds only inodes whose reference is an O_PATH descriptor:
  that descriptor keeps the inode number from being given to another file. An inode known by its handle alone may be
  deleted on the host and its number reused, so a hit by numbers would be the wrong file (semantics.md 8/10).
* Find-or-insert is one step under the lock; no system call is made under it.
* A pinned inode keeps its descriptor and its mount reference until the last pin goes, however often it is forgotten.
* Records are columns of machine integers, not objects: a million inodes cost neither a million objects nor a pause of the
  garbage collector.
* No step takes longer the more inodes there are. A new session only puts an empty table in place of the full one; the full
  one is emptied bit by bit (`take_wiped`), and what it holds counts until then.
"""

from __future__ import annotations

import errno
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable
from itertools import compress
from types import TracebackType
from typing import NamedTuple, Self

from vfsd.broker.inode_table import NO_FD, ROOT_NODEID, SLOT_MASK, Identity, Page, Released, Table
from vfsd.errors import ReplyErrno

__all__ = ["DEFAULT_MAX_INODES", "ROOT_NODEID", "Identity", "InodeStore", "Pin", "Released", "Wiped"]

DEFAULT_MAX_INODES = 4_000_000


class Wiped(NamedTuple):
    """What some inodes of an ended session leave: how many they are, descriptors to close, references per mount to drop."""

    inodes: int
    fds: list[int]
    mounts: Counter[int]


class Pin:
    """An inode that cannot go away while this is held. Made by `InodeStore.pin`, left with `with`."""

    __slots__ = ("_page", "_row", "_store", "_table", "device", "fd", "file_type", "handle_key", "mount_id", "nodeid")

    def __init__(self, store: InodeStore, table: Table, page: Page, row: int) -> None:
        self._store = store
        self._table = table
        self._page = page
        self._row = row
        self.nodeid = page.nodeids[row]
        self.fd = page.fds[row]
        self.handle_key = page.handle_keys[row]
        self.mount_id = page.mounts[row]
        self.device = page.devices[row]
        self.file_type = page.types[row]

    @property
    def is_directory(self) -> bool:
        return self.file_type == stat.S_IFDIR

    @property
    def may_be_opened(self) -> bool:
        """Only regular files and directories: opening a FIFO or a device has effects on the host (CVE-2020-35517)."""
        return self.file_type in (stat.S_IFREG, stat.S_IFDIR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._store.unpin(self._table, self._page, self._row)


class InodeStore:
    """See the module. `on_release` gets what freed inodes leave behind, called without the lock.

    What a whole session leaves is not told but fetched: `take_wiped`, then `settle_wiped` when it is closed and dropped.
    """

    def __init__(self, lock: threading.Lock, on_release: Callable[[list[Released]], None], max_inodes: int = DEFAULT_MAX_INODES) -> None:
        self._lock = lock
        self._on_release = on_release
        self._max_inodes = min(max_inodes, SLOT_MASK - 1)
        self._table = Table()
        self._wiped: deque[Table] = deque()
        self.held = 0  # inodes, also those of ended sessions that are not freed yet
        self.fd_count = 0  # descriptors of inodes that are not closed yet
        self.session = 0

    def __len__(self) -> int:
        """Inodes of this session."""
        return self._table.count

    @property
    def full(self) -> bool:
        return self.held >= self._max_inodes

    def count_lookup(self, identity: Identity, session: int) -> int | None:
        """The nodeid of a known inode, its lookup counted; None if it is not known. ESTALE in another session."""
        with self._lock:
            self._require(session)
            nodeid = self._table.find(identity)
            if nodeid is not None:
                self._table.count_lookup(nodeid)
            return nodeid

    def find(self, identity: Identity, session: int) -> int | None:
        """As `count_lookup`, but nothing is counted: the inode may be forgotten at any time."""
        with self._lock:
            self._require(session)
            return self._table.find(identity)

    def insert(self, identity: Identity, session: int, *, fd: int, held_mount: bool) -> tuple[int, bool]:
        """(nodeid, True) of a new inode that took over `fd` (-1: none) and the mount reference; its lookup is counted.

        (nodeid, False) if another thread was first: then the caller still owns both. ENFILE when the store is full.
        """
        with self._lock:
            self._require(session)
            nodeid = self._table.find(identity)
            if nodeid is not None:
                self._table.count_lookup(nodeid)
                return nodeid, False
            if self.held >= self._max_inodes:
                raise ReplyErrno(errno.ENFILE)
            nodeid = self._table.add(identity, fd, held_mount=held_mount)
            self.held += 1
            self.fd_count += fd != NO_FD
            return nodeid, True

    def insert_root(self, identity: Identity, *, fd: int, held_mount: bool) -> None:
        """The root, once at start: neither a forget nor a new session removes it."""
        with self._lock:
            self._table.add_root(identity, fd, held_mount=held_mount)
            self.held += 1
            self.fd_count += fd != NO_FD

    def pin(self, nodeid: int, session: int) -> Pin:
        """Hold an inode. EBADF if the nodeid is not known, ESTALE in another session."""
        with self._lock:
            self._require(session)
            table = self._table
            found = table.locate(nodeid)
            if found is None or found[0].lookups[found[1]] == 0:
                raise ReplyErrno(errno.EBADF)
            page, row = found
            page.pins[row] += 1
            return Pin(self, table, page, row)

    def unpin(self, table: Table, page: Page, row: int) -> None:
        with self._lock:
            page.pins[row] -= 1
            doomed = page.pins[row] == 0 and page.lookups[row] == 0
            released = [table.free(page, row)] if doomed else []
        if released:
            self._hand_back(released)

    def _hand_back(self, released: list[Released]) -> None:
        """Its descriptors count until they are closed: else another thread would open more than there is room for."""
        self._on_release(released)
        fds = sum(inode.fd != NO_FD for inode in released)
        with self._lock:
            self.held -= len(released)
            self.fd_count -= fds

    def mount_of(self, nodeid: int) -> int:
        """The mount an inode lives on, 0 if it is not known. A hint for scheduling: taken without the lock."""
        try:
            found = self._table.locate(nodeid)
        except IndexError:  # the reaper was taking the pages of an ended session
            return 0
        return found[0].mounts[found[1]] if found is not None else 0

    def alive(self, nodeid: int) -> bool:
        """Whether the guest still knows it. The caller holds the lock."""
        found = self._table.locate(nodeid)
        return found is not None and found[0].lookups[found[1]] > 0

    def forget(self, pairs: list[int], session: int) -> None:
        """Take back lookups: [nodeid, count, …]. Unknown nodeids and excess counts are harmless; the root stays."""
        released = []
        with self._lock:
            if session != self.session:
                return
            table = self._table
            for nodeid, count in zip(pairs[::2], pairs[1::2], strict=True):
                found = table.locate(nodeid)
                if found is None or nodeid == ROOT_NODEID:
                    continue
                page, row = found
                page.lookups[row] -= min(count, page.lookups[row])
                if page.lookups[row] == 0:
                    table.unlist(page, row)
                    if page.pins[row] == 0:
                        released.append(table.free(page, row))
        if released:
            self._hand_back(released)

    # --- the end of a session ----------------------------------------------------------------------------------------

    def begin_session(self, session: int) -> None:
        """Know nothing but the root any more. Nothing if a later one has begun."""
        with self._lock:
            if session < self.session:
                return
            self.session = session
            ended = self._table
            if ended.untouched:
                return
            self._table = Table(ended.next_generation)
            ended.move_root(self._table)
            self._wiped.append(ended)

    @property
    def wiped_tables(self) -> int:
        """How many ended sessions still hold something."""
        return len(self._wiped)

    def take_wiped(self) -> Wiped | None:
        """The next bit of what ended sessions held, at most a page; None if nothing is left. One caller at a time.

        Pinned inodes are left to their pins: after its session nobody takes another pin on an inode.
        """
        if not self._wiped:
            return None
        table = self._wiped[0]
        if table.pages:
            return self._empty(table.pages.pop())
        if not table.take_some_of_indexes():
            self._wiped.popleft()
        return Wiped(0, [], Counter())

    def _empty(self, page: Page) -> Wiped:
        with self._lock:
            for row, pins in enumerate(page.pins):
                if pins and page.nodeids[row]:
                    page.lookups[row] = 0
            ours = [not pins for pins in page.pins]
            fds = [fd for fd in compress(page.fds, ours) if fd != NO_FD]
            mounts = Counter(compress(compress(page.mounts, ours), compress(page.held_mounts, ours)))
            return Wiped(sum(map(bool, compress(page.nodeids, ours))), fds, mounts)

    def settle_wiped(self, wiped: Wiped) -> None:
        """Its descriptors are closed and its mount references dropped."""
        with self._lock:
            self.held -= wiped.inodes
            self.fd_count -= len(wiped.fds)

    def _require(self, session: int) -> None:
        if session != self.session:
            raise ReplyErrno(errno.ESTALE)
