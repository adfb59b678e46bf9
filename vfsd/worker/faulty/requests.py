"""Requests with faults: the dispatcher, and the broker client, of a worker that was started for it.

Rules are looked at when a request begins. Those that select by path are decided with the broker, which alone knows paths: the
request waits for that answer, as for any other. A delay or hang holds up its own request, not the ring; it ends with EINTR when
the ring is to stop.
"""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Generator
from typing import Any

from vfsd.errors import ReplyErrno
from vfsd.faults import catalogue
from vfsd.faults.injector import Armed, Hit
from vfsd.faulty import Faults
from vfsd.fds import OwnedFd, TempFd
from vfsd.wire import fuse_abi as abi
from vfsd.wire.broker_messages import ReplyPacket
from vfsd.wire.fault_messages import MatchPath, unpack_numbers
from vfsd.worker.broker_client import BrokerClient
from vfsd.worker.dispatch import Dispatcher, Operation
from vfsd.worker.file_system import FileSystem, Given, Outcome, Waiting
from vfsd.worker.io_pool import IoPool
from vfsd.worker.request import Request
from vfsd.worker.ring import Ring
from vfsd.worker.virtqueue import Chain

# What happens when the request is answered.
_OF_COMPLETIONS = ("drop", "duplicate", "corrupt")
_NAME_OF = {number: name for name, number in catalogue.OPERATIONS.items()}
# Where the name stands in the body of a request that is about one; what RENAME moves is the old name.
_NAME_AT = {
    abi.FUSE_LOOKUP: 0, abi.FUSE_UNLINK: 0, abi.FUSE_RMDIR: 0, abi.FUSE_SYMLINK: 0,
    abi.FUSE_MKNOD: abi.fuse_mknod_in.size, abi.FUSE_MKDIR: abi.fuse_mkdir_in.size, abi.FUSE_CREATE: abi.fuse_create_in.size,
    abi.FUSE_LINK: abi.fuse_link_in.size, abi.FUSE_RENAME: abi.fuse_rename_in.size, abi.FUSE_RENAME2: abi.fuse_rename2_in.size,
}  # fmt: skip
_MOST_NAME = 255


