"""A real broker, an honest worker in the hands of the test, and a confined one that is hostile (`puppet.py`).

The test stands where the supervisor stands. A breach costs a worker its link, so each attack gets a link of its own: the
hostile process is handed one more, which the broker knows by an index of its own.
"""

import fcntl
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack

from tests.security.sandbox import number_of
from tests.support.broker_process import BrokerProcess
from vfsd.children import Child
from vfsd.config import WorkerConfig
from vfsd.log import TRACE, StderrLog
from vfsd.sandbox.census import open_fds
from vfsd.wire import broker_messages as wire
from vfsd.wire.channel import WORKER_TO_SUPERVISOR, Ready

PUPPET = Path(__file__).with_name("puppet.py")
_PATIENCE_SECONDS = 60.0
_SOCKET_BYTES = 1 << 20
_FIRST_INDEX, _LAST_INDEX = 2, 250  # 0 is the honest worker, 1 the hostile one's own link
_ORDER_BYTES = 1 << 20


def packet_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return pair


class _Puppet(Child):
    @staticmethod
    def _command(module: str, config_fd: int) -> list[str]:
        return [sys.executable, "-I", str(PUPPET), str(config_fd), module]


class Link:
    """One of the hostile worker's ends of a socket to the broker."""

    def __init__(self, hostile: "HostileWorker", index: int, fd: int) -> None:
        self._hostile = hostile
        self.index = index
        self.fd = fd
        self._last_id = 0

    def send(self, packet: bytes, fds: list[int] | None = None) -> int:
        error: int = self._hostile.order("send", self.fd, packet, fds or [])
        return error

    def flood(self, packet: bytes, most: int, fds: list[int] | None = None) -> int:
        """How many of these packets the socket took."""
        taken: int = self._hostile.order("flood", self.fd, packet, most, fds or [])
        return taken

    def receive(self) -> bytes:
        """The next packet; b"" when the broker has closed the link."""
        packet = self._hostile.order("receive", self.fd)
        assert isinstance(packet, bytes), packet
        return packet

    def requests(self, session: int, *messages: wire.Request) -> bytes:
        """A packet of them, by new request ids."""
        first = self._last_id + 1
        self._last_id += len(messages)
        return wire.join_requests(session, [wire.encode_request(first + place, each) for place, each in enumerate(messages)])

    def replies(self, count: int) -> list[wire.Reply]:
        """So many replies; notices are not heeded."""
        found: list[wire.Reply] = []
        while len(found) < count:
            packet = self.receive()
            assert packet, "the broker has closed the link"
            found += wire.decode_replies(packet).replies
        return found

    def ask(self, session: int, *messages: wire.Request) -> list[wire.Reply]:
        """What the broker answers to one packet of these."""
        assert self.send(self.requests(session, *messages)) == 0
        return self.replies(len(messages))

    def read_to_end(self) -> None:
        while self.receive():
            pass

    def close(self) -> None:
        self._hostile.order("close", self.fd)


class HostileWorker:
    """The confined process. It has index 1."""

    def __init__(self, arena: "Arena", *, landlock: bool = True) -> None:
        roles = arena.broker.roles
        self._orders, control = packet_pair()
        ours, theirs = packet_pair()
        give = (control.fileno(), theirs.fileno())

        def make_config(channel_fd: int) -> WorkerConfig:
            config = roles.worker(1, channel_fd, *give)
            return replace(config, confinement=replace(config.confinement, landlock=landlock))

        with control, theirs:
            self._child = _Puppet(
                "worker 1", "worker", WORKER_TO_SUPERVISOR, make_config,
                pass_fds=(roles.supervisor_pidfd, *give), log=StderrLog(TRACE), pid_namespace=roles.options.sandbox == "namespace",
            )  # fmt: skip
        self.pid = self._child.pid
        arena.broker.introduce(1, ours)
        try:
            self._wait_ready()
            self.order("close", "broker")  # it acknowledges nothing; attacks have links of their own
        except BaseException:
            self.close()
            raise

    def _wait_ready(self) -> None:
        while True:
            received = self._child.channel.receive()
            if received is None:
                assert select.select([self._child.channel], [], [], _PATIENCE_SECONDS)[0], "the puppet says nothing"
            else:
                assert isinstance(received.message, Ready), (received.message, self._child.last_words())
                return

    def order(self, *order: object, fds: tuple[int, ...] = ()) -> object:
        """The answer of the hostile process to one order. EOFError if it died of it."""
        socket.send_fds(self._orders, [msgpack.packb(order)], fds) if fds else self._orders.send(msgpack.packb(order))
        assert select.select([self._orders], [], [], _PATIENCE_SECONDS)[0], "the puppet does not answer"
        try:
            answer = self._orders.recv(_ORDER_BYTES)
        except ConnectionResetError:
            answer = b""
        if not answer:
            raise EOFError(self.how_it_ended())
        return msgpack.unpackb(answer)

    def give(self, fd: int) -> int:
        """The number by which the hostile process has a descriptor of ours from now on."""
        (number,) = self.order("ping", fds=(fd,))  # type: ignore[misc]
        return int(number)

    def attempt(self, name: str, *arguments: int | bytes) -> int:
        """A raw system call: its result, or minus its errno."""
        result, error = self.order("syscall", number_of(name), *arguments)  # type: ignore[misc]
        return -error if error else int(result)

    def how_it_ended(self) -> str:
        assert select.select([self._child.pidfd], [], [], _PATIENCE_SECONDS)[0], "it lives"
        return self._child.reap()

    def close(self) -> None:
        self._orders.close()
        self._child.kill()
        self._child.reap()
        self._child.close()


