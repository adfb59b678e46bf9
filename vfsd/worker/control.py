"""The control process: speaks vhost-user with the frontend, tells the workers which rings to serve from which memory.

Who controls the bytes: the frontend's messages and the workers' answers are hostile; the supervisor is trusted. It holds
descriptors of guest memory but maps none, has no capability and no system call that takes a path. One thread, one poll.
"""

from __future__ import annotations

import select
import sys
from functools import partial
from typing import NoReturn

from vfsd.channel import Channel
from vfsd.config import ControlConfig, read_config
from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.log import ChildLog, Logger
from vfsd.role import run_role
from vfsd.sandbox.lockdown import lock_down
from vfsd.sandbox.memory import settle_allocator
from vfsd.sandbox.namespaces import enter_empty_root
from vfsd.wire.channel import (
    FrontendGone,
    MemoryAdd,
    MemoryClear,
    MemoryRemove,
    Ready,
    RingCall,
    RingErr,
    RingKick,
    RingStart,
    RingStop,
    bounded,
)
from vfsd.wire.vhost_user import MemoryRegion
from vfsd.worker.device import Device
from vfsd.worker.frontend_stream import FrontendClosed, FrontendStream
from vfsd.worker.memory_table import MemoryTable
from vfsd.worker.vrings import Vring
from vfsd.worker.worker_links import StopAsked, WorkerFailed, WorkerLink, WorkerLinks, WorkerLost, WorkerRefused

LOST_WORKER_SECONDS = 1.0  # how long the supervisor may take to see that a worker died, before we end the device ourselves


def worker_of(queue_index: int) -> int:
    """Worker 0 serves hiprio (queue 0) and the first request queue; every further queue has its own worker."""
    return max(0, queue_index - 1)


class Workers:
    """The device's WorkerPort over the sockets to the workers."""

    def __init__(self, links: WorkerLinks) -> None:
        self._links = links

    def need_for(self, queue_index: int) -> None:
        self._links.need(worker_of(queue_index))

    def add_memory(self, region: MemoryRegion, fd: OwnedFd) -> None:
        informed: list[WorkerLink] = []
        try:
            for link in self._informed():
                self._add(link, region, fd)
                informed.append(link)
        except WorkerRefused:
            for link in informed:  # all of them have it, or none
                self._remove(link, region)
            raise

    def remove_memory(self, region: MemoryRegion) -> None:
        for link in self._informed():
            self._remove(link, region)

    def clear_memory(self) -> None:
        for link in self._informed():
            self._links.ask(link, MemoryClear)

    def start_ring(self, ring: Vring, memory: MemoryTable, *, event_idx: bool) -> None:
        link = self._link(ring.index)
        if not link.knows_memory:
            self._inform(link, memory)
        fds = [fd for fd in (ring.kick, ring.call, ring.err) if fd is not None]
        self._links.ask(link, partial(_ring_start, ring, event_idx), fds)

    def stop_ring(self, queue_index: int) -> int:
        return self._links.ask(self._link(queue_index), lambda seq: RingStop(seq, queue_index))

    def replace_kick(self, queue_index: int, fd: OwnedFd | None) -> None:
        self._replace(RingKick, queue_index, fd)

    def replace_call(self, queue_index: int, fd: OwnedFd | None) -> None:
        self._replace(RingCall, queue_index, fd)

    def replace_err(self, queue_index: int, fd: OwnedFd | None) -> None:
        self._replace(RingErr, queue_index, fd)

    def _replace(self, kind: type[RingKick | RingCall | RingErr], queue_index: int, fd: OwnedFd | None) -> None:
        present = [fd] if fd is not None else []
        self._links.ask(self._link(queue_index), lambda seq: kind(seq, queue_index, bool(present)), present)

    def _add(self, link: WorkerLink, region: MemoryRegion, fd: OwnedFd) -> None:
        self._links.ask(link, lambda seq: MemoryAdd(seq, *region), [fd])

    def _remove(self, link: WorkerLink, region: MemoryRegion) -> None:
        self._links.ask(link, lambda seq: MemoryRemove(seq, region.gpa, region.size, region.uva))

    def _inform(self, link: WorkerLink, memory: MemoryTable) -> None:
        """All of memory to a worker that is about to serve its first ring; cleared first, should this be a second try."""
        self._links.ask(link, MemoryClear)
        for region, fd in memory:
            self._add(link, region, fd)
        link.knows_memory = True

    def _link(self, queue_index: int) -> WorkerLink:
        return self._links.get(worker_of(queue_index))

    def _informed(self) -> list[WorkerLink]:
        """Worker 0 always: its refusal of a region is the answer to the frontend. Others once they serve a ring."""
        first = self._links.get(0)
        first.knows_memory = True
        return [link for link in self._links if link.knows_memory]


