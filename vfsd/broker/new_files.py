"""Making a file that has its security label from the first moment that anybody can see it.

A regular file is made without a name (O_TMPFILE), labelled, and then linked: nobody finds it unlabelled. Where the file
system cannot do that, and for directories, symlinks and special files, which cannot be made without a name, it is made,
labelled, and removed again if that fails. In between the host and other guests can see it without the label (the guest's
own kernel has its directory locked). Linux could set the label as it makes the file (/proc/thread-self/attr/fscreate), but
only where the host itself runs an LSM that knows the guest's labels, and never under another name; vfsd does not use it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from vfsd.broker.credentials import Caller
from vfsd.broker.path_fds import PathFd
from vfsd.broker.share import Share
from vfsd.broker.xattrs import Label
from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd

NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_AS_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# EOPNOTSUPP is said by what has no O_TMPFILE, EISDIR by what does not know the flag (it contains O_DIRECTORY).
_NO_UNNAMED_FILES = (errno.EOPNOTSUPP, errno.EISDIR)


class NewFile:
    """A regular file to be made in a directory, as the caller."""

    def __init__(self, share: Share, directory: PathFd, name: bytes, mode: int, caller: Caller, label: Label | None) -> None:
        self._share = share
        self._directory = directory
        self._name = name
        self._mode = mode
        self._caller = caller
        self._label = label

    def open(self, flags: int) -> OwnedFd:
        """Make it; a descriptor with these flags. FileExistsError if the name is taken."""
        if self._label is None:
            return self._make(self._name, flags | NEW_FILE)
        try:
            # An unnamed file must be writable.
            made = self._make(b".", flags & ~os.O_ACCMODE | os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
            return self._label_named(flags, self._label)
        with made:
            self._label.put(made.fileno())
            opened = self._reopen(made, flags)
        return self._link(opened)

    def _make(self, name: bytes, flags: int) -> OwnedFd:
        with self._share.credentials.of_caller(self._caller):
            return OwnedFd(os.open(name, flags, self._mode, dir_fd=self._directory.fd))

    def _link(self, made: OwnedFd) -> OwnedFd:
        """Give it its name, as the last that can fail. Takes over `made` and gives it back."""
        source = b"%d" % made.fileno()
        try:
            os.link(source, self._name, src_dir_fd=self._share.proc_self_fd, dst_dir_fd=self._directory.fd, follow_symlinks=True)
        except OSError:
            made.close()
            raise
        return made

    def _reopen(self, made: OwnedFd, flags: int) -> OwnedFd:
        """With the access that was asked for; the file's own permissions do not matter to who made it."""
        if flags & os.O_ACCMODE == os.O_RDWR:
            return OwnedFd(made.detach())
        return OwnedFd(os.open(b"%d" % made.fileno(), flags | os.O_CLOEXEC, dir_fd=self._share.proc_self_fd))

    def _label_named(self, flags: int, label: Label) -> OwnedFd:
        made = self._make(self._name, flags | NEW_FILE)
        try:
            label.put(made.fileno())
        except (ReplyErrno, OSError):
            made.close()
            _undo(os.unlink, self._directory, self._name)
            raise
        return made


def label_by_name(directory: PathFd, name: bytes, label: Label, remove: Callable[..., None]) -> None:
    """Label what was just made under that name; if that fails it is removed, and the error is the guest's."""
    try:
        with OwnedFd(os.open(name, _AS_PATH, dir_fd=directory.fd)) as made:
            label.put(made.fileno())
    except (ReplyErrno, OSError):
        _undo(remove, directory, name)
        raise


def _undo(remove: Callable[..., None], directory: PathFd, name: bytes) -> None:
    """Best effort: the error that led here is what counts."""
    with suppress(OSError):
        remove(name, dir_fd=directory.fd)
