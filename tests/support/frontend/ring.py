"""A split virtqueue from the driver's side (virtio 1.2, 2.7), able to lay out anything a driver could, and much that none should.

Legal use: `submit(readable bytes, writable length, layout)` -> Submission, `kick()`, `wait(submission)`. Hostile use: the raw
helpers write descriptors and indexes as they are told.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.support.frontend.guest_memory import GuestRam

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4
VIRTQ_AVAIL_F_NO_INTERRUPT = 1
VIRTQ_USED_F_NO_NOTIFY = 1

DESC_BYTES = 16
_CANARY = b"\xa5\x5a" * 8  # after every writable piece: a device that writes past its descriptor is caught
_FILL = b"\xee"
_barrier = threading.Lock()  # taking a lock is the one full memory barrier that Python offers


class RingError(AssertionError):
    """The device broke the virtqueue protocol."""


class RingTimeout(TimeoutError):
    """The device did not complete a request in time."""


class DeviceGone(ConnectionError):
    """The backend closed the vhost-user connection while a request was in flight."""


# Layouts: how one request is spread over descriptors

Split = Callable[[int], list[int]]


def whole(length: int) -> list[int]:
    return [length] if length else []


def at(*boundaries: int) -> Split:
    """Cut at these offsets, as far as they lie inside: at(40) separates the FUSE header from the rest, as Linux does."""

    def split(length: int) -> list[int]:
        edges = [0, *(edge for edge in sorted(set(boundaries)) if 0 < edge < length), length]
        return [end - start for start, end in pairwise(edges) if end > start]

    return split


def pieces(size: int) -> Split:
    """Descriptors of `size` bytes each; pieces(1) is one byte per descriptor."""

    def split(length: int) -> list[int]:
        return [min(size, length - start) for start in range(0, length, size)]

    return split


def randomly(rng: random.Random, most: int = 6) -> Split:
    """Up to `most` descriptors, cut anywhere."""

    def split(length: int) -> list[int]:
        return at(*(rng.randrange(1, length) for _ in range(rng.randrange(most))))(length) if length > 1 else whole(length)

    return split


@dataclass(frozen=True)
class Layout:
    """How the device-readable and the device-writable part are cut, and whether the table is an indirect one."""

    readable: Split = whole
    writable: Split = whole
    indirect: bool = False


JOINED = Layout()
LINUX = Layout(readable=at(40), writable=at(16))  # header, rest | header, rest


@dataclass(frozen=True)
class Descriptor:
    """One entry of a descriptor table, as it stands in memory."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        return struct.pack("<QIHH", self.addr, self.length, self.flags, self.next)


@dataclass
class Submission:
    """A request that the device has, and its reply when it gave one."""

    head: int
    ring: Ring
    heads: list[int]  # the ring's descriptors to give back
    readable: list[tuple[int, int]]  # gpa, length
    writable: list[tuple[int, int]]
    table: tuple[int, int] | None = None  # the indirect table's allocation
    written: int | None = None
    reply: bytes = b""

    @property
    def done(self) -> bool:
        return self.written is not None


