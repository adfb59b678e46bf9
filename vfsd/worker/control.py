"""The control process: speaks vhost-user with the frontend, tells the workers which rings to serve from which memory.

Who controls the bytes: the frontend's messages and the workers' answers are hostile; the supervisor is trusted. It holds
descriptors of guest memory but maps none, has no capability and no system call that takes a path. One thread, one poll.
"""

from __future__ import annotations

import select
import sys
from typing import NoReturn

from vfsd.channel import Channel
from vfsd.config import ControlConfig, read_config
from vfsd.errors import FrontendBreach
from vfsd.log import ChildLog, Logger
from vfsd.role import run_role
from vfsd.sandbox.lockdown import lock_down
from vfsd.sandbox.memory import settle_allocator
from vfsd.sandbox.namespaces import enter_empty_root
from vfsd.wire.channel import FrontendGone, Ready, bounded
from vfsd.worker.device import Device
from vfsd.worker.frontend_stream import FrontendClosed, FrontendStream
from vfsd.worker.inflight_memory import InflightMemory
from vfsd.worker.memory_table import MemoryTable
from vfsd.worker.worker_links import StopAsked, WorkerFailed, WorkerLink, WorkerLinks, WorkerLost, ignore
from vfsd.worker.worker_port import FdReply
from vfsd.worker.workers import Workers


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
        self._inflight.forget_frontend()
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
        if isinstance(reply, FdReply):
            stream.send(reply.data, reply.fd)
        elif reply is not None:
            stream.send(reply)

    def _give_up(self, text: str, *, clean: bool) -> None:
        """The connection is over; the supervisor decides what follows: Stop, or another connection."""
        self._close_stream()
        if self._config.keep_listening and self._workers is not None:
            self._workers.let_go()
            self._links.on_broken = ignore
        self._disconnect()
        self._supervisor.send(FrontendGone(bounded(text), clean))

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _disconnect(self) -> None:
        self._close_stream()
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
