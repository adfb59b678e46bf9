"""One virtqueue of a hostile driver: descriptor tables, indirect ones too, available ring and events changed at any moment.

Oracle: a chain is popped with just the buffers that a second reading of the tables gives, each of them guest memory, or there is
a GuestBreach; completions stand in the used ring as they were pushed; the device calls and arms as the specification says; at the
end a ring that is set up as a correct driver does works, and every view of guest memory can be taken back.
"""

from __future__ import annotations

import struct

from tests.fuzz.oracle import open_fd_count
from tests.fuzz.provider import Provider, Recipe
from tests.support.driver import AVAIL_AT, DATA_AT, DESC_AT, INDIRECT_AT, RAM_BYTES, USED_AT, UVA, Driver
from vfsd.errors import FrontendBreach, GuestBreach
from vfsd.wire.virtio_ring import VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE
from vfsd.worker.guest_memory import GuestMemory
from vfsd.worker.virtqueue import Chain, Virtqueue

_STEPS = (
    "describe",
    "describe",
    "link",
    "offer",
    "offer",
    "pop",
    "pop",
    "complete",
    "avail_idx",
    "used_event",
    "used_idx",
    "flags",
    "arm",
    "poke",
)
_SIZES = (8, 1, 2, 256)
_FLAGS = (0, 1, 2, 3, 4, 5, 6, 7, 0xFFFF)
_BUDGET = 1024  # of a queue of at most so many descriptors: what ends a loop
_MOST_STEPS = 150
_INDIRECT_ENTRIES = 32768
_ADDRESSES = (DATA_AT, DATA_AT + 1, 0, RAM_BYTES - 1, RAM_BYTES, RAM_BYTES // 2 - 8, INDIRECT_AT, AVAIL_AT)
_PATTERN = bytes(range(251)) * (RAM_BYTES // 251 + 1)


def one_input(data: bytes) -> None:
    provider = Provider(data)
    before = open_fd_count()
    driver = Driver(size=provider.pick(_SIZES), event_idx=provider.flag())
    try:
        _Run(provider, driver).run()
    finally:
        driver.close()  # BufferError, if a view is left
    assert open_fd_count() == before


class _Run:
    def __init__(self, provider: Provider, driver: Driver) -> None:
        self._provider = provider
        self._driver = driver
        driver.ram[DATA_AT:] = _PATTERN[DATA_AT:RAM_BYTES]
        self._split = self._two_regions() if provider.flag() else None
        self._popped: dict[int, Chain] = {}

    def _two_regions(self) -> GuestMemory:
        """The same memory as two regions that follow each other: a buffer may lie in both."""
        memory = GuestMemory()
        memory.add(self._driver.ram_fd, 0, RAM_BYTES // 2, UVA, 0)
        memory.add(self._driver.ram_fd, RAM_BYTES // 2, RAM_BYTES // 2, UVA + 4 * RAM_BYTES, RAM_BYTES // 2)
        return memory

    def run(self) -> None:
        try:
            queue = self._start()
            if queue is not None:
                for _ in range(_MOST_STEPS):
                    if self._provider.left:
                        self._step(queue)
                queue.close()
            self._serve_a_correct_driver()
        finally:
            self._popped.clear()
            if self._split is not None:
                for each in self._driver.queues:
                    each.close()
                self._split.clear()

    def _start(self) -> Virtqueue | None:
        """At the places that belong to it, or anywhere else."""
        provider = self._provider
        last_avail = provider.number(16)
        changed = {}
        if provider.one_in(8):
            where = provider.pick(("desc_uva", "avail_uva", "used_uva", "size"))
            changed[where] = provider.number(64 if where != "size" else 17) + (UVA if provider.flag() else 0)
        self._driver.set_avail_idx(last_avail)
        try:
            return self._driver.queue(last_avail=last_avail, memory=self._split, **changed)
        except FrontendBreach:
            assert changed
            return None

    def _step(self, queue: Virtqueue) -> None:
        provider, driver = self._provider, self._driver
        match provider.pick(_STEPS):
            case "describe":
                self._describe()
            case "link":  # a table of which each entry leads to the next, the last one anywhere
                table = provider.pick((DESC_AT, INDIRECT_AT))
                for number in range(count := provider.byte()):
                    following = provider.byte() if number == count - 1 else number + 1
                    driver.describe(number, DATA_AT + number, 16, VIRTQ_DESC_F_NEXT, following, table=table)
            case "offer":
                driver.offer(provider.number(16))
            case "avail_idx":
                driver.set_avail_idx(provider.number(16))
            case "used_event":
                driver.set_used_event(provider.number(16))
            case "used_idx":
                driver.set_used_idx(provider.number(16))
            case "flags":
                driver.set_no_interrupt(provider.number(16))
            case "poke":
                driver.put(provider.number(16) & ~1, "<H", provider.number(16))
            case "pop":
                self._pop(queue)
            case "complete":
                self._complete(queue)
            case _:
                self._arm(queue)
        assert queue.in_flight == len(self._popped)

    def _describe(self) -> None:
        provider = self._provider
        number = provider.byte() % 16
        address = provider.number() if provider.one_in(4) else provider.pick(_ADDRESSES)
        length = provider.number(32)
        self._driver.describe(
            number,
            address,
            length,
            provider.pick(_FLAGS),
            provider.number(16),
            table=provider.pick((DESC_AT, INDIRECT_AT, DESC_AT, DATA_AT)),
        )

    def _pop(self, queue: Virtqueue) -> None:
        driver, size = self._driver, queue.size
        head = driver.get(AVAIL_AT + 4 + 2 * (queue.last_avail % size)) if _is_usual(queue, driver) else None
        last_avail = queue.last_avail
        try:
            chain = queue.pop()
        except GuestBreach as breach:
            assert str(breach).startswith("queue 3")
            assert queue.last_avail == last_avail
            return
        if chain is None:
            assert queue.last_avail == last_avail
            return
        assert queue.last_avail == (last_avail + 1) & 0xFFFF
        assert chain.head not in self._popped
        self._popped[chain.head] = chain
        if head is not None:
            assert chain.head == head
            self._check_buffers(chain, _read_chain(driver, size, head))

    def _check_buffers(self, chain: Chain, expected: list[tuple[int, int, bool]]) -> None:
        readable = [(address, length) for address, length, writable in expected if not writable]
        writable = [(address, length) for address, length, writable in expected if writable]
        assert chain.readable_bytes == sum(length for _, length in readable)
        assert chain.writable_bytes == sum(length for _, length in writable)
        for views, buffers in ((chain.readable, readable), (chain.writable, writable)):
            assert sum(map(len, views)) == sum(length for _, length in buffers)
            position = 0
            for address, length in buffers[:32]:
                assert address + length <= RAM_BYTES
                while length:
                    view = views[position]
                    assert len(view) <= length
                    assert view[:512] == self._driver.ram[address : address + len(view)][:512]
                    address, length, position = address + len(view), length - len(view), position + 1

    def _complete(self, queue: Virtqueue) -> None:
        """All that is in flight."""
        staged = []
        for head, chain in self._popped.items():
            written = min(chain.writable_bytes, self._provider.number(32))
            queue.push(head, written)
            staged.append((head, written))
        self._popped.clear()
        idx = queue._next_used
        queue.publish()
        if staged and _is_usual(queue, self._driver):
            assert self._driver.used_idx == idx
            for back, entry in enumerate(reversed(staged), 1):
                assert self._driver.used_entry((idx - back) & 0xFFFF) == entry

    def _arm(self, queue: Virtqueue) -> None:
        more = queue.arm()
        if _is_usual(queue, self._driver):
            assert more == (self._driver.get(AVAIL_AT + 2) != queue.last_avail)
            if self._driver.event_idx:
                assert self._driver.avail_event == queue.last_avail
            else:
                assert self._driver.used_flags == 0
        queue.disarm()

    def _serve_a_correct_driver(self) -> None:
        """Whatever was in this memory before."""
        driver = self._driver
        driver.ram[:DATA_AT] = bytes(DATA_AT)
        queue = driver.queue(memory=self._split)
        driver.describe(0, DATA_AT, 40, VIRTQ_DESC_F_NEXT if driver.size > 1 else 0, 1)
        if driver.size > 1:
            driver.describe(1, DATA_AT + 64, 32, VIRTQ_DESC_F_WRITE)
        driver.offer(0)
        chain = queue.pop()
        assert chain is not None
        assert chain.readable[0] == driver.ram[DATA_AT : DATA_AT + 40]
        assert chain.writable_bytes == (32 if driver.size > 1 else 0)
        queue.push(0, chain.writable_bytes)
        assert queue.publish()
        assert driver.used_entry(0) == (0, 32 if driver.size > 1 else 0)
        queue.close()


def _is_usual(queue: Virtqueue, driver: Driver) -> bool:
    """Whether its rings are where the driver keeps them."""
    places = [(DESC_AT, queue._descriptors), (AVAIL_AT, queue._avail), (USED_AT, queue._used)]
    return queue.size == driver.size and all(driver.ram[at : at + 16] == view.cast("B")[:16] for at, view in places)


def _read_chain(driver: Driver, size: int, head: int) -> list[tuple[int, int, bool]]:
    """(address, length, writable) of a chain that is right (virtio 1.2, 2.7.5)."""
    found: list[tuple[int, int, bool]] = []
    table, entries, index, inside = DESC_AT, size, head, False
    while True:
        assert index < entries
        address, length, flags, following = struct.unpack_from("<QIHH", driver.ram, table + 16 * index)
        if flags & VIRTQ_DESC_F_INDIRECT:
            assert not inside
            assert not flags & VIRTQ_DESC_F_NEXT
            assert length
            assert length % 16 == 0
            assert length // 16 <= _INDIRECT_ENTRIES
            assert address + length <= RAM_BYTES
            table, entries, index, inside = address, length // 16, 0, True
            continue
        writable = bool(flags & VIRTQ_DESC_F_WRITE)
        assert length
        assert writable or not (found and found[-1][2])
        assert len(found) < max(size, _BUDGET)
        found.append((address, length, writable))
        if not flags & VIRTQ_DESC_F_NEXT:
            return found
        index = following


def _recipe(*, size: int = 8, two_regions: bool = False) -> Recipe:
    """A queue that begins at index 0, where it belongs."""
    return Recipe().pick(_SIZES, size).flag(True).flag(two_regions).number(0).one_in(8)


def _describe(recipe: Recipe, number: int, address: int, length: int, flags: int, following: int = 0, table: int = DESC_AT) -> None:
    tables = (DESC_AT, INDIRECT_AT, DESC_AT, DATA_AT)
    recipe.pick(_STEPS, "describe").byte(number).one_in(4, True).number(address).number(length).pick(_FLAGS, flags).number(following)
    recipe.pick(tables, table)


def _then_pop(recipe: Recipe, head: int = 0) -> bytes:
    for step in ("offer", "pop", "complete", "arm"):
        recipe.pick(_STEPS, step)
        if step == "offer":
            recipe.number(head)
        elif step == "complete":
            recipe.number(16)
    return bytes(recipe)


def seeds() -> dict[str, bytes]:
    found = {}
    recipe = _recipe()
    _describe(recipe, 0, DATA_AT, 40, VIRTQ_DESC_F_NEXT, 1)
    _describe(recipe, 1, DATA_AT + 64, 80, VIRTQ_DESC_F_WRITE)
    found["a-request"] = _then_pop(recipe)
    recipe = _recipe(two_regions=True)
    _describe(recipe, 0, RAM_BYTES // 2 - 8, 16, 0)
    found["a-buffer-in-two-regions"] = _then_pop(recipe)
    recipe = _recipe()
    for number in range(3):
        _describe(recipe, number, DATA_AT, 16, VIRTQ_DESC_F_NEXT, (number + 1) % 3)
    found["a-loop"] = _then_pop(recipe)
    recipe = _recipe()
    _describe(recipe, 0, INDIRECT_AT, 32, VIRTQ_DESC_F_INDIRECT)
    _describe(recipe, 0, DATA_AT, 40, VIRTQ_DESC_F_NEXT, 1, INDIRECT_AT)
    _describe(recipe, 1, DATA_AT + 64, 80, VIRTQ_DESC_F_WRITE, 0, INDIRECT_AT)
    found["an-indirect-table"] = _then_pop(recipe)
    recipe = _recipe()
    _describe(recipe, 0, INDIRECT_AT, 16, VIRTQ_DESC_F_INDIRECT)
    _describe(recipe, 0, INDIRECT_AT, 16, VIRTQ_DESC_F_INDIRECT, 0, INDIRECT_AT)
    found["an-indirect-table-in-itself"] = _then_pop(recipe)
    recipe = _recipe()
    recipe.pick(_STEPS, "link").pick((DESC_AT, INDIRECT_AT), INDIRECT_AT).byte(200).byte(0)
    _describe(recipe, 0, INDIRECT_AT, 200 * 16, VIRTQ_DESC_F_INDIRECT)
    found["a-loop-in-an-indirect-table"] = _then_pop(recipe)
    recipe = _recipe()
    _describe(recipe, 0, (1 << 64) - 8, 16, 0)
    found["an-address-that-wraps-round"] = _then_pop(recipe)
    recipe = _recipe()
    _describe(recipe, 0, DATA_AT, 16, VIRTQ_DESC_F_WRITE | VIRTQ_DESC_F_NEXT, 1)
    _describe(recipe, 1, DATA_AT, 16, 0)
    found["readable-after-writable"] = _then_pop(recipe)
    found["a-head-outside-the-table"] = _then_pop(_recipe(), 8)
    found["a-jump-of-the-index"] = bytes(_recipe().pick(_STEPS, "avail_idx").number(0x8000).pick(_STEPS, "pop"))
    return found
