"""The device's side of one split virtqueue: take chains, complete them, and agree with the driver on who wakes whom.

Trust: the descriptor table and the available ring belong to the guest and change at will; what is read of them is read once
and checked before use (GuestBreach: the ring is to be stopped). Size, start index and addresses come from the frontend
(FrontendBreach). The used ring is ours to write, but lies in guest memory: after the start nothing is read back from it.

Not thread-safe: only the ring thread may touch a Virtqueue. The views in a Chain may be filled and read by any thread until
that chain is pushed.

Written so that Cython's pure-Python mode can compile it: integers, typed views of the rings, no pointer arithmetic.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque

from vfsd.errors import FrontendBreach, GuestBreach
from vfsd.wire import virtio_ring
from vfsd.wire.inflight import InflightTable
from vfsd.wire.virtio_ring import RING_FLAGS, RING_IDX, RING_START, VIRTQ_DESC_F_WRITE, need_event, walk_chain
from vfsd.worker.guest_memory import GuestMemory

# A FUSE request of 1 MiB is some 260 pages; Linux puts them into one indirect chain however short the queue is. Longer
# ones than this nobody sends, and each descriptor costs us a view.
_LEAST_CHAIN_BUDGET = 1024

_fence_lock = threading.Lock()
_TOTAL_STORE_ORDER = os.uname().machine in ("x86_64", "i386", "i586", "i686")


def fence() -> None:
    """A full memory barrier: every load and store before it happens before every load and store after it.

    The rings need it where we store one word and then load another (used.idx, then used_event; avail_event, then avail.idx):
    even x86 lets the load overtake the store, and then each side sleeps in the belief that the other saw its word. Python has no
    barrier, but a lock has. An uncontended threading.Lock is a POSIX semaphore: acquire is an atomic compare-and-swap, release
    an atomic add.

    * x86-64: both are LOCK-prefixed instructions, and no load or store passes such a one in either direction (Intel SDM vol. 3,
      "Memory Ordering"; Linux's smp_mb() is one too). One pair is more than enough.
    * aarch64 and others: acquire and release are half barriers. Earlier accesses cannot sink below a release, later ones cannot
      rise above an acquire, but both may move *into* one pair and cross there. A release followed by an acquire does order all,
      because a load-acquire is not observed before an earlier store-release; so there we take two pairs.

    The compiler reorders nothing across it: these are calls made by an interpreter.
    """
    _fence_lock.acquire()
    _fence_lock.release()
    if not _TOTAL_STORE_ORDER:
        _fence_lock.acquire()
        _fence_lock.release()


def _order() -> None:
    """Keep loads in order with later loads and stores with later stores: x86 always does, others need a barrier."""
    if not _TOTAL_STORE_ORDER:
        fence()


class Chain:
    """The buffers of one request: `readable` holds what the driver says, `writable` takes what we answer.

    The views follow the driver's layout, which is free: a FUSE header may be split over several, or share one with data.
    There may be more of them than IOV_MAX (1024), since a buffer that spans memory regions is several views.
    `number` tells one use of a head from the next, also across workers. `deaths`: how many workers died while they ran it.
    """

    __slots__ = ("deaths", "head", "inflight", "number", "readable", "readable_bytes", "writable", "writable_bytes")

    def __init__(self, head: int, number: int = 0, inflight: InflightTable | None = None, deaths: int = 0) -> None:
        self.head = head
        self.number = number
        self.deaths = deaths
        self.inflight = inflight  # where its use of the head is noted
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.readable_bytes = 0
        self.writable_bytes = 0

    def runs(self, running: bool) -> None:
        """Whether this worker is at the request, or somebody else is: if it dies now, the request is, or is not, what it dies of.

        Only noted of one that a worker died of before: another one's first death is no reason for anything.
        """
        if self.deaths and self.inflight is not None:
            self.inflight.note_deaths(self.head, self.deaths if running else self.deaths - 1)

    def release(self) -> bool:
        """Give the views back: from now on using one is a ValueError, not a write into memory the guest has put to other use.

        False if a call in another thread is just using one of them; that one is released with the call's last reference.
        """
        all_released = True
        for views in (self.readable, self.writable):
            for view in views:
                try:
                    view.release()
                except BufferError:
                    all_released = False
        return all_released


class Virtqueue:
    """One started ring. It goes on from `last_avail` in the available ring and from the used.idx found in memory.

    If the table says that this very start (`start_number`) was served before, by a worker that died, or if the table is `adopted`
    from the frontend, which kept it, it goes on where that one was instead: what was in flight comes out of `pop_recovered`.
    Numbers are taken from the clock at first, so that no later start, in whatever process, gives one again. The table is taken
    over.

    `index` is the vhost-user queue index, for messages. `close()` gives the rings' memory back; it must come before the
    memory is unmapped.
    """

    __slots__ = (
        "_avail",
        "_budget",
        "_decided_used",
        "_descriptors",
        "_event_idx",
        "_in_flight",
        "_memory",
        "_next_number",
        "_next_used",
        "_recovered",
        "_seen_avail",
        "_size",
        "_staged",
        "_used",
        "_used_ring",
        "_views",
        "index",
        "inflight",
        "last_avail",
        "resumed",
    )

    def __init__(
        self,
        memory: GuestMemory,
        index: int,
        size: int,
        last_avail: int,
        desc_uva: int,
        avail_uva: int,
        used_uva: int,
        event_idx: bool,
        inflight: InflightTable,
        start_number: int,
        *,
        adopted: bool = False,
    ) -> None:
        self.inflight = inflight
        self._views: list[memoryview] = []
        self._in_flight: dict[int, Chain | None] = {}  # by head; None: staged, not yet published
        self._staged: list[int] = []
        self._recovered: deque[int] = deque()  # heads that a dead worker had taken, until they are run again
        self.resumed = False  # a dead worker served this ring before
        try:
            self._check_start(index, size, last_avail, avail_uva, used_uva)
        except FrontendBreach:
            self.close()
            raise
        self.index = index
        self.last_avail = last_avail  # the next entry of the available ring to take; free-running, modulo 2^16
        self._memory = memory
        self._size = size
        self._event_idx = event_idx
        self._budget = max(size, _LEAST_CHAIN_BUDGET)
        self._decided_used: int | None = None  # used.idx when we last decided about a call
        self._next_number = time.monotonic_ns()
        try:
            self._map_rings(desc_uva, avail_uva, used_uva)
            self._next_used = self._used[RING_IDX]
            self._settle_inflight(start_number, adopted)
        except (FrontendBreach, GuestBreach):
            self.close()
            raise
        self._seen_avail = self.last_avail  # avail.idx when we last looked: up to there we need not look again

    @staticmethod
    def _check_start(index: int, size: int, last_avail: int, avail_uva: int, used_uva: int) -> None:
        if not virtio_ring.is_queue_size(size):
            raise FrontendBreach(f"queue {index}: size {size} is not a power of two up to {virtio_ring.MAX_QUEUE_SIZE}")
        if not 0 <= last_avail <= 0xFFFF:
            raise FrontendBreach(f"queue {index}: start index {last_avail} does not fit in 16 bits")
        if avail_uva % virtio_ring.AVAIL_ALIGN or used_uva % virtio_ring.USED_ALIGN:
            raise FrontendBreach(f"queue {index}: available ring at {avail_uva:#x} or used ring at {used_uva:#x} is not aligned")

    def _map_rings(self, desc_uva: int, avail_uva: int, used_uva: int) -> None:
        size = self._size
        self._descriptors = self._own(self._memory.contiguous(desc_uva, virtio_ring.table_bytes(size)))
        self._avail = self._own_u16(self._memory.contiguous(avail_uva, virtio_ring.avail_bytes(size, self._event_idx)))
        used = self._own(self._memory.contiguous(used_uva, virtio_ring.used_bytes(size, self._event_idx)))
        self._used = self._own(used.cast("H"))
        entries = self._own(used[2 * RING_START : 2 * virtio_ring.used_event_position(size)])
        self._used_ring = self._own(entries.cast("I"))  # id, len, id, len, …

    def _settle_inflight(self, start_number: int, adopted: bool) -> None:
        if not self.inflight.continues(start_number, self._size, adopted_at=self._next_used if adopted else None):
            self.inflight.begin(start_number, self._size, self._next_used, self.last_avail)
            return
        self.resumed = True
        heads, self.last_avail = self.inflight.recover(self._next_used, self._size, start_number)
        self._recovered.extend(heads)
        self._in_flight.update((head, Chain(head)) for head in heads)

    def _own(self, view: memoryview) -> memoryview:
        self._views.append(view)
        return view

    def _own_u16(self, view: memoryview) -> memoryview:
        return self._own(self._own(view).cast("H"))

    @property
    def size(self) -> int:
        """How many requests the driver can have in flight, one descriptor each."""
        return self._size

    @property
    def in_flight(self) -> int:
        """How many chains were popped and are not yet published."""
        return len(self._in_flight)

    @property
    def staged(self) -> bool:
        """Whether there are completions that the driver has not been shown."""
        return bool(self._staged)

    @property
    def recovering(self) -> bool:
        """Whether there is something that a dead worker was at."""
        return bool(self._recovered)

    def pop_recovered(self) -> Chain:
        """The next request, of those that a dead worker had taken. GuestBreach as `pop`."""
        head = self._recovered.popleft()
        chain = self._take(head, self.inflight.number(head), self.inflight.count_death(head))
        self._in_flight[head] = chain
        return chain

    def pop(self) -> Chain | None:
        """The next request, or None if the driver offers no more at the moment.

        GuestBreach leaves the queue as it was; the ring is then to be stopped, since what follows makes no sense either.
        """
        if self.last_avail == self._seen_avail and not self._look():
            return None
        head = self._avail[RING_START + (self.last_avail & (self._size - 1))]
        if head >= self._size:
            raise GuestBreach(f"queue {self.index}: head {head} lies outside a table of {self._size}")
        if head in self._in_flight:
            raise GuestBreach(f"queue {self.index}: head {head} was made available while it was in flight")
        number = self._next_number
        chain = self._take(head, number)
        self._next_number = number + 1
        self.inflight.take(head, number)
        self.last_avail = (self.last_avail + 1) & 0xFFFF
        self._in_flight[head] = chain
        return chain

    def _look(self) -> bool:
        """Read avail.idx: whether there is anything to take."""
        avail_idx = self._avail[RING_IDX]
        fresh = (avail_idx - self.last_avail) & 0xFFFF
        if fresh == 0:
            return False
        if fresh > self._size:
            raise GuestBreach(f"queue {self.index}: avail.idx jumped from {self.last_avail} to {avail_idx}, the queue size is {self._size}")
        self._seen_avail = avail_idx
        _order()  # the ring entries and descriptors were written before the index: read them after it
        return True

    def _take(self, head: int, number: int, deaths: int = 0) -> Chain:
        """Walk the chain at `head` and find its buffers in memory, or GuestBreach with no view left."""
        gather = self._memory.gather
        chain = Chain(head, number, self.inflight, deaths)
        readable, writable = chain.readable, chain.writable
        readable_bytes = writable_bytes = 0
        try:
            for address, length, flags, _ in walk_chain(self._descriptors, self._size, head, self._budget, self._memory.table):
                if flags & VIRTQ_DESC_F_WRITE:
                    gather(address, length, writable)
                    writable_bytes += length
                else:
                    gather(address, length, readable)
                    readable_bytes += length
            if readable_bytes + writable_bytes > virtio_ring.MAX_CHAIN_BYTES:
                raise GuestBreach("a chain of more than 2^32 bytes")
        except GuestBreach as breach:
            chain.release()
            raise GuestBreach(f"queue {self.index}, head {head}: {breach}") from None
        chain.readable_bytes = readable_bytes
        chain.writable_bytes = writable_bytes
        return chain

    def push(self, head: int, written_bytes: int) -> None:
        """Stage the completion of a popped chain, with `written_bytes` put into its writable buffers, and release its views.

        The driver does not see it before `publish()`. A head that is not in flight is our bug: KeyError.
        """
        chain = self._in_flight[head]
        if chain is None:
            raise KeyError(head)
        if not 0 <= written_bytes <= chain.writable_bytes:
            raise ValueError(f"{written_bytes} bytes written into a chain of {chain.writable_bytes}")
        # The entry may be written at once: the driver reads no further than used.idx, and every chain in flight has a place.
        place = 2 * (self._next_used & (self._size - 1))
        self._used_ring[place] = head
        self._used_ring[place + 1] = written_bytes
        self._next_used = (self._next_used + 1) & 0xFFFF
        self._in_flight[head] = None
        self._staged.append(head)
        chain.release()

    def publish(self) -> bool:
        """Show the driver all staged completions by one update of used.idx; whether it wants a call for them."""
        if not self._staged:
            return False
        new = self._next_used
        self.inflight.link(self._staged)
        _order()  # 2.7.8.2: the entries before the index
        self._used[RING_IDX] = new
        self.inflight.clear(self._staged, new)
        for head in self._staged:
            del self._in_flight[head]
        self._staged.clear()
        fence()  # the index before what the driver says about calls: it stores that, then looks at the index once more
        old, self._decided_used = self._decided_used, new
        if not self._event_idx:
            return not self._avail[RING_FLAGS] & virtio_ring.VIRTQ_AVAIL_F_NO_INTERRUPT
        used_event = self._avail[virtio_ring.avail_event_position(self._size)]
        return old is None or need_event(used_event, new, old)

    def arm(self) -> bool:
        """Ask for a kick when the driver offers more; True if it did so before it could know: pop again instead of sleeping."""
        if self._event_idx:
            self._used[virtio_ring.used_event_position(self._size)] = self.last_avail
        else:
            self._used[RING_FLAGS] = 0
        fence()  # our wish before its index: the driver stores the index, then looks at the wish
        return self._avail[RING_IDX] != self.last_avail

    def disarm(self) -> None:
        """Ask for no kicks while we look by ourselves.

        With EVENT_IDX nothing is to be done: the driver kicks once, when it passes the avail_event of the last `arm()`, and that lies
        behind it until 2^16 requests later.
        """
        if not self._event_idx:
            self._used[RING_FLAGS] = virtio_ring.VIRTQ_USED_F_NO_NOTIFY

    def close(self) -> None:
        """Release every view of guest memory that this queue and its unfinished chains hold. The queue cannot be used after it."""
        for chain in self._in_flight.values():
            if chain is not None:
                chain.release()
        self._in_flight.clear()
        self._staged.clear()
        self._recovered.clear()
        for view in self._views:
            view.release()
        self._views.clear()
        self.inflight.close()
