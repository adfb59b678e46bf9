"""The vhost-user messages, as the backend sees them: decode what a frontend sends, encode the replies.

Source: QEMU's docs/interop/vhost-user.rst; constants keep its names. Who controls the bytes: the frontend (QEMU …), which a guest may
have taken over. Every `decode_` raises FrontendBreach, naming message and reason, and nothing else. What a decoded value *means* (does
the queue exist, may the message come now, does the address lie in a memory region) is decided by the caller.

A message is a header of three little-endian 32-bit words (request, flags, payload size), then the payload; descriptors come beside it
(SCM_RIGHTS). Imported by the control process; imports only vfsd.errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from vfsd.errors import FrontendBreach

# Requests of the frontend ("Front-end message types")

VHOST_USER_GET_FEATURES = 1
VHOST_USER_SET_FEATURES = 2
VHOST_USER_SET_OWNER = 3
VHOST_USER_RESET_OWNER = 4
VHOST_USER_SET_MEM_TABLE = 5
VHOST_USER_SET_LOG_BASE = 6
VHOST_USER_SET_LOG_FD = 7
VHOST_USER_SET_VRING_NUM = 8
VHOST_USER_SET_VRING_ADDR = 9
VHOST_USER_SET_VRING_BASE = 10
VHOST_USER_GET_VRING_BASE = 11
VHOST_USER_SET_VRING_KICK = 12
VHOST_USER_SET_VRING_CALL = 13
VHOST_USER_SET_VRING_ERR = 14
VHOST_USER_GET_PROTOCOL_FEATURES = 15
VHOST_USER_SET_PROTOCOL_FEATURES = 16
VHOST_USER_GET_QUEUE_NUM = 17
VHOST_USER_SET_VRING_ENABLE = 18
VHOST_USER_SEND_RARP = 19
VHOST_USER_NET_SET_MTU = 20
VHOST_USER_SET_BACKEND_REQ_FD = 21
VHOST_USER_IOTLB_MSG = 22
VHOST_USER_SET_VRING_ENDIAN = 23
VHOST_USER_GET_CONFIG = 24
VHOST_USER_SET_CONFIG = 25
VHOST_USER_CREATE_CRYPTO_SESSION = 26
VHOST_USER_CLOSE_CRYPTO_SESSION = 27
VHOST_USER_POSTCOPY_ADVISE = 28
VHOST_USER_POSTCOPY_LISTEN = 29
VHOST_USER_POSTCOPY_END = 30
VHOST_USER_GET_INFLIGHT_FD = 31
VHOST_USER_SET_INFLIGHT_FD = 32
VHOST_USER_GPU_SET_SOCKET = 33
VHOST_USER_RESET_DEVICE = 34
VHOST_USER_VRING_KICK = 35
VHOST_USER_GET_MAX_MEM_SLOTS = 36
VHOST_USER_ADD_MEM_REG = 37
VHOST_USER_REM_MEM_REG = 38
VHOST_USER_SET_STATUS = 39
VHOST_USER_GET_STATUS = 40
VHOST_USER_GET_SHARED_OBJECT = 41
VHOST_USER_SET_DEVICE_STATE_FD = 42
VHOST_USER_CHECK_DEVICE_STATE = 43

# The names for log lines, from the constants above so that they cannot drift apart.
_NAMES: Final = {value: name for name, value in list(globals().items()) if name.startswith("VHOST_USER_") and type(value) is int}

# Protocol features: bit numbers

VHOST_USER_PROTOCOL_F_MQ = 0
VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1
VHOST_USER_PROTOCOL_F_RARP = 2
VHOST_USER_PROTOCOL_F_REPLY_ACK = 3
VHOST_USER_PROTOCOL_F_MTU = 4
VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5
VHOST_USER_PROTOCOL_F_CROSS_ENDIAN = 6
VHOST_USER_PROTOCOL_F_CRYPTO_SESSION = 7
VHOST_USER_PROTOCOL_F_PAGEFAULT = 8
VHOST_USER_PROTOCOL_F_CONFIG = 9
VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD = 10
VHOST_USER_PROTOCOL_F_HOST_NOTIFIER = 11
VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12
VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13
VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 14
VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15
VHOST_USER_PROTOCOL_F_STATUS = 16
VHOST_USER_PROTOCOL_F_XEN_MMAP = 17
VHOST_USER_PROTOCOL_F_SHARED_OBJECT = 18
VHOST_USER_PROTOCOL_F_DEVICE_STATE = 19

# Virtio and vhost feature bits of GET_FEATURES and SET_FEATURES: bit numbers

VIRTIO_F_NOTIFY_ON_EMPTY = 24
VHOST_F_LOG_ALL = 26
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VHOST_USER_F_PROTOCOL_FEATURES = 30
VIRTIO_F_VERSION_1 = 32

# Header flags

VHOST_USER_VERSION = 0x1
VHOST_USER_VERSION_MASK = 0x3
VHOST_USER_REPLY_MASK = 0x1 << 2
VHOST_USER_NEED_REPLY_MASK = 0x1 << 3

# Payloads

VHOST_USER_VRING_IDX_MASK = 0xFF
VHOST_USER_VRING_NOFD_MASK = 0x1 << 8
VHOST_VRING_F_LOG = 0  # bit number in VringAddr.flags

MAX_PAYLOAD_BYTES = 4096  # the largest legal payload is a memory table of MAX_REGIONS (1032 bytes); rust-vmm has the same bound
MAX_REGIONS = 32  # of one SET_MEM_TABLE: QEMU sends at most 8, rust-vmm's frontends as many as one message has descriptors
MAX_CONFIG_BYTES = 256  # VHOST_USER_MAX_CONFIG_SIZE

HEADER = Struct("<III")  # request, flags, size of the payload
_U64 = Struct("<Q")
_VRING_STATE = Struct("<II")
_VRING_ADDR = Struct("<IIQQQQ")
_TABLE_HEADER = Struct("<I4x")
_REGION = Struct("<QQQQ")
_SINGLE_REGION = Struct("<8xQQQQ")
_CONFIG_HEADER = Struct("<III")
_INFLIGHT = Struct("<QQHH")

# A structure in C is padded to 24 bytes, and sent so; the specification's fields are 20.
_INFLIGHT_BYTES = (_INFLIGHT.size, 24)
# User-Mode Linux 6.1 always sends the two-region structure, also for one region.
_UML_ONE_REGION_BYTES = _TABLE_HEADER.size + 2 * _REGION.size
_ADDRESS_SPACE = 1 << 64
_MAX_FILE_OFFSET = 1 << 63


def request_name(request: int) -> str:
    """The specification's name of a request, or its number: for messages to people."""
    return _NAMES.get(request, f"vhost-user request {request}")


