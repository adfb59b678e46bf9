"""The kinds of failure vfsd tells apart. Everything else that is raised is a bug in vfsd.

Imports nothing of vfsd, so that every layer may import it.
"""

from __future__ import annotations

import os

# The commonest mistake of set-up, found in two places: when a ring is described, and when it is mapped.
NOT_SHARED = (
    "the frontend shared no memory region: guest RAM is not shared memory; add to QEMU's command line "
    "`-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem` (SIZE as in -m), "
    "to cloud-hypervisor's `--memory ...,shared=on`, to libvirt's domain `<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>`"
)


class ReplyErrno(Exception):
    """One request fails with an errno that goes to the guest; the connection lives on."""

    def __init__(self, errno_value: int) -> None:
        super().__init__(errno_value)
        self.errno = errno_value

    def __str__(self) -> str:
        return os.strerror(self.errno)


class Breach(Exception):
    """A peer broke its protocol. Never shown to that peer: it loses the thing it broke."""


class GuestBreach(Breach):
    """The guest's driver laid out a ring or descriptor that no correct driver makes: the ring is stopped."""


class FrontendBreach(Breach):
    """The vhost-user frontend sent what no correct frontend sends: the connection is closed."""


class WorkerBreach(Breach):
    """A worker sent the broker what no intact worker sends: that worker is killed."""


class ChildBreach(Breach):
    """A child sent its supervisor, or a worker its control process, what no intact one sends: it is killed."""


class ConfigError(Exception):
    """The user asked for something vfsd cannot do; the text names the option or step, the reason, and what to do."""


def drop_traceback(error: BaseException | None) -> None:
    """Let go of the frames an error passed through, and of those of the errors it came from.

    A frame that still holds the error as a local variable makes a cycle with it. The collector is off in the daemon's
    processes, so such a cycle is never freed, and with it whatever those frames held: requests, views of guest memory.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
