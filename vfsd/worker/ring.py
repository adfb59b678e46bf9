"""A started ring: its virtqueue, its eventfds, and whether it is being served, drained or broken.

The kick fd is waited for edge-triggered and never read: QEMU's is non-blocking and shared. The call fd is used as it is at
that moment, since frontends replace it while the ring runs. Each may be absent.
"""

from __future__ import annotations

import os

from vfsd.fds import OwnedFd
from vfsd.worker.virtqueue import Chain, Virtqueue

_ONE = (1).to_bytes(8, "little")
DRAIN_SECONDS = 5.0  # the frontend's main loop waits for GET_VRING_BASE


class Stopping:
    """A RingStop that waits for what is in flight, until `deadline` (time.monotonic()). No `seq`: nobody asked for it."""

    __slots__ = ("deadline", "seq")

    def __init__(self, seq: int | None, deadline: float) -> None:
        self.seq = seq
        self.deadline = deadline


class Ring:
    """One started ring, the ring thread's alone."""

    __slots__ = ("broken", "call", "err", "give_up", "kick", "more", "queue", "stopping")

    def __init__(self, queue: Virtqueue, kick: OwnedFd | None, call: OwnedFd | None, err: OwnedFd | None, *, give_up: bool = False) -> None:
        self.queue = queue
        self.kick = kick
        self.call = call
        self.err = err
        self.more = True  # there may be something to pop
        self.broken = False
        self.give_up = give_up  # what a dead worker had not completed hangs, and is answered EIO
        self.stopping: Stopping | None = None

    @property
    def index(self) -> int:
        return self.queue.index

    @property
    def serving(self) -> bool:
        return not self.broken and self.stopping is None

    @property
    def recovering(self) -> bool:
        """Whether there is something that a dead worker was at. That must be completed also of a ring that is to be stopped."""
        return self.queue.recovering and not self.broken

    def pop(self) -> Chain | None:
        """The next request; None, and armed for a kick, if there is none. GuestBreach as Virtqueue.pop."""
        while True:
            chain = self.queue.pop()
            if chain is not None:
                return chain
            if not self.queue.arm():
                self.more = False
                return None

    def publish(self) -> bool:
        """Show all completions to the driver, and call it if it wants that. Whether there were any."""
        if not self.queue.staged:
            return False
        if self.queue.publish() and self.call is not None:
            _signal(self.call)
        return True

    def call_anyway(self) -> None:
        """Whether a dead worker called the driver for what it had shown nobody knows: one call too many does no harm."""
        if self.call is not None:
            _signal(self.call)

    def report_broken(self) -> None:
        """No more requests are taken; the frontend is told by the err fd."""
        self.broken = True
        self.more = False
        if self.err is not None:
            _signal(self.err)

    def close(self) -> None:
        """Give back the rings' memory and all descriptors."""
        self.queue.close()
        for fd in (self.kick, self.call, self.err):
            if fd is not None:
                fd.close()


def _signal(fd: OwnedFd) -> None:
    """Add one to an eventfd (or put eight bytes into the pipe that User-Mode Linux uses). A full one has been signalled."""
    try:
        os.write(fd.fileno(), _ONE)
    except OSError:
        return  # the other side is gone or full: nobody waits for this signal
