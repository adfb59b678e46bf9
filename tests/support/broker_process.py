"""A real, confined broker process, and a worker's end of its socket in the hands of a test: what a taken-over worker has."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from vfsd.channel import take_descriptors
from vfsd.children import Child
from vfsd.cli import parse_options
from vfsd.fds import OwnedFd
from vfsd.filters import make_filters
from vfsd.log import OFF, TRACE, StderrLog
from vfsd.roles import make_roles
from vfsd.wire import broker_messages as wire
from vfsd.wire.channel import BROKER_TO_SUPERVISOR, AddWorker, Breach, Log, Ready, Silent

_PATIENCE_SECONDS = 30.0
_NOFILE = 4096
_FD_ROOM = socket.CMSG_SPACE(wire.MAX_FDS_PER_PACKET * 4)


class Got(NamedTuple):
    errno: int
    fields: list[Any]
    fd: OwnedFd | None


class BrokerProcess:
    """`arguments`: of vfsd's command line."""

    def __init__(self, share: Path, *arguments: str) -> None:
        options = parse_options(["--shared-dir", str(share), "--socket-path", "unused", *arguments])
        self.log: list[str] = []
        self.breaches: list[tuple[int, str]] = []
        self._pidfd = OwnedFd(os.pidfd_open(os.getpid()))
        roles = self.roles = make_roles(options, self._pidfd.fileno(), _NOFILE, make_filters(options, StderrLog(OFF)))
        self._child = Child(
            "broker", "vfsd.broker", BROKER_TO_SUPERVISOR, roles.broker,
            pass_fds=(self._pidfd.fileno(),), log=StderrLog(TRACE),
            pid_namespace=options.sandbox == "namespace",
        )  # fmt: skip
        self.pid = self._child.pid
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._last_id = 0
        self.session = 0
        try:
            self._hear(Ready)
            self.introduce(0, theirs)
            self._begin()
        except BaseException:
            self.close()
            raise

    def _hear(self, kind: type[Any] | tuple[type[Any], ...]) -> Any:
        """The next message of that kind; lines of the log are kept."""
        while True:
            received = self._child.channel.receive()
            if received is None:
                assert select.select([self._child.channel], [], [], _PATIENCE_SECONDS)[0], "the broker says nothing"
                continue
            self._note(received.message)
            if isinstance(received.message, kind):
                return received.message

    def _note(self, message: Any) -> None:
        if isinstance(message, Log):
            self.log.append(str(message.text))
        elif isinstance(message, (Breach, Silent)):
            self.breaches.append((message.worker_index, message.text.decode()))

    def introduce(self, index: int, link: socket.socket) -> None:
        """Tell the broker of another worker, by its end of the socket to it, which is taken over."""
        with OwnedFd(link.detach()) as fd:
            assert self._child.send(AddWorker(index), [fd])

    def wait_for_breach(self, index: int) -> str:
        """What the broker reports of this worker."""
        while not (found := [text for worker, text in self.breaches if worker == index]):
            self._hear((Breach, Silent))
        return found[0]

    def wait_for_log(self, text: str) -> str:
        """The first line that contains it."""
        while not (found := [line for line in self.log if text in line]):
            self._hear(Log)
        return found[0]

    def drain_log(self) -> list[str]:
        """All that has been said so far."""
        while (received := self._child.channel.receive()) is not None:
            self._note(received.message)
        return self.log

    def _begin(self) -> None:
        self.ask(wire.Hello(wire.PROTOCOL_VERSION))
        assert self.ask(wire.SessionStart(wire.SESSION_POSIX_ACL)).errno == 0

    def _heed(self, notice: wire.Notice) -> None:
        """As an honest worker does."""
        if isinstance(notice, wire.SessionNotice):
            self.session = notice.session
            self._send(wire.SessionAck(self.session))
        elif isinstance(notice, wire.LocksNotice):
            self._send(wire.LocksAck(notice.session))

    def _send(self, message: wire.Request) -> int:
        self._last_id += 1
        self._socket.send(wire.join_requests(self.session, [wire.encode_request(self._last_id, message)]))
        return self._last_id

    def _receive(self) -> tuple[wire.ReplyPacket, Sequence[OwnedFd]]:
        assert select.select([self._socket], [], [], _PATIENCE_SECONDS)[0], "the broker does not answer"
        data, ancillary, _flags, _ = self._socket.recvmsg(wire.MAX_PACKET_BYTES, _FD_ROOM, socket.MSG_CMSG_CLOEXEC)
        assert data, "the broker has closed the link"
        return wire.decode_replies(data), take_descriptors(ancillary)

    def _answer(self, number: int) -> Got:
        while True:
            packet, fds = self._receive()
            for notice in packet.notices:
                self._heed(notice)
            for reply in packet.replies:
                assert reply.request_id == number
                return Got(reply.errno, reply.fields, fds[0] if reply.donated else None)

    def ask(self, message: wire.Request) -> Got:
        """Send one message that is answered, and wait for its answer."""
        return self._answer(self._send(message))

    def tell(self, message: wire.Request) -> None:
        """Send one message that is not."""
        self._send(message)

    def errno_of(self, message: wire.Request) -> int:
        got = self.ask(message)
        if got.fd is not None:
            got.fd.close()
        return got.errno

    def lookup(self, path: bytes) -> int:
        nodeid = 1
        for name in path.split(b"/"):
            got = self.ask(wire.Lookup(nodeid, name))
            assert got.errno == 0, os.strerror(got.errno)
            nodeid = got.fields[0]
        return nodeid

    def open(self, message: wire.Open | wire.OpenDir) -> tuple[int, OwnedFd]:
        got = self.ask(message)
        assert got.fd is not None, os.strerror(got.errno)
        return got.fields[0], got.fd

    def close(self) -> None:
        self._socket.close()
        self._child.kill()
        self._child.reap()
        self._child.close()
        self._pidfd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