class Message(NamedTuple):
    """One message of the frontend, its payload not looked at yet."""

    request: int
    flags: int
    payload: bytes

    @property
    def name(self) -> str:
        return request_name(self.request)

    @property
    def need_reply(self) -> bool:
        """The frontend waits for a u64: 0 for success (meaningful only with PROTOCOL_F_REPLY_ACK)."""
        return bool(self.flags & VHOST_USER_NEED_REPLY_MASK)


@dataclass(frozen=True, slots=True)
class VringState:
    """The number is a ring size, a base index or 0/1, depending on the request."""

    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr:
    """Where a ring's three parts lie, as addresses in the frontend's own address space (uva)."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


class MemoryRegion(NamedTuple):
    """A piece of guest RAM: its guest address, bytes, frontend address, and where it begins in the descriptor sent along."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int


class Inflight(NamedTuple):
    """Where the in-flight tables of so many queues lie in the descriptor that goes with it; of GET_INFLIGHT_FD the last two fields count."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class ConfigRequest(NamedTuple):
    """A window of the device configuration space."""

    offset: int
    size: int
    flags: int


def breach(request: int, reason: str) -> FrontendBreach:
    """The error for a message that cannot be accepted; the text goes to the log."""
    return FrontendBreach(f"{request_name(request)}: {reason}")


def decode_header(header: bytes) -> tuple[int, int, int]:
    """Request, flags, payload size in bytes (at most MAX_PAYLOAD_BYTES). The request may be an unknown one."""
    if len(header) != HEADER.size:
        raise FrontendBreach(f"vhost-user header of {len(header)} bytes instead of {HEADER.size}")
    request, flags, size = HEADER.unpack(header)
    if flags & VHOST_USER_VERSION_MASK != VHOST_USER_VERSION:
        raise breach(request, f"protocol version {flags & VHOST_USER_VERSION_MASK}, only {VHOST_USER_VERSION} exists")
    if flags & VHOST_USER_REPLY_MASK:
        raise breach(request, "is marked as a reply, but nothing was asked")
    if size > MAX_PAYLOAD_BYTES:
        raise breach(request, f"payload of {size} bytes, at most {MAX_PAYLOAD_BYTES} are accepted")
    return request, flags, size


def decode_empty(message: Message) -> None:
    """Nothing: the request has no payload."""
    _check_size(message, 0)


def decode_u64(message: Message) -> int:
    """One number: features, or the flags of another request."""
    _check_size(message, _U64.size)
    value: int = _U64.unpack(message.payload)[0]
    return value


def decode_vring_state(message: Message) -> VringState:
    _check_size(message, _VRING_STATE.size)
    return VringState(*_VRING_STATE.unpack(message.payload))


def decode_vring_addr(message: Message) -> VringAddr:
    _check_size(message, _VRING_ADDR.size)
    return VringAddr(*_VRING_ADDR.unpack(message.payload))


def decode_vring_fd(message: Message) -> tuple[int, bool]:
    """SET_VRING_KICK, _CALL and _ERR: the ring's index (bits 0 to 7), and whether a descriptor comes along (bit 8: none, the ring is polled)."""
    value = decode_u64(message)
    if value & ~(VHOST_USER_VRING_IDX_MASK | VHOST_USER_VRING_NOFD_MASK):
        raise breach(message.request, f"reserved bits are set in {value:#x}")
    return value & VHOST_USER_VRING_IDX_MASK, not value & VHOST_USER_VRING_NOFD_MASK


