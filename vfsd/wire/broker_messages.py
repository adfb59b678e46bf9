"""The protocol between a worker and the broker: one table, from which decoding, checking and docs/protocol.md are made.

**Trust.** The broker trusts no byte that a worker sends: a worker may have been taken over by its guest. `decode_requests`
accepts exactly what the table allows (exact types, bounded sizes, no left-over bytes) and raises WorkerBreach for
everything else, which costs the worker its life. Replies come from the broker, which the worker trusts.

**Shape.** SOCK_SEQPACKET, one msgpack array per packet.
  request packet  [session, [[tag, request_id, field…], …]]           worker → broker, never with descriptors
                  a request that is to be done once has [request_id, place, number] in place of its request_id
  reply packet    [consumed, [[request_id, errno, donated, [field…]], …], [[tag, field…], …]]   broker → worker
`consumed` is how many request packets the broker has taken so far: it is what a worker's window of outstanding packets is
counted by. The last list holds notices. Descriptors come by SCM_RIGHTS in the order of the replies that donate them.
Place (queue << 16 | head) and number (of that use of the head) say for which request of the guest's a worker asks: a worker that
replaces another one asks by the same ones again, and gets the answer that the other one got, or would have got.

An inode is named by nodeid and at most one name component, an open file by nodeid and fh. File handles never travel.
Imports nothing but errors and attr; does no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgpack

from vfsd.errors import WorkerBreach
from vfsd.wire.attr import ATTR_BYTES, SET_ALL, STATX_BYTES

PROTOCOL_VERSION = 1

MAX_PACKET_BYTES = 128 * 1024  # far below the 208 KiB a Unix socket buffers by default: one packet always fits
MAX_REQUESTS_PER_PACKET = 256  # bounds the broker's work, and the delay of other workers, per packet
MAX_FDS_PER_PACKET = 64  # the kernel's own limit is 253
MAX_OUTSTANDING_PACKETS = 4  # per worker; the fifth waits in the worker
MAX_NAME_BYTES = 255  # NAME_MAX
MAX_TARGET_BYTES = 4095  # PATH_MAX less its NUL
MAX_NAMES_PER_LOOKUP = 200  # names times NAME_MAX stay below MAX_PACKET_BYTES, and so do their entries
MAX_FORGETS = 2048  # pairs in one Forget
MAX_GROUPS = 4096  # supplementary groups of one caller; Linux sends one
MAX_XATTR_BYTES = 65536  # XATTR_SIZE_MAX, XATTR_LIST_MAX
MAX_LABEL_BYTES = 4096  # of a security context; the kernel's own contexts fit a page
MAX_IOCTL_BYTES = 32  # the largest argument of an ioctl that is passed on (struct fsxattr: 28)

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
STATX_RECORD = Bin(STATX_BYTES, STATX_BYTES)
MODE = Uint(0o177777)
UMASK = Uint(0o777)
XATTR_VALUE = Bin(0, MAX_XATTR_BYTES)


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
    """nodeid, count, nodeid, count, …

    `requests`: whose pairs they are, in the same order, each by place, number, which of all its pairs is the first one here, and
    how many are here. What was forgotten for a request is not forgotten for it again.
    """

    pairs: list[int]
    requests: Sequence[int] = ()


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
    kill: int = 0


class ReadLink(NamedTuple):
    nodeid: int


class SymLink(NamedTuple):
    """Messages that make a file end with who makes it (`umask` 0 where the guest has applied its own) and a security label:
    an extended attribute's name and value, empty if there is none.
    """

    parent: int
    name: bytes
    target: bytes
    uid: int
    gid: int
    umask: int = 0
    groups: Sequence[int] = ()
    label_name: bytes = b""
    label: bytes = b""


class MkNod(NamedTuple):
    parent: int
    name: bytes
    mode: int
    rdev: int
    uid: int
    gid: int
    umask: int = 0
    groups: Sequence[int] = ()
    label_name: bytes = b""
    label: bytes = b""


class MkDir(NamedTuple):
    parent: int
    name: bytes
    mode: int
    uid: int
    gid: int
    umask: int = 0
    groups: Sequence[int] = ()
    label_name: bytes = b""
    label: bytes = b""


class Unlink(NamedTuple):
    parent: int
    name: bytes


class RmDir(NamedTuple):
    parent: int
    name: bytes


class Rename(NamedTuple):
    """`uid`, `gid`: of whom a whiteout will be that it leaves."""

    parent: int
    name: bytes
    new_parent: int
    new_name: bytes
    flags: int
    uid: int = 0
    gid: int = 0


class Link(NamedTuple):
    nodeid: int
    parent: int
    name: bytes


class Open(NamedTuple):
    """`kill`: what truncates takes the set-id bits away, as the caller has no CAP_FSETID; so in other messages."""

    nodeid: int
    flags: int
    kill: int = 0


class OpenDir(NamedTuple):
    nodeid: int


class Create(NamedTuple):
    parent: int
    name: bytes
    flags: int
    mode: int
    uid: int
    gid: int
    umask: int = 0
    groups: Sequence[int] = ()
    label_name: bytes = b""
    label: bytes = b""
    kill: int = 0


class TmpFile(NamedTuple):
    """A file without a name, in the directory's file system."""

    parent: int
    flags: int
    mode: int
    uid: int
    gid: int
    umask: int = 0
    groups: Sequence[int] = ()
    label_name: bytes = b""
    label: bytes = b""


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
    """A close(2) in the guest: runs the file system's flush method, and drops the POSIX locks of `owner` on the inode."""

    nodeid: int
    fh: int
    owner: int = 0


