"""Extended attributes: the broker has them; here is what the guest's buffer is too small for.

Without --xattr all four are ENOSYS, after which the guest's kernel does not ask again.
"""

from __future__ import annotations

import errno

from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.file_system import FileSystem, Given, Waiting
from vfsd.worker.request import Request


def setxattr(fs: FileSystem, request: Request) -> Waiting:
    _require(fs)
    extended = fs.agreed(abi.FUSE_SETXATTR_EXT)
    start = abi.fuse_setxattr_in.size if extended else abi.FUSE_COMPAT_SETXATTR_IN_SIZE
    head = request.arguments(start)[:start]
    size, flags, own_flags = abi.fuse_setxattr_in.unpack(head.ljust(abi.fuse_setxattr_in.size, b"\0"))
    (name,), value = request.names_and_rest(start, 1)
    if size != len(value):
        raise ReplyErrno(errno.EINVAL)
    if size > wire.MAX_XATTR_BYTES:
        raise ReplyErrno(errno.E2BIG)
    kill_sgid = int(bool(own_flags & abi.FUSE_SETXATTR_ACL_KILL_SGID))
    yield wire.SetXattr(request.nodeid, _check_name(name), value, flags, kill_sgid)
    return b""


def getxattr(fs: FileSystem, request: Request) -> Waiting:
    _require(fs)
    (size,) = abi.fuse_getxattr_in.unpack_from(request.arguments(abi.fuse_getxattr_in.size))
    given: Given = yield wire.GetXattr(request.nodeid, _check_name(request.name(abi.fuse_getxattr_in.size)))
    return _sized(given.fields[0], size)


def listxattr(fs: FileSystem, request: Request) -> Waiting:
    _require(fs)
    (size,) = abi.fuse_getxattr_in.unpack_from(request.arguments(abi.fuse_getxattr_in.size))
    given: Given = yield wire.ListXattr(request.nodeid)
    return _sized(given.fields[0], size)


def removexattr(fs: FileSystem, request: Request) -> Waiting:
    _require(fs)
    yield wire.RemoveXattr(request.nodeid, _check_name(request.name()))
    return b""


def _require(fs: FileSystem) -> None:
    if not fs.features.xattr:
        raise ReplyErrno(errno.ENOSYS)


def _check_name(name: bytes) -> bytes:
    """ERANGE, as the kernel: a longer name would not fit the broker's message. All else is the broker's check."""
    if len(name) > wire.MAX_NAME_BYTES:
        raise ReplyErrno(errno.ERANGE)
    return name


def _sized(found: bytes, size: int) -> bytes:
    """Size 0 asks for the length."""
    if size == 0:
        return abi.fuse_getxattr_out.pack(len(found))
    if len(found) > size:
        raise ReplyErrno(errno.ERANGE)
    return found
