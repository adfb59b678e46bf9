"""The broker's end of the socket to one worker.

**Trust.** Everything received is hostile. Packets are received without room for descriptors: one that carries any is a
breach, and so is one that is too long. The broker never waits for a worker: what the socket does not take is queued, within
bounds; over them the worker is not read, and if it does not read for ten seconds that is a breach.
"""

from __future__ import annotations

import array
import errno
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

from vfsd.broker.answers import Answer, Granted
from vfsd.errors import WorkerBreach
from vfsd.fds import OwnedFd
from vfsd.wire import broker_messages as wire

MAX_QUEUED_BYTES = 1 << 20
MAX_QUEUED_FDS = 64
MAX_UNANSWERED = 4096  # above the in-flight requests of any honest worker: beyond it the worker is not read
UNREAD_SECONDS = 10.0
# Too many descriptors wait in its socket; the kernel has no memory.
_NOT_NOW = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)
_FULL_PACKET = wire.MAX_PACKET_BYTES - 32 * 1024  # the largest single reply (200 entries) still fits behind it


_serials = count(1)


class Outcome(NamedTuple):
    """What became of one request."""

    request_id: int
    errno: int
    answer: Answer | None


class Task(NamedTuple):
    """One request and where it came from."""

    link: WorkerLink
    session: int
    spec: wire.Spec
    request_id: int
    message: Any
    slot: wire.Slot | None = None


class _Packet(NamedTuple):
    data: bytes
    fds: list[OwnedFd]


