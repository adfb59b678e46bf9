"""A hostile frontend, and hostile workers, against a real Control: messages in pieces, in any order, with any descriptors.

Everything is real but the processes: Control with its stream, state machine, links and channels, and at the other end of these the
workers' ring tables, which map memory and start queues. Oracle: every reply answers a request in the protocol's form; a breach ends
the connection, and the supervisor is told once why; nothing else is raised, nothing waits for what never comes, no descriptor or
mapping is left. While the connection lives, a correct frontend can, from whatever state, bring the device to serve a request.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from array import array
from contextlib import suppress

from tests.fuzz import vhost_user_grammar as grammar
from tests.fuzz.oracle import open_fd_count
from tests.fuzz.provider import Provider, Recipe
from tests.support.broker import RecordingLog
from vfsd.channel import Channel, close_all
from vfsd.config import ControlConfig
from vfsd.errors import GuestBreach
from vfsd.fds import OwnedFd, sealed_memfd
from vfsd.log import DEBUG, ChildLog
from vfsd.sandbox.lockdown import Confinement
from vfsd.wire import channel as wire
from vfsd.wire import vhost_user as vu
from vfsd.wire.inflight import TABLE_STRIDE_BYTES
from vfsd.worker.control import Control
from vfsd.worker.device import FEATURES, PROTOCOL_FEATURES
from vfsd.worker.inflight_memory import InflightMemory
from vfsd.worker.ring_table import RingTable
from vfsd.worker.worker_links import WorkerLinks

_STEPS = (*["message"] * 12, "poke", "poke", "set up", "set up", "bytes", "worker says", "worker sends")
_MOST_FDS = 34
_CONFINEMENT = Confinement(
    role="control", sandbox="none", seccomp_filter=b"", uid=None, gid=None, capabilities=(), landlock=False, nofile=None, supervisor_pidfd=None
)  # fmt: skip


def one_input(data: bytes) -> None:
    provider = Provider(data)
    before = open_fd_count()
    world = _World(tag=b"fuzz" if provider.flag() else None, queues=provider.pick((2, 2, 3, 1)))
    try:
        while provider.left and world.connected:
            world.step(provider)
        world.serve_a_correct_frontend()
    finally:
        world.close()
    assert open_fd_count() == before, "a descriptor was lost"


class _NothingWaits:
    """In place of a Dispatcher: the requests of this target are completed as they are popped."""

    def end_lock_waits(self, _ring: object) -> None:
        pass


class _Worker:
    """A worker's ring table; its requests are popped and completed at once."""

    def __init__(self, control: socket.socket) -> None:
        self.channel = Channel(control, wire.CONTROL_TO_WORKER)
        self.log = RecordingLog()
        self._epoll = select.epoll()
        self.rings = RingTable(self.channel, _NothingWaits(), self.log, self._epoll)  # type: ignore[arg-type]
        self.served = 0

    def turn(self) -> None:
        while select.select([self.channel], [], [], 0)[0]:
            self.rings.hear_control()
            self.serve()
            self.rings.finish_stops(0)

    def serve(self) -> None:
        for ring in self.rings.in_order():
            if not ring.serving:
                continue
            try:
                while (chain := ring.pop()) is not None:
                    ring.queue.push(chain.head, 0)
                    self.served += 1
            except GuestBreach as breach:
                self.rings.broke(ring, str(breach))
            ring.publish()

    def close(self) -> None:
        for ring in self.rings.in_order():
            ring.close()
        self.rings._memory.clear()  # BufferError, if a view is left
        self.channel.close()
        self._epoll.close()


class _Links(WorkerLinks):
    """Where Control would sleep, the others have their turn; what is not ready then will never be."""

    def __init__(self, supervisor: Channel, world: _World) -> None:
        super().__init__(supervisor)
        self._world = world

    def _wait(self, fds: list[int], deadline: float, what: str) -> set[int]:
        self._world.others_turn()
        assert select.select(fds, [], [], 0)[0], f"waits for ever: {what}"
        return super()._wait(fds, deadline, what)


