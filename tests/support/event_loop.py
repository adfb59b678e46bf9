"""A worker's event loop on a thread of its own, in the test process: real rings in real memory, real channels, a real broker."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.support.broker import Bench, RecordingLog
from tests.support.frontend.guest_memory import GuestRam
from tests.support.frontend.ring import LINUX, Ring
from tests.support.worker import EndingIoPool
from vfsd.channel import Channel, ChannelClosed
from vfsd.fds import OwnedFd
from vfsd.wire import broker_messages, fuse_abi
from vfsd.wire import channel as wire
from vfsd.worker.broker_client import BrokerClient, BrokerGone
from vfsd.worker.cache_policy import CACHE_POLICIES
from vfsd.worker.event_loop import EventLoop
from vfsd.worker.file_system import FileSystem
from vfsd.worker.inflight_memory import InflightMemory

PATIENCE = 20.0
MIB = 1 << 20


def pair(ours: wire.Table, theirs: wire.Table) -> tuple[Channel, Channel]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(one, ours), Channel(other, theirs)


def copy_of(fd: int) -> OwnedFd:
    return OwnedFd(os.dup(fd))


class Loop:
    """A worker's event loop on a thread of its own, and everything that it talks to."""

    def __init__(self, path: Any) -> None:
        self.bench = Bench(path)
        self.pumping = True
        self.control, control = pair(wire.WORKER_TO_CONTROL, wire.CONTROL_TO_WORKER)
        self.supervisor, supervisor = pair(wire.WORKER_TO_SUPERVISOR, wire.SUPERVISOR_TO_CHILD)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.bench.server.links.add(0, OwnedFd(theirs.detach()))
        self.broker = BrokerClient(OwnedFd(ours.detach()))
        self.log = RecordingLog()
        self.pool = EndingIoPool()
        self.pool.start()
        fs = FileSystem(self.broker, CACHE_POLICIES["auto"], self.log, self.pool, 16)
        self.loop = EventLoop(supervisor, control, self.broker, fs, self.pool, self.log)
        self.fs = fs
        self.theirs = [control, supervisor]
        self.memory = GuestRam((4 * MIB,))
        self.inflight = InflightMemory(4)
        self.rings: dict[int, Ring] = {}
        self.answers: list[Any] = []
        self.seq = 0
        self.gone = False  # control: nobody is asked any more
        self.raised: Exception | None = None
        self.broker.ask(broker_messages.Hello(broker_messages.PROTOCOL_VERSION), self)
        self.broker.flush()
        self.bench.pump()
        self.broker.receive()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def answered(self, error: int, fields: list[int], _donated: object) -> None:
        assert error == 0
        self.fs.begin_session(broker_messages.SessionNotice(*fields))

    def _run(self) -> None:
        try:
            self.loop.run()
        except (ChannelClosed, BrokerGone) as error:
            self.raised = error

    def until(self, condition: Callable[[], Any]) -> None:
        """Be the broker, and hear what the worker says to control, until something holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            for ring in self.rings.values():  # say which completion is to be called for, then look once more
                self.memory.write(ring.avail + 4 + 2 * ring.size, struct.pack("<H", ring.last_used))
                ring.collect()
            if condition():
                return
            watched = [*([] if self.gone else [self.control.fileno()]), *[ring.call_fd for ring in self.rings.values()]]
            if self.pumping:
                watched.append(self.bench._epoll.fileno())
            select.select(watched, [], [], 0.5)
            if self.pumping:
                self.bench.pump()
            received = None if self.gone else self.control.receive()
            if received is not None:
                self.answers.append(received.message)
            for ring in self.rings.values():
                ring.drain_calls()
                ring.collect()

    def ask(self, message: Any, *arguments: Any, fds: Sequence[OwnedFd] = ()) -> Any:
        """One of control's requests; its answer."""
        self.seq += 1
        asked = message(self.seq, *arguments)
        assert self.control.send(asked, fds)
        for fd in fds:
            fd.close()
        self.until(lambda: any(getattr(answer, "seq", None) == asked.seq for answer in self.answers))
        return self.answers.pop(next(index for index, each in enumerate(self.answers) if getattr(each, "seq", None) == asked.seq))

    def share_memory(self) -> None:
        (region,) = self.memory.regions
        answer = self.ask(wire.MemoryAdd, region.gpa, region.size, region.uva, region.mmap_offset, fds=[copy_of(region.fd)])
        assert isinstance(answer, wire.Done)

    def ring(self, index: int, *, event_idx: bool = True) -> Ring:
        """A ring in guest memory, not yet started."""
        self.rings[index] = Ring(self.memory, index, 64, event_idx)
        return self.rings[index]

    def start(self, ring: Ring, last_avail: int = 0, **changed: int) -> Any:
        values = {"size": ring.size, "desc_uva": self.memory.uva(ring.desc)} | changed
        fds = [copy_of(self.inflight.of(ring.index).fileno()), copy_of(ring.kick_fd), copy_of(ring.call_fd), copy_of(ring.err_fd)]
        return self.ask(
            wire.RingStart, ring.index, values["size"], last_avail, values["desc_uva"], self.memory.uva(ring.avail),
            self.memory.uva(ring.used), ring.event_idx, True, True, True, self.inflight.next_start(), fds=fds,
        )  # fmt: skip

    def fds(self) -> int:
        """How many descriptors are open. The question before it makes sure that the loop is done with the one before that."""
        assert isinstance(self.ask(wire.RingStop, 99), wire.Refused)
        return len(os.listdir("/proc/self/fd"))

    def call(self, ring: Ring, request: bytes, room: int = 4096) -> int:
        submission = ring.submit(request, room, LINUX)
        ring.kick()
        self.until(lambda: submission.done)
        return -fuse_abi.fuse_out_header.unpack_from(submission.reply)[1]

    def close(self) -> None:
        if self.thread.is_alive():
            self.supervisor.send(wire.Stop())
            self.thread.join(PATIENCE)
            assert not self.thread.is_alive()
        for ring in list(self.loop._rings._rings.values()):
            ring.close()
        self.loop._rings._memory.clear()
        self.loop._epoll.close()
        self.fs.files.clear()
        self.fs.nodes.clear()
        self.pool.end()
        self.broker._socket.close()
        self.bench.close()
        for channel in (self.control, self.supervisor, *self.theirs):
            channel.close()
        for ring in self.rings.values():
            ring.close()
        self.memory.close()
        self.inflight.close()