class FAllocate(NamedTuple):
    nodeid: int
    fh: int
    mode: int
    offset: int
    length: int
    kill: int = 0


class AfterWrite(NamedTuple):
    """A worker, who is nobody, wrote to a file that had these set-id bits, on behalf of somebody whose write leaves them.

    With none, where file capabilities are kept under another name (`--xattrmap`): the host's kernel does not remove those.
    """

    nodeid: int
    fh: int
    set_id_bits: int


class Access(NamedTuple):
    nodeid: int
    mask: int
    uid: int
    gid: int


class SyncFs(NamedTuple):
    nodeid: int


class StatX(NamedTuple):
    nodeid: int


class GetXattr(NamedTuple):
    """The whole value: whether it fits the guest's buffer is the worker's to say."""

    nodeid: int
    name: bytes


class SetXattr(NamedTuple):
    """`kill_sgid`: setting this ACL takes the set-group-id bit away."""

    nodeid: int
    name: bytes
    value: bytes
    flags: int
    kill_sgid: int


class ListXattr(NamedTuple):
    nodeid: int


class RemoveXattr(NamedTuple):
    nodeid: int
    name: bytes


class GetLock(NamedTuple):
    """Answered by the first lock that would conflict, or kind F_UNLCK."""

    nodeid: int
    fh: int
    owner: int
    start: int
    end: int
    kind: int


class SetLock(NamedTuple):
    """`flock`: of the open file itself, the range without meaning. `wait`: answered when the lock is granted."""

    nodeid: int
    fh: int
    owner: int
    start: int
    end: int
    kind: int
    flock: int
    wait: int


class CancelLock(NamedTuple):
    """The worker waits no longer for the lock that it asked for by that request: which is then answered, by EAGAIN or by the lock."""

    request_id: int


class LocksAck(NamedTuple):
    """The worker asks for each FLUSH of that session from now on."""

    session: int


class Ioctl(NamedTuple):
    nodeid: int
    fh: int
    command: int
    argument: bytes


class SessionNotice(NamedTuple):
    """A new session has begun, or without SESSION_ACTIVE the old one has ended; to be acknowledged by SessionAck."""

    session: int
    flags: int


class LocksNotice(NamedTuple):
    """A POSIX lock was asked for in this session: FLUSH drops locks from now on; to be acknowledged by LocksAck."""

    session: int


class DropFile(NamedTuple):
    """The open file is gone: close every descriptor of it."""

    fh: int


class DropNode(NamedTuple):
    """The inode is forgotten: close the O_PATH descriptor donated for it."""

    nodeid: int


