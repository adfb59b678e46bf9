"""A worker inside the test process: real dispatcher, file system and broker client, a real broker at the other end.

Only the virtqueue is not one: chains are views of byte arrays, and what is pushed is kept.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

from tests.support.broker import Bench, RecordingLog
from vfsd.config import Features
from vfsd.fds import OwnedFd, TempFd
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.wire.inflight import InflightTable
from vfsd.worker.broker_client import BrokerClient
from vfsd.worker.cache_policy import CACHE_POLICIES
from vfsd.worker.dispatch import Dispatcher
from vfsd.worker.file_system import FileSystem
from vfsd.worker.io_pool import IoPool, Job
from vfsd.worker.request import OUT_HEADER_BYTES
from vfsd.worker.ring import Ring
from vfsd.worker.virtqueue import Chain

PATIENCE_MS = 20_000
_numbers = count(1)


def pack_request(
    opcode: int, body: bytes = b"", *, nodeid: int = 1, unique: int = 7, uid: int = 0, gid: int = 0, length: int = -1
) -> bytes:
    """A FUSE request; `length` is what its header claims (-1: the truth)."""
    claimed = abi.fuse_in_header.size + len(body) if length < 0 else length
    return abi.fuse_in_header.pack(claimed, opcode, unique, nodeid, uid, gid, 1, 0) + body


def cut(data: bytes | bytearray, sizes: list[int]) -> list[memoryview]:
    """Views of `data` of these sizes, the last of what is left."""
    whole = memoryview(data)
    views, start = [], 0
    for size in sizes:
        views.append(whole[start : start + size])
        start += size
    return [view for view in [*views, whole[start:]] if len(view)]


def randomly_cut(data: bytes | bytearray, rng: random.Random) -> list[memoryview]:
    return cut(data, [rng.randrange(1, max(2, len(data) // 2)) for _ in range(rng.randrange(6))])


def make_chain(readable: list[memoryview], writable: list[memoryview], head: int = 0) -> Chain:
    chain = Chain(head, next(_numbers))
    chain.readable, chain.writable = readable, writable
    chain.readable_bytes = sum(map(len, readable))
    chain.writable_bytes = sum(map(len, writable))
    return chain


class Queue:
    """In place of a Virtqueue: keeps what is pushed."""

    def __init__(self) -> None:
        self.index = 1
        self.size = 16
        self.last_avail = 0
        self.pushed: list[tuple[int, int]] = []
        self.chains: dict[int, Chain] = {}

    @property
    def in_flight(self) -> int:
        return len(self.chains)

    def push(self, head: int, written: int) -> None:
        """As Virtqueue.push: once for each head, and its views are released."""
        assert self.chains.pop(head).release()
        self.pushed.append((head, written))


class _Task(NamedTuple):
    job: Job
    waiter: None


def _leave() -> None:
    raise SystemExit


class EndingIoPool(IoPool):
    """The daemon's threads never end; a test's do."""

    def __init__(self) -> None:
        super().__init__()
        self._threads: set[threading.Thread] = set()

    def start(self) -> None:
        before = set(threading.enumerate())
        super().start()
        self._threads = set(threading.enumerate()) - before

    def _work(self, ready: threading.Barrier) -> None:
        with suppress(SystemExit):
            super()._work(ready)

    def wait(self) -> None:
        """Collect when there is something to collect."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        assert poll.poll(PATIENCE_MS), "no job was done"
        self.collect()

    def end(self) -> None:
        for _ in self._threads:
            self._jobs.put(_Task(Job(0, _leave), None))  # type: ignore[arg-type]
        for thread in self._threads:
            thread.join()
        os.close(self.fileno())


class Reply(NamedTuple):
    errno: int
    body: bytes


_FEATURES = Features()


