"""The protocol between a worker and the broker: one table, from which decoding, checking and docs/protocol.md are made.

**Trust.** The broker trusts no byte that a worker sends: a worker may have been taken over by its guest. `decode_requests`
accepts exactly what the table allows (exact types, bounded sizes, no left-over bytes) and raises WorkerBreach for
everything else, which costs the worker its life. Replies come from the broker, which the worker trusts.

**Shape.** SOCK_SEQPACKET, one msgpack array per packet.
  request packet  [session, [[tag, request_id, field…], …]]           worker → broker, never with descriptors
  reply packet    [consumed, [[request_id, errno, donated, [field…]], …], [[tag, field…], …]]   broker → worker
`consumed` is how many request packets the broker has taken so far: it is what a worker's window of outstanding packets is
counted by. The last list holds notices. Descriptors come by SCM_RIGHTS in the order of the replies that donate them.

An inode is named by nodeid and at most one name component, an open file by nodeid and fh. File handles never travel.
Imports nothing but errors and attr; does no I/O.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import msgpack

from vfsd.errors import WorkerBreach
from vfsd.wire.attr import ATTR_BYTES, SET_ALL

PROTOCOL_VERSION = 1

MAX_PACKET_BYTES = 128 * 1024  # far below the 208 KiB a Unix socket buffers by default: one packet always fits
MAX_REQUESTS_PER_PACKET = 256  # bounds the broker's work, and the delay of other workers, per packet
MAX_FDS_PER_PACKET = 64  # the kernel's own limit is 253
MAX_OUTSTANDING_PACKETS = 4  # per worker; the fifth waits in the worker
MAX_NAME_BYTES = 255  # NAME_MAX
MAX_TARGET_BYTES = 4095  # PATH_MAX less its NUL
MAX_NAMES_PER_LOOKUP = 200  # names times NAME_MAX stay below MAX_PACKET_BYTES, and so do their entries
MAX_FORGETS = 2048  # pairs in one Forget

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_I64_MAX = (1 << 63) - 1


class Uint(NamedTuple):
    """An integer from 0 to `limit`."""

    limit: int

    def accepts(self, value: object) -> bool:
        return type(value) is int and 0 <= value <= self.limit

    def __str__(self) -> str:
        return {_U32: "u32", _U64: "u64"}.get(self.limit, f"0…{self.limit}")


class Int64(NamedTuple):
    """A signed 64-bit integer: seconds before 1970 are negative."""

    def accepts(self, value: object) -> bool:
        return type(value) is int and -_I64_MAX <= value <= _I64_MAX

    def __str__(self) -> str:
        return "i64"


class Bin(NamedTuple):
    """Bytes, from `least` to `most` of them."""

    least: int
    most: int

    def accepts(self, value: object) -> bool:
        return type(value) is bytes and self.least <= len(value) <= self.most

    def __str__(self) -> str:
        return f"bytes({self.most})" if self.least == self.most else f"bytes({self.least}…{self.most})"


class ListOf(NamedTuple):
    """A list of `least` to `most` items of one kind, their number a multiple of `step`."""

    item: Uint | Bin
    least: int
    most: int
    step: int = 1

    def accepts(self, value: object) -> bool:
        if type(value) is not list or not self.least <= len(value) <= self.most or len(value) % self.step:
            return False
        accepts = self.item.accepts
        return all(accepts(item) for item in value)

    def __str__(self) -> str:
        return f"list({self.least}…{self.most}) of {self.item}"


Field = Uint | Int64 | Bin | ListOf

U32 = Uint(_U32)
U64 = Uint(_U64)
OFFSET = Uint(_I64_MAX)
BOOL = Uint(1)
NSEC = Uint(999_999_999)
NAME = Bin(0, MAX_NAME_BYTES)  # what may stand in a name is the broker's check: a bad one is the guest's error, not a breach
ATTR_RECORD = Bin(ATTR_BYTES, ATTR_BYTES)
MODE = Uint(0o177777)


class Hello(NamedTuple):
    """The first message of every worker."""

    version: int


class SessionStart(NamedTuple):
    """The guest sent INIT: wipe what the last session left, begin a new one."""

    flags: int


class SessionEnd(NamedTuple):
    """The guest sent DESTROY: wipe everything."""


class SessionAck(NamedTuple):
    """The worker has dropped all that belonged to sessions before this one."""

    session: int


class Lookup(NamedTuple):
    parent: int
    name: bytes


class LookupMany(NamedTuple):
    """The lookups of one READDIRPLUS; answered by one [errno, nodeid, attr] for each name."""

    parent: int
    names: list[bytes]


class Forget(NamedTuple):
    """nodeid, count, nodeid, count, …"""

    pairs: list[int]


class GetAttr(NamedTuple):
    """Donates an O_PATH descriptor from the second question about one inode within a second."""

    nodeid: int


class SetAttr(NamedTuple):
    """fh 0: none; a field counts only if its SET_ bit is in `valid`."""

    nodeid: int
    fh: int
    valid: int
    size: int
    atime: int
    mtime: int
    atime_nsec: int
    mtime_nsec: int
    mode: int
    uid: int
    gid: int


class ReadLink(NamedTuple):
    nodeid: int


class SymLink(NamedTuple):
    parent: int
    name: bytes
    target: bytes
    uid: int
    gid: int


class MkNod(NamedTuple):
    parent: int
    name: bytes
    mode: int
    rdev: int
    uid: int
    gid: int


class MkDir(NamedTuple):
    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int


class Unlink(NamedTuple):
    parent: int
    name: bytes


class RmDir(NamedTuple):
    parent: int
    name: bytes


class Rename(NamedTuple):
    parent: int
    name: bytes
    new_parent: int
    new_name: bytes
    flags: int


class Link(NamedTuple):
    nodeid: int
    parent: int
    name: bytes


class Open(NamedTuple):
    nodeid: int
    flags: int


class OpenDir(NamedTuple):
    nodeid: int


class Create(NamedTuple):
    parent: int
    name: bytes
    flags: int
    mode: int
    uid: int
    gid: int


class Release(NamedTuple):
    nodeid: int
    fh: int


class Fetch(NamedTuple):
    """A worker that lacks the descriptor of an open file (opened by another worker, or evicted) asks for it."""

    nodeid: int
    fh: int


class StatFs(NamedTuple):
    nodeid: int


class FSync(NamedTuple):
    nodeid: int
    fh: int
    data_only: int


class Flush(NamedTuple):
    nodeid: int
    fh: int


class FAllocate(NamedTuple):
    nodeid: int
    fh: int
    mode: int
    offset: int
    length: int


class Access(NamedTuple):
    nodeid: int
    mask: int
    uid: int
    gid: int


class SyncFs(NamedTuple):
    nodeid: int


class SessionNotice(NamedTuple):
    """A new session has begun, or without SESSION_ACTIVE the old one has ended; to be acknowledged by SessionAck."""

    session: int
    flags: int


class DropFile(NamedTuple):
    """The open file is gone: close every descriptor of it."""

    fh: int


class DropNode(NamedTuple):
    """The inode is forgotten: close the O_PATH descriptor donated for it."""

    nodeid: int


Request = (
    Hello | SessionStart | SessionEnd | SessionAck | Lookup | LookupMany | Forget | GetAttr | SetAttr | ReadLink | SymLink
    | MkNod | MkDir | Unlink | RmDir | Rename | Link | Open | OpenDir | Create | Release | Fetch | StatFs | FSync | Flush
    | FAllocate | Access | SyncFs
)  # fmt: skip
Notice = SessionNotice | DropFile | DropNode


class Spec(NamedTuple):
    """One row of the protocol. `reply` None: no answer is sent. `in_session`: refused with ESTALE outside the current session."""

    tag: int
    message: type[Any]
    fields: tuple[Field, ...]
    reply: tuple[Field, ...] | None
    donates: int
    in_session: bool
    resembles: str


_ENTRY = (U64, ATTR_RECORD)  # nodeid, attr
_OPENED = (U64, U32, U64)  # fh, traits, mount key

REQUESTS = (
    Spec(1, Hello, (U32,), (U64, U64), 0, in_session=False, resembles="–"),
    Spec(2, SessionStart, (U64,), (U64,), 0, in_session=False, resembles="mount"),
    Spec(3, SessionEnd, (), (), 0, in_session=False, resembles="umount"),
    Spec(4, SessionAck, (U64,), None, 0, in_session=False, resembles="–"),
    Spec(10, Lookup, (U64, NAME), _ENTRY, 0, in_session=True, resembles="openat(O_PATH|O_NOFOLLOW), statx, name_to_handle_at"),
    Spec(11, LookupMany, (U64, ListOf(NAME, 1, MAX_NAMES_PER_LOOKUP)), (), 0, in_session=True, resembles="as Lookup, for each name"),
    Spec(12, Forget, (ListOf(U64, 2, 2 * MAX_FORGETS, 2),), None, 0, in_session=True, resembles="close"),
    Spec(13, GetAttr, (U64,), (ATTR_RECORD,), 1, in_session=True, resembles="statx"),
    Spec(
        14, SetAttr, (U64, U64, Uint(SET_ALL), OFFSET, Int64(), Int64(), NSEC, NSEC, MODE, U32, U32), (ATTR_RECORD,), 0,
        in_session=True, resembles="fchmodat, fchownat, ftruncate, utimensat, statx",
    ),
    Spec(15, ReadLink, (U64,), (Bin(0, MAX_TARGET_BYTES + 1),), 0, in_session=True, resembles="readlinkat"),
    Spec(16, SymLink, (U64, NAME, Bin(0, MAX_TARGET_BYTES), U32, U32), _ENTRY, 0, in_session=True, resembles="symlinkat"),
    Spec(17, MkNod, (U64, NAME, MODE, U32, U32, U32), _ENTRY, 0, in_session=True, resembles="mknodat"),
    Spec(18, MkDir, (U64, NAME, MODE, U32, U32), _ENTRY, 0, in_session=True, resembles="mkdirat"),
    Spec(19, Unlink, (U64, NAME), (), 0, in_session=True, resembles="unlinkat"),
    Spec(20, RmDir, (U64, NAME), (), 0, in_session=True, resembles="unlinkat(AT_REMOVEDIR)"),
    Spec(21, Rename, (U64, NAME, U64, NAME, U32), (), 0, in_session=True, resembles="renameat2"),
    Spec(22, Link, (U64, U64, NAME), _ENTRY, 0, in_session=True, resembles="linkat"),
    Spec(23, Open, (U64, U32), _OPENED, 1, in_session=True, resembles="open_by_handle_at or openat(/proc/self/fd)"),
    Spec(24, OpenDir, (U64,), _OPENED, 1, in_session=True, resembles='openat(".", O_DIRECTORY)'),
    Spec(25, Create, (U64, NAME, U32, MODE, U32, U32), _ENTRY + _OPENED, 1, in_session=True, resembles="openat(O_CREAT|O_EXCL)"),
    Spec(26, Release, (U64, U64), None, 0, in_session=True, resembles="close"),
    Spec(27, Fetch, (U64, U64), (U32, U64), 1, in_session=True, resembles='dup; of a directory openat(".")'),
    Spec(28, StatFs, (U64,), (U64,) * 5 + (U32,) * 3, 0, in_session=True, resembles="fstatfs"),
    Spec(29, FSync, (U64, U64, BOOL), (), 0, in_session=True, resembles="fsync, fdatasync"),
    Spec(30, Flush, (U64, U64), (), 0, in_session=True, resembles="close(dup)"),
    Spec(31, FAllocate, (U64, U64, U32, OFFSET, OFFSET), (), 0, in_session=True, resembles="fallocate"),
    Spec(32, Access, (U64, U32, U32, U32), (), 0, in_session=True, resembles="faccessat, by mode bits"),
    Spec(33, SyncFs, (U64,), (), 0, in_session=True, resembles="syncfs"),
)  # fmt: skip

NOTICES: dict[int, type[Any]] = {1: SessionNotice, 2: DropFile, 3: DropNode}

# Session flags: the first bit is the broker's business, the others are the workers' own and opaque to it.
SESSION_ACTIVE = 1 << 0  # the guest has mounted; without it a worker answers everything but INIT with EIO

# Open, OpenDir and Create tell what the file system behind a description is like.
TRAIT_FLUSH = 1 << 0  # it has a flush method (NFS, CIFS, FUSE): FLUSH must be asked for
TRAIT_SLOW = 1 << 1  # a call may take a network's time: never on the ring thread

_BY_TAG = {spec.tag: spec for spec in REQUESTS}
_TAG_OF = {spec.message: spec.tag for spec in REQUESTS}
_NOTICE_TAG_OF = {message: tag for tag, message in NOTICES.items()}
SPEC_OF: dict[type[Any], Spec] = {spec.message: spec for spec in REQUESTS}


class Reply(NamedTuple):
    """What the broker answers to one request; `donated` descriptors travel beside it."""

    request_id: int
    errno: int
    donated: int
    fields: list[Any]


class ReplyPacket(NamedTuple):
    consumed: int
    replies: list[Reply]
    notices: list[Notice]


def _refuse_ext(code: int, _data: bytes) -> object:
    raise WorkerBreach(f"msgpack extension type {code}")


def encode_request(request_id: int, message: Request) -> bytes:
    """One request as msgpack, to be gathered into a packet by `join_requests`."""
    return cast("bytes", msgpack.packb([_TAG_OF[type(message)], request_id, *message]))


def join_requests(session: int, encoded: list[bytes]) -> bytes:
    """A request packet of requests that `encode_request` made."""
    packer = msgpack.Packer()
    return b"".join((packer.pack_array_header(2), packer.pack(session), packer.pack_array_header(len(encoded)), *encoded))


def decode_requests(packet: bytes) -> tuple[int, list[tuple[Spec, int, Any]]]:
    """(session, [(row of the table, request id, message)]) of one request packet.

    Raises WorkerBreach for anything the table does not allow; nothing else.
    """
    try:
        top = msgpack.unpackb(
            packet, raw=False, strict_map_key=True, ext_hook=_refuse_ext,
            max_str_len=0, max_map_len=0, max_ext_len=0, max_bin_len=MAX_TARGET_BYTES, max_array_len=2 * MAX_FORGETS,
        )  # fmt: skip
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WorkerBreach(f"not a msgpack packet within bounds: {type(error).__name__}") from None
    if type(top) is not list or len(top) != 2 or not U64.accepts(top[0]) or type(top[1]) is not list:
        raise WorkerBreach("a packet is [session, [request, …]]")
    if not 1 <= len(top[1]) <= MAX_REQUESTS_PER_PACKET:
        raise WorkerBreach(f"{len(top[1])} requests in a packet")
    return top[0], [_decode_request(row) for row in top[1]]


def _decode_request(row: object) -> tuple[Spec, int, Any]:
    if type(row) is not list or len(row) < 2 or type(row[0]) is not int:
        raise WorkerBreach("a request is [tag, request id, field, …]")
    spec = _BY_TAG.get(row[0])
    if spec is None:
        raise WorkerBreach(f"unknown tag {row[0]}")
    name = spec.message.__name__
    if not U64.accepts(row[1]):
        raise WorkerBreach(f"{name}: bad request id")
    if len(row) - 2 != len(spec.fields):
        raise WorkerBreach(f"{name}: {len(row) - 2} fields for {len(spec.fields)}")
    for position, field in enumerate(spec.fields):
        if not field.accepts(row[position + 2]):
            raise WorkerBreach(f"{name}: field {spec.message._fields[position]} is not {field}")
    return spec, row[1], spec.message._make(row[2:])


def encode_reply(reply: Reply) -> bytes:
    """One reply as msgpack, to be gathered into a packet by `join_replies`."""
    return cast("bytes", msgpack.packb(reply))


def encode_notice(notice: Notice) -> bytes:
    """One notice as msgpack, to be gathered into a packet by `join_replies`."""
    return cast("bytes", msgpack.packb([_NOTICE_TAG_OF[type(notice)], *notice]))


def join_replies(consumed: int, replies: list[bytes], notices: list[bytes]) -> bytes:
    """A reply packet of encoded replies and notices. Its caller keeps to MAX_PACKET_BYTES and MAX_FDS_PER_PACKET."""
    pack = msgpack.Packer()
    return b"".join((
        pack.pack_array_header(3), pack.pack(consumed),
        pack.pack_array_header(len(replies)), *replies, pack.pack_array_header(len(notices)), *notices,
    ))  # fmt: skip


def decode_replies(packet: bytes | memoryview) -> ReplyPacket:
    """A reply packet, from the broker (trusted): ValueError for what no broker of this version sends."""
    consumed, replies, notices = msgpack.unpackb(packet, raw=False)
    return ReplyPacket(
        consumed,
        [Reply(*reply) for reply in replies],
        [cast("Notice", NOTICES[row[0]]._make(row[1:])) for row in notices],
    )
