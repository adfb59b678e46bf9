"""A hostile worker against the broker: any packet, with a neighbour that must not notice.

Oracle: a packet is what the table of messages permits, and then each of its requests is answered once, as its row says, with no
descriptor but of a regular file or directory (or a mere O_PATH), or that worker is in breach and loses its socket. No bug is logged,
the neighbour is served right, what lies outside the share stays as it is, and when the worker has gone nothing is left.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any

import msgpack

from tests.fuzz.fuse_grammar import NAMES
from tests.fuzz.provider import Provider, Recipe
from tests.fuzz.rigs import Rigs, check_nothing_is_left
from tests.fuzz.share import CONTENT, SmallShare, as_the_broker
from tests.support.broker import Bench, FakeWorker
from vfsd.errors import WorkerBreach
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls
from vfsd.wire import broker_messages as wire

NEEDS_ROOT = True  # device nodes, other people's files, file handles
_CONFIGURATIONS = (
    {"inode_file_handles": "prefer", "xattr": True, "posix_acl": True},
    {"inode_file_handles": "never", "xattr": True, "xattrmap": ":map::user.virtiofs.:"},
)
_WAYS = (*["requests"] * 14, "odd", "bytes")
_KINDS = tuple(spec.message for spec in wire.REQUESTS)
_BY_NUMBER = (
    0,
    1,
    2,
    0o644,
    0o100644,
    0o010600,
    0o020666,
    0o060666,
    0o106755,
    os.O_RDWR | os.O_TRUNC,
    os.O_CREAT,
    os.O_PATH,
    os.O_DIRECTORY,
)
_ODD = (None, True, -1, 1.5, "text", b"bytes", [], {}, [[]], 1 << 64)
_MOST_PACKETS = 30


class _Hostile(FakeWorker):
    """Remembers each reply, however many have the same id."""

    def __init__(self, bench: Bench, index: int) -> None:
        super().__init__(bench, index)
        self.got: list[tuple[wire.Reply, OwnedFd | None]] = []

    def _take(self, packet: wire.ReplyPacket, fds: list[OwnedFd]) -> None:
        self.notices += packet.notices
        for reply in packet.replies:
            self.got.append((reply, fds.pop(0) if reply.donated else None))
        assert fds == [], "descriptors that belong to no reply"


class _Rig:
    def __init__(self, share: SmallShare, number: int) -> None:
        self.share = share
        self.bench = Bench(share.path, **_CONFIGURATIONS[number])
        self.neighbour = self.bench.add(0)
        self.next_index = 1
        self.fds = 0
        self.bench.begin_session()
        self.wipe()

    def settle(self, *workers: FakeWorker) -> None:
        """The broker works, and who is told of a session or of locks says that it knows."""
        for _ in range(4):
            self.bench.pump()
            for worker in (self.neighbour, *workers):
                if not worker.gone:
                    worker.read()
                    _acknowledge(worker)

    def wipe(self) -> None:
        (number,) = self.neighbour.send(wire.SessionStart(0))
        self.settle()
        assert self.neighbour.replies.pop(number).errno == 0
        self.bench.share.paths.sweep(float("inf"))

    def close(self) -> None:
        self.bench.close()


_rigs = Rigs(_Rig, len(_CONFIGURATIONS))
open_rig, close_rig = _rigs.open, _rigs.close


def _acknowledge(worker: FakeWorker) -> None:
    notices, worker.notices = worker.notices, []
    for notice in notices:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if isinstance(notice, wire.SessionNotice):
                worker.session = notice.session
                worker.send(wire.SessionAck(notice.session))
            elif isinstance(notice, wire.LocksNotice):
                worker.send(wire.LocksAck(notice.session))


def one_input(data: bytes) -> None:
    with as_the_broker():
        provider = Provider(data)
        rig = provider.pick(_rigs)
        rig.share.fill()
        run = _Run(rig, provider)
        run.run()
        _check_neighbour(rig)
        run.leave()
        rig.wipe()
        check_nothing_is_left(rig)


def _check_neighbour(rig: _Rig) -> None:
    """Served right, whatever the other one does."""
    name = rig.share.new_file()
    rig.settle()
    nodeid = rig.neighbour.lookup(name)
    _fh, fd = rig.neighbour.open(nodeid, os.O_RDONLY)
    with fd:
        assert os.pread(fd.fileno(), 1000, 0) == CONTENT
    assert rig.share.canary.read_bytes() == b"canary"


class _Run:
    """One hostile worker's life."""

    def __init__(self, rig: _Rig, provider: Provider) -> None:
        self._rig = rig
        self._provider = provider
        self._worker = _Hostile(rig.bench, rig.next_index)
        rig.next_index += 1
        self._number = 0
        self._owed: dict[int, list[wire.Spec]] = {}
        self._ambiguous: set[int] = set()
        self._nodeids = [1]
        self._files = [(1, 1)]

    def run(self) -> None:
        breaches = len(self._rig.bench.breaches)
        if not self._provider.one_in(16):
            self._worker.socket.send(wire.join_requests(0, [wire.encode_request(0, wire.Hello(wire.PROTOCOL_VERSION))]))
            self._rig.settle(self._worker)
            self._worker.session = self._worker.got.pop()[0].fields[0]
        for _ in range(_MOST_PACKETS):
            if not self._provider.left:
                return
            packet = self._packet()
            try:
                _session, requests = wire.decode_requests(packet)
                harmless = bool(self._worker.index in self._greeted() or requests[0][0].message is wire.Hello)
            except WorkerBreach:
                harmless, requests = False, []
            _check_round_trip(packet)
            for spec, request_id, _message, _slot in requests if harmless else []:
                if request_id in self._owed:  # which of the replies is whose cannot be told
                    self._ambiguous.add(request_id)
                if spec.reply is not None:
                    self._owed.setdefault(request_id, []).append(spec)
            self._worker.socket.send(packet)
            self._rig.settle(self._worker)
            self._take_replies()
            assert self._worker.gone != harmless
            assert len(self._rig.bench.breaches) == breaches + (not harmless)
            if self._worker.gone:
                return

    def _greeted(self) -> set[int]:
        return {link.index for link in self._rig.bench.server.links._by_fd.values() if link.greeted}

    def _packet(self) -> bytes:
        provider = self._provider
        session = provider.number() if provider.one_in(24) else self._worker.session
        match provider.pick(_WAYS):
            case "requests":
                return wire.join_requests(session, [self._request() for _ in range(1 + provider.byte() % 4)])
            case "odd":
                packed: bytes = msgpack.packb(_odd(provider, 0))
                return packed
        return provider.blob(300) or b"\0"

    def _request(self) -> bytes:
        """Mostly as its row says."""
        provider = self._provider
        kind = provider.pick(_KINDS)
        spec = wire.SPEC_OF[kind]
        self._number += 1
        request_id = provider.byte() if provider.one_in(12) else self._number
        nodeid, fh = provider.pick(self._files[-16:]) if "fh" in kind._fields else (provider.pick(self._nodeids[-16:]), 0)
        values = []
        for name, field in zip(kind._fields, spec.fields, strict=True):
            known = {"nodeid": nodeid, "fh": fh, "parent": nodeid if "nodeid" not in kind._fields else 1, "new_parent": 1}
            if provider.one_in(48):
                values.append(_odd(provider, 3) if provider.one_in(3) else self._value(name, field))
            else:
                values.append(known.get(name, self._value(name, field)))
        row: list[Any] = [spec.tag, request_id, *values]
        if provider.one_in(64):
            row = row[: provider.byte() % (len(row) + 1)]
        packed: bytes = msgpack.packb(row)
        return packed

    def _value(self, name: str, field: wire.Field) -> Any:
        provider = self._provider
        match field:
            case wire.Uint(limit):
                if name == "command":
                    return provider.pick(sorted(filecalls.IOCTL_BYTES))
                if name == "end" and not provider.one_in(4):
                    return limit
                if name in ("offset", "length", "size", "start", "end") and not provider.one_in(8):
                    return provider.byte()
                value = provider.number() if provider.one_in(4) else provider.pick(_BY_NUMBER)
                return value if value <= limit or provider.one_in(48) else value % (limit + 1)
            case wire.Int64():
                return provider.number(63) * (-1 if provider.flag() else 1)
            case wire.Bin(_, most) if "name" in name:
                return provider.pick([each for each in NAMES if len(each) <= most]) if provider.flag() else provider.blob(min(most, 256))
            case wire.Bin():
                return provider.blob(200)
            case wire.ListOf(item, least, _, step):
                return [self._value(name, item) for _ in range(max(least, provider.byte() % 4 * step))]
        raise TypeError(field)

    def _take_replies(self) -> None:
        for reply, fd in self._worker.got:
            asked = self._owed.get(reply.request_id, [])
            assert asked, f"nobody asked: {reply}"
            assert (fd is not None) == bool(reply.donated)
            spec = asked.pop()
            if reply.request_id not in self._ambiguous:
                self._check_reply(spec, reply, fd)
            if fd is not None:
                fd.close()
        self._worker.got.clear()

    def _check_reply(self, spec: wire.Spec, reply: wire.Reply, fd: OwnedFd | None) -> None:
        name = spec.message.__name__
        assert reply.donated <= spec.donates, name
        assert 0 <= reply.errno < 512, (name, reply.errno)
        if fd is not None:
            _check_donation(fd.fileno())
        if reply.errno:
            assert reply.fields == []
            return
        if spec.message is wire.LookupMany:
            return
        assert spec.reply is not None
        assert len(reply.fields) == len(spec.reply), name
        assert all(field.accepts(value) for field, value in zip(spec.reply, reply.fields, strict=True)), (name, reply.fields)
        self._learn(spec, reply)

    def _learn(self, spec: wire.Spec, reply: wire.Reply) -> None:
        if spec.reply is not None and len(spec.reply) in (2, 5) and spec.reply[1] == wire.ATTR_RECORD:
            self._nodeids.append(reply.fields[0])
        if spec.message in (wire.Create, wire.TmpFile):
            self._files.append((reply.fields[0], reply.fields[2]))
        elif spec.message in (wire.Open, wire.OpenDir):
            self._files += [(nodeid, reply.fields[0]) for nodeid in self._nodeids[-4:]]

    def leave(self) -> None:
        """What still waited (a lock, a session) is let go with the socket."""
        self._worker.close()
        self._rig.settle()