class Pause:
    """What a handler yields to be gone on with later; `math.inf`: never."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Pauses:
    """Operations that are held up."""

    def __init__(self) -> None:
        self._until: dict[Operation, float] = {}

    def add(self, operation: Operation, seconds: float) -> None:
        self._until[operation] = time.monotonic() + seconds

    def seconds(self) -> float | None:
        """Until the first one is over; None if none ever is."""
        first = min(self._until.values(), default=math.inf)
        return None if first == math.inf else max(0.0, first - time.monotonic())

    def resume(self) -> None:
        """Go on with those that are over."""
        now = time.monotonic()
        for operation in [each for each, until in self._until.items() if until <= now]:
            self._end(operation, None)

    def interrupt(self, ring: Ring) -> None:
        for operation in [each for each in self._until if each.ring is ring]:
            self._end(operation, ReplyErrno(errno.EINTR))

    def _end(self, operation: Operation, error: ReplyErrno | None) -> None:
        del self._until[operation]
        if not operation.replied:  # given up meanwhile
            operation.advance(None, error)


class FaultyDispatcher(Dispatcher):
    def __init__(self, faults: Faults, pauses: Pauses, fs: FileSystem, pool: IoPool) -> None:
        super().__init__(fs, pool)
        self._injector = faults.injector
        self._pauses = pauses
        self._ring: Ring | None = None  # whose request begins
        self._completions: dict[tuple[int, int], list[Hit]] = {}  # by queue and head

    def handle(self, ring: Ring, chain: Chain) -> None:
        self._ring = ring
        super().handle(ring, chain)

    def _run(self, request: Request) -> Any:
        ring = self._ring
        name = _NAME_OF.get(request.opcode, "")
        if ring is None:
            return super()._run(request)
        rules = self._injector.about(name, nodeid=request.nodeid, uid=request.uid, queue=ring.index)
        return self._run_with(ring, request, name, rules) if rules else super()._run(request)

    def _run_with(self, ring: Ring, request: Request, name: str, rules: list[Armed]) -> Generator[Any, Any, Outcome]:
        if any(armed.rule.path is not None for armed in rules):
            rules = yield from _matching_path(request, rules)
        what = f"{name} of nodeid {request.nodeid} by uid {request.uid}, queue {ring.index}"
        for hit in self._injector.hits(rules, what):
            yield from self._suffer(ring, request, hit)
        outcome: Outcome | Waiting = super()._run(request)
        return (yield from outcome) if isinstance(outcome, Generator) else outcome

    def _suffer(self, ring: Ring, request: Request, hit: Hit) -> Generator[Pause, None, None]:
        action = hit.rule.action
        if action.name == "error":
            raise ReplyErrno(action.number)
        if action.name == "delay":
            yield Pause(hit.delay_seconds)
        elif action.name == "hang":
            yield Pause(math.inf)
        elif action.name == "short":
            _shorten(request, action.number)
        else:
            self._completions.setdefault((ring.index, request.chain.head), []).append(hit)

    def wait(self, operation: Operation, wish: Any) -> None:
        if not isinstance(wish, Pause):
            super().wait(operation, wish)
            return
        if operation not in self._waiting:
            self._waiting.add(operation)
            self._waiting_bytes += operation.request.buffer_bytes
        self._pauses.add(operation, wish.seconds)

    def _reply(self, ring: Ring, request: Request, error: int, outcome: Outcome) -> None:
        queue: Any = ring.queue
        queue.twists = self._completions.pop((ring.index, request.chain.head), [])
        super()._reply(ring, request, error, outcome)

    def end_lock_waits(self, ring: Ring) -> None:
        """The ring is to stop: what is hung is interrupted, what was kept back is shown."""
        super().end_lock_waits(ring)
        self._pauses.interrupt(ring)
        queue: Any = ring.queue
        queue.release_withheld()


def _matching_path(request: Request, rules: list[Armed]) -> Generator[Any, Any, list[Armed]]:
    """Of these rules those whose path fits too. None with a path does where the broker cannot tell."""
    try:
        given: Given = yield MatchPath(request.nodeid, _name_in(request))
        fitting = unpack_numbers(given.fields[0])
    except ReplyErrno:
        fitting = set()
    return [armed for armed in rules if armed.rule.path is None or armed.number in fitting]


def _name_in(request: Request) -> bytes:
    """The name that a request is about, empty if it is about the inode itself."""
    start = _NAME_AT.get(request.opcode)
    name, end, _rest = request.body[start:].partition(b"\0") if start is not None else (b"", b"", b"")
    return name if end and len(name) <= _MOST_NAME else b""


def _shorten(request: Request, most: int) -> None:
    """Let a READ or WRITE be of fewer bytes: at most so many, half of them if -1. What does not fit stays as it is, to be refused."""
    layout = abi.fuse_write_in if request.opcode == abi.FUSE_WRITE else abi.fuse_read_in
    if len(request.body) < layout.size:
        return
    fh, offset, size, *rest = layout.unpack_from(request.body)
    shorter = size // 2 if most < 0 else min(size, most)
    request.body = layout.pack(fh, offset, shorter, *rest)
    if request.opcode == abi.FUSE_WRITE and size == sum(len(view) for view in request.data):
        request.data = _first(request.data, shorter)


def _first(views: list[memoryview], length: int) -> list[memoryview]:
    """The first so many bytes of them."""
    found = []
    for view in views:
        if length <= 0:
            break
        found.append(view[:length])
        length -= len(view)
    return found


class FaultyBrokerClient(BrokerClient):
    def __init__(self, faults: Faults, fd: OwnedFd) -> None:
        super().__init__(fd)
        self._faults = faults

    def flush(self) -> None:
        asks = bool(self._gathered or self._forgets)
        if asks:
            self._faults.at("before-ask", "questions to the broker stand ready")
        super().flush()
        if asks:
            self._faults.at("after-ask", "questions to the broker are sent")

    def _take(self, packet: ReplyPacket, fds: deque[TempFd]) -> None:
        """As `receive` does when the kernel had no room for the descriptors."""
        if fds and self._faults.injector.hits(self._faults.injector.about(catalogue.SEND_FDS), f"a packet with {len(fds)} descriptors"):
            for fd in fds:
                fd.close()
            raise RuntimeError("a packet of the broker was cut: out of descriptors")
        super()._take(packet, fds)
