"""The in-flight table of one vring: which requests were taken from it and not yet completed, in memory that outlives the worker.

The first part is laid out as vhost-user has it for split virtqueues ("Inflight I/O tracking"); behind it stands what only
vfsd needs. The worker that serves the ring writes the table with plain stores, in an order that leaves it true whenever the
worker dies; the worker's successor reads it.

* Taking a request: number, then the flag. The flag is what "advances": how far the available ring was taken follows from
  the used index and the number of flags.
* Completing a batch: link its heads, newest first, and say where the list begins; then the used ring's index, which is the
  one store that decides; then clear the flags; then note the used index. If the noted index lags behind the ring's, the batch
  was shown to the driver and its flags are cleared again, by the links.

Who controls the bytes: the worker, or whoever took it over, and so does the guest with the used index. What a successor reads
may be anything: it is bounded here, and can harm nothing but that guest's own requests. Pure; imports errors and virtio_ring.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vfsd.errors import GuestBreach
from vfsd.wire.virtio_ring import MAX_QUEUE_SIZE

# struct QueueRegionSplit: u64 features, u16 version, u16 desc_num, u16 last_batch_head, u16 used_idx; then the entries.
# struct DescStateSplit: u8 inflight, u8 padding[5], u16 next, u64 counter. The first byte of padding is `deaths` here.
HEADER_BYTES = 16
ENTRY_BYTES = 16
_VERSION, _DESC_NUM, _LAST_BATCH_HEAD, _USED_IDX = 4, 5, 6, 7  # in units of u16
VERSION = 1

# vfsd's own part, at one place whatever the ring's size: u64 start number, u64 skew; then a journal entry for each head.
_OWN = HEADER_BYTES + ENTRY_BYTES * MAX_QUEUE_SIZE
_OWN_BYTES = 64
_START_NUMBER, _SKEW = _OWN // 8, _OWN // 8 + 1  # in units of u64
_JOURNAL = _OWN + _OWN_BYTES
_JOURNAL_ENTRY = struct.Struct("<QQQQ")  # number, fh, size, length

TABLE_BYTES = _JOURNAL + _JOURNAL_ENTRY.size * MAX_QUEUE_SIZE
_LARGEST_PAGE_BYTES = 1 << 16
# From one queue's table to the next, where several lie in one file: each can be mapped by itself.
TABLE_STRIDE_BYTES = -(-TABLE_BYTES // _LARGEST_PAGE_BYTES) * _LARGEST_PAGE_BYTES


class Append(NamedTuple):
    """What was journalled of an append: the open file, its size before, and how many bytes were to be written."""

    fh: int
    size: int
    length: int


class Recovered(NamedTuple):
    """What a dead worker left: the heads in flight, in the order in which they were taken, and how far it had taken them."""

    heads: list[int]
    last_avail: int


class InflightTable:
    """One vring's table in `buffer` of TABLE_BYTES. `close()` gives the buffer back.

    The ring thread's alone, but for `journal`: a pool thread notes the append that it makes, which no other thread is at.
    """

    __slots__ = ("_bytes", "_halves", "_words")

    def __init__(self, buffer: memoryview) -> None:
        self._bytes = buffer
        self._halves = buffer.cast("H")
        self._words = buffer.cast("Q")

    def continues(self, start_number: int, size: int, *, adopted_at: int | None = None) -> bool:
        """Whether the ring that was started by this number, of this size, was being served: then `recover`, else `begin`.

        A table that was adopted from the frontend tells of a start on an earlier connection: if it is of this ring, whose used index
        is now `adopted_at`, and not of one that the guest has reset since.
        """
        halves = self._halves
        if halves[_DESC_NUM] != size:
            return False
        if self._words[_START_NUMBER] == start_number:
            return True
        return adopted_at is not None and halves[_VERSION] == VERSION and (adopted_at - halves[_USED_IDX]) & 0xFFFF <= size

    def begin(self, start_number: int, size: int, used_idx: int, last_avail: int) -> None:
        """Nothing is in flight. `start_number` is never 0."""
        words, halves = self._words, self._halves
        words[_START_NUMBER] = 0
        self._bytes[HEADER_BYTES : HEADER_BYTES + ENTRY_BYTES * size] = bytes(ENTRY_BYTES * size)
        words[0] = 0
        halves[_VERSION] = VERSION
        halves[_DESC_NUM] = size
        halves[_LAST_BATCH_HEAD] = 0
        halves[_USED_IDX] = used_idx
        words[_SKEW] = (last_avail - used_idx) & 0xFFFF
        words[_START_NUMBER] = start_number  # last: from here on the table is true

    def take(self, head: int, number: int) -> None:
        """A head was taken from the available ring: the `number`-th, of numbers that only grow."""
        words = self._words
        words[3 + 2 * head] = number
        words[2 + 2 * head] = 1  # flag, no deaths, no next: one store

    def link(self, heads: list[int]) -> None:
        """These heads are about to be shown to the driver as completed. Before the used index."""
        halves = self._halves
        previous = halves[_LAST_BATCH_HEAD]
        for head in heads:
            halves[11 + 8 * head] = previous
            previous = head
        halves[_LAST_BATCH_HEAD] = previous

    def clear(self, heads: list[int], used_idx: int) -> None:
        """They were shown, by this used index."""
        flags = self._bytes
        for head in heads:
            flags[HEADER_BYTES + ENTRY_BYTES * head] = 0
        self._halves[_USED_IDX] = used_idx

    def recover(self, used_idx: int, size: int, start_number: int) -> Recovered:
        """Finish what the dead worker was at. GuestBreach if the ring's used index is not where a worker can have left it.

        The size is the ring's own: the table's may have been changed since it was compared.
        """
        halves = self._halves
        self._words[_START_NUMBER] = start_number
        shown = (used_idx - halves[_USED_IDX]) & 0xFFFF
        if shown > size:
            raise GuestBreach(f"used.idx is {used_idx}, where at most {size} completions after {halves[_USED_IDX]} were shown")
        self.clear(self._newest_batch(shown, size), used_idx)
        flags, words = self._bytes, self._words
        heads = [head for head in range(size) if flags[HEADER_BYTES + ENTRY_BYTES * head]]
        heads.sort(key=lambda head: words[3 + 2 * head])
        return Recovered(heads, (used_idx + len(heads) + words[_SKEW]) & 0xFFFF)

    def _newest_batch(self, shown: int, size: int) -> list[int]:
        heads = []
        head = self._halves[_LAST_BATCH_HEAD]
        for _ in range(shown):
            if head >= size:
                raise GuestBreach(f"the in-flight table names head {head} of {size}")
            heads.append(head)
            head = self._halves[11 + 8 * head]
        return heads

    def number(self, head: int) -> int:
        """By which it was taken."""
        return self._words[3 + 2 * head]

    def count_death(self, head: int) -> int:
        """A recovered head is about to be run again: by how many workers it was run that died before they completed it."""
        deaths = min(self._bytes[HEADER_BYTES + ENTRY_BYTES * head + 1] + 1, 0xFF)
        self.note_deaths(head, deaths)
        return deaths

    def note_deaths(self, head: int, deaths: int) -> None:
        """Of so many workers that died this request may be the cause, if the present one dies as well."""
        self._bytes[HEADER_BYTES + ENTRY_BYTES * head + 1] = deaths

    # --- appends -------------------------------------------------------------------------------------------------------

    def journal(self, head: int, append: Append) -> None:
        """Note an append that is about to be made, valid until the head is taken again."""
        position = _JOURNAL + _JOURNAL_ENTRY.size * head
        self._words[position // 8] = 0
        _JOURNAL_ENTRY.pack_into(self._bytes, position, 0, *append)
        self._words[position // 8] = self.number(head)

    def journalled(self, head: int) -> Append | None:
        """What was noted of this head since it was taken."""
        number, *append = _JOURNAL_ENTRY.unpack_from(self._bytes, _JOURNAL + _JOURNAL_ENTRY.size * head)
        return Append(*append) if number and number == self.number(head) else None

    def close(self) -> None:
        for view in (self._halves, self._words, self._bytes):
            view.release()
