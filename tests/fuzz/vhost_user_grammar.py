"""vhost-user messages of a hostile frontend: payloads of the right shape, some fields of which are what they should not be.

`make_payload` says what a message carries, `good_ring` what a correct frontend sends; descriptors are named by their kind.
"""

from __future__ import annotations

import os
import socket
import struct

from tests.fuzz.provider import Provider
from vfsd.fds import sealed_memfd
from vfsd.wire import vhost_user as vu
from vfsd.wire.inflight import TABLE_STRIDE_BYTES
from vfsd.worker.device import FEATURES, PROTOCOL_FEATURES

REQUESTS = tuple(range(1, 44))
COMMON = (
    vu.VHOST_USER_SET_FEATURES, vu.VHOST_USER_SET_PROTOCOL_FEATURES, vu.VHOST_USER_SET_MEM_TABLE, vu.VHOST_USER_ADD_MEM_REG,
    vu.VHOST_USER_REM_MEM_REG, vu.VHOST_USER_SET_VRING_NUM, vu.VHOST_USER_SET_VRING_BASE, vu.VHOST_USER_SET_VRING_ADDR,
    vu.VHOST_USER_SET_VRING_KICK, vu.VHOST_USER_SET_VRING_CALL, vu.VHOST_USER_SET_VRING_ERR, vu.VHOST_USER_SET_VRING_ENABLE,
    vu.VHOST_USER_GET_VRING_BASE, vu.VHOST_USER_RESET_DEVICE, vu.VHOST_USER_RESET_OWNER, vu.VHOST_USER_GET_CONFIG,
    vu.VHOST_USER_GET_INFLIGHT_FD, vu.VHOST_USER_SET_INFLIGHT_FD,
)  # fmt: skip
FDS = ("ram", "eventfd", "pipe", "socket", "null", "directory", "huge", "empty", "path", "tables")
RAM, EVENTFD, SOCKET, TABLES = FDS.index("ram"), FDS.index("eventfd"), FDS.index("socket"), FDS.index("tables")
DESC, AVAIL, USED, DATA = 0x0, 0x4000, 0x8000, 0x10000  # where a correct frontend's driver has its ring, and a request
_UVA = 0x7F00_0000_0000
_MIB = 1 << 20
_RING = struct.Struct("<IIQQQQ")
_OFFERED = {vu.VHOST_USER_SET_FEATURES: FEATURES, vu.VHOST_USER_SET_PROTOCOL_FEATURES: PROTOCOL_FEATURES}
_STATES = {
    vu.VHOST_USER_SET_VRING_NUM: (128, 64, 1, 256),
    vu.VHOST_USER_SET_VRING_BASE: (0, 1, 0xFFFF),
    vu.VHOST_USER_SET_VRING_ENABLE: (1, 0),
    vu.VHOST_USER_GET_VRING_BASE: (0,),
}
_FD_REQUESTS = (vu.VHOST_USER_SET_VRING_KICK, vu.VHOST_USER_SET_VRING_CALL, vu.VHOST_USER_SET_VRING_ERR)


def make_fd(kind: str) -> int:
    match kind:
        case "eventfd":
            return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        case "pipe":
            read_end, write_end = os.pipe2(os.O_NONBLOCK)
            os.close(read_end)
            return write_end
        case "socket":
            one, other = socket.socketpair()
            other.close()
            return one.detach()
        case "null":
            return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        case "directory":
            return os.open("/", os.O_RDONLY | os.O_CLOEXEC)
        case "path":
            return os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
        case "tables":
            return sealed_memfd(kind, 3 * TABLE_STRIDE_BYTES).detach()
    fd = os.memfd_create(kind, os.MFD_CLOEXEC)
    os.ftruncate(fd, {"ram": _MIB, "huge": 1 << 62, "empty": 0}[kind])
    return fd


