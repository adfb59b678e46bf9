"""What was done for which request of the guest's, so that a worker that takes a dead one's place does not have it done twice.

A slot belongs to a worker's index, and in that to a place: a queue and a head. The number in it tells one use of that head from
the next: a head is used again only when the guest has its answer, so another number frees the slot. The same number with the
same message is the same request asked again: what is done is answered as before, what is still being done is waited for.
Another message by the same number is another step of that request, or the guest has changed its request meanwhile.

A listing's lookups are no answer to be repeated, for the directory may list other names by then: they are taken back, and
looked up again. Of too many we lose count: what a dead worker looked up beyond that stays known until the session ends.

**Trust.** All of it comes from workers. A worker reaches the slots of its own index only, they are bounded, and what they hold
it could have asked for anyway.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from vfsd.broker.answers import Answer
from vfsd.wire import broker_messages as wire

if TYPE_CHECKING:
    from vfsd.broker.worker_link import Outcome, Task

MOST_SLOTS = 4096  # of one worker: no honest one has so many requests at the broker (worker_link.MAX_UNANSWERED)

# Numbers, of which a lookup takes two. Of one listing: above what fits in a reply of 1 MiB (6553 entries). Of all of one worker's.
MOST_COUNTED_OF_LISTING = 1 << 15
MOST_COUNTED_OF_WORKER = 1 << 18

_MOST_GROUPS, _MOST_LABEL_BYTES = 64, 512  # kept as they are; of what is longer, a digest
_LONG = frozenset({wire.LookupMany, wire.SetXattr, wire.SymLink, wire.MkNod, wire.MkDir, wire.Create, wire.TmpFile})
_LISTING = wire.LookupMany(0, [])


class Stored(NamedTuple):
    """An answer whose descriptor is gone: of the open file another copy is made."""

    fields: list[Any]
    nodeid: int
    fh: int


class Slot:
    """`stored` is None while it is being done; `waiter` is then who asked again."""

    __slots__ = ("asker", "counted", "message", "number", "replaced", "stored", "undo", "waiter", "worker")

    def __init__(self, worker: int, number: int, asker: int, message: Any) -> None:
        self.worker = worker
        self.number = number
        self.asker = asker  # the serial of its link
        self.message = message
        self.stored: Outcome | Stored | None = None
        self.waiter: Task | None = None
        self.counted: list[int] | None = None  # pairs of what a listing looked up: nodeid, 1
        self.undo: list[int] | None = None  # lookups of a dead worker's, to be taken back before it is done again
        self.replaced = False


class Again(NamedTuple):
    """It was asked for before, and answered `stored`; or that comes later, where this is None."""

    stored: Outcome | Stored | None


class Rest(NamedTuple):
    """What is to be done when a request is done: `waiter` is to be answered too, or lookups are to be taken back."""

    waiter: Task | None
    undo: list[int]


class ReplySlots:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[int, dict[int, Slot]] = {}  # by worker and place
        self._forgotten: dict[int, dict[int, tuple[int, int]]] = {}  # by worker and place: number, pairs done
        self._counted: Counter[int] = Counter()  # by worker: at least as many numbers as its slots' `counted` hold

    def __len__(self) -> int:
        return sum(map(len, self._slots.values())) + sum(map(len, self._forgotten.values()))

    def begin(self, task: Task, asked: wire.Slot) -> Slot | Again:
        """A request is asked for: its slot, if it is to be done (and then `finish`ed)."""
        link, message = task.link, task.message
        kind = type(message)
        if kind in _LONG:
            message = _shortened(message)
        with self._lock:
            slots = self._slots.get(link.index)
            if slots is None:
                slots = self._slots[link.index] = {}
            fresh = Slot(link.index, asked.number, link.serial, message)
            slot = slots.pop(asked.place, None)
            if slot is not None and slot.number == asked.number and type(slot.message) is kind:
                if kind is wire.LookupMany:
                    if slot.asker == link.serial:  # the next names of the same listing
                        fresh.counted = slot.counted
                    else:
                        fresh.undo, slot.counted, slot.replaced = slot.counted, None, True
                elif slot.message == message:
                    slots[asked.place] = slot
                    slot.waiter = task
                    if slot.stored is not None:
                        slot.waiter = None
                    return Again(None if slot.waiter is task else slot.stored)
            slots[asked.place] = fresh
            if len(slots) > MOST_SLOTS:
                _drop_oldest(slots)
            return fresh

    def finish(self, slot: Slot, outcome: Outcome | None) -> Rest | None:
        """It is done; what else is to be done now."""
        answer = None if outcome is None else outcome.answer
        if answer is not None and answer.donation is not None:
            return self._finish(slot, _without_descriptor(slot.message, answer))
        if type(slot.message) is wire.LookupMany:
            return self._finish_listing(slot, [] if answer is None else _looked_up(answer))
        return self._finish(slot, outcome)

    def _finish(self, slot: Slot, stored: Outcome | Stored | None) -> Rest | None:
        slot.stored = stored
        if slot.waiter is None:  # who begins to wait from now on looks once more, and sees it
            return None
        with self._lock:
            waiter, slot.waiter = slot.waiter, None
        return None if waiter is None else Rest(waiter, [])

    def _finish_listing(self, slot: Slot, looked_up: list[int]) -> Rest | None:
        with self._lock:
            if slot.replaced:
                return Rest(None, looked_up)
            counted = slot.counted or []
            if len(counted) + len(looked_up) <= MOST_COUNTED_OF_LISTING:
                slot.counted = counted + looked_up
                self._count(slot, len(looked_up))
            return None

    def _count(self, slot: Slot, numbers: int) -> None:
        """Under the lock. What other listings hold is mostly of requests that were completed long ago."""
        self._counted[slot.worker] += numbers
        if self._counted[slot.worker] > MOST_COUNTED_OF_WORKER:
            for other in self._slots.get(slot.worker, {}).values():
                if other is not slot:
                    other.counted = None
            self._counted[slot.worker] = len(slot.counted or ())

    def not_yet_forgotten(self, worker: int, message: wire.Forget) -> list[int]:
        """The pairs of a Forget that were not done for the same requests before."""
        if not message.requests:
            return message.pairs
        pairs: list[int] = []
        position = 0
        with self._lock:
            forgotten = self._forgotten.setdefault(worker, {})
            for place, number, first, count in zip(*(message.requests[start::4] for start in range(4)), strict=True):
                before, done = forgotten.pop(place, (0, 0))
                if before != number:
                    done = 0
                skipped = min(max(0, done - first), count)
                pairs += message.pairs[2 * (position + skipped) : 2 * (position + count)]
                position += count
                forgotten[place] = number, max(done, first + count)
            while len(forgotten) > MOST_SLOTS:
                del forgotten[next(iter(forgotten))]
        return pairs

    def begin_session(self) -> None:
        """Nothing of the session before is asked for again."""
        with self._lock:
            self._slots.clear()
            self._forgotten.clear()
            self._counted.clear()


def _shortened(message: Any) -> Any:
    """What tells a message from another one: itself, but for what is too long to keep."""
    if type(message) is wire.LookupMany:
        return _LISTING
    if type(message) is wire.SetXattr:
        return message._replace(value=_digest(message.value))
    if len(message.groups) > _MOST_GROUPS or len(message.label) > _MOST_LABEL_BYTES:
        return message._replace(groups=_digest(repr(message.groups).encode()), label=_digest(message.label))
    return message


def _digest(value: bytes) -> bytes:
    """Keyed by the interpreter (as hashes of numbers are not), and only compared with others of this process."""
    return hash(value).to_bytes(8, "little", signed=True)


def _without_descriptor(message: Any, answer: Answer) -> Stored:
    nodeid = message.nodeid if isinstance(message, (wire.Open, wire.OpenDir)) else answer.fields[0]
    return Stored(answer.fields, nodeid, answer.granted_id)


def _looked_up(answer: Answer) -> list[int]:
    return [number for _errno, nodeid, _attr in answer.fields if nodeid for number in (nodeid, 1)]


def _drop_oldest(slots: dict[int, Slot]) -> None:
    """Of those that are done; whoever fills all slots with what is not done loses the oldest."""
    del slots[next((place for place, slot in slots.items() if slot.stored is not None), next(iter(slots)))]