Request = (
    Hello | SessionStart | SessionEnd | SessionAck | Lookup | LookupMany | Forget | GetAttr | SetAttr | ReadLink | SymLink
    | MkNod | MkDir | Unlink | RmDir | Rename | Link | Open | OpenDir | Create | TmpFile | Release | Fetch | StatFs | FSync
    | Flush | FAllocate | AfterWrite | Access | SyncFs | StatX | GetXattr | SetXattr | ListXattr | RemoveXattr | GetLock
    | SetLock | CancelLock | LocksAck | Ioctl
)  # fmt: skip
Notice = SessionNotice | DropFile | DropNode | LocksNotice


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
_CALLER = (U32, U32, UMASK, ListOf(U32, 0, MAX_GROUPS))  # uid, gid, umask, supplementary groups
_LABEL = (NAME, Bin(0, MAX_LABEL_BYTES))
_RANGE = (OFFSET, OFFSET)  # first and last byte; the highest offset means to the end, however far that is
_LOCK_KIND = Uint(2)  # F_RDLCK, F_WRLCK, F_UNLCK

REQUESTS = (
    Spec(1, Hello, (U32,), (U64, U64), 0, in_session=False, resembles="–"),
    Spec(2, SessionStart, (U64,), (U64,), 0, in_session=False, resembles="mount"),
    Spec(3, SessionEnd, (), (), 0, in_session=False, resembles="umount"),
    Spec(4, SessionAck, (U64,), None, 0, in_session=False, resembles="–"),
    Spec(10, Lookup, (U64, NAME), _ENTRY, 0, in_session=True, resembles="openat(O_PATH|O_NOFOLLOW), statx, name_to_handle_at"),
    Spec(11, LookupMany, (U64, ListOf(NAME, 1, MAX_NAMES_PER_LOOKUP)), (), 0, in_session=True, resembles="as Lookup, for each name"),
    Spec(12, Forget, (ListOf(U64, 2, 2 * MAX_FORGETS, 2), ListOf(U64, 0, 4 * MAX_FORGETS, 4)), None, 0, in_session=True, resembles="close"),
    Spec(13, GetAttr, (U64,), (ATTR_RECORD,), 1, in_session=True, resembles="statx"),
    Spec(
        14, SetAttr, (U64, U64, Uint(SET_ALL), OFFSET, Int64(), Int64(), NSEC, NSEC, MODE, U32, U32, BOOL), (ATTR_RECORD,), 0,
        in_session=True, resembles="fchmodat, fchownat, ftruncate, utimensat, statx",
    ),
    Spec(15, ReadLink, (U64,), (Bin(0, MAX_TARGET_BYTES + 1),), 0, in_session=True, resembles="readlinkat"),
    Spec(16, SymLink, (U64, NAME, Bin(0, MAX_TARGET_BYTES), *_CALLER, *_LABEL), _ENTRY, 0, in_session=True, resembles="symlinkat"),
    Spec(17, MkNod, (U64, NAME, MODE, U32, *_CALLER, *_LABEL), _ENTRY, 0, in_session=True, resembles="mknodat"),
    Spec(18, MkDir, (U64, NAME, MODE, *_CALLER, *_LABEL), _ENTRY, 0, in_session=True, resembles="mkdirat"),
    Spec(19, Unlink, (U64, NAME), (), 0, in_session=True, resembles="unlinkat"),
    Spec(20, RmDir, (U64, NAME), (), 0, in_session=True, resembles="unlinkat(AT_REMOVEDIR)"),
    Spec(21, Rename, (U64, NAME, U64, NAME, U32, U32, U32), (), 0, in_session=True, resembles="renameat2"),
    Spec(22, Link, (U64, U64, NAME), _ENTRY, 0, in_session=True, resembles="linkat"),
    Spec(23, Open, (U64, U32, BOOL), _OPENED, 1, in_session=True, resembles="open_by_handle_at or openat(/proc/self/fd)"),
    Spec(24, OpenDir, (U64,), _OPENED, 1, in_session=True, resembles='openat(".", O_DIRECTORY)'),
    Spec(
        25, Create, (U64, NAME, U32, MODE, *_CALLER, *_LABEL, BOOL), _ENTRY + _OPENED, 1,
        in_session=True, resembles="openat(O_CREAT|O_EXCL)",
    ),
    Spec(26, Release, (U64, U64), None, 0, in_session=True, resembles="close"),
    Spec(27, Fetch, (U64, U64), (U32, U64), 1, in_session=True, resembles='dup; of a directory openat(".")'),
    Spec(28, StatFs, (U64,), (U64,) * 5 + (U32,) * 3, 0, in_session=True, resembles="fstatfs"),
    Spec(29, FSync, (U64, U64, BOOL), (), 0, in_session=True, resembles="fsync, fdatasync"),
    Spec(30, Flush, (U64, U64, U64), (), 0, in_session=True, resembles="close(dup)"),
    Spec(31, FAllocate, (U64, U64, U32, OFFSET, OFFSET, BOOL), (), 0, in_session=True, resembles="fallocate"),
    Spec(32, Access, (U64, U32, U32, U32), (), 0, in_session=True, resembles="faccessat, by mode bits"),
    Spec(33, SyncFs, (U64,), (), 0, in_session=True, resembles="syncfs"),
    Spec(34, TmpFile, (U64, U32, MODE, *_CALLER, *_LABEL), _ENTRY + _OPENED, 1, in_session=True, resembles="openat(O_TMPFILE)"),
    Spec(35, AfterWrite, (U64, U64, MODE), (), 0, in_session=True, resembles="fchmod"),
    Spec(36, StatX, (U64,), (STATX_RECORD,), 0, in_session=True, resembles="statx"),
    Spec(37, GetXattr, (U64, NAME), (XATTR_VALUE,), 0, in_session=True, resembles="getxattr(/proc/self/fd)"),
    Spec(38, SetXattr, (U64, NAME, XATTR_VALUE, U32, BOOL), (), 0, in_session=True, resembles="setxattr(/proc/self/fd)"),
    Spec(39, ListXattr, (U64,), (XATTR_VALUE,), 0, in_session=True, resembles="listxattr(/proc/self/fd)"),
    Spec(40, RemoveXattr, (U64, NAME), (), 0, in_session=True, resembles="removexattr(/proc/self/fd)"),
    Spec(41, GetLock, (U64, U64, U64, *_RANGE, _LOCK_KIND), (*_RANGE, _LOCK_KIND, U32), 0, in_session=True, resembles="fcntl(F_OFD_GETLK)"),
    Spec(
        42, SetLock, (U64, U64, U64, *_RANGE, _LOCK_KIND, BOOL, BOOL), (), 0,
        in_session=True, resembles="fcntl(F_OFD_SETLK), flock(LOCK_NB)",
    ),
    Spec(43, CancelLock, (U64,), None, 0, in_session=False, resembles="–"),
    Spec(44, Ioctl, (U64, U64, U32, Bin(0, MAX_IOCTL_BYTES)), (Bin(0, MAX_IOCTL_BYTES),), 0, in_session=True, resembles="ioctl"),
    Spec(45, LocksAck, (U64,), None, 0, in_session=False, resembles="–"),
)  # fmt: skip

