"""Locks: decoded here, held by the broker. SETLKW is answered when the lock is granted, however long that takes (lock_waits.py).

Linux sends F_SETLK, F_OFD_SETLK and flock(2) alike: the owner tells processes and open files apart, FUSE_LK_FLOCK says flock.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.file_system import FileSystem, Given, Waiting
from vfsd.worker.request import Request

_LAST_OFFSET = (1 << 63) - 1
_F_UNLCK = 2


class _Lock(NamedTuple):
    fh: int
    owner: int
    start: int
    end: int
    kind: int
    flock: bool


def _decode(fs: FileSystem, request: Request) -> _Lock:
    """ENOLCK for a kind of lock that the user has switched off: the guest must not believe that it holds one."""
    fh, owner, start, end, kind, _pid, flags = abi.fuse_lk_in.unpack_from(request.arguments(abi.fuse_lk_in.size))
    flock = bool(flags & abi.FUSE_LK_FLOCK)
    if not (fs.features.flock if flock else fs.features.posix_lock):
        raise ReplyErrno(errno.ENOLCK)
    if not start <= end <= _LAST_OFFSET or kind > _F_UNLCK:
        raise ReplyErrno(errno.EINVAL)
    return _Lock(fh, owner, start, end, kind, flock)


def getlk(fs: FileSystem, request: Request) -> Waiting:
    lock = _decode(fs, request)
    if lock.flock:
        raise ReplyErrno(errno.EINVAL)  # flock(2) cannot ask
    given: Given = yield wire.GetLock(request.nodeid, lock.fh, lock.owner, lock.start, lock.end, lock.kind)
    return abi.fuse_lk_out.pack(*given.fields)


def setlk(fs: FileSystem, request: Request) -> Waiting:
    return _set_lock(fs, request, wait=0)


def setlkw(fs: FileSystem, request: Request) -> Waiting:
    return _set_lock(fs, request, wait=1)


def _set_lock(fs: FileSystem, request: Request, wait: int) -> Waiting:
    lock = _decode(fs, request)
    yield wire.SetLock(request.nodeid, lock.fh, lock.owner, lock.start, lock.end, lock.kind, int(lock.flock), wait)
    return b""
