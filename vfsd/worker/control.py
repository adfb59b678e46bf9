"""The control process: speaks vhost-user with the frontend, tells the workers which rings to serve from which memory.

Who controls the bytes: the frontend's messages and the workers' answers are hostile; the supervisor is trusted. It holds
descriptors of guest memory but maps none, has no capability and no system call that takes a path. One thread, one poll.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, NoReturn

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
    ChannelMessage,
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
from vfsd.worker.inflight_memory import InflightMemory
from vfsd.worker.memory_table import MemoryTable
from vfsd.worker.vrings import Vring
from vfsd.worker.worker_links import StopAsked, WorkerFailed, WorkerLink, WorkerLinks, WorkerLost, WorkerRefused


def worker_of(queue_index: int) -> int:
    """Worker 0 serves hiprio (queue 0) and the first request queue; every further queue has its own worker."""
    return max(0, queue_index - 1)


class _Served(NamedTuple):
    """A ring that a worker has, and must be given again if that worker dies."""

    ring: Vring
    event_idx: bool


class Workers:
    """The device's WorkerPort over the sockets to the workers.

    A worker that dies while it is asked is waited for: its successor gets the memory regions and rings that stand in the tables
    here. What was asked is then either part of that, or asked again.
    """

    def __init__(self, links: WorkerLinks, inflight: InflightMemory, memory: MemoryTable) -> None:
        self._links = links
        self._inflight = inflight
        self._memory = memory
        self._informed: set[int] = {0}  # workers that know the memory; worker 0 always: its refusal is the answer to the frontend
        self._served: dict[int, _Served] = {}  # by queue

    def need_for(self, queue_index: int) -> None:
        self._links.need(worker_of(queue_index))

    def add_memory(self, region: MemoryRegion, fd: OwnedFd) -> None:
        added: list[int] = []
        try:
            for index in sorted(self._informed):
                self._ask(index, lambda seq: MemoryAdd(seq, *region), [fd])  # a successor gets it with the table
                added.append(index)
        except WorkerRefused:
            for index in added:  # all of them have it, or none
                self._remove(index, region)
            raise

    def remove_memory(self, region: MemoryRegion) -> None:
        for index in sorted(self._informed):
            self._remove(index, region)

    def _remove(self, index: int, region: MemoryRegion) -> None:
        while self._ask(index, lambda seq: MemoryRemove(seq, region.gpa, region.size, region.uva)) is None:
            if not any(slot.region == region for slot in self._memory):
                return  # so the successor was not given it

    def clear_memory(self) -> None:
        for index in sorted(self._informed):
            self._ask(index, MemoryClear)

    def start_ring(self, ring: Vring, *, event_idx: bool) -> None:
        index = worker_of(ring.index)
        ring.start_number = self._inflight.next_start()
        started = _Served(ring, event_idx)
        try:
            link = self._links.get(index)
            if index in self._links.arrived:
                self.restore(index)
                link = self._links.get(index)
            if index not in self._informed:
                self._inform(link)
                self._informed.add(index)
            self._start(link, started)
        except WorkerLost:
            self._informed.add(index)
            self._served[ring.index] = started
            self.restore(index)
        else:
            self._served[ring.index] = started

    def stop_ring(self, queue_index: int) -> int:
        try:
            while True:
                last_avail = self._ask(worker_of(queue_index), lambda seq: RingStop(seq, queue_index))
                if last_avail is not None:
                    return last_avail
        finally:
            self._served.pop(queue_index, None)

    def replace_kick(self, queue_index: int, fd: OwnedFd | None) -> None:
        self._replace(RingKick, queue_index, fd)

    def replace_call(self, queue_index: int, fd: OwnedFd | None) -> None:
        self._replace(RingCall, queue_index, fd)

    def replace_err(self, queue_index: int, fd: OwnedFd | None) -> None:
        self._replace(RingErr, queue_index, fd)

    def _replace(self, kind: type[RingKick | RingCall | RingErr], queue_index: int, fd: OwnedFd | None) -> None:
        """The ring has it already, and with that a successor."""
        present = [fd] if fd is not None else []
        self._ask(worker_of(queue_index), lambda seq: kind(seq, queue_index, bool(present)), present)

    def _ask(self, index: int, make: Callable[[int], ChannelMessage], fds: Sequence[OwnedFd] = ()) -> int | None:
        """The answer's number; None if the worker died, before or meanwhile: then its successor has what stands in the tables now."""
        link = self._links.get(index)
        if index not in self._links.arrived:
            try:
                return self._links.ask(link, make, fds)
            except WorkerLost:
                pass
        self.restore(index)
        return None

    def restore(self, index: int) -> None:
        """Give a successor, when it has come, all that the worker before it had."""
        while True:
            link = self._links.get(index)
            self._links.arrived.discard(index)
            try:
                if index in self._informed:
                    self._inform(link)
                for served in [served for queue, served in self._served.items() if worker_of(queue) == index]:
                    self._start_again(link, served)
            except WorkerLost:
                continue
            except WorkerRefused as error:
                raise WorkerFailed(f"worker {index} cannot take the place of the one before it: {error}") from error
            return

    def _inform(self, link: WorkerLink) -> None:
        """All of memory to a worker that is about to serve; cleared first, should this be a second try."""
        self._links.ask(link, MemoryClear)
        for region, fd in self._memory:
            self._links.ask(link, partial(_memory_add, region), [fd])

    def _start(self, link: WorkerLink, served: _Served) -> None:
        ring = served.ring
        fds = [fd for fd in (self._inflight.of(ring.index), ring.kick, ring.call, ring.err) if fd is not None]
        self._links.ask(link, partial(_ring_start, ring, served.event_idx), fds)

    def _start_again(self, link: WorkerLink, served: _Served) -> None:
        try:
            self._start(link, served)
        except WorkerRefused as error:  # the guest has changed its own ring under the worker's hands
            del self._served[served.ring.index]
            self._links.on_broken(served.ring.index, str(error))


