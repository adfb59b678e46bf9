"""What control tells a worker: guest memory, rings to start and stop, eventfds. Each request is answered Done or Refused.

**Trust.** Control has parsed the frontend's messages and passes on numbers and descriptors that the frontend chose: addresses
and sizes are checked by GuestMemory and Virtqueue (FrontendBreach becomes Refused).
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

from vfsd.channel import Channel, Received, close_all
from vfsd.errors import FrontendBreach, GuestBreach
from vfsd.fds import OwnedFd
from vfsd.log import ChildLog
from vfsd.wire import channel as wire
from vfsd.worker.dispatch import Dispatcher
from vfsd.worker.guest_memory import GuestMemory
from vfsd.worker.inflight_memory import MappedTable
from vfsd.worker.ring import DRAIN_SECONDS, Ring, Stopping
from vfsd.worker.virtqueue import Virtqueue


class RingTable:
    """The rings this worker serves, and the memory they lie in. The ring thread's alone."""

    def __init__(self, control: Channel, dispatcher: Dispatcher, log: ChildLog, epoll: select.epoll) -> None:
        self._control = control
        self._dispatcher = dispatcher
        self._log = log
        self._epoll = epoll
        self._memory = GuestMemory()
        self._rings: dict[int, Ring] = {}
        self._order: list[Ring] = []
        self._by_kick: dict[int, Ring] = {}
        self.leaving = False
        self._handlers: dict[type[wire.ChannelMessage], Callable[[Any, list[OwnedFd]], None]] = {
            wire.MemoryClear: self._clear_memory,
            wire.MemoryAdd: self._add_memory,
            wire.MemoryRemove: self._remove_memory,
            wire.RingStart: self._start,
            wire.RingStop: self._stop,
            wire.RingKick: self._replace_kick,
            wire.RingCall: self._replace_call,
            wire.RingErr: self._replace_err,
        }

    def in_order(self) -> list[Ring]:
        """All rings, hiprio first."""
        return self._order

    @property
    def busy(self) -> bool:
        """Whether a ring may have more to pop right now."""
        return any((ring.more and ring.serving) or ring.recovering for ring in self._order)

    @property
    def draining(self) -> bool:
        return any(ring.stopping is not None for ring in self._order)

    def kicked(self, fd: int) -> None:
        ring = self._by_kick.get(fd)
        if ring is not None:
            ring.more = True

    def broke(self, ring: Ring, text: str) -> None:
        """The guest broke a ring: it is served no more; the others go on."""
        self._log.error(f"{text}; the queue is stopped")
        self._unwatch(ring)
        ring.report_broken()
        self._control.send(wire.RingBroken(ring.index, wire.bounded(text)))

    # --- control's requests ------------------------------------------------------------------------------------------

    def hear_control(self) -> None:
        received = self._control.receive()
        if received is None:
            return
        try:
            self._obey(received)
        except (FrontendBreach, GuestBreach, OSError, BufferError) as error:
            message: Any = received.message
            self._control.send(wire.Refused(message.seq, wire.bounded(str(error))))
        finally:
            close_all(received.fds)  # those that were taken over are no longer in the list

    def _obey(self, received: Received) -> None:
        message: Any = received.message
        self._handlers[type(message)](message, received.fds)
        if not isinstance(message, wire.RingStop):
            self._done(message.seq)

    def _done(self, seq: int, value: int = 0) -> None:
        self._control.send(wire.Done(seq, value))

    def _clear_memory(self, _message: wire.MemoryClear, _fds: list[OwnedFd]) -> None:
        self._memory.clear()

    def _add_memory(self, message: wire.MemoryAdd, fds: list[OwnedFd]) -> None:
        self._memory.add(fds[0].fileno(), message.gpa, message.size, message.uva, message.mmap_offset)

    def _remove_memory(self, message: wire.MemoryRemove, _fds: list[OwnedFd]) -> None:
        self._memory.remove(message.gpa, message.size, message.uva)

    def _start(self, message: wire.RingStart, fds: list[OwnedFd]) -> None:
        """Serve a ring from its first unseen request on, or go on where a dead worker was: a kick that came before is not needed."""
        if message.queue_index in self._rings:
            raise FrontendBreach(f"queue {message.queue_index} is already running")
        with fds.pop(0) as inflight:
            table = MappedTable(inflight.fileno(), message.table_offset)
        queue = Virtqueue(
            self._memory, message.queue_index, message.size, message.last_avail,
            message.desc_uva, message.avail_uva, message.used_uva, message.event_idx, table, message.start_number,
            adopted=message.adopted,
        )  # fmt: skip
        kick, call, err = (fds.pop(0) if present else None for present in (message.has_kick, message.has_call, message.has_err))
        ring = Ring(queue, kick, call, err, give_up=message.give_up)
        try:
            self._watch(ring)
        except OSError:
            ring.close()
            raise
        self._rings[ring.index] = ring
        self._order = [self._rings[index] for index in sorted(self._rings)]
        if queue.resumed:
            ring.call_anyway()

    def _ring(self, index: int) -> Ring:
        ring = self._rings.get(index)
        if ring is None:
            raise FrontendBreach(f"queue {index} is not running")
        return ring

    def _watch(self, ring: Ring) -> None:
        if ring.kick is not None:
            self._epoll.register(ring.kick.fileno(), select.EPOLLIN | select.EPOLLET)
            self._by_kick[ring.kick.fileno()] = ring

    def _unwatch(self, ring: Ring) -> None:
        if ring.kick is not None and self._by_kick.pop(ring.kick.fileno(), None) is not None:
            self._epoll.unregister(ring.kick.fileno())

    def _replace_kick(self, message: wire.RingKick, fds: list[OwnedFd]) -> None:
        ring = self._ring(message.queue_index)
        self._unwatch(ring)
        if ring.kick is not None:
            ring.kick.close()
        ring.kick = fds.pop() if fds else None
        self._watch(ring)
        ring.more = True  # a kick of the old fd may have come just now

    def _replace_call(self, message: wire.RingCall, fds: list[OwnedFd]) -> None:
        ring = self._ring(message.queue_index)
        if ring.call is not None:
            ring.call.close()
        ring.call = fds.pop() if fds else None

    def _replace_err(self, message: wire.RingErr, fds: list[OwnedFd]) -> None:
        ring = self._ring(message.queue_index)
        if ring.err is not None:
            ring.err.close()
        ring.err = fds.pop() if fds else None

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _stop(self, message: wire.RingStop, _fds: list[OwnedFd]) -> None:
        """Pop no more; answered by `finish_stops` when nothing is in flight."""
        ring = self._ring(message.queue_index)
        self._unwatch(ring)
        ring.stopping = Stopping(message.seq, time.monotonic() + DRAIN_SECONDS)
        self._dispatcher.end_lock_waits(ring)

    def stop_all(self) -> None:
        """Control is gone, and nobody waits for an answer: complete what was taken, and no more."""
        self.leaving = True
        for ring in self._order:
            self._unwatch(ring)
            if ring.stopping is None and not ring.broken:
                self._dispatcher.end_lock_waits(ring)
            ring.stopping = Stopping(None, time.monotonic() + DRAIN_SECONDS)

    @property
    def left(self) -> bool:
        """Whether `stop_all` was called, and nothing more can be completed."""
        return self.leaving and not self.draining

    def finish_stops(self, now: float) -> None:
        """Answer the stops that are drained, and those whose time is over."""
        for ring in self._order:
            if ring.stopping is None:
                continue
            if ring.queue.in_flight == 0:
                self._finish(ring, ring.stopping)
            elif now > ring.stopping.deadline:
                self._give_up(ring, ring.stopping)

    def _finish(self, ring: Ring, stopping: Stopping) -> None:
        ring.close()
        del self._rings[ring.index]
        self._order = [self._rings[index] for index in sorted(self._rings)]
        if stopping.seq is not None:
            self._done(stopping.seq, ring.queue.last_avail)

    def _give_up(self, ring: Ring, stopping: Stopping) -> None:
        """EIO to what waits for the broker; what a pool thread still writes into guest memory cannot be abandoned."""
        drained = self._dispatcher.give_up(ring)
        ring.publish()
        if drained:
            self._finish(ring, stopping)
            return
        text = f"queue {ring.index}: {ring.queue.in_flight} requests hang in the host's file system for over {DRAIN_SECONDS:.0f} s"
        if stopping.seq is not None:
            self._control.send(wire.Refused(stopping.seq, wire.bounded(text)))
        ring.stopping = None
        ring.report_broken()
