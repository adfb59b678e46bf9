"""A worker's start: configuration, empty root, lock-down, then service. `python -I -m vfsd.worker CONFIG_FD`."""

from __future__ import annotations

import os
import resource
import select
import sys

from vfsd.channel import Channel
from vfsd.config import WorkerConfig, read_config
from vfsd.fds import OwnedFd
from vfsd.log import ChildLog
from vfsd.role import run_role
from vfsd.sandbox.lockdown import lock_down
from vfsd.sandbox.memory import settle_allocator
from vfsd.sandbox.namespaces import enter_empty_root
from vfsd.wire import broker_messages as wire
from vfsd.wire.channel import CONTROL_TO_WORKER, Alive, Ping, Ready, Stop
from vfsd.wire.id_map import make_id_maps
from vfsd.worker.broker_client import BrokerClient, BrokerGone
from vfsd.worker.cache_policy import CACHE_POLICIES
from vfsd.worker.event_loop import EventLoop
from vfsd.worker.file_system import FileSystem
from vfsd.worker.io_pool import IoPool

_MEMORY_FDS = 512  # each memory region costs one
_MOST_FILES = 8192


class _Greeting:
    """The answer to Hello: the session that is under way. To be made before the lock-down, which leaves no call that makes an epoll."""

    def __init__(self, fs: FileSystem, supervisor: Channel) -> None:
        self._fs = fs
        self._supervisor = supervisor
        self._heard = False
        self._epoll = select.epoll()
        self._epoll.register(fs.broker.fileno(), select.EPOLLIN)
        self._epoll.register(supervisor.fileno(), select.EPOLLIN)

    def wait(self) -> bool:
        """A worker that replaces another one is not answered before the broker is done with that one. Until then it must not serve.

        A spare one is answered when it is needed. False if the supervisor says Stop first.
        """
        with self._epoll:
            while not self._heard:
                for fd, _ in self._epoll.poll():
                    if fd == self._fs.broker.fileno():
                        self._fs.broker.receive()
                    elif not self._hear_supervisor():
                        return False
        return True

    def _hear_supervisor(self) -> bool:
        received = self._supervisor.receive()
        match received.message if received is not None else None:
            case Stop():
                return False
            case Ping():
                self._supervisor.send(Alive())
        return True

    def answered(self, error: int, fields: list[int], _donated: object) -> None:
        if error:
            raise RuntimeError(f"the broker refuses this worker: {os.strerror(error)}")
        self._fs.begin_session(wire.SessionNotice(*fields))
        self._heard = True


def main() -> None:
    config = read_config(WorkerConfig, int(sys.argv[1]))
    name = "spare worker" if config.index is None else f"worker{config.index}"
    run_role(config, name, lambda channel, log: serve(config, channel, log))


def serve(config: WorkerConfig, channel: Channel, log: ChildLog) -> None:
    enter_empty_root(config.sandbox)
    control = Channel.from_fd(OwnedFd(config.control_fd), CONTROL_TO_WORKER)
    pool = IoPool()
    broker = BrokerClient(OwnedFd(config.broker_fd))
    most_fds = config.confinement.nofile or resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most_files = max(16, min(_MOST_FILES, (most_fds - _MEMORY_FDS) // 2))
    ids = make_id_maps(config.translate_uid, config.translate_gid)
    fs = FileSystem(broker, CACHE_POLICIES[config.cache], log, pool, most_files, config.features, ids)
    loop = EventLoop(channel, control, broker, fs, pool, log)
    greeting = _Greeting(fs, channel)
    settle_allocator()
    done = lock_down(config.confinement, start_threads=pool.start)
    broker.ask(wire.Hello(wire.PROTOCOL_VERSION), greeting)
    try:
        broker.flush()
        ready = Ready(done.securebits, done.landlock, done.dumpable)
        if config.index is None:
            channel.send(ready)
        if greeting.wait():
            if config.index is not None:
                channel.send(ready)
            loop.run()
    except BrokerGone:
        log.debug("the broker is gone")  # the supervisor knows why, and ends us all


if __name__ == "__main__":
    main()