class Worker:
    """`call` runs one request to its end."""

    def __init__(self, bench: Bench, *, index: int = 0, cache: str = "auto", most_files: int = 64, features: Features = _FEATURES) -> None:
        self.bench = bench
        self.log = RecordingLog()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        bench.server.links.add(index, OwnedFd(theirs.detach()))
        self.broker = BrokerClient(OwnedFd(ours.detach()))
        self.pool = EndingIoPool()
        self.pool.start()
        self.fs = FileSystem(self.broker, CACHE_POLICIES[cache], self.log, self.pool, most_files, features)
        self.dispatcher = Dispatcher(self.fs, self.pool)
        self.queue = Queue()
        self.ring = Ring(self.queue, None, None, None)
        self._next_head = 0
        self.inflight: InflightTable | None = None
        self.deaths = 0
        self._buffers: dict[int, bytearray] = {}
        self.broker.ask(wire.Hello(wire.PROTOCOL_VERSION), _Greeting(self.fs))
        self.turn()

    def begin(self) -> None:
        """INIT."""
        assert self.call(abi.FUSE_INIT, abi.fuse_init_in.pack(7, 38, 1 << 20, 0xFFFFFFFF, 0)).errno == 0

    def turn(self) -> None:
        """One turn of the event loop; the broker has answered when it ends."""
        for _ in range(2):  # an answer may lead to the next question
            self.broker.flush()
            self.bench.pump()
            while select.select([self.broker.fileno()], [], [], 0)[0]:
                self.broker.receive()

    def submit(self, request: bytes, room: int = 4096, rng: random.Random | None = None) -> int:
        """Hand a request to the dispatcher; its head."""
        self._next_head += 1
        head = self._next_head
        buffer = self._buffers[head] = bytearray(b"\xee" * room)
        cutter = randomly_cut if rng is not None else lambda data, _rng: cut(data, [])
        self.queue.chains[head] = make_chain(cutter(bytearray(request), rng), cutter(buffer, rng), head)
        if self.inflight is not None:
            self._note(self.queue.chains[head], self.inflight)
        self.dispatcher.handle(self.ring, self.queue.chains[head])
        return head

    def _note(self, chain: Chain, inflight: InflightTable) -> None:
        """As a queue does with what it pops, or with what was popped before a death."""
        chain.inflight, chain.deaths = inflight, self.deaths
        if not chain.deaths:
            inflight.take(chain.head, chain.number)
        chain.number = inflight.number(chain.head)

    def submit_again(self, head: int, request: bytes, deaths: int = 1) -> int:
        """Hand over a request that another worker had at that head when it died."""
        self.deaths, self._next_head = deaths, head - 1
        try:
            return self.submit(request)
        finally:
            self.deaths = 0

    def finish(self, head: int) -> Reply | None:
        """Let broker and pool work until the request is answered; None if it was owed no reply."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while head in self.queue.chains:
            assert time.monotonic() < deadline, "it was not answered"
            self.turn()
            if head in self.queue.chains and any(waiting.on_pool for waiting in self.dispatcher._waiting):
                self.pool.wait()
        ((_, written),) = [pushed for pushed in self.queue.pushed if pushed[0] == head]
        self.turn()
        return self._decode(bytes(self._buffers.pop(head)), written)

    def finish_one_of(self, heads: Collection[int]) -> int:
        """Let the broker work until one of these requests has succeeded; its head."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not (done := [head for head in heads if head not in self.queue.chains]):
            assert time.monotonic() < deadline, "none was answered"
            self.turn()
        assert self.finish(done[0]) == (0, b"")
        return done[0]

    def _decode(self, buffer: bytes, written: int) -> Reply | None:
        if written == 0:
            assert set(buffer) <= {0xEE}, "bytes were written that were not counted"
            return None
        length, error, unique = abi.fuse_out_header.unpack_from(buffer)
        assert (length, unique) == (written, 7)
        assert set(buffer[written:]) <= {0xEE} or error == 0, "more was written than was counted"
        return Reply(-error, buffer[OUT_HEADER_BYTES:written])

    def call(self, opcode: int, body: bytes = b"", *, room: int = 4096, **header: Any) -> Any:
        return self.finish(self.submit(pack_request(opcode, body, **header), room))

    def ok(self, opcode: int, body: bytes = b"", **how: Any) -> bytes:
        reply = self.call(opcode, body, **how)
        assert reply.errno == 0, errno.errorcode[reply.errno]
        answer: bytes = reply.body
        return answer

    def lookup(self, name: bytes, parent: int = 1) -> int:
        nodeid: int = abi.fuse_entry_out.unpack(self.ok(abi.FUSE_LOOKUP, name + b"\0", nodeid=parent))[0]
        return nodeid

    def open(self, nodeid: int, flags: int = os.O_RDWR) -> int:
        fh: int = abi.fuse_open_out.unpack(self.ok(abi.FUSE_OPEN, abi.fuse_open_in.pack(flags, 0), nodeid=nodeid))[0]
        return fh

    def opendir(self, nodeid: int) -> int:
        fh: int = abi.fuse_open_out.unpack(self.ok(abi.FUSE_OPENDIR, abi.fuse_open_in.pack(0, 0), nodeid=nodeid))[0]
        return fh

    def read(self, nodeid: int, fh: int, offset: int, size: int) -> Any:
        return self.call(abi.FUSE_READ, abi.fuse_read_in.pack(fh, offset, size, 0, 0, 0), nodeid=nodeid, room=size + OUT_HEADER_BYTES)

    def write(self, nodeid: int, fh: int, offset: int, data: bytes, *, write_flags: int = 0, flags: int = 0) -> Any:
        body = abi.fuse_write_in.pack(fh, offset, len(data), write_flags, 0, flags) + data
        return self.call(abi.FUSE_WRITE, body, nodeid=nodeid)

    def close(self) -> None:
        self.fs.files.clear()
        self.fs.nodes.clear()
        self.pool.end()
        self.broker._socket.close()
        assert self.queue.chains == {}
        assert self.dispatcher._waiting == set()
        assert self.log.bugs == []


class _Greeting:
    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs

    def answered(self, error: int, fields: list[int], _donated: TempFd | None) -> None:
        assert error == 0
        self._fs.begin_session(wire.SessionNotice(*fields))
