"""The inodes the guest knows: nodeid → packed record, found again by file handle or by (ino, dev, mount id).

**Trust.** nodeids and counts come from workers and may be anything; every access goes through `pin`, which refuses what
is not there. The records hold only what the broker itself found out.

**Invariants.**
* A nodeid is never used twice. It is (generation << 24 | slot); a slot's generation grows each time it is freed. Root is 1.
* `by_handle` holds every inode that has a file handle. `by_ids` holds only inodes whose reference is an O_PATH descriptor:
  that descriptor keeps the inode number from being given to another file. An inode known by its handle alone may be
  deleted on the host and its number reused, so a hit by numbers would be the wrong file (semantics.md 8/10).
* Find-or-insert is one step under the lock; no system call is made under it.
* A pinned inode keeps its descriptor and its mount reference until the last pin goes, however often it is forgotten.
* Records are columns of machine integers, not objects: a million inodes cost neither a million objects nor a pause of the
  garbage collector.
"""

from __future__ import annotations

import errno
import stat
import threading
from array import array
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from vfsd.errors import ReplyErrno

ROOT_NODEID = 1
DEFAULT_MAX_INODES = 4_000_000

_SLOT_BITS = 24
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_NO_FD = -1


class Identity(NamedTuple):
    """How an inode is recognised: `handle_key` (mount id and struct file_handle) if it has one, and its numbers."""

    handle_key: bytes | None
    ids_key: bytes
    mount_id: int
    device: int
    file_type: int  # S_IFMT bits


class Released(NamedTuple):
    """What a freed inode leaves to its owner: a descriptor to close (-1: none), a mount reference to drop, its nodeid."""

    nodeid: int
    fd: int
    mount_id: int
    held_mount: bool


class Pin:
    """An inode that cannot go away while this is held. Made by `InodeStore.pin`, left with `with`."""

    __slots__ = ("_slot", "_store", "device", "fd", "file_type", "handle_key", "mount_id", "nodeid")

    def __init__(self, store: InodeStore, slot: int) -> None:
        self._store = store
        self._slot = slot
        self.nodeid = store.nodeids[slot]
        self.fd = store.fds[slot]
        self.handle_key = store.handle_keys[slot]
        self.mount_id = store.mounts[slot]
        self.device = store.devices[slot]
        self.file_type = store.types[slot]

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
        self._store.unpin(self._slot)