def _memory_add(region: MemoryRegion, seq: int) -> MemoryAdd:
    return MemoryAdd(seq, *region)


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
        start_number=ring.start_number,
    )


class Control:
    """The main loop: until the supervisor says Stop, or is gone."""

    def __init__(self, config: ControlConfig, supervisor: Channel, log: Logger, inflight: InflightMemory) -> None:
        """The memory is taken over."""
        self._config = config
        self._inflight = inflight
        self._supervisor = supervisor
        self._log = log
        self._links = WorkerLinks(supervisor)
        self._stream: FrontendStream | None = None
        self._device: Device | None = None
        self._workers: Workers | None = None

    def run(self) -> None:
        try:
            while True:
                self._turn()
        except StopAsked:
            return
        finally:
            self._disconnect()
            self._links.close()
            self._inflight.close()

    def _turn(self) -> None:
        ready = self._wait()
        if self._supervisor.fileno() in ready:
            self._links.hear_supervisor()
            self._connect()
        try:
            self._restore_arrived()
            for link in self._links:
                if link.channel.fileno() in ready:
                    self._hear_worker(link)
            if self._stream is not None and self._stream.fileno() in ready:
                self._hear_frontend(self._stream)
        except WorkerFailed as error:
            self._give_up(str(error), clean=False)
        except FrontendBreach as error:
            self._give_up(str(error), clean=False)
        except FrontendClosed as error:
            self._give_up(str(error), clean=True)

    def _restore_arrived(self) -> None:
        """A worker that comes takes up what another one had, if any had."""
        while self._links.arrived:
            index = self._links.arrived.pop()
            if self._workers is not None:
                self._workers.restore(index)

    def _hear_worker(self, link: WorkerLink) -> None:
        try:
            self._links.hear(link)
        except WorkerLost as error:
            self._log.debug(f"{error}; the supervisor replaces it, or ends us all")

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
        memory = MemoryTable()
        self._workers = Workers(self._links, self._inflight, memory)
        self._device = Device(self._workers, self._log, memory, request_queues=self._config.request_queues, tag=self._config.tag)
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

    def _disconnect(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._device is not None:
            self._device.close()
            self._device = self._workers = None


def main() -> NoReturn:
    config = read_config(ControlConfig, int(sys.argv[1]))
    run_role(config, "control", lambda channel, log: serve(config, channel, log))


def serve(config: ControlConfig, supervisor: Channel, log: ChildLog) -> None:
    enter_empty_root(config.sandbox)
    inflight = InflightMemory(config.request_queues + 1)
    settle_allocator()
    done = lock_down(config.confinement)
    supervisor.send(Ready(done.securebits, done.landlock, done.dumpable))
    Control(config, supervisor, log, inflight).run()


if __name__ == "__main__":
    main()
