"""The inodes of one session as columns of machine integers, in pages; and two indexes over them, in shards.

Nothing here grows in one piece: a page or a shard is small, so that neither its growth nor its end is a pause that a guest
would feel (one dictionary of a million entries is copied for 50 ms when it grows). A new session starts with a new table;
nodeids go on where the old one's ended.

**Trust.** None: nodeids are looked up, not believed. Not thread-safe: the inode store (inode_store.py) has the lock.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

ROOT_NODEID = 1
SLOT_BITS = 24
SLOT_MASK = (1 << SLOT_BITS) - 1
NO_FD = -1

_PAGE_BITS = 10
PAGE_ROWS = 1 << _PAGE_BITS
_ROW_MASK = PAGE_ROWS - 1
_SHARDS = 1024  # at four million inodes a shard has 4096 entries, and is copied in a quarter of a millisecond
_SHARD_MASK = _SHARDS - 1


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


class Page:
    """Columns of 1024 inodes, one value per row."""

    __slots__ = (
        "devices", "fds", "first_slot", "generations", "handle_keys", "held_mounts", "ids_keys", "lookups", "mounts", "next_free",
        "nodeids", "pins", "types",
    )  # fmt: skip

    def __init__(self, first_slot: int, generation: int) -> None:
        self.first_slot = first_slot
        self.nodeids = array("Q", bytes(8 * PAGE_ROWS))  # 0: the row is free
        self.lookups = array("Q", bytes(8 * PAGE_ROWS))
        self.mounts = array("Q", bytes(8 * PAGE_ROWS))
        self.devices = array("Q", bytes(8 * PAGE_ROWS))
        self.generations = array("Q", [generation]) * PAGE_ROWS
        self.fds = array("i", [NO_FD]) * PAGE_ROWS  # the O_PATH reference, or -1
        self.pins = array("I", bytes(4 * PAGE_ROWS))
        self.next_free = array("I", bytes(4 * PAGE_ROWS))  # of a free row: the next free slot, 0 after the last
        self.types = array("H", bytes(2 * PAGE_ROWS))
        self.held_mounts = array("B", bytes(PAGE_ROWS))  # 1: the inode holds a reference on its mount's descriptor
        self.handle_keys: list[bytes | None] = [None] * PAGE_ROWS
        self.ids_keys: list[bytes | None] = [None] * PAGE_ROWS


class Index:
    """Key → nodeid."""

    __slots__ = ("_shards",)

    def __init__(self) -> None:
        self._shards: list[dict[bytes, int]] = [{} for _ in range(_SHARDS)]

    def get(self, key: bytes) -> int | None:
        return self._shards[hash(key) & _SHARD_MASK].get(key)

    def put(self, key: bytes, nodeid: int) -> None:
        self._shards[hash(key) & _SHARD_MASK][key] = nodeid

    def remove(self, key: bytes, nodeid: int) -> None:
        """Only where it means this very inode: a younger one may have its key."""
        shard = self._shards[hash(key) & _SHARD_MASK]
        if shard.get(key) == nodeid:
            del shard[key]

    def take_some(self) -> bool:
        """Of an index that nobody uses any more: free about a page's worth of entries. False if there are none."""
        found = bool(self._shards)
        room = PAGE_ROWS
        while self._shards and room > 0:
            room -= len(self._shards.pop())
        return found