class InodeStore:
    """See the module. `on_release` gets what freed inodes leave behind, called without the lock."""

    def __init__(self, lock: threading.Lock, on_release: Callable[[list[Released]], None], max_inodes: int = DEFAULT_MAX_INODES) -> None:
        self._lock = lock
        self._on_release = on_release
        self._max_inodes = min(max_inodes, _SLOT_MASK - 1)
        # Columns, one value per slot. Slot 0 is never used, slot 1 is the root's.
        self.nodeids = array("Q")  # 0: the slot is free
        self.lookups = array("Q")
        self.fds = array("i")  # the O_PATH reference, or -1
        self.mounts = array("Q")
        self.devices = array("Q")
        self.types = array("H")
        self.pins = array("I")
        self.held_mounts = array("B")  # 1: the inode holds a reference on its mount's descriptor
        self.handle_keys: list[bytes | None] = []
        self._ids_keys: list[bytes | None] = []
        self._generations = array("Q")
        self._free: list[int] = []
        self._by_handle: dict[bytes, int] = {}
        self._by_ids: dict[bytes, int] = {}
        self._count = 0
        self.fd_count = 0  # inodes kept as a descriptor
        self.session = 0
        for _ in range(2):
            self._add_slot()

    def __len__(self) -> int:
        return self._count

    def _add_slot(self) -> int:
        for column in (self.nodeids, self.lookups, self.mounts, self.devices, self.types, self.pins, self.held_mounts, self._generations):
            column.append(0)
        self.fds.append(_NO_FD)
        self.handle_keys.append(None)
        self._ids_keys.append(None)
        return len(self.nodeids) - 1

    def _slot_of(self, nodeid: int) -> int | None:
        slot = nodeid & _SLOT_MASK
        if slot == 0 or slot >= len(self.nodeids) or self.nodeids[slot] != nodeid:
            return None
        return slot

    def _find(self, identity: Identity) -> int | None:
        nodeid = self._by_handle.get(identity.handle_key) if identity.handle_key is not None else None
        if nodeid is None:
            nodeid = self._by_ids.get(identity.ids_key)
        return None if nodeid is None else nodeid & _SLOT_MASK

    def count_lookup(self, identity: Identity, session: int) -> int | None:
        """The nodeid of a known inode, its lookup counted; None if it is not known. ESTALE in another session."""
        with self._lock:
            self._require(session)
            slot = self._find(identity)
            if slot is None:
                return None
            self.lookups[slot] += 1
            return self.nodeids[slot]

    def insert(self, identity: Identity, session: int, *, fd: int, held_mount: bool) -> tuple[int, bool]:
        """(nodeid, True) of a new inode that took over `fd` (-1: none) and the mount reference; its lookup is counted.

        (nodeid, False) if another thread was first: then the caller still owns both. ENFILE when the store is full.
        """
        with self._lock:
            self._require(session)
            slot = self._find(identity)
            if slot is not None:
                self.lookups[slot] += 1
                return self.nodeids[slot], False
            slot = self._take_slot()
            self._fill(slot, (self._generations[slot] << _SLOT_BITS) | slot, identity, fd, held_mount=held_mount)
            return self.nodeids[slot], True

    def insert_root(self, identity: Identity, *, fd: int, held_mount: bool) -> None:
        """The root, once at start: neither a forget nor a new session removes it."""
        with self._lock:
            self._fill(ROOT_NODEID, ROOT_NODEID, identity, fd, held_mount=held_mount)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if self._count >= self._max_inodes:
            raise ReplyErrno(errno.ENFILE)
        return self._add_slot()

    def _fill(self, slot: int, nodeid: int, identity: Identity, fd: int, *, held_mount: bool) -> None:
        self.nodeids[slot] = nodeid
        self.lookups[slot] = 1
        self.fds[slot] = fd
        self.mounts[slot] = identity.mount_id
        self.devices[slot] = identity.device
        self.types[slot] = identity.file_type
        self.held_mounts[slot] = held_mount
        self.handle_keys[slot] = identity.handle_key
        if identity.handle_key is not None:
            self._by_handle[identity.handle_key] = nodeid
        if fd != _NO_FD:
            self.fd_count += 1
            self._ids_keys[slot] = identity.ids_key
            self._by_ids[identity.ids_key] = nodeid
        self._count += 1

    def pin(self, nodeid: int, session: int) -> Pin:
        """Hold an inode. EBADF if the nodeid is not known, ESTALE in another session."""
        with self._lock:
            self._require(session)
            slot = self._slot_of(nodeid)
            if slot is None or self.lookups[slot] == 0:
                raise ReplyErrno(errno.EBADF)
            self.pins[slot] += 1
            return Pin(self, slot)

    def unpin(self, slot: int) -> None:
        with self._lock:
            self.pins[slot] -= 1
            doomed = self.pins[slot] == 0 and self.lookups[slot] == 0
            released = [self._free_slot(slot)] if doomed else []
        if released:
            self._on_release(released)

    def mount_of(self, nodeid: int) -> int:
        """The mount an inode lives on, 0 if it is not known. A hint for scheduling: taken without the lock."""
        slot = nodeid & _SLOT_MASK
        return self.mounts[slot] if slot < len(self.nodeids) and self.nodeids[slot] == nodeid else 0

    def alive(self, nodeid: int) -> bool:
        """Whether the guest still knows it. The caller holds the lock."""
        slot = self._slot_of(nodeid)
        return slot is not None and self.lookups[slot] > 0

    def forget(self, pairs: list[int], session: int) -> None:
        """Take back lookups: [nodeid, count, …]. Unknown nodeids and excess counts are harmless; the root stays."""
        released = []
        with self._lock:
            if session != self.session:
                return
            for nodeid, count in zip(pairs[::2], pairs[1::2], strict=True):
                slot = self._slot_of(nodeid)
                if slot is None or slot == ROOT_NODEID:
                    continue
                self.lookups[slot] -= min(count, self.lookups[slot])
                if self.lookups[slot] == 0:
                    self._unlist(slot)
                    if self.pins[slot] == 0:
                        released.append(self._free_slot(slot))
        if released:
            self._on_release(released)

    def begin_session(self, session: int) -> None:
        """Forget everything but the root. Pinned inodes go when their last pin does. Nothing if a later one has begun."""
        released = []
        with self._lock:
            if session < self.session:
                return
            self.session = session
            for slot in range(ROOT_NODEID + 1, len(self.nodeids)):
                if self.lookups[slot] == 0:
                    continue
                self.lookups[slot] = 0
                self._unlist(slot)
                if self.pins[slot] == 0:
                    released.append(self._free_slot(slot))
        if released:
            self._on_release(released)

    def _unlist(self, slot: int) -> None:
        """Take an inode out of both indexes, but only where they mean this very inode: a younger one may have its numbers."""
        nodeid = self.nodeids[slot]
        handle_key, ids_key = self.handle_keys[slot], self._ids_keys[slot]
        if handle_key is not None and self._by_handle.get(handle_key) == nodeid:
            del self._by_handle[handle_key]
        if ids_key is not None and self._by_ids.get(ids_key) == nodeid:
            del self._by_ids[ids_key]

    def _free_slot(self, slot: int) -> Released:
        released = Released(self.nodeids[slot], self.fds[slot], self.mounts[slot], bool(self.held_mounts[slot]))
        self.nodeids[slot] = 0
        self.fd_count -= self.fds[slot] != _NO_FD
        self.fds[slot] = _NO_FD
        self.handle_keys[slot] = None
        self._ids_keys[slot] = None
        self._count -= 1
        self._generations[slot] += 1
        self._free.append(slot)
        return released

    def _require(self, session: int) -> None:
        if session != self.session:
            raise ReplyErrno(errno.ESTALE)
