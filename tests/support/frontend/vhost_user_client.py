"""The frontend's end of a vhost-user socket: any message, well formed or not, with or without descriptors."""

from __future__ import annotations

import array
import contextlib
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from tests.support.frontend.guest_memory import Region

HEADER = struct.Struct("<III")
VERSION = 0x1
REPLY = 0x4
NEED_REPLY = 0x8
NO_FD = 0x100


class Request(IntEnum):
    """The messages that some frontend sends to a file-system device."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class Feature(IntFlag):
    """GET_FEATURES and SET_FEATURES."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


class ProtocolFeature(IntFlag):
    """GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    DEVICE_STATE = 1 << 19


class BackendClosed(ConnectionError):
    """The backend closed the connection instead of answering."""


class BackendRefused(RuntimeError):
    """The backend acknowledged a message with an error."""


@dataclass(frozen=True)
class Reply:
    """A message from the backend."""

    request: int
    flags: int
    payload: bytes


class VhostUserClient:
    """One connection. `call` waits for an answer, `tell` for none, `acked` for a NEED_REPLY acknowledgement, `raw` sends any bytes."""

    def __init__(self, path: str, timeout: float = 15.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(timeout)
        self.reply_ack = False  # PROTOCOL_F_REPLY_ACK was negotiated
        try:
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        self.sock.close()

    # Sending and receiving

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([data], ancillary)
        if sent < len(data):  # a send of no bytes would fail if the backend has closed meanwhile
            self.sock.sendall(data[sent:])

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = VERSION) -> None:
        self.raw(HEADER.pack(request, flags, len(payload)) + payload, fds)

    def receive(self) -> Reply:
        request, flags, size = HEADER.unpack(self._exactly(HEADER.size))
        return Reply(request, flags, self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.sock.recv(size - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise BackendClosed(f"connection closed after {len(data)} of {size} bytes")
            data += piece
        return data

    def call(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request that has an answer of its own."""
        self.tell(request, payload, fds)
        reply = self.receive()
        if reply.request != request or reply.flags != VERSION | REPLY:
            raise BackendRefused(f"asked {Request(request).name}, answered {reply}")
        return reply.payload

    def call_with_fd(self, request: int, payload: bytes = b"") -> tuple[bytes, int]:
        """A request whose answer brings a descriptor, which is the caller's."""
        self.tell(request, payload)
        head, fds, _, _ = socket.recv_fds(self.sock, HEADER.size, 4)
        if len(head) < HEADER.size:
            raise BackendClosed(f"connection closed after {len(head)} of {HEADER.size} bytes")
        answered, flags, size = HEADER.unpack(head)
        if (answered, flags, len(fds)) != (request, VERSION | REPLY, 1):
            raise BackendRefused(f"asked {Request(request).name}, answered {answered} with {len(fds)} descriptors")
        return self._exactly(size), fds[0]

    def call_u64(self, request: int) -> int:
        payload = self.call(request)
        return int(struct.unpack("<Q", payload)[0])

    def acked(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """With REPLY_ACK: wait until it is done. Without: send it."""
        if not self.reply_ack:
            self.tell(request, payload, fds)
            return
        self.tell(request, payload, fds, flags=VERSION | NEED_REPLY)
        reply = self.receive()
        if reply != Reply(request, VERSION | REPLY, struct.pack("<Q", 0)):
            raise BackendRefused(f"{Request(request).name}: {reply}")

    def is_closed(self, timeout: float = 10.0) -> bool:
        """Whether the backend closes the connection within that time (what it still sends is dropped)."""
        deadline = time.monotonic() + timeout
        while (remaining := deadline - time.monotonic()) > 0:
            if select.select([self.sock], [], [], remaining)[0]:
                with contextlib.suppress(ConnectionResetError):
                    if self.sock.recv(4096):
                        continue
                return True
        return False


# Payloads


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def vring_state(index: int, num: int) -> bytes:
    return struct.pack("<II", index, num)


def memory_table(regions: Sequence[Region]) -> bytes:
    return struct.pack("<II", len(regions), 0) + b"".join(_region(region) for region in regions)


def single_region(region: Region) -> bytes:
    return bytes(8) + _region(region)


def _region(region: Region) -> bytes:
    return struct.pack("<QQQQ", region.gpa, region.size, region.uva, region.mmap_offset)
