"""Messages of vfsd's internal channels: supervisor <-> child, and control <-> worker. Pure codec, no I/O.

Who controls the bytes: a child may have been taken over by the guest, so everything a child or a worker sends is hostile;
`decode_message` accepts exactly what the tables below list, or raises ChildBreach. What is not in a table is not permitted.
One packet (SOCK_SEQPACKET) is one msgpack array `[tag, field, ...]`; descriptors travel beside it by SCM_RIGHTS. Text is
msgpack bin, never str: nobody has checked that it is UTF-8. Imports errors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import msgpack

from vfsd.errors import ChildBreach

MAX_PACKET = 4096  # the longest message is a Failed: tag, framing and 2000 bytes of text
MAX_LOG_TEXT = 1000
MAX_FAILED_TEXT = 2000
MAX_QUEUE_INDEX = 255  # vhost-user names a queue with one byte where it sends its descriptors (SET_VRING_KICK)
MAX_QUEUE_SIZE = 32768  # virtio 1.2, 2.7: the largest split virtqueue
MAX_WORKER_INDEX = MAX_QUEUE_INDEX - 1
_U16, _U32, _U64 = 2**16 - 1, 2**32 - 1, 2**64 - 1


class Uint(NamedTuple):
    """An exact int (True is not 1) from 0 up to and including the limit."""

    limit: int

    def accepts(self, value: object) -> bool:
        return type(value) is int and 0 <= value <= self.limit


class Octets(NamedTuple):
    """Bytes, at most so many."""

    limit: int

    def accepts(self, value: object) -> bool:
        return type(value) is bytes and len(value) <= self.limit


class Flag(NamedTuple):
    """True or False, nothing that merely counts as such."""

    def accepts(self, value: object) -> bool:
        return type(value) is bool


@dataclass(frozen=True, slots=True)
class ChannelMessage:
    """Base of all messages; `fd_count` is how many descriptors belong to this one."""

    def fd_count(self) -> int:
        return 0


# --- supervisor -> child -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stop(ChannelMessage):
    """End now; the supervisor kills whoever is still there some 300 ms later."""


@dataclass(frozen=True, slots=True)
class Ping(ChannelMessage):
    """To a worker: say Alive."""


@dataclass(frozen=True, slots=True)
class AddWorker(ChannelMessage):
    """Worker `index` has been started, perhaps in place of one that died; the descriptor is this child's end of the socket to it."""

    index: int

    def fd_count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Connection(ChannelMessage):
    """To control: the connected vhost-user socket."""

    def fd_count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class AreYouWell(ChannelMessage):
    """To the broker: answer IAmWell, by way of the thread that serves requests."""


@dataclass(frozen=True, slots=True)
class InflightGiven(ChannelMessage):
    """To control: the memory it asked for, all zeros, which can neither grow nor shrink."""

    def fd_count(self) -> int:
        return 1


# --- child -> supervisor -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready(ChannelMessage):
    """Locked down, and serving. With what of its confinement only it can know, said before it hears anybody; only the first one counts."""

    securebits: int = 0
    landlock: int = 0  # the version of its interface, 0: none
    dumpable: bool = True


@dataclass(frozen=True, slots=True)
class Alive(ChannelMessage):
    """From a worker: the answer to Ping."""


@dataclass(frozen=True, slots=True)
class Completed(ChannelMessage):
    """From a worker, once: it has completed a request."""


@dataclass(frozen=True, slots=True)
class Counted(ChannelMessage):
    """From a worker: so many more requests of a dead one's were run again, refused, or were appends of which nobody can tell."""

    replayed: int
    refused: int
    undecided: int


@dataclass(frozen=True, slots=True)
class Log(ChannelMessage):
    level: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Failed(ChannelMessage):
    """Start-up failed, or it cannot go on, for a reason the user can do something about; the child then exits with 1."""

    text: bytes


@dataclass(frozen=True, slots=True)
class NeedWorker(ChannelMessage):
    """From control: the frontend named the queue of a worker that has not been started."""

    index: int


@dataclass(frozen=True, slots=True)
class KillWorker(ChannelMessage):
    """From control: this worker does not let go of what is the frontend's, as `text` says; another one is to take its place."""

    index: int
    text: bytes


@dataclass(frozen=True, slots=True)
class NeedInflight(ChannelMessage):
    """From control, once for each frontend: memory for the in-flight tables of all queues, to be shared with it."""


@dataclass(frozen=True, slots=True)
class FrontendGone(ChannelMessage):
    """From control: the vhost-user connection is over; not `clean` means that vfsd closed it because of what `text` says."""

    text: bytes
    clean: bool


@dataclass(frozen=True, slots=True)
class Breach(ChannelMessage):
    """From the broker: this worker sent what no intact worker sends, and is no longer served. Another one may be."""

    worker_index: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Silent(ChannelMessage):
    """From the broker: this worker does not read or acknowledge what it must, and is no longer served. Another one may be."""

    worker_index: int
    text: bytes


