"""Rings with faults: completions that are lost, doubled or spoilt, kicks and calls that get lost, and the points of a ring's life."""

from __future__ import annotations

from typing import Any

from vfsd.faults import catalogue
from vfsd.faults.injector import Hit
from vfsd.faults.rule import chance
from vfsd.faulty import Faults
from vfsd.wire.inflight import _SKEW, Recovered
from vfsd.worker.inflight_memory import MappedTable
from vfsd.worker.request import OUT_HEADER_BYTES
from vfsd.worker.ring import Ring
from vfsd.worker.ring_table import RingTable
from vfsd.worker.virtqueue import Chain, Virtqueue


class FaultyTable(MappedTable):
    """With points between what it notes."""

    __slots__ = ("_faults", "_recovering", "queue")

    def __init__(self, faults: Faults, *rest: Any) -> None:
        super().__init__(*rest)
        self._faults = faults
        self._recovering = False
        self.queue = -1

    def link(self, heads: list[int]) -> None:
        super().link(heads)
        self._faults.at("after-link", f"{len(heads)} completions of queue {self.queue}", queue=self.queue)

    def clear(self, heads: list[int], used_idx: int) -> None:
        if not self._recovering:
            self._faults.at("before-clear", f"{len(heads)} completions of queue {self.queue}", queue=self.queue)
        super().clear(heads, used_idx)

    def doubled(self, entries: int) -> None:
        """So many entries of the used ring are of no request: how far the available ring was taken is told without them."""
        self._words[_SKEW] = (self._words[_SKEW] - entries) & 0xFFFF

    def recover(self, *where: Any) -> Recovered:
        self._recovering = True
        try:
            return super().recover(*where)
        finally:
            self._recovering = False


class FaultyVirtqueue(Virtqueue):
    """`twists`: the faults of the next completion that is pushed."""

    __slots__ = ("_doubled", "_faults", "_withheld", "twists")

    def __init__(self, faults: Faults, memory: Any, index: int, *rest: Any, **keywords: Any) -> None:
        self._faults = faults
        self._withheld: list[tuple[int, int]] = []
        self._doubled = 0  # of what is staged
        self.twists: list[Hit] = []
        for each in rest:
            if isinstance(each, FaultyTable):
                each.queue = index
        super().__init__(memory, index, *rest, **keywords)

    def push(self, head: int, written_bytes: int) -> None:
        twists, self.twists = self.twists, []
        names = {hit.rule.action.name for hit in twists}
        for hit in twists:
            if hit.rule.action.name == "corrupt":
                _corrupt(self._in_flight[head], written_bytes, hit)
        if "drop" in names:
            self._withheld.append((head, written_bytes))
            return
        super().push(head, written_bytes)
        if "duplicate" in names:
            self._show_again(head, written_bytes)

    def _show_again(self, head: int, written_bytes: int) -> None:
        """A second entry in the used ring, which then runs one ahead of what was taken."""
        place = 2 * (self._next_used & (self._size - 1))
        self._used_ring[place] = head
        self._used_ring[place + 1] = written_bytes
        self._next_used = (self._next_used + 1) & 0xFFFF
        self._doubled += 1

    def release_withheld(self) -> None:
        """What was kept back is completed after all: the ring is to stop, and could not with requests in flight."""
        withheld, self._withheld = self._withheld, []
        for head, written_bytes in withheld:
            super().push(head, written_bytes)

    def publish(self) -> bool:
        if not self._staged:
            return False
        what = f"{len(self._staged)} completions of queue {self.index}"
        self._faults.at("before-publish", what, queue=self.index)
        wanted = super().publish()
        if self._doubled and isinstance(self.inflight, FaultyTable):
            self.inflight.doubled(self._doubled)
            self._doubled = 0
        self._faults.at("after-publish", what, queue=self.index)
        if not wanted:
            return False
        injector = self._faults.injector
        return not injector.hits(injector.about(catalogue.CALL, queue=self.index), f"queue {self.index}")


def _corrupt(chain: Chain | None, written_bytes: int, hit: Hit) -> None:
    """Change one byte of a reply: the one that the rule names, or any behind the header, or of it if that is all there is."""
    if chain is None or not written_bytes:
        return
    place = hit.rule.action.number
    if place < 0:
        first = OUT_HEADER_BYTES if written_bytes > OUT_HEADER_BYTES else 0
        place = first + int(chance(hit.seed ^ 1, hit.number) * (written_bytes - first))
    change = 1 + int(chance(hit.seed ^ 2, hit.number) * 255)
    for view in chain.writable:
        if place < len(view):
            view[place] ^= change
            return
        place -= len(view)


class FaultyRing(Ring):
    __slots__ = ("_faults",)

    def __init__(self, faults: Faults, *rest: Any, **keywords: Any) -> None:
        super().__init__(*rest, **keywords)
        self._faults = faults

    def pop(self) -> Chain | None:
        chain = super().pop()
        if chain is not None:
            self._faults.at("after-pop", f"head {chain.head} of queue {self.index}", queue=self.index)
        return chain


class FaultyRingTable(RingTable):
    def __init__(self, faults: Faults, *rest: Any) -> None:
        super().__init__(*rest)
        self._injector = faults.injector

    def kicked(self, fd: int) -> None:
        ring = self._by_kick.get(fd)
        if ring is not None and self._injector.hits(self._injector.about(catalogue.KICK, queue=ring.index), f"queue {ring.index}"):
            return
        super().kicked(fd)