@dataclass
class Ring:
    """One split virtqueue and its eventfds. Queue size is a power of two. Not thread-safe."""

    memory: GuestRam
    index: int
    size: int = 128
    event_idx: bool = True
    check_guards: bool = True
    backend: socket.socket | None = None  # watched while waiting: a backend that is gone completes nothing
    kick_fd: int = field(init=False)
    call_fd: int = field(init=False)
    err_fd: int = field(init=False)

    def __post_init__(self) -> None:
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Page-aligned and apart, so that uva order says nothing: used before avail before desc.
        self._used_bytes, self._avail_bytes, self._desc_bytes = 6 + 8 * self.size, 6 + 2 * self.size, DESC_BYTES * self.size
        self.used = self.memory.alloc(max(self._used_bytes, 4096))
        self.avail = self.memory.alloc(max(self._avail_bytes, 4096))
        self.desc = self.memory.alloc(max(self._desc_bytes, 4096))
        self.kicks = self.calls = 0
        self.reset()

    def reset(self) -> None:
        """What a driver does before it starts a queue: empty rings, nothing in flight."""
        for start, length in ((self.used, self._used_bytes), (self.avail, self._avail_bytes), (self.desc, self._desc_bytes)):
            self.memory.write(start, bytes(length))
        self.avail_idx = self.last_used = self._kicked_idx = 0
        self._free = list(range(self.size - 1, -1, -1))
        self.in_flight: dict[int, Submission] = {}
        self.drain_calls()

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    # Submitting

    def submit(self, readable: bytes, writable: int, layout: Layout = JOINED) -> Submission:
        """Put one request in the ring and publish it; kick() tells the device."""
        submission = self.lay_out(readable, writable, layout)
        self.publish([submission.head])
        return submission

    def lay_out(self, readable: bytes, writable: int, layout: Layout = JOINED) -> Submission:
        """Write one request's buffers and descriptors; the device does not see it yet."""
        sources, targets = self._buffers(readable, layout.readable), self._targets(layout.writable(writable))
        buffers = [(gpa, length, 0) for gpa, length in sources] + [(gpa, length, VIRTQ_DESC_F_WRITE) for gpa, length in targets]
        table = None
        if layout.indirect:
            head = self._take(1)[0]
            heads = [head]
            size = DESC_BYTES * len(buffers)
            table = (self.memory.alloc(size), size)
            self.memory.write(table[0], b"".join(d.pack() for d in chained(buffers, range(len(buffers)))))
            self.write_descriptor(head, Descriptor(table[0], size, VIRTQ_DESC_F_INDIRECT))
        else:
            heads = self._take(len(buffers))
            for position, descriptor in zip(heads, chained(buffers, heads), strict=True):
                self.write_descriptor(position, descriptor)
        submission = Submission(heads[0], self, heads, sources, targets, table)
        self.in_flight[submission.head] = submission
        return submission

    def _buffers(self, data: bytes, split: Split) -> list[tuple[int, int]]:
        placed, start = [], 0
        for length in split(len(data)):
            gpa = self.memory.alloc(length)
            self.memory.write(gpa, data[start : start + length])
            placed.append((gpa, length))
            start += length
        return placed

    def _targets(self, lengths: Iterable[int]) -> list[tuple[int, int]]:
        placed = []
        for length in lengths:
            gpa = self.memory.alloc(length + len(_CANARY))
            if self.check_guards:
                self.memory.write(gpa, _FILL * length + _CANARY)
            placed.append((gpa, length))
        return placed

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise RingError(f"{count} descriptors wanted, {len(self._free)} of {self.size} free")
        return [self._free.pop() for _ in range(count)]

    @property
    def free_descriptors(self) -> int:
        return len(self._free)

    def publish(self, heads: Sequence[int]) -> None:
        """Make heads available with one index update, as a driver does for a batch."""
        for head in heads:
            self.write_avail_entry(self.avail_idx, head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.write_avail_idx(self.avail_idx)

    def kick(self) -> bool:
        """Notify the device, if it wants to be (2.7.10). Returns whether it was."""
        _fence()  # avail.idx must be visible before the device's wish is read
        if self.event_idx:
            avail_event = self._u16(self.used + 4 + 8 * self.size)
            wanted = (self.avail_idx - avail_event - 1) & 0xFFFF < (self.avail_idx - self._kicked_idx) & 0xFFFF
        else:
            wanted = not self._u16(self.used) & VIRTQ_USED_F_NO_NOTIFY
        self._kicked_idx = self.avail_idx
        if wanted:
            self.force_kick()
        return wanted

    def force_kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)
        self.kicks += 1

    # Completing

    def collect(self) -> list[Submission]:
        """Take what the device has used, without waiting."""
        collected = []
        used_idx = self._u16(self.used + 2)
        if (used_idx - self.last_used) & 0xFFFF > self.size:
            raise RingError(f"used.idx jumped from {self.last_used} to {used_idx} in a ring of {self.size}")
        while self.last_used != used_idx:
            head, written = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.last_used % self.size), 8))
            self.last_used = (self.last_used + 1) & 0xFFFF
            collected.append(self._complete(head, written))
        return collected

    def _complete(self, head: int, written: int) -> Submission:
        submission = self.in_flight.pop(head, None)
        if submission is None:
            raise RingError(f"head {head} was completed but is not in flight")
        room = sum(length for _, length in submission.writable)
        if written > room:
            raise RingError(f"the device says it wrote {written} bytes into {room}")
        content = bytearray()
        for gpa, length in submission.writable:
            piece = self.memory.read(gpa, length + len(_CANARY))
            if self.check_guards and piece[length:] != _CANARY:
                raise RingError(f"the device wrote past a descriptor of {length} bytes")
            content += piece[:length]
            self.memory.free(gpa, length + len(_CANARY))
        for gpa, length in submission.readable:
            self.memory.free(gpa, length)
        if submission.table:
            self.memory.free(*submission.table)
        self._free.extend(reversed(submission.heads))
        submission.reply, submission.written = bytes(content[:written]), written
        return submission

    def wait(self, submissions: Sequence[Submission], timeout: float = 20.0) -> None:
        """Sleep on the call eventfd until all of them are complete."""
        deadline = time.monotonic() + timeout
        while not all(submission.done for submission in submissions):
            if not self.wait_any(deadline - time.monotonic()):
                missing = [submission.head for submission in submissions if not submission.done]
                raise RingTimeout(f"queue {self.index}: heads {missing} not completed within {timeout} s")

    def wait_any(self, timeout: float) -> list[Submission]:
        """What the device completes next; empty when nothing came in time. Sees nothing that came without a call, as a guest would not."""
        deadline = time.monotonic() + timeout
        while True:
            # As in 2.7.7.1: say which completion we want to hear of, then look once more, then sleep.
            self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", self.last_used))
            _fence()
            if collected := self.collect():
                return collected
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self._sleep(remaining):
                return self._late_without_call()
            self.drain_calls()

    def _sleep(self, timeout: float) -> bool:
        """Until a call comes, or the backend goes (DeviceGone); False at the timeout."""
        watched = [self.call_fd] if self.backend is None else [self.call_fd, self.backend.fileno()]
        ready = select.select(watched, [], [], timeout)[0]
        if self.backend is not None and self.call_fd not in ready and self.backend.fileno() in ready and _is_at_end(self.backend):
            raise DeviceGone(f"queue {self.index}: the backend closed the connection")
        return bool(ready)

    def _late_without_call(self) -> list[Submission]:
        """At a timeout: a completion that nobody announced is a lost interrupt, for which a guest would wait for ever."""
        collected = self.collect()
        if collected and not select.select([self.call_fd], [], [], 1.0)[0]:
            raise RingError(f"queue {self.index}: completed without the call the driver had asked for")
        return []

    def drain_calls(self) -> int:
        """Take the pending calls off the eventfd; how many there were."""
        try:
            count = os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0
        self.calls += count
        return count

    def error_signalled(self, timeout: float = 5.0) -> bool:
        """Whether the device wrote to this ring's err eventfd."""
        return bool(select.select([self.err_fd], [], [], timeout)[0])

    # Raw access, for layouts that no driver makes

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def write_descriptor(self, position: int, descriptor: Descriptor) -> None:
        self.memory.write(self.desc + DESC_BYTES * position, descriptor.pack())

    def write_avail_entry(self, idx: int, head: int) -> None:
        self.memory.write(self.avail + 4 + 2 * (idx % self.size), struct.pack("<H", head))

    def write_avail_idx(self, idx: int) -> None:
        self.memory.write(self.avail + 2, struct.pack("<H", idx & 0xFFFF))

    def write_avail_flags(self, flags: int) -> None:
        self.memory.write(self.avail, struct.pack("<H", flags))

    @property
    def used_idx(self) -> int:
        return self._u16(self.used + 2)

    def submit_raw(self, descriptors: dict[int, Descriptor], head: int) -> None:
        """Write these descriptors, make `head` available, kick. The ring is not usable by submit() afterwards until reset()."""
        for position, descriptor in descriptors.items():
            self.write_descriptor(position, descriptor)
        self.publish([head])
        self.force_kick()


def _is_at_end(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


def _fence() -> None:
    with _barrier:
        pass


def chained(buffers: Sequence[tuple[int, int, int]], positions: Sequence[int]) -> list[Descriptor]:
    """(gpa, length, flags) at these table positions, each linked to the next."""
    last = len(buffers) - 1
    return [
        Descriptor(gpa, length, flags | (VIRTQ_DESC_F_NEXT if i < last else 0), positions[i + 1] if i < last else 0)
        for i, (gpa, length, flags) in enumerate(buffers)
    ]
