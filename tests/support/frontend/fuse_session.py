"""FUSE requests over the rings of a Device: send any, wait for one or many, check what every reply must have."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from tests.support.frontend.device import Device
from tests.support.frontend.fuse_types import ProtocolViolation
from tests.support.frontend.ring import JOINED, Layout, Submission
from vfsd.wire import fuse_abi as abi

HIPRIO = 0
FIRST_REQUEST_QUEUE = 1
# The guest kernel takes an error of a reply only from this range (fuse_dev_do_write).
MAX_ERRNO = 512


class Caller(NamedTuple):
    """Who makes the system call in the guest."""

    uid: int
    gid: int
    pid: int = 4242


ROOT_CALLER = Caller(0, 0)


@dataclass
class Pending:
    """A request that was sent."""

    submission: Submission
    opcode: int
    unique: int


class FuseSession:
    """Requests, one or many at a time, with the caller, queue and descriptor layout that are set. Not thread-safe."""

    def __init__(self, device: Device, *, timeout: float = 20.0) -> None:
        self.device = device
        self.timeout = timeout
        self.caller = ROOT_CALLER
        self.queue = FIRST_REQUEST_QUEUE
        self.layout: Layout = JOINED
        self._unique = 0

    @contextmanager
    def acting_as(self, uid: int, gid: int) -> Iterator[None]:
        """Requests as this user of the guest."""
        before, self.caller = self.caller, Caller(uid, gid)
        try:
            yield
        finally:
            self.caller = before

    @contextmanager
    def laid_out(self, layout: Layout) -> Iterator[None]:
        """Requests with this descriptor layout."""
        before, self.layout = self.layout, layout
        try:
            yield
        finally:
            self.layout = before

    def next_unique(self) -> int:
        self._unique += 2  # the kernel keeps odd ones for interrupts
        return self._unique

    def header(self, opcode: int, nodeid: int, body_bytes: int, unique: int | None = None) -> bytes:
        """A correct fuse_in_header for a body of that many bytes."""
        unique = self.next_unique() if unique is None else unique
        return abi.fuse_in_header.pack(abi.fuse_in_header.size + body_bytes, opcode, unique, nodeid, *self.caller, 0)

    def send(
        self, opcode: int, nodeid: int, body: bytes = b"", reply_bytes: int = 0, *, queue: int | None = None, kick: bool = True
    ) -> Pending:
        """Send one request with room for so many bytes after the reply's header. Without `kick`, publish only."""
        header = self.header(opcode, nodeid, len(body))
        ring = self.device.rings[self.queue if queue is None else queue]
        submission = ring.submit(header + body, abi.fuse_out_header.size + reply_bytes, self.layout)
        if kick:
            ring.kick()
        return Pending(submission, opcode, self._unique)

    def send_forgotten(self, opcode: int, nodeid: int, body: bytes, *, queue: int = HIPRIO, wait: bool = True) -> Submission:
        """Send a request that has no reply; wait until the device is done with it. Its used length must be 0."""
        ring = self.device.rings[queue]
        submission = ring.submit(self.header(opcode, nodeid, len(body)) + body, 0, self.layout)
        ring.kick()
        if wait:
            ring.wait([submission], self.timeout)
            if submission.written:
                raise ProtocolViolation(f"opcode {opcode} has no reply, but {submission.written} bytes were written")
        return submission

    def finish(self, pending: Pending) -> bytes:
        """Wait for one reply: its body, or OSError."""
        pending.submission.ring.wait([pending.submission], self.timeout)
        return self.result(pending)

    def finish_all(self, pending: Sequence[Pending]) -> None:
        """Wait until all are answered; result() says how."""
        for queue in {one.submission.ring.index for one in pending}:
            ring = self.device.rings[queue]
            ring.wait([one.submission for one in pending if one.submission.ring is ring], self.timeout)

    def result(self, pending: Pending) -> bytes:
        """The body of a reply that came, or OSError."""
        error, body = decode_reply(pending.submission.reply, pending.unique)
        if error:
            raise OSError(error, f"{os.strerror(error)} (FUSE opcode {pending.opcode})")
        return body

    def request(self, opcode: int, nodeid: int, body: bytes = b"", reply_bytes: int = 0, *, queue: int | None = None) -> bytes:
        """One request and its reply's body, or OSError."""
        return self.finish(self.send(opcode, nodeid, body, reply_bytes, queue=queue))

    def raw(
        self, message: bytes, writable: int = 4096, *, queue: int | None = None, layout: Layout | None = None
    ) -> tuple[int, bytes] | None:
        """Any bytes at all as a request: (errno or 0, body), or None if the device completed it without a reply."""
        ring = self.device.rings[self.queue if queue is None else queue]
        submission = ring.submit(message, writable, self.layout if layout is None else layout)
        ring.kick()
        ring.wait([submission], self.timeout)
        if not submission.written:
            return None
        unique = int.from_bytes(message[8:16], "little") if len(message) >= abi.fuse_in_header.size else None
        return decode_reply(submission.reply, unique)


def decode_reply(reply: bytes, unique: int | None) -> tuple[int, bytes]:
    """(errno or 0, body) of a reply that keeps the rules which the guest's kernel checks."""
    if len(reply) < abi.fuse_out_header.size:
        raise ProtocolViolation(f"a reply of {len(reply)} bytes")
    length, error, got_unique = abi.fuse_out_header.unpack_from(reply)
    body = reply[abi.fuse_out_header.size :]
    if length != len(reply):
        raise ProtocolViolation(f"the reply says {length} bytes, the used ring says {len(reply)}")
    if unique is not None and got_unique != unique:
        raise ProtocolViolation(f"reply to {got_unique}, expected one to {unique}")
    if error > 0 or error <= -MAX_ERRNO:
        raise ProtocolViolation(f"error {error} is not a negative errno")
    if error and body:
        raise ProtocolViolation(f"error {errno.errorcode.get(-error, error)} with {len(body)} bytes after the header")
    return -error, body
