"""What the frontend has said about one vring, and whether that is enough to serve it. Pure state, no I/O but closing.

Who controls the values: the frontend. Three things decide about a ring: it is *configured* (size, addresses, kick given),
it is *enabled* (SET_VRING_ENABLE, or by default for a frontend without protocol features), and it *runs*: a worker serves
it. vhost-user, "Ring states": a ring that is stopped or disabled must not be touched.
"""

from __future__ import annotations

from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.wire.channel import MAX_QUEUE_SIZE
from vfsd.wire.vhost_user import VringAddr
from vfsd.worker.memory_table import MemoryTable

_DESC_ALIGN, _AVAIL_ALIGN, _USED_ALIGN = 16, 2, 4  # virtio 1.2, 2.7
_MAX_BASE = 2**16 - 1


class Vring:
    """One ring; owns its kick, call and err descriptors."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.call: OwnedFd | None = None
        self.err: OwnedFd | None = None
        self.kick: OwnedFd | None = None
        self.running = False  # a worker has it: only RingStop may change that
        self._forget_configuration()

    def _forget_configuration(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: VringAddr | None = None
        self.kick_given = False  # SET_VRING_KICK came, perhaps without a descriptor
        self.enabled = False
        self.broken = False  # the guest broke it; only a stop by the frontend mends that

    @property
    def configured(self) -> bool:
        return self.size > 0 and self.addresses is not None and self.kick_given

    @property
    def wants_to_run(self) -> bool:
        return self.configured and self.enabled and not self.running and not self.broken

    def set_size(self, size: int) -> None:
        if size == 0 or size > MAX_QUEUE_SIZE or size & (size - 1):
            raise FrontendBreach(f"a size of {size}, it must be a power of two up to {MAX_QUEUE_SIZE}")
        if size != self.size:
            self._check_stopped("size")
        self.size = size

    def set_base(self, base: int) -> None:
        if base > _MAX_BASE:
            raise FrontendBreach(f"a base of {base:#x}, an index has 16 bits")
        self._check_stopped("base")
        self.base = base

    def set_addresses(self, addresses: VringAddr) -> None:
        if addresses.desc % _DESC_ALIGN or addresses.avail % _AVAIL_ALIGN or addresses.used % _USED_ALIGN:
            raise FrontendBreach(f"misaligned: descriptors {addresses.desc:#x}, avail {addresses.avail:#x}, used {addresses.used:#x}")
        if self.addresses is None or _parts(addresses) != _parts(self.addresses):
            self._check_stopped("addresses")
        self.addresses = addresses

    def set_kick(self, fd: OwnedFd | None) -> None:
        _close(self.kick)
        self.kick = fd
        self.kick_given = True

    def set_call(self, fd: OwnedFd | None) -> None:
        _close(self.call)
        self.call = fd

    def set_err(self, fd: OwnedFd | None) -> None:
        _close(self.err)
        self.err = fd

    def lies_in(self, memory: MemoryTable) -> bool:
        """Whether each of the three parts lies in one region (virtio 1.2, 2.7; with the two event fields at the ends)."""
        if self.addresses is None:
            return False
        return (
            memory.covers(self.addresses.desc, 16 * self.size)
            and memory.covers(self.addresses.avail, 6 + 2 * self.size)
            and memory.covers(self.addresses.used, 6 + 8 * self.size)
        )

    def stop(self) -> None:
        """GET_VRING_BASE: a new SET_VRING_KICK starts it again; what else is known stays."""
        _close(self.kick)
        self.kick = None
        self.kick_given = False
        self.broken = False

    def reset(self) -> None:
        """RESET_DEVICE: as new, but for call and err, which QEMU gives once, before the machine's first reset."""
        self.stop()
        self._forget_configuration()

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            _close(fd)
        self.kick = self.call = self.err = None

    def _check_stopped(self, what: str) -> None:
        if self.running:
            raise FrontendBreach(f"a new {what} for ring {self.index}, which is running; stop it first (GET_VRING_BASE)")


def _parts(addresses: VringAddr) -> tuple[int, int, int]:
    return addresses.desc, addresses.avail, addresses.used


def _close(fd: OwnedFd | None) -> None:
    if fd is not None:
        fd.close()
