"""The broker's main thread: hears the supervisor, sees a leader that is stuck, and does what comes once a second.

It sleeps while nothing happens: after a while without a running request it stops ticking, and the next task wakes it.
It never changes its credentials and never serves a request, so that nothing a guest asks for can hold it up.
"""

from __future__ import annotations

import os
import select
import time

from vfsd.broker.pool import STUCK_SECONDS, Pool
from vfsd.broker.server import Server
from vfsd.broker.worker_link import Task
from vfsd.channel import Channel, ChannelClosed
from vfsd.errors import ChildBreach, ConfigError
from vfsd.wire.channel import AddWorker, AreYouWell, IAmWell, Stop

_IDLE_TICKS = 40  # ticks without a running request before it sleeps
_DUTIES_SECONDS = 0.5


class Watchdog:
    def __init__(self, channel: Channel, server: Server) -> None:
        self._channel = channel
        self._server = server
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._poll.register(self._wake_fd, select.POLLIN)
        self._idle_ticks = 0
        self._awake = True

    def wake(self) -> None:
        """From any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def watch(self, pool: Pool[Task]) -> None:
        """Returns when the supervisor says Stop; ChannelClosed when it is gone."""
        duties_at = time.monotonic() + _DUTIES_SECONDS
        while True:
            timeout = STUCK_SECONDS if self._awake else _DUTIES_SECONDS
            for fd, _events in self._poll.poll(timeout * 1000):
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                    self._awake, self._idle_ticks = True, 0
                elif not self._hear(pool):
                    return
            now = time.monotonic()
            self._tick(pool, now)
            if now >= duties_at:
                self._server.tick(now)
                duties_at = now + _DUTIES_SECONDS

    def _tick(self, pool: Pool[Task], now: float) -> None:
        if not self._awake:
            return
        if pool.promote_if_stuck(now):
            self._idle_ticks = 0
            return
        self._idle_ticks += 1
        if self._idle_ticks >= _IDLE_TICKS:
            self._awake = not pool.let_watchdog_sleep()

    def _hear(self, pool: Pool[Task]) -> bool:
        try:
            received = self._channel.receive()
        except ChildBreach:  # the supervisor is no liar: the kernel had no number for the socket that came with a worker
            raise ConfigError("a worker's socket could not be received: no descriptor is left; ask for more by --rlimit-nofile") from None
        if received is None:
            return True
        match received.message:
            case AddWorker(index):
                self._server.links.add(index, received.fds[0])
            case AreYouWell():
                self._show_life(pool)
            case Stop():
                return False
        return True

    def _show_life(self, pool: Pool[Task]) -> None:
        """The thread that serves must answer: that this one runs says little. But a host whose file systems hang is not our illness."""
        if pool.all_hang():
            self._say_well()
        else:
            self._server.have_leader_call(self._say_well)

    def _say_well(self) -> None:
        try:
            self._channel.send(IAmWell())  # lost if the supervisor does not read: it asks again
        except ChannelClosed:
            return  # which the main thread notices, and ends