@dataclass(frozen=True, slots=True)
class IAmWell(ChannelMessage):
    """From the broker: requests are served, or all its threads wait for file systems of the host."""


# --- control -> worker: each is answered by Done or Refused with the same seq -----------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryClear(ChannelMessage):
    seq: int


@dataclass(frozen=True, slots=True)
class MemoryAdd(ChannelMessage):
    seq: int
    gpa: int
    size: int
    uva: int
    mmap_offset: int

    def fd_count(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class MemoryRemove(ChannelMessage):
    seq: int
    gpa: int
    size: int
    uva: int


@dataclass(frozen=True, slots=True)
class RingStart(ChannelMessage):
    """Serve this ring from `last_avail` on; or, if its in-flight table tells of this very start, from where a dead worker was.

    Descriptors: the in-flight table, then kick, call, err, in this order, those that are there. `table_offset`: where the table
    begins. `adopted`: it comes from the frontend, and what it says of an earlier connection holds. `give_up`: what a dead worker
    had not completed is answered EIO.
    """

    seq: int
    queue_index: int
    size: int
    last_avail: int
    desc_uva: int
    avail_uva: int
    used_uva: int
    event_idx: bool
    has_kick: bool
    has_call: bool
    has_err: bool
    start_number: int
    table_offset: int = 0
    adopted: bool = False
    give_up: bool = False

    def fd_count(self) -> int:
        return 1 + self.has_kick + self.has_call + self.has_err


@dataclass(frozen=True, slots=True)
class _RingFd(ChannelMessage):
    seq: int
    queue_index: int
    present: bool

    def fd_count(self) -> int:
        return int(self.present)


@dataclass(frozen=True, slots=True)
class RingKick(_RingFd):
    pass


@dataclass(frozen=True, slots=True)
class RingCall(_RingFd):
    pass


@dataclass(frozen=True, slots=True)
class RingErr(_RingFd):
    pass


@dataclass(frozen=True, slots=True)
class RingStop(ChannelMessage):
    """Pop no more, complete what is in flight, then answer Done(last_avail); Refused if it could not be drained."""

    seq: int
    queue_index: int


# --- worker -> control -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done(ChannelMessage):
    seq: int
    value: int


@dataclass(frozen=True, slots=True)
class Refused(ChannelMessage):
    seq: int
    text: bytes


@dataclass(frozen=True, slots=True)
class RingBroken(ChannelMessage):
    """Unasked: the guest laid out what no driver lays out, and this ring is no longer served."""

    queue_index: int
    text: bytes


# --- the tables --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One permitted message: its tag on the wire, its type, its fields, and the most descriptors it can bring."""

    tag: int
    message: type[ChannelMessage]
    bounds: tuple[Uint | Octets | Flag, ...] = ()
    max_fds: int = 0


_SEQ, _QUEUE, _WORKER, _ADDRESS, _FLAG = Uint(_U32), Uint(MAX_QUEUE_INDEX), Uint(MAX_WORKER_INDEX), Uint(_U64), Flag()
_TEXT = Octets(MAX_LOG_TEXT)
_OFFSET = Uint(2**63 - 1)

_TO_CHILD = (
    Row(1, Stop),
    Row(2, AddWorker, (_WORKER,), max_fds=1),
    Row(3, Connection, (), max_fds=1),
    Row(4, AreYouWell),
    Row(5, Ping),
    Row(6, InflightGiven, (), max_fds=1),
)
_FROM_ANY_CHILD = (
    Row(16, Ready, (Uint(_U32), Uint(_U16), _FLAG)),
    Row(17, Log, (Uint(5), _TEXT)),
    Row(18, Failed, (Octets(MAX_FAILED_TEXT),)),
)
_FROM_CONTROL = (
    Row(19, NeedWorker, (_WORKER,)),
    Row(20, FrontendGone, (_TEXT, _FLAG)),
    Row(25, KillWorker, (_WORKER, _TEXT)),
    Row(26, NeedInflight),
)
_FROM_BROKER = (
    Row(21, Breach, (_WORKER, _TEXT)),
    Row(22, IAmWell),
    Row(28, Silent, (_WORKER, _TEXT)),
)
_FROM_WORKER_UP = (
    Row(23, Completed),
    Row(24, Alive),
    Row(27, Counted, (Uint(_U32), Uint(_U32), Uint(_U32))),
)
_TO_WORKER = (
    Row(32, MemoryClear, (_SEQ,)),
    Row(33, MemoryAdd, (_SEQ, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS), max_fds=1),
    Row(34, MemoryRemove, (_SEQ, _ADDRESS, _ADDRESS, _ADDRESS)),
    Row(
        35,
        RingStart,
        (
            *(_SEQ, _QUEUE, Uint(MAX_QUEUE_SIZE), Uint(_U16), _ADDRESS, _ADDRESS, _ADDRESS, _FLAG, _FLAG, _FLAG, _FLAG, Uint(_U32)),
            *(_OFFSET, _FLAG, _FLAG),
        ),
        max_fds=4,
    ),
    Row(36, RingKick, (_SEQ, _QUEUE, _FLAG), max_fds=1),
    Row(37, RingCall, (_SEQ, _QUEUE, _FLAG), max_fds=1),
    Row(38, RingErr, (_SEQ, _QUEUE, _FLAG), max_fds=1),
    Row(39, RingStop, (_SEQ, _QUEUE)),
)
_FROM_WORKER = (
    Row(48, Done, (_SEQ, Uint(_U32))),
    Row(49, Refused, (_SEQ, _TEXT)),
    Row(50, RingBroken, (_QUEUE, _TEXT)),
)

Table = Mapping[int, Row]
Message = TypeVar("Message", bound=ChannelMessage)


def _table(*rows: Row) -> Table:
    return {row.tag: row for row in rows}


SUPERVISOR_TO_CHILD: Table = _table(*_TO_CHILD)
BROKER_TO_SUPERVISOR: Table = _table(*_FROM_ANY_CHILD, *_FROM_BROKER)
CONTROL_TO_SUPERVISOR: Table = _table(*_FROM_ANY_CHILD, *_FROM_CONTROL)
WORKER_TO_SUPERVISOR: Table = _table(*_FROM_ANY_CHILD, *_FROM_WORKER_UP)
CONTROL_TO_WORKER: Table = _table(*_TO_WORKER)
WORKER_TO_CONTROL: Table = _table(*_FROM_WORKER)

_ROW_OF = {
    row.message: row for row in (*_TO_CHILD, *_FROM_ANY_CHILD, *_FROM_CONTROL, *_FROM_WORKER_UP, *_FROM_BROKER, *_TO_WORKER, *_FROM_WORKER)
}


def extended(table: Table, *rows: Row) -> Table:
    """A table with further rows, whose messages can be sent from then on: what only an option permits is in no table without it."""
    _ROW_OF.update({row.message: row for row in rows})
    return {**table, **_table(*rows)}


def max_fds(table: Table) -> int:
    """The most descriptors that one packet of this direction may bring."""
    return max(row.max_fds for row in table.values())


def bounded(text: str, limit: int = MAX_LOG_TEXT) -> bytes:
    """Text cut to what a message takes; whoever shows it decodes and escapes it, so a cut character does no harm."""
    return text.encode(errors="backslashreplace")[:limit]


def encode_message(message: ChannelMessage) -> bytes:
    """Raises ValueError for a value out of its bounds: that is our own bug, and must not look like the peer's."""
    row = _ROW_OF[type(message)]
    values = [getattr(message, field.name) for field in fields(message)]
    for field, bound, value in zip(fields(message), row.bounds, values, strict=True):
        if not bound.accepts(value):
            raise ValueError(f"{type(message).__name__}.{field.name} is out of bounds")
    packed: bytes = msgpack.packb([row.tag, *values])
    return packed


def decode_message(packet: bytes, fd_count: int, table: Table) -> ChannelMessage:
    """One packet and the number of descriptors that came with it -> a message of this table, or ChildBreach."""
    tag, values = _decode_array(packet)
    row = table.get(tag)
    if row is None:
        raise ChildBreach(f"message tag {tag} is not permitted here")
    name = row.message.__name__
    if len(values) != len(row.bounds):
        raise ChildBreach(f"{name}: {len(values)} fields where {len(row.bounds)} belong")
    for field, bound, value in zip(fields(row.message), row.bounds, values, strict=True):
        if not bound.accepts(value):
            raise ChildBreach(f"{name}: field {field.name} has a wrong type or is out of bounds")
    make: Callable[..., ChannelMessage] = row.message
    message = make(*values)
    if message.fd_count() != fd_count:
        raise ChildBreach(f"{name}: {fd_count} descriptors where {message.fd_count()} belong")
    return message


def _decode_array(packet: bytes) -> tuple[int, list[Any]]:
    if len(packet) > MAX_PACKET:
        raise ChildBreach(f"a packet of {len(packet)} bytes, at most {MAX_PACKET} are permitted")
    try:
        array = msgpack.unpackb(packet, raw=False, strict_map_key=True)
    except (
        ValueError,
        TypeError,
        OverflowError,
        msgpack.UnpackException,
    ) as error:  # ExtraData, FormatError and StackError are ValueErrors
        raise ChildBreach("a packet that is not one msgpack value") from error
    if type(array) is not list or not array or type(array[0]) is not int:
        raise ChildBreach("a packet that is not an array with a tag")
    return array[0], array[1:]