def good_ring(index: int) -> list[tuple[int, bytes, tuple[int, ...]]]:
    """SET_MEM_TABLE and what describes a ring in it: request, payload, descriptors."""
    return [
        (vu.VHOST_USER_SET_FEATURES, struct.pack("<Q", FEATURES), ()),
        (vu.VHOST_USER_SET_MEM_TABLE, struct.pack("<I4xQQQQ", 1, 0, _MIB, _UVA, 0), (RAM,)),
        (vu.VHOST_USER_SET_VRING_NUM, struct.pack("<II", index, 128), ()),
        (vu.VHOST_USER_SET_VRING_BASE, struct.pack("<II", index, 0), ()),
        (vu.VHOST_USER_SET_VRING_ADDR, _RING.pack(index, 0, _UVA + DESC, _UVA + USED, _UVA + AVAIL, 0), ()),
        (vu.VHOST_USER_SET_VRING_CALL, struct.pack("<Q", index), (EVENTFD,)),
        (vu.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", index), (EVENTFD,)),
        (vu.VHOST_USER_SET_VRING_ENABLE, struct.pack("<II", index, 1), ()),
    ]


def make_payload(provider: Provider, request: int) -> tuple[bytes, list[int]]:
    """What this request carries, mostly plausible."""
    if request in _OFFERED:
        features = _OFFERED[request] & ~provider.pick((0, 1 << vu.VIRTIO_RING_F_EVENT_IDX, 1 << vu.VHOST_USER_PROTOCOL_F_REPLY_ACK))
        return struct.pack("<Q", provider.number() if provider.one_in(16) else features), []
    if request in _STATES:
        return struct.pack("<II", _queue(provider), provider.number(32) if provider.one_in(16) else provider.pick(_STATES[request])), []
    if request == vu.VHOST_USER_SET_VRING_ADDR:
        return _RING.pack(_queue(provider), 0, *(_address(provider) for _ in range(3)), 0), []
    if request in _FD_REQUESTS:
        absent = provider.one_in(4)
        return struct.pack("<Q", _queue(provider) | absent << 8), [] if absent else [_fd_kind(provider, EVENTFD)]
    if request == vu.VHOST_USER_SET_MEM_TABLE:
        count = 1 + provider.byte() % 4
        regions = b"".join(_region(provider) for _ in range(count))
        return struct.pack("<I4x", count) + regions, [_fd_kind(provider, RAM) for _ in range(count)]
    if request in (vu.VHOST_USER_ADD_MEM_REG, vu.VHOST_USER_REM_MEM_REG):
        return bytes(8) + _region(provider), [_fd_kind(provider, RAM)] if request == vu.VHOST_USER_ADD_MEM_REG else []
    if request in (vu.VHOST_USER_GET_CONFIG, vu.VHOST_USER_SET_CONFIG):
        size = provider.number(9)
        return struct.pack("<III", provider.number(9), size, 0) + bytes(size), []
    if request in (vu.VHOST_USER_GET_INFLIGHT_FD, vu.VHOST_USER_SET_INFLIGHT_FD):
        queues = provider.number(16) if provider.one_in(12) else 1 + provider.byte() % 3
        size, offset = (provider.number(), provider.number()) if provider.one_in(12) else (queues * TABLE_STRIDE_BYTES, 0)
        payload = struct.pack("<QQHH", size, offset, queues, 128) + bytes(4 * (provider.byte() % 2))
        return payload, [_fd_kind(provider, TABLES)] if request == vu.VHOST_USER_SET_INFLIGHT_FD else []
    if request == vu.VHOST_USER_SET_BACKEND_REQ_FD:
        return b"", [SOCKET]
    return provider.blob(40) if provider.one_in(12) else b"", []


def _queue(provider: Provider) -> int:
    return provider.byte() if provider.one_in(24) else provider.byte() % 3


def _fd_kind(provider: Provider, usual: int) -> int:
    return provider.byte() % len(FDS) if provider.one_in(12) else usual


def _address(provider: Provider) -> int:
    if provider.one_in(16):
        return provider.number()
    return _UVA + (provider.byte() << 12) + (provider.pick((2, 4, 8, 0xFFE)) if provider.one_in(12) else 0)


def _region(provider: Provider) -> bytes:
    if provider.one_in(12):
        return struct.pack("<QQQQ", *(provider.number() for _ in range(4)))
    place = provider.byte() % 8
    size = _MIB if not provider.one_in(8) else provider.pick((_MIB // 2, 4096, 1))
    return struct.pack("<QQQQ", place * _MIB, size, _UVA + place * _MIB, provider.pick((4096, 1)) if provider.one_in(12) else 0)