class Arena:
    """`secret` is beside the share; nothing an attack does may touch it."""

    def __init__(self, folder: Path, *arguments: str, landlock: bool = True) -> None:
        self.secret = folder / "secret"
        self.secret.write_text("outside")
        self.share = folder / "share"
        (self.share / "directory").mkdir(parents=True)
        (self.share / "file").write_text("inside")
        self._outside = self._look_outside()
        self._next_index = _FIRST_INDEX
        self._fds_at_rest: dict[int, str] | None = None
        self.broker = BrokerProcess(self.share, "--inode-file-handles=prefer", "--xattr", *arguments)
        self.hostile = HostileWorker(self, landlock=landlock)
        self.file = self.broker.lookup(b"file")
        self.directory = self.broker.lookup(b"directory")
        self._have_a_lock()

    def _have_a_lock(self) -> None:
        """From the first lock of a session on every new worker knows of locks; those before must acknowledge."""
        fh, fd = self.broker.open(wire.Open(self.file, os.O_RDWR))
        fd.close()
        assert self.broker.errno_of(wire.SetLock(self.file, fh, 1, 0, 0, fcntl.F_WRLCK, 0, 0)) == 0
        self.broker.tell(wire.Release(self.file, fh))
        self.check_service()  # when that is answered, it is released

    @property
    def session(self) -> int:
        return self.broker.session

    def _look_outside(self) -> object:
        folder = self.secret.parent
        seen = self.secret.stat()
        return sorted(os.listdir(folder)), self.secret.read_text(), (seen.st_mode, seen.st_uid, seen.st_nlink, seen.st_mtime_ns)

    def new_link(self, *, greet: bool = True) -> Link:
        """Another link of the hostile process."""
        index = self._next_index
        self._next_index = _FIRST_INDEX if index == _LAST_INDEX else index + 1
        ours, theirs = packet_pair()
        with theirs:
            link = Link(self.hostile, index, self.hostile.give(theirs.fileno()))
        self.broker.breaches[:] = [each for each in self.broker.breaches if each[0] != index]
        self.broker.introduce(index, ours)
        if greet:
            (hello,) = link.ask(0, wire.Hello(wire.PROTOCOL_VERSION))
            assert hello.errno == 0
        return link

    def check_service(self) -> None:
        """The honest worker is served, and nothing happened outside of the share."""
        got = self.broker.ask(wire.Lookup(1, b"file"))
        assert (got.errno, got.fields[0]) == (0, self.file), os.strerror(got.errno)
        assert self._look_outside() == self._outside
        assert not [line for line in self.broker.drain_log() if "bug in" in line], self.broker.log

    def broker_fds(self) -> dict[int, str]:
        fds = open_fds(self.broker.pid)
        assert fds is not None
        return fds

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Whatever happens inside the block, afterwards the broker has the descriptors that it had, and serves."""
        before = self._fds_at_rest or self.settled_fds()
        self._fds_at_rest = None
        yield
        self.check_service()
        after = self.settled_fds()
        assert sorted(after.values()) == sorted(before.values()), (before, after)
        self._fds_at_rest = after

    def settled_fds(self) -> dict[int, str]:
        """The broker's descriptors without those that it remembers for a second or two."""
        return {number: target for number, target in self.broker_fds().items() if not self._is_remembered(number)}

    def _is_remembered(self, number: int) -> bool:
        try:
            flags = Path(f"/proc/{self.broker.pid}/fdinfo/{number}").read_text().split("flags:\t", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        return bool(int(flags, 8) & os.O_PATH) and os.readlink(f"/proc/{self.broker.pid}/fd/{number}") != "/"

    def expect_breach(self, link: Link, text: str) -> None:
        """The broker has closed the link, told the supervisor whose it was and why, and logged it."""
        self.expect_report(link, text)
        self.broker.wait_for_log(f"worker {link.index} broke the broker protocol")
        self.broker.log.clear()

    def expect_report(self, link: Link, text: str) -> None:
        """The broker has closed the link, and told the supervisor whose it was and why: that kills the worker, and says so."""
        link.read_to_end()
        link.close()
        assert text in self.broker.wait_for_breach(link.index)
        self.broker.breaches.clear()

    def close(self) -> None:
        self.hostile.close()
        self.broker.close()


def until(condition: Callable[[], bool], arena: Arena) -> None:
    """Ask the broker for something else until it is so; each round is a round trip."""
    for _ in range(100_000):
        arena.check_service()
        if condition():
            return
    raise AssertionError("it never came to that")