class _World:
    """A Control, and everybody around it."""

    def __init__(self, *, tag: bytes | None, queues: int) -> None:
        ours, theirs = _packet_pair()
        self._supervisor = Channel(ours, wire.CONTROL_TO_SUPERVISOR)
        self._control_channel = Channel(theirs, wire.SUPERVISOR_TO_CHILD)
        config = ControlConfig(
            channel_fd=0, supervisor_pidfd=0, confinement=_CONFINEMENT, sandbox="none", log_level=DEBUG, tag=tag, request_queues=queues
        )  # fmt: skip
        self._control = Control(config, self._control_channel, ChildLog(self._control_channel, DEBUG), InflightMemory(queues + 1))
        self._control._links = self._links = _Links(self._control_channel, self)
        self._workers: dict[int, _Worker] = {}
        self._hostile: dict[int, socket.socket] = {}
        self._gone: list[wire.FrontendGone] = []
        self._fds: dict[int, int] = {}
        self._replies = b""
        self._sent: set[int] = set()
        self._whole = True  # the next byte begins a message
        self._worker_lied = False
        self._described: set[int] | None = set()  # the rings that a correct frontend has described; None: it is no correct one
        self._queues = queues
        self._frontend, backend = socket.socketpair()
        self._add_worker(0)
        with OwnedFd(backend.detach()) as connection:
            self._supervisor.send(wire.Connection(), [connection])
        self._run()

    @property
    def connected(self) -> bool:
        return not self._gone

    def _add_worker(self, index: int) -> None:
        ours, theirs = _packet_pair()
        self._workers[index] = _Worker(ours)
        self._hostile[index] = socket.socket(fileno=os.dup(ours.fileno()))
        with OwnedFd(theirs.detach()) as end:
            self._supervisor.send(wire.AddWorker(index), [end])

    def others_turn(self) -> None:
        """Supervisor and workers."""
        while (received := self._supervisor.receive()) is not None:
            match received.message:
                case wire.NeedWorker(index):
                    self._add_worker(index)
                case wire.KillWorker(index):
                    self._add_worker(index)
                case wire.NeedInflight():
                    with sealed_memfd("tables", (self._queues + 1) * TABLE_STRIDE_BYTES) as memory:
                        self._supervisor.send(wire.InflightGiven(), [memory])
                case wire.FrontendGone() as gone:
                    self._gone.append(gone)
                case wire.Log(level, _):
                    assert level, "a log line of no level"
        for worker in list(self._workers.values()):
            worker.turn()

    def _run(self) -> None:
        """Control's main loop until it would sleep."""
        while True:
            self.others_turn()
            watched: list[int] = [self._control_channel.fileno(), *[link.channel.fileno() for link in self._links]]
            if self._control._stream is not None:
                watched.append(self._control._stream.fileno())
            if not select.select(watched, [], [], 0)[0]:
                break
            self._control._turn()
            self._read_replies()
        self.others_turn()
        assert len(self._gone) <= 1
        assert (self._control._stream is None) == bool(self._gone)
        for gone in self._gone:
            assert gone.text or gone.clean
            assert b"did not answer" not in gone.text
            assert b"within 10 s" not in gone.text

        self._check_both_sides_agree()

    def _check_both_sides_agree(self) -> None:
        """What control believes of memory and rings is what the workers have."""
        device = self._control._device
        if device is None or self._worker_lied:
            return
        theirs = {(region.gpa, region.size, region.uva) for region in self._workers[0].rings._memory._regions}
        assert theirs == {region[:3] for region, _ in device._memory}
        running = {ring.index for worker in self._workers.values() for ring in worker.rings.in_order()}
        assert running == {ring.index for ring in device._rings if ring.running}

    def _read_replies(self) -> None:
        with suppress(BlockingIOError, ConnectionResetError):
            self._replies += self._frontend.recv(1 << 16, socket.MSG_DONTWAIT)
        while len(self._replies) >= vu.HEADER.size:
            request, flags, size = vu.HEADER.unpack_from(self._replies)
            assert flags == vu.VHOST_USER_VERSION | vu.VHOST_USER_REPLY_MASK
            assert request in self._sent or not self._whole
            assert size <= vu.MAX_CONFIG_BYTES + 12
            assert len(self._replies) >= vu.HEADER.size + size
            self._last_reply = request, self._replies[vu.HEADER.size : vu.HEADER.size + size]
            self._replies = self._replies[vu.HEADER.size + size :]

    # --- steps ---------------------------------------------------------------------------------------------------------

    def step(self, provider: Provider) -> None:
        step = provider.pick(_STEPS)
        if step != "set up":
            self._described = None
        match step:
            case "message":
                self._send_message(provider)
            case "poke":
                os.pwrite(self._fd(grammar.RAM), struct.pack("<Q", provider.number()), provider.number(18))
                for worker in self._workers.values():
                    worker.serve()
            case "set up":
                self._set_up(provider.byte() % (self._queues + 1))
            case "bytes":
                self._whole = False
                self._send(provider.blob(200), [])
            case kind if provider.one_in(4):
                self._worker_lied = True
                index = provider.pick(list(self._hostile))
                with suppress(BrokenPipeError, ConnectionResetError):
                    self._hostile[index].send(self._lie(provider) if kind == "worker says" else provider.blob(64) or b"\0")
        self._run()
        assert self.connected or self._described is None, self._gone

    def _lie(self, provider: Provider) -> bytes:
        number = provider.number(32)
        return wire.encode_message(
            provider.pick((wire.Done(number, 1), wire.Refused(number, b"no"), wire.RingBroken(number & 0xFF, b"broken"), wire.Done(1, 0)))
        )

    def _send_message(self, provider: Provider) -> None:
        request = provider.number(32) if provider.one_in(32) else provider.pick(grammar.REQUESTS if provider.one_in(24) else grammar.COMMON)
        flags = provider.number(32) if provider.one_in(32) else vu.VHOST_USER_VERSION | vu.VHOST_USER_NEED_REPLY_MASK * provider.flag()
        payload, fds = grammar.make_payload(provider, request)
        if provider.one_in(16):
            payload = payload[: provider.byte()] + provider.blob(40)
        if provider.one_in(16):
            fds = [provider.byte() % len(grammar.FDS) for _ in range(provider.byte() % (_MOST_FDS + 1))]
        size = len(payload)
        if provider.one_in(32):
            size = provider.number(32)
        too_long = self._whole and size > vu.MAX_PAYLOAD_BYTES
        self._whole = self._whole and size == len(payload)
        self._sent.add(request)
        self._send(vu.HEADER.pack(request, flags, size) + payload, [self._fd(kind) for kind in fds], cut=provider.byte())
        assert not (too_long and self.connected), "a payload that is too long is waited for"

    def _send(self, data: bytes, fds: list[int], cut: int = 0) -> None:
        """In two pieces, if `cut` lies inside."""
        for piece, rights in ((data[:cut], fds if cut else []), (data[cut:], [] if cut else fds)):
            if not piece:
                continue
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", rights))] if rights else []
            try:
                self._frontend.sendmsg([piece], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError):
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    raise
                self._whole = False
                return
            self._run()

    def _fd(self, kind: int) -> int:
        """One of each kind, made when it is first sent."""
        if kind not in self._fds:
            self._fds[kind] = grammar.make_fd(grammar.FDS[kind])
        return self._fds[kind]

    # --- a correct frontend --------------------------------------------------------------------------------------------

    def _ask(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """A message whose reply is waited for."""
        self._sent.add(request)
        self._last_reply = None
        self._send(vu.HEADER.pack(request, 1 | vu.VHOST_USER_NEED_REPLY_MASK, len(payload)) + payload, [self._fd(kind) for kind in fds])
        assert self._last_reply is not None, (vu.request_name(request), self._gone)
        assert self._last_reply[0] == request
        return self._last_reply[1]

    def _set_up(self, index: int) -> None:
        """A ring as a frontend makes it. If it runs already, or memory is not as it was, that is wrong."""
        if self._described is not None:
            self._described = None if index in self._described else self._described | {index}
        for request, payload, fds in grammar.good_ring(index):
            self._sent.add(request)
            self._send(vu.HEADER.pack(request, 1, len(payload)) + payload, [self._fd(kind) for kind in fds])

    def serve_a_correct_frontend(self) -> None:
        if not self.connected or not self._whole or self._worker_lied:
            return
        assert self._ask(vu.VHOST_USER_GET_FEATURES) == struct.pack("<Q", FEATURES)
        assert self._ask(vu.VHOST_USER_GET_QUEUE_NUM) == struct.pack("<Q", self._queues + 1)
        offered = int.from_bytes(self._ask(vu.VHOST_USER_GET_PROTOCOL_FEATURES), "little")
        assert offered & ~(1 << vu.VHOST_USER_PROTOCOL_F_CONFIG) == PROTOCOL_FEATURES
        assert self._ask(vu.VHOST_USER_SET_PROTOCOL_FEATURES, struct.pack("<Q", offered)) == bytes(8)
        assert self._ask(vu.VHOST_USER_RESET_DEVICE) == bytes(8)
        assert self._ask(vu.VHOST_USER_SET_FEATURES, struct.pack("<Q", FEATURES)) == bytes(8)
        os.pwrite(self._fd(grammar.RAM), bytes(grammar.DATA), 0)
        os.pwrite(self._fd(grammar.RAM), struct.pack("<QIHH", grammar.DATA, 40, 0, 0), grammar.DESC)
        os.pwrite(self._fd(grammar.RAM), struct.pack("<HHH", 0, 1, 0), grammar.AVAIL)
        before = self._workers[0].served
        for request, payload, fds in grammar.good_ring(1):
            assert self._ask(request, payload, fds) == bytes(8), vu.request_name(request)
        assert self._workers[0].served == before + 1
        assert os.pread(self._fd(grammar.RAM), 4, grammar.USED) == struct.pack("<HH", 0, 1)

    def close(self) -> None:
        self._control._disconnect()
        self._links.close()
        self._control._inflight.close()
        for channel in (self._supervisor, self._control_channel):
            channel.close()
        for worker in self._workers.values():
            worker.close()
        for sock in (self._frontend, *self._hostile.values()):
            sock.close()
        close_all([OwnedFd(fd) for fd in self._fds.values()])


def _packet_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _recipe() -> Recipe:
    return Recipe().flag(False).byte(0)


def _message(recipe: Recipe, request: int, *, need_reply: bool = True) -> Recipe:
    """Up to its payload."""
    return recipe.pick(_STEPS, "message").one_in(32).one_in(24, True).pick(grammar.REQUESTS, request).one_in(32).flag(need_reply)


def _end(recipe: Recipe, cut: int = 0) -> Recipe:
    """After its payload: nothing is changed."""
    return recipe.one_in(16).one_in(16).one_in(32).byte(cut)


def seeds() -> dict[str, bytes]:
    found = {}
    for request in grammar.REQUESTS:
        name = vu.request_name(request).removeprefix("VHOST_USER_").lower().replace("_", "-").replace(" ", "-")
        found[name] = bytes(_end(_message(_recipe(), request).raw(bytes(12))))
    setting_up = _recipe().pick(_STEPS, "set up").byte(1)
    found["a-ring-that-runs"] = bytes(setting_up)
    found["set-mem-table-while-it-runs"] = bytes(_recipe().pick(_STEPS, "set up").byte(1).pick(_STEPS, "set up").byte(2))
    found["one-worker-for-each-queue"] = bytes(_recipe().pick(_STEPS, "set up").byte(0).pick(_STEPS, "set up").byte(2))
    found["a-worker-that-answers-unasked"] = bytes(
        _recipe().pick(_STEPS, "set up").byte(1).pick(_STEPS, "worker says").one_in(4, True).byte(0).number(9).byte(0)
    )
    found["a-guest-that-breaks-its-ring"] = bytes(
        _recipe()
        .pick(_STEPS, "set up")
        .byte(1)
        .pick(_STEPS, "poke")
        .number(0x7FFF0000)
        .number(grammar.AVAIL)
        .pick(_STEPS, "set up")
        .byte(1)
    )
    found["bytes-that-are-no-header"] = bytes(_recipe().pick(_STEPS, "bytes").blob(b"GET / HTTP/1.0\r\n\r\n"))
    found["a-header-without-its-payload"] = bytes(_recipe().pick(_STEPS, "bytes").blob(vu.HEADER.pack(2, 1, 8)))
    return found
