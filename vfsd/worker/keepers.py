"""Writes under way whose writer may keep the file's set-id bits.

Each looks at the file's mode before it writes, and has the broker put back what it saw. But what one saw, another that
overlaps with it may not have seen: the first had taken the bits away, they came back between the second's look and its write,
and it took them away for good. So all that overlap share what one of them saw. The ring thread's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Group:
    """The writes under way to one inode, and the bits that one of them saw."""

    __slots__ = ("bits", "users")

    def __init__(self) -> None:
        self.bits = 0
        self.users = 0


class Keepers:
    """nodeid → group."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def seen(self, nodeid: int) -> int:
        """The bits that a write which is under way saw."""
        group = self._groups.get(nodeid)
        return 0 if group is None else group.bits

    @contextmanager
    def joined(self, nodeid: int) -> Iterator[Group]:
        """A write to the inode is under way inside the block."""
        group = self._groups.setdefault(nodeid, Group())
        group.users += 1
        try:
            yield group
        finally:
            group.users -= 1
            if not group.users:
                del self._groups[nodeid]
