"""A broker inside the test process: a real Share on a real directory, a real Server, workers that are sockets.

Nothing here waits: what a worker sends is there when it has been sent, so `pump` serves what is ready and returns.
"""

from __future__ import annotations

import array
import os
import select
import socket
import stat
from collections.abc import Callable
from typing import Any, NamedTuple

from vfsd.broker.closer import Closer
from vfsd.broker.credentials import Credentials
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.server import Server
from vfsd.broker.share import Settings, Share
from vfsd.broker.whereabouts import Whereabouts
from vfsd.fds import OwnedFd
from vfsd.log import ERROR, TRACE, WARNING, Logger
from vfsd.wire import attr
from vfsd.wire import broker_messages as wire
from vfsd.wire.channel import Breach, Silent

_FD_ROOM = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class RecordingLog(Logger):
    """Keeps its lines."""

    def __init__(self) -> None:
        super().__init__(TRACE)
        self.lines: list[tuple[int, str]] = []

    def _emit(self, level: int, text: str) -> None:
        self.lines.append((level, text))

    @property
    def warnings(self) -> list[str]:
        return [text for level, text in self.lines if level == WARNING]

    @property
    def errors(self) -> list[str]:
        return [text for level, text in self.lines if level == ERROR]

    @property
    def bugs(self) -> list[str]:
        return [text for text in self.errors if text.startswith("bug in")]


class ImmediateCloser(Closer):
    """Closes at once, on the caller's thread."""

    def take(self, fd: int, mount: int) -> None:
        del mount
        os.close(fd)


def path_fd(path: Any) -> OwnedFd:
    return OwnedFd(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))


