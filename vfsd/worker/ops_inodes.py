"""Operations on inodes: attributes, link targets, access, the file system's figures."""

from __future__ import annotations

import errno
import os
import struct

from vfsd.errors import ReplyErrno
from vfsd.sandbox import filecalls
from vfsd.sandbox.filecalls import Stat
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.wire.attr import ATTR, SET_ALL, encode_rdev
from vfsd.worker.file_system import FileSystem, Given, Outcome, Waiting
from vfsd.worker.ops_files import on_pool
from vfsd.worker.request import Request

_I64_MAX = (1 << 63) - 1
_U64 = 1 << 64
_ATTR_HEAD = struct.Struct("<QI4x")  # a fuse_attr_out up to its fuse_attr
_NSEC_LIMIT = 1_000_000_000


def encode_stat(seen: Stat) -> bytes:
    """An attribute record from fstat(2)."""
    return ATTR.pack(
        seen.ino, seen.size, seen.blocks, seen.atime, seen.mtime, seen.ctime, seen.atime_nsec, seen.mtime_nsec, seen.ctime_nsec,
        seen.mode, seen.nlink, seen.uid, seen.gid, encode_rdev(seen.rdev_major, seen.rdev_minor), seen.blksize, 0,
    )  # fmt: skip


def _attr_reply(fs: FileSystem, attr: bytes) -> bytes:
    return _ATTR_HEAD.pack(fs.cache.timeout_seconds, 0) + attr


def getattr_(fs: FileSystem, request: Request) -> Outcome | Waiting:
    """From a descriptor this worker holds, if it holds one: no trip to the broker."""
    body = request.arguments(abi.fuse_getattr_in.size)
    flags, fh = abi.fuse_getattr_in.unpack_from(body)
    if flags & abi.FUSE_GETATTR_FH:
        opened = fs.files.get(request.nodeid, fh)
        if opened is not None and not opened.mount.pooled():
            return _attr_reply(fs, encode_stat(fs.as_guest(filecalls.fstat(opened.fd))))
    fd = fs.nodes.get(request.nodeid)
    if fd is not None:
        seen = filecalls.fstat(fd)
        if seen.nlink:
            return _attr_reply(fs, encode_stat(fs.as_guest(seen)))
        fs.nodes.drop(request.nodeid)  # deleted: whether it still exists is for the broker to say
    return _ask_attributes(fs, request.nodeid)


def _ask_attributes(fs: FileSystem, nodeid: int) -> Waiting:
    given: Given = yield wire.GetAttr(nodeid)
    if given.donated is not None:
        fs.nodes.add(nodeid, given.donated)
    return _attr_reply(fs, given.fields[0])


def setattr_(fs: FileSystem, request: Request) -> Waiting:
    arguments = abi.fuse_setattr_in.unpack_from(request.arguments(abi.fuse_setattr_in.size))
    valid, fh, size, _owner, atime, mtime, _ctime, atime_nsec, mtime_nsec, _ctime_nsec, mode, uid, gid = arguments
    kill = int(bool(valid & abi.FATTR_KILL_SUIDGID))
    if size > _I64_MAX or atime_nsec >= _NSEC_LIMIT or mtime_nsec >= _NSEC_LIMIT:
        raise ReplyErrno(errno.EINVAL)
    given: Given = yield wire.SetAttr(
        request.nodeid, fh if valid & abi.FATTR_FH else 0, valid & SET_ALL, size,
        _signed(atime), _signed(mtime), atime_nsec, mtime_nsec, mode & 0o177777, uid, gid, kill,
    )  # fmt: skip
    return _attr_reply(fs, given.fields[0])


def _signed(seconds: int) -> int:
    """FUSE carries seconds before 1970 in an unsigned field."""
    return max(seconds - _U64, -_I64_MAX) if seconds > _I64_MAX else seconds


def statx(fs: FileSystem, request: Request) -> Waiting:
    """Asked for where the attributes are not enough: the birth time."""
    request.arguments(abi.fuse_statx_in.size)
    given: Given = yield wire.StatX(request.nodeid)
    record: bytes = given.fields[0]
    return abi.FUSE_STATX_OUT_HEAD.pack(fs.cache.timeout_seconds, 0) + record


def readlink(_fs: FileSystem, request: Request) -> Waiting:
    given: Given = yield wire.ReadLink(request.nodeid)
    target: bytes = given.fields[0]
    return target


def statfs(_fs: FileSystem, request: Request) -> Waiting:
    given: Given = yield wire.StatFs(request.nodeid)
    return abi.fuse_statfs_out.pack(*given.fields)


def access(_fs: FileSystem, request: Request) -> Waiting:
    (mask,) = abi.fuse_access_in.unpack_from(request.arguments(abi.fuse_access_in.size))
    yield wire.Access(request.nodeid, mask, request.uid, request.gid)
    return b""


def syncfs(_fs: FileSystem, request: Request) -> Waiting:
    yield wire.SyncFs(request.nodeid)
    return b""


def lseek(fs: FileSystem, request: Request) -> Waiting:
    fh, offset, whence = abi.fuse_lseek_in.unpack_from(request.arguments(abi.fuse_lseek_in.size))
    if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE) or offset > _I64_MAX:
        raise ReplyErrno(errno.EINVAL)
    opened = yield from fs.fetch(request.nodeid, fh)
    if opened.mount.pooled():
        found: int = yield from on_pool(opened, lambda: os.lseek(opened.fd, offset, whence))
    else:
        found = os.lseek(opened.fd, offset, whence)
    return abi.fuse_lseek_out.pack(found)
