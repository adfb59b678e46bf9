"""File descriptors that are closed exactly once.

A bare int does not say who closes it. An `OwnedFd` does: whoever holds the object. It is closed by `close()`, by leaving
its `with` block, or given away by `detach()`; one that is merely dropped is a leak and says so (ResourceWarning, which the
tests turn into an error). Imports nothing of vfsd.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from types import TracebackType
from typing import Self

_CLOSED = -1


class OwnedFd:
    """One descriptor with one owner.

    Not thread-safe: an owner that shares it keeps it alive until the last user is done (see the pins of the broker's
    inode store and of the worker's file cache).
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = _CLOSED  # so that an object that could not be made has nothing to close
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd

    def fileno(self) -> int:
        """The number, lent: it must not be closed, and not be kept beyond this object's life."""
        if self._fd == _CLOSED:
            raise ValueError("file descriptor used after it was closed or given away")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd == _CLOSED

    def detach(self) -> int:
        """Give the descriptor away: the caller closes it."""
        fd, self._fd = self.fileno(), _CLOSED
        return fd

    def close(self) -> None:
        """Close it; closing twice is harmless, as with Python's files."""
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self.closed else self._fd}>"

    def __del__(self) -> None:
        if self._fd != _CLOSED:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()


def sealed_memfd(name: str, size_bytes: int) -> OwnedFd:
    """A memfd of zeros that can neither grow nor shrink: who else holds it can neither fill memory through it nor take pages away."""
    memfd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(memfd.fileno(), size_bytes)
    fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return memfd


class TempFd(OwnedFd):
    """A descriptor the broker donated to a worker. The worker may close it at any time and ask for it again."""

    __slots__ = ()