def _check_donation(fd: int) -> None:
    """Only what a taken-over worker may have."""
    with open(f"/proc/self/fdinfo/{fd}") as info:
        flags = int(info.read().split("flags:")[1].split()[0], 8)
    kind = os.fstat(fd).st_mode
    assert flags & os.O_PATH or stat.S_ISREG(kind) or stat.S_ISDIR(kind), oct(kind)


def _check_round_trip(packet: bytes) -> None:
    """What is accepted means what it says: written again, it is the same."""
    try:
        session, requests = wire.decode_requests(packet)
    except WorkerBreach:
        return
    again = wire.join_requests(session, [wire.encode_request(number, message, slot) for _spec, number, message, slot in requests])
    assert wire.decode_requests(again) == (session, requests)


def _odd(provider: Provider, depth: int) -> Any:
    if depth < 3 and provider.flag():
        return [_odd(provider, depth + 1) for _ in range(provider.byte() % 4)]
    if provider.flag():
        return provider.number()
    value = provider.pick(_ODD)
    return 1 if value == 1 << 64 else value


def seeds() -> dict[str, bytes]:
    found = {}
    for position, spec in enumerate(wire.REQUESTS):
        recipe = Recipe().byte(0).one_in(16).one_in(24).pick(_WAYS, "requests").byte(0).byte(position).one_in(12).byte(0).raw(bytes(24))
        found[spec.message.__name__.lower()] = bytes(recipe)
    everything = Recipe().byte(0).one_in(16)
    for position in range(len(_KINDS)):
        everything.one_in(24).pick(_WAYS, "requests").byte(0).byte(position).one_in(12).byte(0)
        for _name in _KINDS[position]._fields:
            everything.one_in(48).byte(1).byte(position % len(NAMES))
    found["one-after-another"] = bytes(everything)
    found["no-msgpack"] = bytes(Recipe().byte(0).one_in(16).one_in(24).pick(_WAYS, "bytes").blob(b"\xc1"))
    found["a-bomb"] = bytes(Recipe().byte(0).one_in(16).one_in(24).pick(_WAYS, "bytes").blob(b"\x91" * 299))
    return found
