"""File systems made for tests: loop images, tmpfs, overlays and bind mounts, all unmounted again whatever happens.

Loop devices belong to the whole machine: `mount -o loop` takes a free one and gives it back at the last unmount.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self

_IMAGE_BYTES = 320 << 20  # sparse; xfs refuses less than 300 MiB
_MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
# Without file handles: a plain overlay has none.
WITHOUT_HANDLES = ("overlay",)
KINDS = (*_MAKE, "tmpfs", "overlay with nfs_export", "overlay")
_OVERLAY_OPTIONS = {"overlay": "index=off,nfs_export=off", "overlay with nfs_export": "index=on,nfs_export=on"}


class Mounts:
    """What a test mounts. The end of the `with` block unmounts it in reverse order, also what is busy or already gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # for images, and for an overlay's layers
        self._targets: list[Path] = []
        self._made = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for target in reversed(self._targets):
            # A mount that propagated from elsewhere has one over it or none: an error here is of no interest.
            subprocess.run(["umount", "-l", target], check=False, capture_output=True)

    def mount(self, target: Path, *arguments: str | Path) -> Path:
        """`mount ARGUMENTS TARGET`; the target is made if it is not there."""
        if not target.exists():
            target.mkdir(parents=True)
        subprocess.run(["mount", *arguments, target], check=True, capture_output=True)
        self._targets.append(target)
        return target

    def unmount(self, target: Path, *, lazily: bool = False) -> None:
        subprocess.run(["umount", *(["-l"] if lazily else []), target], check=True, capture_output=True)
        self._targets.remove(target)

    def tmpfs(self, target: Path, *, shared: bool = False) -> Path:
        """`shared`: what is mounted below it appears in namespaces that were copied before, as with systemd."""
        self.mount(target, "-t", "tmpfs", "-o", "size=64m", "test")
        if shared:
            subprocess.run(["mount", "--make-shared", target], check=True)
        return target

    def bind(self, source: Path, target: Path, *, readonly: bool = False) -> Path:
        """The target may be a file, which must exist."""
        self.mount(target, "--bind", source)
        if readonly:
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        return target

    def image(self, kind: str) -> Path:
        """A sparse file with an empty file system: ext4, xfs or btrfs."""
        path = self._next("image")
        with path.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        subprocess.run([*_MAKE[kind], path], check=True, capture_output=True)
        return path

    def loop(self, image: Path, target: Path) -> Path:
        return self.mount(target, "-o", "loop", image)

    def overlay(self, kind: str, target: Path) -> Path:
        """Of two layers on a tmpfs; the lower one has a file `lower`."""
        layers = self.tmpfs(self._next("layers"))
        lower, upper, work = (layers / name for name in ("lower", "upper", "work"))
        for layer in (lower, upper, work):
            layer.mkdir()
        (lower / "lower").write_bytes(b"from the lower layer")
        options = f"lowerdir={lower},upperdir={upper},workdir={work},{_OVERLAY_OPTIONS[kind]}"
        return self.mount(target, "-t", "overlay", "-o", options, "test")

    def file_system(self, kind: str, target: Path) -> Path:
        """A new one of KINDS."""
        if kind in _MAKE:
            return self.loop(self.image(kind), target)
        if kind == "tmpfs":
            return self.tmpfs(target)
        return self.overlay(kind, target)

    def _next(self, what: str) -> Path:
        self._made += 1
        return self._folder / f"{what}-{self._made}"