def _ring_start(ring: Vring, event_idx: bool, seq: int) -> RingStart:
    addresses = ring.addresses
    if addresses is None:
        raise ValueError("a ring without addresses is not complete")
    return RingStart(
        seq=seq,
        queue_index=ring.index,
        size=ring.size,
        last_avail=ring.base,
        desc_uva=addresses.desc,
        avail_uva=addresses.avail,
        used_uva=addresses.used,
        event_idx=event_idx,
        has_kick=ring.kick is not None,
        has_call=ring.call is not None,
        has_err=ring.err is not None,
    )


class Control:
    """The main loop: until the supervisor says Stop, or is gone."""

    def __init__(self, config: ControlConfig, supervisor: Channel, log: Logger) -> None:
        self._config = config
        self._supervisor = supervisor
        self._log = log
        self._links = WorkerLinks(supervisor)
        self._stream: FrontendStream | None = None
        self._device: Device | None = None

    def run(self) -> None:
        try:
            while True:
                self._turn()
        except StopAsked:
            return
        finally:
            self._disconnect()
            self._links.close()

    def _turn(self) -> None:
        ready = self._wait()
        if self._supervisor.fileno() in ready:
            self._links.hear_supervisor()
            self._connect()
        try:
            for link in self._links:
                if link.channel.fileno() in ready:
                    self._links.hear(link)
            if self._stream is not None and self._stream.fileno() in ready:
                self._hear_frontend(self._stream)
        except WorkerLost as error:
            self._await_stop(str(error))
        except WorkerFailed as error:
            self._give_up(str(error), clean=False)
        except FrontendBreach as error:
            self._give_up(str(error), clean=False)
        except FrontendClosed as error:
            self._give_up(str(error), clean=True)

    def _wait(self) -> set[int]:
        poller = select.poll()
        poller.register(self._supervisor.fileno(), select.POLLIN)
        for link in self._links:
            poller.register(link.channel.fileno(), select.POLLIN)
        if self._stream is not None:
            poller.register(self._stream.fileno(), select.POLLIN)
        return {fd for fd, _ in poller.poll()}

    def _connect(self) -> None:
        if self._links.connection is None:
            return
        connection, self._links.connection = self._links.connection, None
        self._disconnect()
        self._stream = FrontendStream(connection)
        self._device = Device(Workers(self._links), self._log, request_queues=self._config.request_queues, tag=self._config.tag)
        self._links.on_broken = self._device.ring_broken

    def _hear_frontend(self, stream: FrontendStream) -> None:
        """One message: the supervisor is heard between any two, however fast a frontend sends."""
        received = stream.receive()
        if received is None or self._device is None:
            return
        message, fds = received
        self._log.debug(
            f"{message.name}: {len(message.payload)} bytes, {len(fds)} descriptors{', NEED_REPLY' if message.need_reply else ''}"
        )
        reply = self._device.handle(message, fds)
        if reply is not None:
            stream.send(reply)

    def _give_up(self, text: str, *, clean: bool) -> None:
        """The connection is over; the supervisor decides what follows, usually Stop."""
        self._disconnect()
        self._supervisor.send(FrontendGone(bounded(text), clean))

    def _await_stop(self, text: str) -> None:
        """A worker died: the supervisor knows how and says so better than we could, if it is given the time."""
        poller = select.poll()
        poller.register(self._supervisor.fileno(), select.POLLIN)
        while poller.poll(LOST_WORKER_SECONDS * 1000):
            self._links.hear_supervisor()
        self._give_up(text, clean=False)
        raise StopAsked

    def _disconnect(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._device is not None:
            self._device.close()
            self._device = None


def main() -> NoReturn:
    config = read_config(ControlConfig, int(sys.argv[1]))

    def body(supervisor: Channel, log: ChildLog) -> None:
        enter_empty_root(config.sandbox)
        settle_allocator()
        done = lock_down(config.confinement)
        supervisor.send(Ready(done.securebits, done.landlock, done.dumpable))
        Control(config, supervisor, log).run()

    run_role(config, "control", body)


if __name__ == "__main__":
    main()
