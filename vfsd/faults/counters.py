"""How often each rule was matched and hit, in memory that outlives the process it happened in: 64-bit counts, plain stores.

The supervisor makes the memory and hands it to each child. Each *place* (broker, control, each worker by its index) counts for
itself, so that no two processes write one count, and a worker's successor goes on where it was: a rule that kills the hundredth
time kills once. Who controls the bytes: children, which may have been taken over; to the supervisor they are numbers to show.
Pure; imports nothing of vfsd.
"""

from __future__ import annotations

MAX_RULES = 64  # at a time
BROKER, CONTROL, _FIRST_WORKER = 0, 1, 2
_MOST_WORKERS = 256
_PLACES = _FIRST_WORKER + _MOST_WORKERS
_PAIR = 16  # u64 matches, u64 hits
_HEARD = MAX_RULES * _PLACES * _PAIR // 8  # where a u64 for each place begins: the last change that it has heard of
COUNTERS_BYTES = 8 * (_HEARD + _PLACES)


def place_of_worker(index: int) -> int:
    return _FIRST_WORKER + index


class Counters:
    """`slot` is a rule's, of MAX_RULES. `buffer` has COUNTERS_BYTES; `close` gives it back."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self._words = buffer.cast("Q")

    @staticmethod
    def _at(slot: int, place: int) -> int:
        return 2 * (slot * _PLACES + place)

    def matched(self, slot: int, place: int) -> tuple[int, int]:
        """Count a match: its number, from 1, and how many hits were before it."""
        at = self._at(slot, place)
        number = (self._words[at] + 1) & (2**64 - 1)
        self._words[at] = number
        return number, self._words[at + 1]

    def hit(self, slot: int, place: int) -> int:
        """Count a hit; how many there are now."""
        at = self._at(slot, place) + 1
        number = (self._words[at] + 1) & (2**64 - 1)
        self._words[at] = number
        return number

    def totals(self, slot: int) -> tuple[int, int]:
        """Matches and hits in all places."""
        words = self._words[self._at(slot, 0) : self._at(slot, _PLACES)]
        try:
            return sum(words[::2]), sum(words[1::2])
        finally:
            words.release()

    def clear(self, slot: int) -> None:
        at = 8 * self._at(slot, 0)
        self._buffer[at : at + _PLACES * _PAIR] = bytes(_PLACES * _PAIR)

    def hear(self, place: int, change: int) -> None:
        """The process at this place knows the rules up to that change."""
        self._words[_HEARD + place] = change

    def heard(self, place: int) -> int:
        return self._words[_HEARD + place]

    def close(self) -> None:
        self._words.release()
        self._buffer.release()
