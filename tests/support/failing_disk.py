"""A real disk that fails when its pages are written back: ext4 in a sparse file on a tmpfs, which can be filled up.

What programs write goes to the page cache and succeeds; only the kernel's writing back fails, later, and is told by fsync(2). The
file's blocks were allocated before, and there is no journal, so that nothing but its data is lost.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.support.file_systems import Mounts

_BACKING_BYTES = 24 << 20
_DISK_BYTES = 64 << 20
FILE_BYTES = 4 << 20


class FailingDisk:
    """Mounted at `mountpoint`, with a file `data` of FILE_BYTES zeros. `mounts` unmounts it."""

    def __init__(self, mounts: Mounts, folder: Path, mountpoint: Path) -> None:
        backing = mounts.mount(folder / "backing", "-t", "tmpfs", "-o", f"size={_BACKING_BYTES}", "test")
        self._ballast = backing / "ballast"
        image = backing / "image"
        with image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        options = ["-O", "^has_journal", "-b", "4096", "-E", "lazy_itable_init=0,nodiscard"]
        subprocess.run(["mkfs.ext4", "-q", "-F", *options, image], check=True, capture_output=True)
        mounts.mount(mountpoint, "-o", "loop,errors=continue", image)
        with (mountpoint / "data").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        self.mountpoint = mountpoint
        self.sync()

    def sync(self) -> None:
        """As a host's program that calls sync(1) of this file system; whether that failed is its affair."""
        subprocess.run(["sync", "-f", self.mountpoint], check=False, capture_output=True)

    def fail(self) -> None:
        """From now on what is written back is lost."""
        with self._ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass

    def mend(self) -> None:
        self._ballast.unlink()