# What must not be done twice, because it changes what the next one finds, or counts, or is told an error that is told once (FSync,
# SyncFs). Only these may have a slot. (Forget has its own; locks may be asked for again, by the same owner; Release finds nothing
# the second time.)
ONCE = frozenset({
    Lookup, LookupMany, SetAttr, SymLink, MkNod, MkDir, Unlink, RmDir, Rename, Link, Open, OpenDir, Create, TmpFile, FSync, Flush,
    SyncFs, FAllocate, SetXattr, RemoveXattr, Ioctl,
})  # fmt: skip

NOTICES: dict[int, type[Any]] = {1: SessionNotice, 2: DropFile, 3: DropNode, 4: LocksNotice}

# Session flags: the low byte is the broker's business, the others are the workers' own and opaque to it.
SESSION_ACTIVE = 1 << 0  # the guest has mounted; without it a worker answers everything but INIT with EIO
SESSION_POSIX_ACL = 1 << 1  # the guest reads and writes ACLs, and leaves the umask to the host
SESSION_SUPP_GROUPS = 1 << 2  # it tells the groups of who makes a file
SESSION_LOCKS = 1 << 3  # a POSIX lock was asked for; the broker's to set
SESSION_OWN_FLAGS_SHIFT = 8

# Open, OpenDir and Create tell what the file system behind a description is like.
TRAIT_FLUSH = 1 << 0  # it has a flush method (NFS, CIFS, FUSE): FLUSH must be asked for
TRAIT_SLOW = 1 << 1  # a call may take a network's time: never on the ring thread