def decode_memory_table(message: Message) -> list[MemoryRegion]:
    """SET_MEM_TABLE: one descriptor comes along for each region, in the same order."""
    payload = message.payload
    if len(payload) < _TABLE_HEADER.size:
        raise breach(message.request, f"payload of {len(payload)} bytes holds no region count")
    (count,) = _TABLE_HEADER.unpack_from(payload)
    if not 1 <= count <= MAX_REGIONS:
        raise breach(message.request, f"{count} memory regions, expected 1 to {MAX_REGIONS}")
    if not (count == 1 and len(payload) == _UML_ONE_REGION_BYTES):
        _check_size(message, _TABLE_HEADER.size + count * _REGION.size)
    end = _TABLE_HEADER.size + count * _REGION.size
    regions = [MemoryRegion(*fields) for fields in _REGION.iter_unpack(payload[_TABLE_HEADER.size : end])]
    for region in regions:
        _check_region(message, region)
    return regions


def decode_single_region(message: Message) -> MemoryRegion:
    """ADD_MEM_REG (one descriptor comes along) and REM_MEM_REG (old frontends send one there too)."""
    _check_size(message, _SINGLE_REGION.size)
    region = MemoryRegion(*_SINGLE_REGION.unpack(message.payload))
    _check_region(message, region)
    return region


def decode_config(message: Message) -> ConfigRequest:
    """GET_CONFIG and SET_CONFIG: offset, size and flags, then as many bytes as size says (of no meaning for GET_CONFIG)."""
    if len(message.payload) < _CONFIG_HEADER.size:
        raise breach(message.request, f"payload of {len(message.payload)} bytes, expected at least {_CONFIG_HEADER.size}")
    offset, size, flags = _CONFIG_HEADER.unpack_from(message.payload)
    if size > MAX_CONFIG_BYTES or offset > MAX_CONFIG_BYTES - size:
        raise breach(message.request, f"{size} bytes at offset {offset}, a configuration space has {MAX_CONFIG_BYTES}")
    _check_size(message, _CONFIG_HEADER.size + size)
    return ConfigRequest(offset, size, flags)


def decode_inflight(message: Message) -> Inflight:
    """GET_INFLIGHT_FD, and SET_INFLIGHT_FD, with which the descriptor comes along."""
    if len(message.payload) not in _INFLIGHT_BYTES:
        raise breach(message.request, f"payload of {len(message.payload)} bytes, expected {_INFLIGHT.size} or {_INFLIGHT_BYTES[1]}")
    found = Inflight(*_INFLIGHT.unpack_from(message.payload))
    if found.mmap_size > _MAX_FILE_OFFSET or found.mmap_offset > _MAX_FILE_OFFSET - found.mmap_size:
        raise breach(message.request, f"{found.mmap_size:#x} bytes at offset {found.mmap_offset:#x} of a file")
    return found


def encode_inflight_reply(message: Message, inflight: Inflight) -> bytes:
    """The reply to GET_INFLIGHT_FD, padded as the question was."""
    return encode_reply(message.request, _INFLIGHT.pack(*inflight).ljust(len(message.payload), b"\0"))


def encode_reply(request: int, payload: bytes) -> bytes:
    """A whole reply: header and payload."""
    return HEADER.pack(request, VHOST_USER_VERSION | VHOST_USER_REPLY_MASK, len(payload)) + payload


def encode_u64_reply(request: int, value: int) -> bytes:
    """A reply of one number: features, counts, and the acknowledgement of NEED_REPLY (0 for success)."""
    return encode_reply(request, _U64.pack(value))


def encode_vring_state_reply(request: int, state: VringState) -> bytes:
    """The reply to GET_VRING_BASE: the index of the next descriptor chain to take."""
    return encode_reply(request, _VRING_STATE.pack(state.index, state.num))


def encode_config_reply(request: ConfigRequest, window: bytes) -> bytes:
    """The reply to GET_CONFIG: the request's own window, filled; an empty payload would say that it failed."""
    if len(window) != request.size:
        raise ValueError(f"{len(window)} bytes for a configuration window of {request.size}")
    return encode_reply(VHOST_USER_GET_CONFIG, _CONFIG_HEADER.pack(*request) + window)


def _check_size(message: Message, expected: int) -> None:
    if len(message.payload) != expected:
        raise breach(message.request, f"payload of {len(message.payload)} bytes, expected {expected}")


def _check_region(message: Message, region: MemoryRegion) -> None:
    """No region is empty or wraps round: later arithmetic on its ends need not think of that."""
    if region.size == 0:
        raise breach(message.request, "empty memory region")
    for name, start, limit in (
        ("guest address", region.gpa, _ADDRESS_SPACE),
        ("user address", region.uva, _ADDRESS_SPACE),
        ("mmap offset", region.mmap_offset, _MAX_FILE_OFFSET),
    ):
        if region.size > limit - start:
            raise breach(message.request, f"memory region of {region.size:#x} bytes at {name} {start:#x} wraps round")
