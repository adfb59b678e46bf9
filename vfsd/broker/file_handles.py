"""When an inode is kept as a file handle, and when as an O_PATH descriptor.

`never`: always a descriptor. `prefer`: a handle; a descriptor where the file system has none (EOPNOTSUPP, EOVERFLOW), said
once per mount. `mandatory`: a handle, or the error goes to the guest. Every other errno goes to the guest in each mode: a
handle that could not be made by chance must not make a second inode of a file that is already known (semantics.md 2).
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import Protocol

from vfsd.broker.inode_store import Identity
from vfsd.broker.mount_fds import MountFds
from vfsd.errors import ConfigError
from vfsd.sandbox import filecalls
from vfsd.sandbox.filecalls import Statx

_KEY_MOUNT = struct.Struct("<Q")
_IDS_KEY = struct.Struct("<QIIQ")
_NO_HANDLE = (errno.EOPNOTSUPP, errno.EOVERFLOW)


class Log(Protocol):
    """What the broker's modules need of the log."""

    def warning(self, text: str) -> None: ...

    def error(self, text: str) -> None: ...

    def debug(self, text: str) -> None: ...


def handle_key(mount_id: int, handle: bytes) -> bytes:
    """The key of `by_handle`: the mount id is part of it, since one file seen through two mounts has one handle."""
    return _KEY_MOUNT.pack(mount_id) + handle


def handle_in(key: bytes) -> bytes:
    """The kernel's struct file_handle inside a key."""
    return key[_KEY_MOUNT.size :]


def ids_key(seen: Statx) -> bytes:
    """The key of `by_ids`."""
    return _IDS_KEY.pack(seen.ino, seen.dev_major, seen.dev_minor, seen.mnt_id)


def device_of(seen: Statx) -> int:
    return (seen.dev_major << 32) | seen.dev_minor


class FileHandles:
    """The policy, and what it has learnt about mounts."""

    def __init__(self, mode: str, mounts: MountFds, log: Log) -> None:
        self.mode = mode
        self._mounts = mounts
        self._log = log
        self._warned: set[int] = set()

    def identify(self, path_fd: int, seen: Statx) -> Identity:
        """How the inode behind `path_fd` is recognised. OSError where the mode passes it on."""
        key = None
        if self.mode != "never":
            try:
                key = handle_key(seen.mnt_id, filecalls.name_to_handle_at(path_fd))
            except OSError as error:
                if error.errno not in _NO_HANDLE:
                    raise
                self._without_handle(seen.mnt_id, error)
        return Identity(key, ids_key(seen), seen.mnt_id, device_of(seen), stat.S_IFMT(seen.mode))

    def _without_handle(self, mount_id: int, error: OSError) -> None:
        if mount_id not in self._warned:
            self._warned.add(mount_id)
            outcome = "requests to it fail" if self.mode == "mandatory" else "its inodes are kept as open descriptors"
            self._log.warning(f"mount {mount_id}: file system has no file handles ({error.strerror}); {outcome}")
        if self.mode == "mandatory":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error

    def open(self, key: bytes, flags: int) -> int:
        """Open an inode by the handle in its key; the caller holds a pin, which holds the mount. ESTALE if it is gone."""
        return filecalls.open_by_handle_at(self._mounts.borrow(_KEY_MOUNT.unpack_from(key)[0]), handle_in(key), flags)

    def settle(self, root_fd: int) -> Identity:
        """Try the whole way once, on the share's root; returns the root's identity.

        Where it does not work, `prefer` becomes `never` with one warning, `mandatory` is a ConfigError.
        """
        seen = filecalls.statx(root_fd)
        if self.mode != "never":
            try:
                self._try_root(root_fd, seen)
            except OSError as error:
                self._give_up(error)
        return self.identify(root_fd, seen)

    def _try_root(self, root_fd: int, seen: Statx) -> None:
        handle = filecalls.name_to_handle_at(root_fd)
        self._mounts.acquire(seen.mnt_id, root_fd, stat.S_IFMT(seen.mode))
        try:
            fd = self.open(handle_key(seen.mnt_id, handle), os.O_PATH)
            os.close(fd)
        finally:
            self._mounts.release(seen.mnt_id)

    def _give_up(self, error: OSError) -> None:
        why = f"the shared directory cannot be opened by file handle ({error.strerror})"
        if error.errno == errno.EPERM:
            why += "; opening file handles needs CAP_DAC_READ_SEARCH in the initial user namespace"
        if self.mode == "mandatory":
            raise ConfigError(f"--inode-file-handles=mandatory: {why}; use prefer or never")
        self._log.warning(f"--inode-file-handles=prefer: {why}; using one descriptor per inode instead, as with never")
        self.mode = "never"