class Table:
    """All inodes of a session. `first_generation` is greater than every generation of the tables before."""

    __slots__ = ("_by_handle", "_by_ids", "_first_free", "_first_generation", "_unused", "count", "next_generation", "pages")

    def __init__(self, first_generation: int = 0) -> None:
        self.pages: list[Page] = []
        self.count = 0
        self.next_generation = first_generation + 1  # what a table after this one may begin with
        self._first_generation = first_generation
        self._first_free = 0
        self._unused = ROOT_NODEID + 1  # the first slot that was never used; 0 means nobody, 1 is the root's
        self._by_handle = Index()
        self._by_ids = Index()
        self._add_page()

    @property
    def untouched(self) -> bool:
        """Whether it never held anything but the root."""
        return self._unused == ROOT_NODEID + 1

    def _add_page(self) -> None:
        self.pages.append(Page(len(self.pages) << _PAGE_BITS, self._first_generation))

    def locate(self, nodeid: int) -> tuple[Page, int] | None:
        """The page and row of an inode that is in the table, also of one that only a pin keeps there."""
        slot = nodeid & SLOT_MASK
        number = slot >> _PAGE_BITS
        if not nodeid or number >= len(self.pages):
            return None
        page, row = self.pages[number], slot & _ROW_MASK
        return (page, row) if page.nodeids[row] == nodeid else None

    def find(self, identity: Identity) -> int | None:
        """The nodeid of an inode that is listed: by handle, else by numbers."""
        handle_key, nodeid = identity.handle_key, None
        if handle_key is not None:
            nodeid = self._by_handle.get(handle_key)
        return self._by_ids.get(identity.ids_key) if nodeid is None else nodeid

    def count_lookup(self, nodeid: int) -> None:
        """One more, of an inode that was found."""
        slot = nodeid & SLOT_MASK
        self.pages[slot >> _PAGE_BITS].lookups[slot & _ROW_MASK] += 1

    def add(self, identity: Identity, fd: int, *, held_mount: bool) -> int:
        """A new inode with one lookup; its nodeid."""
        slot = self._take_slot()
        page, row = self.pages[slot >> _PAGE_BITS], slot & _ROW_MASK
        nodeid = (page.generations[row] << SLOT_BITS) | slot
        self._fill(page, row, nodeid, identity, fd, held_mount=held_mount)
        return nodeid

    def add_root(self, identity: Identity, fd: int, *, held_mount: bool) -> None:
        self._fill(self.pages[0], ROOT_NODEID, ROOT_NODEID, identity, fd, held_mount=held_mount)

    def _take_slot(self) -> int:
        slot = self._first_free
        if slot:
            self._first_free = self.pages[slot >> _PAGE_BITS].next_free[slot & _ROW_MASK]
            return slot
        slot = self._unused
        if slot >> _PAGE_BITS == len(self.pages):
            self._add_page()
        self._unused += 1
        return slot

    def _fill(self, page: Page, row: int, nodeid: int, identity: Identity, fd: int, *, held_mount: bool) -> None:
        page.nodeids[row] = nodeid
        page.lookups[row] = 1
        page.fds[row] = fd
        page.mounts[row] = identity.mount_id
        page.devices[row] = identity.device
        page.types[row] = identity.file_type
        page.held_mounts[row] = held_mount
        page.handle_keys[row] = identity.handle_key
        if identity.handle_key is not None:
            self._by_handle.put(identity.handle_key, nodeid)
        if fd != NO_FD:
            page.ids_keys[row] = identity.ids_key
            self._by_ids.put(identity.ids_key, nodeid)
        self.count += 1

    def unlist(self, page: Page, row: int) -> None:
        """Let an inode not be found any more."""
        nodeid = page.nodeids[row]
        handle_key, ids_key = page.handle_keys[row], page.ids_keys[row]
        if handle_key is not None:
            self._by_handle.remove(handle_key, nodeid)
        if ids_key is not None:
            self._by_ids.remove(ids_key, nodeid)

    def free(self, page: Page, row: int) -> Released:
        """Give a row back; the next inode in it has another nodeid."""
        released = Released(page.nodeids[row], page.fds[row], page.mounts[row], bool(page.held_mounts[row]))
        page.nodeids[row] = 0
        page.fds[row] = NO_FD
        page.held_mounts[row] = 0
        page.handle_keys[row] = None
        page.ids_keys[row] = None
        page.generations[row] += 1
        self.next_generation = max(self.next_generation, page.generations[row] + 1)
        page.next_free[row] = self._first_free
        self._first_free = page.first_slot + row
        self.count -= 1
        return released

    def move_root(self, successor: Table) -> None:
        """Give the root to the next session's table. Here a row stays that owns nothing and that pins may still count in."""
        page, row = self.pages[0], ROOT_NODEID
        identity = Identity(page.handle_keys[row], page.ids_keys[row] or b"", page.mounts[row], page.devices[row], page.types[row])
        successor.add_root(identity, page.fds[row], held_mount=bool(page.held_mounts[row]))
        page.nodeids[row] = 0
        page.fds[row] = NO_FD
        page.held_mounts[row] = 0
        self.count -= 1

    def take_some_of_indexes(self) -> bool:
        """Of a table whose pages are gone: free a bit more of it. False if nothing is left."""
        return self._by_handle.take_some() or self._by_ids.take_some()
