"""What control has given to each worker, and gives to its successor: memory regions, rings, eventfds, in-flight tables.

Who controls the bytes: what the frontend described is passed on as numbers and descriptors; workers' answers are hostile, and change
nothing but where a ring stopped. A worker that does not answer in time, or cannot let go of what is the frontend's, is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from vfsd.fds import OwnedFd
from vfsd.wire.channel import (
    ChannelMessage,
    MemoryAdd,
    MemoryClear,
    MemoryRemove,
    RingCall,
    RingErr,
    RingKick,
    RingStart,
    RingStop,
)
from vfsd.wire.vhost_user import MemoryRegion
from vfsd.worker.inflight_memory import InflightMemory, Start
from vfsd.worker.memory_table import MemoryTable
from vfsd.worker.vrings import Vring
from vfsd.worker.worker_links import WorkerFailed, WorkerLink, WorkerLinks, WorkerLost, WorkerRefused, WorkerSilent

STOP_SECONDS = 6.5  # a worker drains for 5 s (ring.DRAIN_SECONDS), then says so


def worker_of(queue_index: int) -> int:
    """Worker 0 serves hiprio (queue 0) and the first request queue; every further queue has its own worker."""
    return max(0, queue_index - 1)


class _Served(NamedTuple):
    """A ring that a worker has, and must be given again if that worker dies."""

    ring: Vring
    event_idx: bool
    start: Start
    give_up: bool = False  # what a dead worker had not completed of it hangs


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
        started = _Served(ring, event_idx, self._inflight.start(ring.index))
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
        """A worker that cannot let go of what is in flight is killed; its successor answers that EIO."""
        try:
            while True:
                try:
                    last_avail = self._ask(worker_of(queue_index), lambda seq: RingStop(seq, queue_index), seconds=STOP_SECONDS)
                except (WorkerRefused, WorkerSilent) as error:
                    self._kill_for(queue_index, error)
                else:
                    if last_avail is not None:
                        return last_avail
        finally:
            self._served.pop(queue_index, None)

    def _kill_for(self, queue_index: int, error: WorkerRefused | WorkerSilent) -> None:
        served = self._served.get(queue_index)
        if served is None or served.give_up:  # a ring that its worker would not take, or a successor that is no better
            raise error
        self._served[queue_index] = served._replace(give_up=True)
        self._links.replace(worker_of(queue_index), str(error))
        self.restore(worker_of(queue_index))

    def let_go(self) -> None:
        """The frontend is gone: no worker keeps a ring or memory of its. One that does not let go is replaced."""
        for index in sorted(self._informed):
            try:
                for queue in [queue for queue in self._served if worker_of(queue) == index]:
                    self.stop_ring(queue)
                self._ask(index, MemoryClear)
            except (WorkerRefused, WorkerFailed) as error:
                self._links.replace(index, str(error))
        self._inflight.forget_frontend()

    def inflight_memory(self) -> OwnedFd:
        """For all queues, of which the frontend may use fewer; whoever asks again on the same connection gets the same."""
        if self._inflight.given is None:
            self._inflight.given = self._links.inflight_memory()
        return self._inflight.given

    def adopt_inflight(self, fd: OwnedFd, offset: int, size_bytes: int, queues: int) -> None:
        self._inflight.adopt(fd, offset, size_bytes, queues)

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

    def _ask(
        self, index: int, make: Callable[[int], ChannelMessage], fds: Sequence[OwnedFd] = (), *, seconds: float | None = None
    ) -> int | None:
        """The answer's number; None if the worker died, before or meanwhile: then its successor has what stands in the tables now."""
        link = self._links.get(index)
        if index not in self._links.arrived:
            try:
                return self._links.ask(link, make, fds, seconds)
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
        fds = [fd for fd in (served.start.fd, ring.kick, ring.call, ring.err) if fd is not None]
        self._links.ask(link, partial(_ring_start, served), fds)

    def _start_again(self, link: WorkerLink, served: _Served) -> None:
        try:
            self._start(link, served)
        except WorkerRefused as error:  # the guest has changed its own ring under the worker's hands
            del self._served[served.ring.index]
            self._links.on_broken(served.ring.index, str(error))


def _memory_add(region: MemoryRegion, seq: int) -> MemoryAdd:
    return MemoryAdd(seq, *region)


def _ring_start(served: _Served, seq: int) -> RingStart:
    ring, start = served.ring, served.start
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
        event_idx=served.event_idx,
        has_kick=ring.kick is not None,
        has_call=ring.call is not None,
        has_err=ring.err is not None,
        start_number=start.number,
        table_offset=start.offset,
        adopted=start.adopted,
        give_up=served.give_up,
    )
