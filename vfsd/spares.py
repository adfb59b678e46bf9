"""Workers that broker and control have not heard of yet: made when they are needed, or before, to be ready when one dies.

A spare worker is at the end of its start, has said Hello to a socket whose other end is here, and waits. To take a dead one's
place is then to hand two descriptors over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from vfsd.children import Child
from vfsd.config import RoleConfig
from vfsd.fds import OwnedFd
from vfsd.roles import Roles
from vfsd.sockets import packet_pair
from vfsd.wire.channel import WORKER_TO_SUPERVISOR, Table

BROKER_SOCKET_BYTES = 1 << 20  # several packets of 128 KiB; the kernel caps it at net.core.wmem_max


class Unintroduced(NamedTuple):
    """A worker, and the ends of its sockets that broker and control are to get."""

    child: Child
    broker_end: OwnedFd
    control_end: OwnedFd


class Spawn(Protocol):
    def __call__(
        self, role: str, module: str, accepts: Table, make_config: Callable[[int], RoleConfig], give: tuple[int, ...] = ()
    ) -> Child: ...


def make_worker(spawn: Spawn, roles: Roles, index: int | None) -> Unintroduced:
    """`index` None: a spare one."""
    broker_end, broker_theirs = packet_pair(BROKER_SOCKET_BYTES)
    control_end, control_theirs = packet_pair()
    with broker_theirs, control_theirs:
        give = (control_theirs.fileno(), broker_theirs.fileno())

        def make_config(channel_fd: int) -> RoleConfig:
            return roles.worker(index, channel_fd, *give)

        name = "worker spare" if index is None else f"worker {index}"
        try:
            return Unintroduced(spawn(name, "vfsd.worker", WORKER_TO_SUPERVISOR, make_config, give), broker_end, control_end)
        except BaseException:
            broker_end.close()
            control_end.close()
            raise


class Spares:
    """At most `count` of them. One that dies is not replaced before the next worker's death: it might die for ever."""

    def __init__(self, make: Callable[[], Unintroduced], count: int) -> None:
        self._make = make
        self._count = count
        self._spares: list[Unintroduced] = []

    def keep(self) -> None:
        """Make those that are missing. Not before there is somebody to serve: what is started first is not to wait for them."""
        while len(self._spares) < self._count:
            self._spares.append(self._make())

    def take(self, index: int) -> Unintroduced | None:
        """One that is ready, to be worker `index`."""
        spare = next((spare for spare in self._spares if spare.child.ready), None)
        if spare is not None:
            self._spares.remove(spare)
            spare.child.rename(f"worker {index}")
        return spare

    def lose(self, child: Child) -> bool:
        """Whether this one, which died, was a spare."""
        spare = next((spare for spare in self._spares if spare.child is child), None)
        if spare is None:
            return False
        self._spares.remove(spare)
        _close(spare)
        return True

    def close(self) -> None:
        for spare in self._spares:
            _close(spare)
        self._spares.clear()


def _close(spare: Unintroduced) -> None:
    spare.broker_end.close()
    spare.control_end.close()
