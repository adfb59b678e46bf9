"""Mount id → an open descriptor on that mount, which open_by_handle_at(2) needs.

It must be a real descriptor (O_PATH is EBADF) and must be on the very mount: the same file system is often mounted twice,
once read-only. It is made from the O_PATH descriptor of the first inode met on the mount, not from a path: a path can be
over-mounted, escaped in mountinfo, or changed between two looks (docs/decisions/0002). Every inode with a handle holds a
reference; with the last one the descriptor is closed, so that the host can unmount.
"""

from __future__ import annotations

import errno
import os
import stat
import threading

from vfsd.broker.closer import Closer
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class _MountFd:
    __slots__ = ("fd", "references")

    def __init__(self, fd: OwnedFd) -> None:
        self.fd = fd
        self.references = 1


class MountFds:
    """Thread-safe; no system call under its lock."""

    def __init__(self, proc_self_fd: int, closer: Closer) -> None:
        self._proc_self_fd = proc_self_fd
        self._closer = closer
        self._lock = threading.Lock()
        self._mounts: dict[int, _MountFd] = {}

    def __len__(self) -> int:
        return len(self._mounts)

    def acquire(self, mount_id: int, path_fd: int, file_type: int) -> bool:
        """Take a reference on a mount; `path_fd` is an O_PATH descriptor of any inode on it.

        False if no descriptor can be had from this inode (neither a directory nor a regular file: opening one has effects).
        OSError EIO if what was opened is on another mount.
        """
        if self._add_reference(mount_id):
            return True
        if file_type not in (stat.S_IFDIR, stat.S_IFREG):
            return False
        made = self._open(mount_id, path_fd, file_type)
        with self._lock:
            mount = self._mounts.get(mount_id)
            if mount is None:
                self._mounts[mount_id] = _MountFd(made)
                return True
            mount.references += 1
        made.close()
        return True

    def _add_reference(self, mount_id: int) -> bool:
        with self._lock:
            mount = self._mounts.get(mount_id)
            if mount is None:
                return False
            mount.references += 1
            return True

    def _open(self, mount_id: int, path_fd: int, file_type: int) -> OwnedFd:
        if file_type == stat.S_IFDIR:
            fd = OwnedFd(os.open(b".", _OPEN_DIRECTORY, dir_fd=path_fd))
        else:
            # Of a file, unlike a directory, closing may wait for a server; and with the last reference a session may end.
            fd = self._closer.own(os.open(b"%d" % path_fd, _OPEN_FILE, dir_fd=self._proc_self_fd), mount_id)
        try:
            opened = filecalls.statx(fd.fileno())
            if opened.mnt_id != mount_id or stat.S_IFMT(opened.mode) != file_type:
                raise OSError(errno.EIO, f"opened mount {opened.mnt_id} instead of {mount_id}")
        except OSError:
            fd.close()
            raise
        return fd

    def borrow(self, mount_id: int) -> int:
        """The descriptor, lent to one who holds a reference (a pinned inode with a handle does)."""
        with self._lock:
            return self._mounts[mount_id].fd.fileno()

    def release(self, mount_id: int, references: int = 1) -> None:
        """Give references back; the last one closes the descriptor."""
        with self._lock:
            mount = self._mounts[mount_id]
            mount.references -= references
            if mount.references:
                return
            del self._mounts[mount_id]
        mount.fd.close()