class WorkerLink:
    """`receive` is the leader's alone; `post` may come from any thread. `still_granted(outcome)` is asked under `share_lock`."""

    def __init__(self, index: int, sock: socket.socket, share_lock: threading.Lock, still_granted: Callable[[int, Outcome], bool]) -> None:
        self.index = index
        self.serial = next(_serials)  # no other link's, also of the same index
        self.closed = False
        self.greeted = False
        self.consumed = 0
        self.unanswered = 0
        self.starved = False  # wait for the watchdog's next tick before the next try to send
        self.rest: deque[Task] = deque()  # of its last packet: the leader's, which takes it in portions
        self.waits_with_rest = False  # for the worker to read
        self._socket = sock
        self._buffer = bytearray(wire.MAX_PACKET_BYTES)
        self._share_lock = share_lock
        self._still_granted = still_granted
        self._send_lock = threading.Lock()
        self._queue: deque[_Packet] = deque()
        self._queued_bytes = 0
        self._queued_fds = 0
        self._blocked_since: float | None = None
        self._announced = 0  # the last `consumed` the worker was told

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """One packet; None if there is none now; b"" at the end. WorkerBreach as the module says."""
        if self.closed:
            return b""
        try:
            length, flags = self._receive_into_buffer()
        except BlockingIOError:
            return None
        if flags & socket.MSG_CTRUNC:
            raise WorkerBreach("sent file descriptors")
        if flags & socket.MSG_TRUNC:
            raise WorkerBreach(f"sent a packet over {wire.MAX_PACKET_BYTES} bytes")
        if length:
            self.consumed += 1
        elif not self._peer_has_closed():
            raise WorkerBreach("sent an empty packet")
        return bytes(memoryview(self._buffer)[:length])

    def _peer_has_closed(self) -> bool:
        """What tells the end of the socket from an empty packet, which recvmsg(2) does not."""
        poller = select.poll()
        poller.register(self._socket.fileno(), select.POLLRDHUP)
        return bool(poller.poll(0))

    def _receive_into_buffer(self) -> tuple[int, int]:
        try:
            length, _ancillary, flags, _address = self._socket.recvmsg_into([self._buffer], 0, socket.MSG_DONTWAIT)
        except ConnectionResetError:
            # The worker died with packets of ours unread. That error comes once, and before what it had sent itself.
            length, _ancillary, flags, _address = self._socket.recvmsg_into([self._buffer], 0, socket.MSG_DONTWAIT)
        return length, flags

    @property
    def congested(self) -> bool:
        """Whether to stop reading from it."""
        return self.clogged or self.unanswered > MAX_UNANSWERED

    @property
    def clogged(self) -> bool:
        """Whether so much waits for it that nothing more must be answered."""
        return self._queued_bytes > MAX_QUEUED_BYTES or self._queued_fds > MAX_QUEUED_FDS

    @property
    def queued_fds(self) -> int:
        """Donated copies that it has not taken yet."""
        return self._queued_fds

    @property
    def has_queue(self) -> bool:
        return bool(self._queue)

    @property
    def owes_acknowledgement(self) -> bool:
        """Whether the worker must hear that its packets were consumed although no reply is due."""
        return self.consumed - self._announced >= wire.MAX_OUTSTANDING_PACKETS // 2

    def unread_for(self, now: float) -> float:
        """Seconds for which the worker has not taken what waits for it."""
        since = self._blocked_since
        return now - since if since is not None else 0.0

    def expect(self, tasks: int) -> None:
        """So many tasks of this worker wait or run from now on."""
        with self._share_lock:
            self.unanswered += tasks

    def settle(self) -> None:
        """One of them is done."""
        with self._share_lock:
            self.unanswered -= 1

    def post(self, outcomes: list[Outcome], notices: list[wire.Notice]) -> None:
        """Queue replies and notices and send what the socket takes. Donations are taken over."""
        with self._share_lock:
            # Checked and queued under the lock under which files are released and inodes forgotten: a drop notice can only
            # come behind the grant that it revokes.
            rows, fds, void = self._rows(outcomes)
            void += self._enqueue(rows, [wire.encode_notice(notice) for notice in notices], fds)
        for fd in void:  # the last descriptor of a deleted file may take its time
            fd.close()
        self.flush()

    def _rows(self, outcomes: list[Outcome]) -> tuple[list[tuple[bytes, int]], list[OwnedFd], list[OwnedFd]]:
        """Encoded replies, the descriptors to go with them, and those whose grant is void, to be closed by the caller."""
        rows: list[tuple[bytes, int]] = []
        fds: list[OwnedFd] = []
        void: list[OwnedFd] = []
        for outcome in outcomes:
            answer = outcome.answer
            if answer is None or answer.donation is None:
                fields = [] if answer is None else answer.fields
                rows.append((wire.encode_reply(wire.Reply(outcome.request_id, outcome.errno, 0, fields)), 0))
            elif self._still_granted(self.index, outcome):
                rows.append((wire.encode_reply(wire.Reply(outcome.request_id, 0, 1, answer.fields)), 1))
                fds.append(answer.donation)
            else:
                void.append(answer.donation)
                rows.append((self._without_grant(outcome, answer), 0))
        return rows, fds, void

    def _without_grant(self, outcome: Outcome, answer: Answer) -> bytes:
        """Attributes are right without their descriptor; an open file that was released is none."""
        if answer.granted is Granted.NODE:
            return wire.encode_reply(wire.Reply(outcome.request_id, 0, 0, answer.fields))
        return wire.encode_reply(wire.Reply(outcome.request_id, errno.EBADF, 0, []))

    def _enqueue(self, rows: list[tuple[bytes, int]], notices: list[bytes], fds: list[OwnedFd]) -> list[OwnedFd]:
        """Returns descriptors that go nowhere: the link has ended."""
        void: list[OwnedFd] = []
        batch: list[bytes] = []
        size = 0
        taken = 0
        packet_fds = 0
        for encoded, donated in rows:
            if batch and (size + len(encoded) > _FULL_PACKET or packet_fds + donated > wire.MAX_FDS_PER_PACKET):
                void += self._append(batch, [], fds[taken : taken + packet_fds])
                taken += packet_fds
                batch, size, packet_fds = [], 0, 0
            batch.append(encoded)
            size += len(encoded)
            packet_fds += donated
        return void + self._append(batch, notices, fds[taken:])

    def _append(self, batch: list[bytes], notices: list[bytes], fds: list[OwnedFd]) -> list[OwnedFd]:
        packet = _Packet(wire.join_replies(self.consumed, batch, notices), fds)
        self._announced = self.consumed
        with self._send_lock:
            if self.closed:
                return fds
            self._queue.append(packet)
            self._queued_bytes += len(packet.data)
            self._queued_fds += len(fds)
        return []

    def flush(self) -> None:
        """Send what the socket takes."""
        with self._send_lock:
            while self._queue and not self.closed:
                packet = self._queue[0]
                if not self._send(packet):
                    return
                self._queue.popleft()
                self._queued_bytes -= len(packet.data)
                self._queued_fds -= len(packet.fds)
                _close_all(packet)

    def _send(self, packet: _Packet) -> bool:
        rights = array.array("i", [fd.fileno() for fd in packet.fds])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        try:
            self._socket.sendmsg([packet.data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._blocked()
            return False
        except OSError as error:
            if error.errno in _NOT_NOW:  # the socket yet counts as writable
                self._blocked()
                self.starved = True
                return False
            # A worker that has gone takes its packets with it.
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
        self._blocked_since = None
        self.starved = False
        return True

    def _blocked(self) -> None:
        if self._blocked_since is None:
            self._blocked_since = time.monotonic()

    def close(self) -> None:
        """Drop what waits, and the socket."""
        with self._send_lock:
            self.closed = True
            while self._queue:
                _close_all(self._queue.popleft())
            self._queued_bytes = self._queued_fds = 0
            self._socket.close()


def _close_all(packet: _Packet) -> None:
    for fd in packet.fds:
        fd.close()
