"""Extended attributes of the share: which names pass, by which name the host knows them, and how they are read and set.

**Trust.** Names, values and flags come from the guest through a worker; any bytes at all. An attribute is read and set by
the magic link of /proc/self/fd that leads to its inode, so that it works for every type of file (a symlink's own too) and
opens none. The path is the descriptor's number: these four calls take no directory descriptor, but each thread of the pool
has that directory as its own working directory (broker/__main__.py).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple, Protocol

from vfsd.broker.share import Share
from vfsd.broker.xattr_map import CAPABILITY
from vfsd.errors import ReplyErrno
from vfsd.sandbox import filecalls
from vfsd.wire.broker_messages import SESSION_POSIX_ACL

ACCESS_ACL = b"system.posix_acl_access"
_ACLS = (ACCESS_ACL, b"system.posix_acl_default")
_LABELS = (b"security.", b"trusted.")
_NOT_TO_BE_CHANGED = 0x10 | 0x20  # STATX_ATTR_IMMUTABLE, STATX_ATTR_APPEND
_NOTHING_TO_REMOVE = (errno.ENODATA, errno.EOPNOTSUPP)


def magic_link(fd: int) -> bytes:
    """The path of the inode behind a descriptor, in this thread's working directory."""
    return b"%d" % fd


def server_name(share: Share, name: bytes) -> bytes:
    """The host's name of a guest's attribute; ReplyErrno if the guest may not have it."""
    if not share.settings.xattr:
        raise ReplyErrno(errno.ENOSYS)
    if not name:
        raise ReplyErrno(errno.ERANGE)  # as the kernel
    if b"\0" in name:
        raise ReplyErrno(errno.EINVAL)
    if name in _ACLS and not _with_acls(share):
        raise ReplyErrno(errno.EOPNOTSUPP)
    return share.xattr_map.to_server(name) if share.xattr_map is not None else name


def client_name(share: Share, name: bytes) -> bytes | None:
    """What the guest calls an attribute that the host listed; None if it does not see it."""
    seen = share.xattr_map.to_client(name) if share.xattr_map is not None else name
    return None if seen in _ACLS and not _with_acls(share) else seen


def _with_acls(share: Share) -> bool:
    """A guest that has not agreed on ACLs does not heed them: it would let pass what they deny."""
    return share.settings.posix_acl and bool(share.session_flags & SESSION_POSIX_ACL)


def set_value(fd: int, name: bytes, host_name: bytes, value: bytes, flags: int = 0) -> None:
    """Set `host_name`, which the guest calls `name`."""
    try:
        os.setxattr(magic_link(fd), host_name, value, flags)
    except PermissionError as error:
        if _is_refused_label(fd, name, error):
            raise ReplyErrno(errno.ENOTSUP) from None
        raise


def remove_value(fd: int, name: bytes, host_name: bytes) -> None:
    try:
        os.removexattr(magic_link(fd), host_name)
    except PermissionError as error:
        if _is_refused_label(fd, name, error):
            raise ReplyErrno(errno.ENOTSUP) from None
        raise


def _is_refused_label(fd: int, name: bytes, error: PermissionError) -> bool:
    """Whether it is a label that the daemon lacks the privilege to set, or that the host cannot keep on such a file: ENOTSUP.

    EPERM would tell the guest's root that its own privilege is missing; tools that label files give up on it, and go on after
    ENOTSUP. Where the file itself may not be changed it is EPERM all the same.
    """
    is_label = name.startswith(_LABELS) and name != CAPABILITY
    return is_label and error.errno == errno.EPERM and not filecalls.statx(fd).attributes & _NOT_TO_BE_CHANGED


class Label(NamedTuple):
    """A security label for a new file: the guest's name, the host's name, and the value."""

    name: bytes
    host_name: bytes
    value: bytes

    def put(self, fd: int) -> None:
        set_value(fd, self.name, self.host_name, self.value)


class _Labelled(Protocol):
    """A message that makes a file."""

    @property
    def label_name(self) -> bytes: ...
    @property
    def label(self) -> bytes: ...


def label_of(share: Share, message: _Labelled) -> Label | None:
    """The label that a new file is to have, None if none; ReplyErrno if it cannot have it: then it is not made at all."""
    name = message.label_name
    if not name:
        return None
    try:
        return Label(name, server_name(share, name), message.label)
    except ReplyErrno as error:
        raise ReplyErrno(errno.ENOTSUP if error.errno == errno.EPERM else error.errno) from None


def drop_remapped_capability(share: Share, fd: int) -> None:
    """Remove file capabilities that --xattrmap keeps under another name: nobody else does.

    The kernel removes `security.capability` when a file's contents or owner change (setattr_prepare, file_remove_privs).
    To be called before such a change, with any descriptor of the file.
    """
    if share.xattr_map is None:
        return
    name = share.xattr_map.server_capability
    if name is None or not stat.S_ISREG(os.fstat(fd).st_mode):
        return
    try:
        os.removexattr(magic_link(fd), name)
    except OSError as error:
        if error.errno not in _NOTHING_TO_REMOVE:
            raise
