"""Go into another process's network namespace for a moment: setns(2), which Python has from 3.12 on.

For tools, never for a role of the daemon. A socket belongs for good to the namespace in which it was made, so one that asks the
kernel about sockets (sock_diag) can be made there and used from here. Who controls the bytes: nobody; nothing is read.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vfsd.fds import OwnedFd
from vfsd.sandbox.syscalls import CLONE_NEWNET

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def in_network_of(pid: int) -> Iterator[None]:
    """The calling thread alone. PermissionError without CAP_SYS_ADMIN here and there; FileNotFoundError if there is no such process."""
    with _open("/proc/thread-self/ns/net") as ours:
        with _open(f"/proc/{pid}/ns/net") as theirs:
            _setns(theirs)
        try:
            yield
        finally:
            _setns(ours)


def _open(path: str) -> OwnedFd:
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _setns(namespace: OwnedFd) -> None:
    if _libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
