"""Handlers of extended attributes: get, set, list, remove. What may be asked for, and by which name, is in xattrs.py."""

from __future__ import annotations

import errno
import os
import stat

from vfsd.broker import xattrs
from vfsd.broker.answers import NOTHING, Answer, Call
from vfsd.broker.inode_store import Pin
from vfsd.broker.path_fds import PathFd
from vfsd.broker.share import Share
from vfsd.errors import ReplyErrno
from vfsd.wire.broker_messages import GetXattr, ListXattr, RemoveXattr, SetXattr

_SET_FLAGS = os.XATTR_CREATE | os.XATTR_REPLACE


def answer_getxattr(share: Share, call: Call, message: GetXattr) -> Answer:
    try:
        host_name = xattrs.server_name(share, message.name)
    except ReplyErrno as error:  # what may not be set is not there either
        raise ReplyErrno(errno.ENODATA if error.errno == errno.EPERM else error.errno) from None
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        return Answer([os.getxattr(xattrs.magic_link(path.fd), host_name)])


def answer_setxattr(share: Share, call: Call, message: SetXattr) -> Answer:
    if message.flags & ~_SET_FLAGS:
        raise ReplyErrno(errno.EINVAL)
    host_name = xattrs.server_name(share, message.name)
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        xattrs.set_value(path.fd, message.name, host_name, message.value, message.flags)
        if message.kill_sgid and message.name == xattrs.ACCESS_ACL:
            _kill_sgid(share, inode, path)
    return NOTHING


def _kill_sgid(share: Share, inode: Pin, path: PathFd) -> None:
    """For a caller who is not in the file's group: the host's kernel would do it for him, but it is the broker who set the ACL."""
    with share.files.set_id.changing(inode.nodeid) as record:
        record.known &= ~stat.S_ISGID
        mode = path.statx().mode
        if mode & stat.S_ISGID:
            os.chmod(xattrs.magic_link(path.fd), mode & 0o7777 & ~stat.S_ISGID, dir_fd=share.proc_self_fd)


def answer_listxattr(share: Share, call: Call, message: ListXattr) -> Answer:
    """Names as listxattr(2) gives them, each with its NUL."""
    if not share.settings.xattr:
        raise ReplyErrno(errno.ENOSYS)
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        names = os.listxattr(xattrs.magic_link(path.fd))
    seen = (xattrs.client_name(share, os.fsencode(name)) for name in names)
    return Answer([b"".join(name + b"\0" for name in seen if name is not None)])


def answer_removexattr(share: Share, call: Call, message: RemoveXattr) -> Answer:
    host_name = xattrs.server_name(share, message.name)
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        xattrs.remove_value(path.fd, message.name, host_name)
    return NOTHING
