"""A small share for hostile guests and workers: a tmpfs of its own, so that no request fills a disk, filled anew for each input."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.file_systems import Mounts

CONTENT = b"what stands in the file\n" * 10
_FS_IOC_SETFLAGS = 0x40086602


@contextmanager
def as_the_broker() -> Iterator[None]:
    """Its working directory and its umask, for a broker in this process."""
    umask = os.umask(0)
    try:
        with contextlib.chdir("/proc/self/fd"):
            yield
    finally:
        os.umask(umask)


class SmallShare:
    """`path` is what is shared, `canary` a file beside it that nobody may reach."""

    def __init__(self, folder: Path) -> None:
        self._mounts = Mounts(folder)
        self._mounts.mount(folder, "-t", "tmpfs", "-o", "size=16m,nr_inodes=2000", "fuzz")
        self.path = folder / "share"
        self.path.mkdir()
        self.canary = folder / "canary"
        self._numbers = iter(range(1 << 62))

    def fill(self) -> None:
        """As every input finds it."""
        self._empty()
        (self.path / "file").write_bytes(CONTENT)
        (self.path / "dir").mkdir()
        (self.path / "dir" / "inner").write_bytes(b"inner")
        (self.path / "link").symlink_to("../canary")
        os.mkfifo(self.path / "fifo")
        self.canary.write_bytes(b"canary")

    def new_file(self) -> bytes:
        """The name of one that no guest has seen."""
        name = f"known-{next(self._numbers)}"
        _clear_flags(self.path)
        (self.path / name).write_bytes(CONTENT)
        return name.encode()

    def _empty(self) -> None:
        _clear_flags(self.path)
        os.chmod(self.path, 0o755)
        for entry in os.scandir(os.fsencode(self.path)):
            if entry.is_dir(follow_symlinks=False):
                _clear_flags_below(entry.path)
                shutil.rmtree(entry.path)
            else:
                _unlink(entry.path)

    def close(self) -> None:
        self._mounts.__exit__()


def _clear_flags(path: Path | bytes) -> None:
    """The guest may have made it immutable, as its root may."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, bytes(8))
    finally:
        os.close(fd)


def _clear_flags_below(folder: bytes) -> None:
    _clear_flags(folder)
    os.chmod(folder, 0o755)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _clear_flags_below(entry.path)
        elif entry.is_file(follow_symlinks=False):
            _clear_flags(entry.path)


def _unlink(path: bytes) -> None:
    try:
        os.unlink(path)
    except PermissionError:
        _clear_flags(path)
        os.unlink(path)
