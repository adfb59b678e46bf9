"""A queue driven at full speed: the same requests' places over and over, a whole round of them for each kick.

`Ring.submit` lays out anything a driver could, and takes its time. For millions of requests a lane lays out its descriptors once,
each place for one kind of request of a fixed length; a round then changes only what differs. Every reply is still held
against the rules: each head completed once, the lengths agree, the answer is to that request.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.support.frontend.device import Device
from tests.support.frontend.fuse_types import ProtocolViolation
from tests.support.frontend.ring import VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, Descriptor, DeviceGone, RingError, RingTimeout
from vfsd.wire import fuse_abi as abi

HEADER = abi.fuse_in_header.size
OUT_HEADER = abi.fuse_out_header.size
_U16 = struct.Struct("<H")
_COMPLETION = struct.Struct("<II")


@dataclass(slots=True)
class Place:
    """One request of every round: its opcode, and where its parts lie in the memory of the only region."""

    opcode: int
    body_bytes: int
    reply_bytes: int
    request: int = 0
    reply: int = 0
    unique: int = 0
    written: int = 0
    error: int = 0
    tag: object = field(default=None)  # whatever the user of the lane wants to know of it when it is answered


class Lane:
    """One ring of a device whose RAM is a single region; nobody else uses the ring meanwhile. A round's places divide its size."""

    def __init__(self, device: Device, queue: int, places: Sequence[Place], first_unique: int) -> None:
        self.ring = ring = device.rings[queue]
        if len(device.ram.regions) != 1 or ring.size % len(places) or 2 * len(places) > ring.size:
            raise ValueError("a lane takes one region of RAM, and a ring of which its places are a half or less")
        self.places = list(places)
        self.memory = device.ram.regions[0].map
        self._gpa = device.ram.regions[0].gpa
        self._backend = device.client.sock
        self._unique = first_unique
        self._used_idx = ring.used + 2 - self._gpa
        self._used_ring = ring.used + 4 - self._gpa
        self._avail_idx = ring.avail + 2 - self._gpa
        self._used_event = ring.avail + 4 + 2 * ring.size - self._gpa
        self._under_way = False
        for number, place in enumerate(self.places):
            self._lay_out(device, number, place)
        for position in range(ring.size):
            ring.write_avail_entry(ring.avail_idx + position, 2 * (position % len(places)))

    def _lay_out(self, device: Device, number: int, place: Place) -> None:
        request = device.ram.alloc(HEADER + place.body_bytes)
        head, last = 2 * number, 2 * number + 1
        length = HEADER + place.body_bytes
        if place.reply_bytes:
            reply = device.ram.alloc(OUT_HEADER + place.reply_bytes)
            self.ring.write_descriptor(head, Descriptor(request, length, VIRTQ_DESC_F_NEXT, last))
            self.ring.write_descriptor(last, Descriptor(reply, OUT_HEADER + place.reply_bytes, VIRTQ_DESC_F_WRITE))
            place.reply = reply - self._gpa
        else:  # FORGET: nothing comes back
            self.ring.write_descriptor(head, Descriptor(request, length))
        place.request = request - self._gpa

    def fill(self, place: Place, nodeid: int, body: bytes) -> None:
        """What this place asks in the next round. The body has the place's length."""
        self._unique += 2
        place.unique = self._unique
        start = place.request + HEADER
        length = HEADER + place.body_bytes
        abi.fuse_in_header.pack_into(self.memory, place.request, length, place.opcode, place.unique, nodeid, 0, 0, 4242, 0)
        self.memory[start : start + place.body_bytes] = body

    def begin(self) -> None:
        """Show the round to the device, and ask for one call when all of it is done."""
        ring, count = self.ring, len(self.places)
        _U16.pack_into(self.memory, self._used_event, (ring.last_used + count - 1) & 0xFFFF)
        ring.avail_idx = (ring.avail_idx + count) & 0xFFFF
        _U16.pack_into(self.memory, self._avail_idx, ring.avail_idx)
        ring.kick()
        self._under_way = True

    def finish(self, timeout: float = 60.0) -> None:
        """Wait for the round's end; then each place has its `written` and `error`, and its reply's body is at `body(place)`."""
        if not self._under_way:
            return
        ring, memory = self.ring, self.memory
        while _U16.unpack_from(memory, self._used_idx)[0] != ring.avail_idx:
            ready = select.select([ring.call_fd, self._backend], [], [], timeout)[0]
            if ring.call_fd in ready:
                ring.drain_calls()
            elif self._backend in ready:
                raise DeviceGone(f"queue {ring.index}: the backend closed the connection")
            elif _U16.unpack_from(memory, self._used_idx)[0] != ring.avail_idx:
                raise RingTimeout(f"queue {ring.index}: a round was not completed within {timeout} s")
        self._take_completions()
        self._under_way = False

    def _take_completions(self) -> None:
        ring, memory, size = self.ring, self.memory, self.ring.size
        seen = set()
        for step in range(len(self.places)):
            head, written = _COMPLETION.unpack_from(memory, self._used_ring + 8 * ((ring.last_used + step) % size))
            seen.add(head)
            place = self.places[head >> 1]
            place.written = written
            if place.reply_bytes:
                length, error, unique = abi.fuse_out_header.unpack_from(memory, place.reply)
                if length != written or unique != place.unique:
                    raise ProtocolViolation(f"opcode {place.opcode}: {written} bytes, said to be {length}; answer to {unique}")
                place.error = -error
            elif written:
                raise ProtocolViolation(f"opcode {place.opcode} has no reply, but {written} bytes were written")
        if len(seen) != len(self.places):
            raise RingError(f"queue {ring.index}: {len(self.places) - len(seen)} heads were completed twice")
        ring.last_used = ring.avail_idx

    def body(self, place: Place) -> bytes:
        """What the reply says after its header. Raises OSError if it is an error."""
        if place.error:
            raise OSError(place.error, f"{os.strerror(place.error)} (FUSE opcode {place.opcode})")
        return self.memory[place.reply + OUT_HEADER : place.reply + place.written]
