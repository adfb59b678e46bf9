"""The worker's end of the socket to the broker: questions out, in as few packets as possible, answers in.

The broker is trusted. Questions are gathered while the ring is drained and go out in one packet; at most
MAX_OUTSTANDING_PACKETS are unconsumed, what is more waits here. Nothing blocks: a worker that cannot send goes on receiving.
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from vfsd.fds import OwnedFd, TempFd
from vfsd.wire import broker_messages as wire

_FD_ROOM = socket.CMSG_SPACE(wire.MAX_FDS_PER_PACKET * array.array("i").itemsize)
_PACKET_ROOM = wire.MAX_PACKET_BYTES - 64


class BrokerGone(Exception):
    """The broker has closed its end."""


class Asker(Protocol):
    """Who waits for an answer, or until something is sent that has none."""

    def answered(self, error: int, fields: list[Any], donated: TempFd | None) -> None:
        """Called once. A donated descriptor is taken over."""


class _Packet(NamedTuple):
    """`tellers` wait for nothing but that it is sent."""

    data: bytes
    tellers: list[Asker]


class BrokerClient:
    """`listen` must be called before `receive`."""

    def __init__(self, fd: OwnedFd) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd.detach())
        self._on_notice: Callable[[wire.Notice], None]
        self.session = 0
        self._buffer = bytearray(wire.MAX_PACKET_BYTES)
        self._next_id = 0
        self._asked: dict[int, Asker] = {}
        self._gathered: list[tuple[bytes, list[Asker]]] = []
        self._forgets: list[int] = []
        self._forgetting: list[int] = []  # for which requests, as Forget has it
        self._forgetters: list[Asker] = []
        self._packets: deque[_Packet] = deque()
        self._sent = 0
        self._consumed = 0
        self.blocked = False  # the socket took no more: wait for it to be writable

    def listen(self, on_notice: Callable[[wire.Notice], None]) -> None:
        """Who hears what the broker says unasked."""
        self._on_notice = on_notice

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, message: wire.Request, asker: Asker, slot: wire.Slot | None = None) -> int:
        """Send a question with the next packet; its request id. With a slot it is done once, whoever asks it again."""
        self._next_id += 1
        self._asked[self._next_id] = asker
        self._gathered.append((wire.encode_request(self._next_id, message, slot), []))
        return self._next_id

    def tell(self, message: wire.Request, *tellers: Asker) -> None:
        """Send a message that has no answer. The tellers hear (with no error and no fields) when it is out of our hands."""
        self._gathered.append((wire.encode_request(0, message), list(tellers)))

    def forget(self, pairs: list[int], slot: wire.Slot, teller: Asker) -> None:
        """Take back lookups (nodeid, count, …); those of many requests are gathered into one message. Tells as `tell`."""
        done, total = 0, len(pairs) // 2
        while done < total:
            some = min(total - done, wire.MAX_FORGETS - len(self._forgets) // 2)
            self._forgets += pairs[2 * done : 2 * (done + some)]
            self._forgetting += (*slot, done, some)
            done += some
            if done == total:
                self._forgetters.append(teller)
            if len(self._forgets) >= 2 * wire.MAX_FORGETS:
                self._gather_forgets()

    def _gather_forgets(self) -> None:
        self.tell(wire.Forget(self._forgets, self._forgetting), *self._forgetters)
        self._forgets, self._forgetting, self._forgetters = [], [], []

    def begin_session(self, session: int) -> None:
        """What was gathered belongs to the session before."""
        self.seal()
        self.session = session

    def seal(self) -> None:
        """Turn what was gathered into packets."""
        if self._forgets:
            self._gather_forgets()
        batch: list[bytes] = []
        tellers: list[Asker] = []
        size = 0
        for encoded, waiting in self._gathered:
            if len(batch) == wire.MAX_REQUESTS_PER_PACKET or size + len(encoded) > _PACKET_ROOM:
                self._packets.append(_Packet(wire.join_requests(self.session, batch), tellers))
                batch, tellers, size = [], [], 0
            batch.append(encoded)
            tellers += waiting
            size += len(encoded)
        if batch:
            self._packets.append(_Packet(wire.join_requests(self.session, batch), tellers))
        self._gathered = []

    def flush(self) -> None:
        """Send what the window and the socket take."""
        if self._gathered or self._forgets:
            self.seal()
        self.blocked = False
        while self._packets and self._sent - self._consumed < wire.MAX_OUTSTANDING_PACKETS:
            try:
                self._socket.send(self._packets[0].data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self.blocked = True
                return
            except (BrokenPipeError, ConnectionResetError) as error:
                raise BrokerGone from error
            self._sent += 1
            for teller in self._packets.popleft().tellers:
                teller.answered(0, [], None)

    def receive(self) -> None:
        """Take one packet, if one has come: answers go to their askers, notices to the listener."""
        try:
            length, ancillary, flags, _address = self._socket.recvmsg_into(
                [self._buffer], _FD_ROOM, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except ConnectionResetError as error:
            raise BrokerGone from error
        if not length:
            raise BrokerGone
        fds = _received_fds(ancillary)
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise RuntimeError("a packet of the broker was cut: out of descriptors")
        self._take(wire.decode_replies(memoryview(self._buffer)[:length]), fds)

    def _take(self, packet: wire.ReplyPacket, fds: deque[TempFd]) -> None:
        self._consumed = packet.consumed
        for reply in packet.replies:
            donated = fds.popleft() if reply.donated else None
            self._asked.pop(reply.request_id).answered(reply.errno, reply.fields, donated)
        for notice in packet.notices:
            self._on_notice(notice)


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> deque[TempFd]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return deque(TempFd(fd) for fd in fds)