_BY_TAG = {spec.tag: spec for spec in REQUESTS}
_TAG_OF = {spec.message: spec.tag for spec in REQUESTS}
_NOTICE_TAG_OF = {message: tag for tag, message in NOTICES.items()}
SPEC_OF: dict[type[Any], Spec] = {spec.message: spec for spec in REQUESTS}


def permit(spec: Spec) -> None:
    """Add a row, before the first packet: of a message that is in no table unless an option asks for it."""
    _BY_TAG[spec.tag] = SPEC_OF[spec.message] = spec
    _TAG_OF[spec.message] = spec.tag


class Slot(NamedTuple):
    """One request of the guest's: where it stands, and the number that tells one use of that head from the next."""

    place: int
    number: int


_PLACES = 1 << 24


def place_of(queue: int, head: int) -> int:
    """A head of a queue as a number."""
    return queue << 16 | head


# One request of a packet: its row of the table, its id, the message, its slot. A plain tuple: one is made for every request.
Asked = tuple[Spec, int, Any, Slot | None]


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


def encode_request(request_id: int, message: Request, slot: Slot | None = None) -> bytes:
    """One request as msgpack, to be gathered into a packet by `join_requests`."""
    return cast("bytes", msgpack.packb([_TAG_OF[type(message)], request_id if slot is None else [request_id, *slot], *message]))


def join_requests(session: int, encoded: list[bytes]) -> bytes:
    """A request packet of requests that `encode_request` made."""
    packer = msgpack.Packer()
    return b"".join((packer.pack_array_header(2), packer.pack(session), packer.pack_array_header(len(encoded)), *encoded))


def decode_requests(packet: bytes) -> tuple[int, list[Asked]]:
    """(session, requests) of one request packet.

    Raises WorkerBreach for anything the table does not allow; nothing else.
    """
    try:
        top = msgpack.unpackb(
            packet, raw=False, strict_map_key=True, ext_hook=_refuse_ext,
            max_str_len=0, max_map_len=0, max_ext_len=0, max_bin_len=MAX_XATTR_BYTES, max_array_len=4 * MAX_FORGETS,
        )  # fmt: skip
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WorkerBreach(f"not a msgpack packet within bounds: {type(error).__name__}") from None
    if type(top) is not list or len(top) != 2 or not U64.accepts(top[0]) or type(top[1]) is not list:
        raise WorkerBreach("a packet is [session, [request, …]]")
    if not 1 <= len(top[1]) <= MAX_REQUESTS_PER_PACKET:
        raise WorkerBreach(f"{len(top[1])} requests in a packet")
    return top[0], [_decode_request(row) for row in top[1]]


def _decode_request(row: object) -> Asked:
    if type(row) is not list or len(row) < 2 or type(row[0]) is not int:
        raise WorkerBreach("a request is [tag, request id, field, …]")
    spec = _BY_TAG.get(row[0])
    if spec is None:
        raise WorkerBreach(f"unknown tag {row[0]}")
    name = spec.message.__name__
    slot = None
    request_id: Any = row[1]
    if type(request_id) is list:
        request_id, slot = _decode_slot(spec, request_id)
    if not U64.accepts(request_id):
        raise WorkerBreach(f"{name}: bad request id")
    if len(row) - 2 != len(spec.fields):
        raise WorkerBreach(f"{name}: {len(row) - 2} fields for {len(spec.fields)}")
    for position, field in enumerate(spec.fields):
        if not field.accepts(row[position + 2]):
            raise WorkerBreach(f"{name}: field {spec.message._fields[position]} is not {field}")
    return spec, request_id, spec.message._make(row[2:]), slot


def _decode_slot(spec: Spec, values: list[object]) -> tuple[object, Slot]:
    if spec.message not in ONCE:
        raise WorkerBreach(f"{spec.message.__name__}: has no slot")
    if len(values) == 3:
        request_id, place, number = values
        if type(place) is int and type(number) is int and 0 <= place < _PLACES and 0 <= number <= _U64:
            return request_id, Slot(place, number)
    raise WorkerBreach(f"{spec.message.__name__}: bad slot")


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