def proc_self_fd() -> OwnedFd:
    return OwnedFd(os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


def open_share(path: Any, log: Any, notify: Any, *, credentials: Credentials | None = None, **settings: Any) -> Share:
    """A share on a directory; keywords as Settings. New files belong to the test's user unless credentials are given."""
    chosen = {
        "inode_file_handles": "never",
        "readonly": False,
        "announce_submounts": True,
        "path_fd_budget": 16,
        "most_guest_fds": 1000,
    } | settings
    root = OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    return Share(
        root, proc_self_fd(), Settings(**chosen), credentials or Credentials(None), log, notify, ImmediateCloser(), Whereabouts(), reap_all
    )


def reap_all(reap: Callable[[], bool]) -> None:
    """In place of the reaper's thread: do all of its work at once."""
    while reap():
        pass


def close_share(share: Share) -> None:
    """Wipe it as the end of a session does, then give back the root, which no session ends; nothing else may be left."""
    share.begin_session(0)
    share.paths.sweep(float("inf"))
    assert len(share.files) == 0
    assert len(share.paths) == 0
    assert share.store.held == 1, "an inode is still pinned"
    with share.store.pin(ROOT_NODEID, share.session) as root:
        os.close(root.fd)
        if root.handle_key is not None:
            share.mounts.release(root.mount_id)
    assert len(share.mounts) == 0
    share.root.close()
    share._proc_self_fd.close()


def naming(name: bytes) -> list[wire.Request]:
    """Every message that takes a name, with this one as the first or the second."""
    root, me = ROOT_NODEID, (os.getuid(), os.getgid())
    return [
        wire.Lookup(root, name), wire.SymLink(root, name, b"target", *me), wire.MkNod(root, name, stat.S_IFREG | 0o644, 0, *me),
        wire.MkDir(root, name, 0o755, *me), wire.Unlink(root, name), wire.RmDir(root, name), wire.Rename(root, name, root, b"ok", 0),
        wire.Rename(root, b"ok", root, name, 0), wire.Create(root, name, os.O_RDWR, 0o644, *me),
    ]  # fmt: skip


def changed(nodeid: int, valid: int, **fields: int) -> wire.SetAttr:
    """A SETATTR of these fields."""
    values = dict.fromkeys(wire.SetAttr._fields, 0) | {"nodeid": nodeid, "valid": valid} | fields
    return wire.SetAttr(**values)


def attributes(record: bytes) -> dict[str, int]:
    names = [
        "ino",
        "size",
        "blocks",
        "atime",
        "mtime",
        "ctime",
        "atime_nsec",
        "mtime_nsec",
        "ctime_nsec",
        "mode",
        "nlink",
        "uid",
        "gid",
        "rdev",
        "blksize",
        "flags",
    ]
    return dict(zip(names, attr.ATTR.unpack(record), strict=True))


class Got(NamedTuple):
    """A reply as a worker sees it."""

    errno: int
    fields: list[Any]
    fd: OwnedFd | None


class FakeWorker:
    """The other end of one worker's socket: sends what it is told, keeps what it gets."""

    def __init__(self, bench: Bench, index: int) -> None:
        self.bench = bench
        self.index = index
        self.session = 0
        self.gone = False
        self.notices: list[wire.Notice] = []
        self.packets: list[wire.ReplyPacket] = []
        self.replies: dict[int, Got] = {}
        self._next_id = 0
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        bench.server.links.add(index, OwnedFd(theirs.detach()))

    def send(self, *messages: wire.Request, session: int | None = None) -> list[int]:
        """One packet; the request ids."""
        ids = list(range(self._next_id + 1, self._next_id + 1 + len(messages)))
        self._next_id += len(messages)
        encoded = [wire.encode_request(number, message) for number, message in zip(ids, messages, strict=True)]
        self.socket.send(wire.join_requests(self.session if session is None else session, encoded))
        return ids

    def send_once(self, message: wire.Request, *slot: int) -> int:
        """One message for this request of the guest's; its request id."""
        self._next_id += 1
        self.socket.send(wire.join_requests(self.session, [wire.encode_request(self._next_id, message, wire.Slot(*slot))]))
        return self._next_id

    def ask_once(self, message: wire.Request, *slot: int) -> Got:
        """As `ask`, for this request of the guest's."""
        number = self.send_once(message, *slot)
        self.bench.pump()
        self.read()
        return self.replies.pop(number)

    def read(self) -> None:
        """Take all that has come."""
        while True:
            try:
                data, ancillary, _flags, _address = self.socket.recvmsg(wire.MAX_PACKET_BYTES, _FD_ROOM, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, ancillary = b"", []
            if not data:
                self.gone = True
                return
            self._take(wire.decode_replies(data), _received(ancillary))

    def _take(self, packet: wire.ReplyPacket, fds: list[OwnedFd]) -> None:
        self.packets.append(packet)
        self.notices += packet.notices
        for reply in packet.replies:
            self.replies[reply.request_id] = Got(reply.errno, reply.fields, fds.pop(0) if reply.donated else None)
        assert fds == [], "descriptors that belong to no reply"

    def ask(self, message: wire.Request, session: int | None = None) -> Got:
        """Send one message, let the broker work, and return its answer."""
        (number,) = self.send(message, session=session)
        self.bench.pump()
        self.read()
        return self.replies.pop(number)

    def ask_ok(self, message: wire.Request) -> Got:
        got = self.ask(message)
        assert got.errno == 0, os.strerror(got.errno)
        return got

    def errno_of(self, message: wire.Request, session: int | None = None) -> int:
        got = self.ask(message, session)
        if got.fd is not None:
            got.fd.close()
        return got.errno

    def lookup(self, name: bytes, parent: int = ROOT_NODEID) -> int:
        """The nodeid of a name."""
        nodeid: int = self.ask_ok(wire.Lookup(parent, name)).fields[0]
        return nodeid

    def open(self, nodeid: int, flags: int = os.O_RDWR) -> tuple[int, OwnedFd]:
        got = self.ask_ok(wire.Open(nodeid, flags))
        assert got.fd is not None
        return got.fields[0], got.fd

    def close(self) -> None:
        for got in self.replies.values():
            if got.fd is not None:
                got.fd.close()
        self.socket.close()


class _Idle(Exception):
    pass


class _Impatient:
    """An epoll that raises instead of waiting, for whatever time."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        events = self._epoll.poll(0)
        if not events and timeout:
            raise _Idle
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


class Bench:
    """Server and share; `pump` serves what is there."""

    def __init__(self, path: Any, **settings: Any) -> None:
        self.log = RecordingLog()
        self.breaches: list[tuple[int, str]] = []
        self.silent: list[tuple[int, str]] = []  # reported as not doing their part
        self.deaf = False  # the supervisor's channel is full
        self.server = Server(self.log, self._take_report)
        self._epoll = self.server.links._epoll
        self.server.links._epoll = _Impatient(self._epoll)
        self.share = open_share(path, self.log, self.server.links.notify, **settings)
        self.server.serve(self.share)
        self.workers: list[FakeWorker] = []

    def _take_report(self, report: Breach | Silent) -> bool:
        if self.deaf:
            return False
        (self.breaches if isinstance(report, Breach) else self.silent).append((report.worker_index, report.text.decode()))
        return True

    def add(self, index: int, *, greet: bool = True) -> FakeWorker:
        worker = FakeWorker(self, index)
        self.workers.append(worker)
        if greet:
            hello = worker.ask_ok(wire.Hello(wire.PROTOCOL_VERSION))
            worker.session = hello.fields[0]
        return worker

    def pump(self) -> None:
        """Serve until nothing is ready."""
        try:
            while True:
                for task in self.server.next_turn():
                    self.server.run(task)(False)
                self.server.finish_turn()
        except _Idle:
            return

    def begin_session(self, flags: int = 0) -> int:
        """As a guest's INIT through the first worker; all workers acknowledge. The session's number."""
        first = self.workers[0]
        (number,) = first.send(wire.SessionStart(flags))
        self.pump()
        self.acknowledge()
        reply = first.replies.pop(number)
        assert reply.errno == 0
        session: int = reply.fields[0]
        return session

    def acknowledge(self, *workers: FakeWorker) -> None:
        """These workers (all, if none is named) take the newest session and say so."""
        for worker in workers or self.workers:
            worker.read()
            worker.session = next(notice.session for notice in reversed(worker.notices) if isinstance(notice, wire.SessionNotice))
            worker.send(wire.SessionAck(worker.session))
        self.pump()
        for worker in workers or self.workers:
            worker.read()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.pump()
        assert self.server.links._by_fd == {}
        assert self.server.links.by_index == {}
        close_share(self.share)
        self._epoll.close()
        os.close(self.server.links._wake_fd)
        assert self.log.bugs == []


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[OwnedFd]:
    fds = array.array("i")
    for _level, _kind, data in ancillary:
        fds.frombytes(data)
    return [OwnedFd(fd) for fd in fds]
