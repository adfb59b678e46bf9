"""The ring thread: waits for kicks, the broker, the pool, control and the supervisor; drains rings in batches.

One turn: hiprio first, then each ring with something to pop; what was asked goes to the broker in one packet; completions
are shown to each driver by one update and at most one call. A batch is bounded, so that a busy ring does not keep the
completions of another waiting.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from vfsd.channel import Channel, ChannelClosed
from vfsd.errors import GuestBreach
from vfsd.log import ChildLog
from vfsd.wire.channel import Alive, Completed, Ping, Stop
from vfsd.worker.broker_client import BrokerClient
from vfsd.worker.dispatch import Dispatcher
from vfsd.worker.file_system import FileSystem
from vfsd.worker.io_pool import IoPool
from vfsd.worker.ring import Ring
from vfsd.worker.ring_table import RingTable

HIPRIO = 0
_BATCH = 64  # requests popped before completions are published
_TICK_SECONDS = 0.5
_MOST_DEATHS = 2  # of workers that ran the same request: it is not run a third time


class EventLoop:
    def __init__(self, supervisor: Channel, control: Channel, broker: BrokerClient, fs: FileSystem, pool: IoPool, log: ChildLog) -> None:
        self._supervisor = supervisor
        self._control = control
        self._broker = broker
        self._fs = fs
        self._pool = pool
        self._log = log
        self._dispatcher = Dispatcher(fs, pool)
        self._epoll = select.epoll()
        self._rings = RingTable(control, self._dispatcher, log, self._epoll)
        self._sources: dict[int, Callable[[], None]] = {
            supervisor.fileno(): self._hear_supervisor,
            control.fileno(): self._hear_control,
            broker.fileno(): broker.receive,
            pool.fileno(): pool.collect,
        }
        for fd in self._sources:
            self._epoll.register(fd, select.EPOLLIN)
        self._broker_interest = select.EPOLLIN
        self._stopped = False
        self._completed = False  # whether the supervisor knows that we are good for something

    def run(self) -> None:
        """Returns when the supervisor says Stop, or control is gone and what was taken is done.

        ChannelClosed or BrokerGone at the others' end.
        """
        while not (self._stopped or self._rings.left):
            for fd, _events in self._epoll.poll(self._timeout()):
                source = self._sources.get(fd)
                if source is not None:
                    source()
                else:
                    self._rings.kicked(fd)
            self._turn()

    def _timeout(self) -> float:
        """Seconds to sleep at most; -1: until something happens."""
        if self._rings.busy and not self._dispatcher.saturated:
            return 0
        return _TICK_SECONDS if self._rings.draining or len(self._fs.nodes) else -1

    def _turn(self) -> None:
        for ring in self._rings.in_order():
            if ring.recovering:
                self._recover_one(ring)
            elif ring.more and ring.serving:
                self._drain(ring)
        self._broker.flush()
        self._watch_broker()
        for ring in self._rings.in_order():
            if ring.publish() and not self._completed:
                self._completed = self._supervisor.send(Completed())
        now = time.monotonic()
        self._rings.finish_stops(now)
        self._fs.nodes.sweep(now)
        if self._fs.tally and self._supervisor.send(self._fs.tally.message()):
            self._fs.tally.clear()

    def _drain(self, ring: Ring) -> None:
        ring.queue.disarm()
        try:
            for _ in range(_BATCH):
                if self._dispatcher.saturated and ring.index != HIPRIO:
                    return  # the ring keeps the rest; what completes makes room, and wakes us
                chain = ring.pop()
                if chain is None:
                    return
                self._dispatcher.handle(ring, chain)
        except GuestBreach as breach:
            self._rings.broke(ring, str(breach))

    def _recover_one(self, ring: Ring) -> None:
        """Run again what a dead worker had not completed: one request a turn, so that what kills us kills as few others as may be."""
        try:
            chain = ring.queue.pop_recovered()
        except GuestBreach as breach:
            self._rings.broke(ring, str(breach))
            return
        if chain.deaths < _MOST_DEATHS and not ring.give_up:
            self._fs.tally.replayed += 1
            self._dispatcher.handle(ring, chain)
            return
        why = "it hung" if ring.give_up else f"{chain.deaths} workers died while they ran it"
        self._log.error(f"queue {ring.index}: a request is answered EIO: {why}")
        self._fs.tally.refused += 1
        self._dispatcher.refuse(ring, chain)

    def _watch_broker(self) -> None:
        wanted = select.EPOLLIN | select.EPOLLOUT if self._broker.blocked else select.EPOLLIN
        if wanted != self._broker_interest:
            self._epoll.modify(self._broker.fileno(), wanted)
            self._broker_interest = wanted

    def _hear_control(self) -> None:
        """Control's death is the frontend's going: what the guest was promised is kept while there is a way to its memory."""
        try:
            self._rings.hear_control()
        except ChannelClosed:
            self._epoll.unregister(self._control.fileno())
            del self._sources[self._control.fileno()]
            self._rings.stop_all()

    def _hear_supervisor(self) -> None:
        received = self._supervisor.receive()
        match received.message if received is not None else None:
            case Stop():
                self._stopped = True
            case Ping():
                self._supervisor.send(Alive())
