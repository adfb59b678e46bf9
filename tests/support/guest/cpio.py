"""Writes an initramfs: a cpio archive in the `newc` format (kernel documentation: driver-api/early-userspace/buffer-format).

Files get uid 0, mtime 0 and the order they are added in, so the same input makes the same archive and no root is needed.
"""

import stat
from types import TracebackType
from typing import BinaryIO, Self


class CpioWriter:
    """Adds files, directories and symbolic links; missing parent directories are made on the way."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._names: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._entry("TRAILER!!!", 0, b"")

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._add(name, stat.S_IFDIR | mode, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def _add(self, name: str, mode: int, data: bytes) -> None:
        if name in self._names:
            return
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        self._names.add(name)
        self._entry(name, mode, data)

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        path = name.encode() + b"\0"
        nlink = 2 if stat.S_ISDIR(mode) else 1
        # ino, mode, uid, gid, nlink, mtime, size, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        fields = (len(self._names), mode, 0, 0, nlink, 0, len(data), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._out.write(_padded(header + path) + _padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
