"""Handlers of locks: POSIX locks on the owner's private description (locks.py), flock on the open file's own.

None of them waits: whoever wants to is told by `WouldWait` to be tried again (lock_waits.py). There is no search for
deadlocks: the host sees one process, and nothing of who waits for whom.
"""

from __future__ import annotations

import errno
import os
from fcntl import F_UNLCK, F_WRLCK
from typing import NamedTuple

from vfsd.broker.answers import NOTHING, Answer, Call, WouldWait
from vfsd.broker.locks import LockOwner
from vfsd.broker.open_files import OpenFile
from vfsd.broker.share import Share
from vfsd.errors import ReplyErrno
from vfsd.sandbox import filecalls
from vfsd.wire.broker_messages import TRAIT_FLUSH, GetLock, SetLock

# Why a file cannot be opened for writing although it can be read.
_READ_ONLY = (errno.EROFS, errno.ETXTBSY, errno.EACCES, errno.EPERM)
_PID_OF_NOBODY = 0  # a process of the host, or of another guest: its number would mean another one in the guest


class _Range(NamedTuple):
    kind: int
    start: int
    end: int


def _range_of(message: GetLock | SetLock) -> _Range:
    if message.end < message.start:
        raise ReplyErrno(errno.EINVAL)
    return _Range(message.kind, message.start, message.end)


def answer_getlock(share: Share, call: Call, message: GetLock) -> Answer:
    """An owner without a description has no lock that could be taken for another's: then the open file's own will do."""
    wanted = _range_of(message)
    with share.files.pin(message.nodeid, message.fh, call.session) as opened:
        owner = share.locks.find(message.nodeid, message.owner)
        if owner is None:
            start, end, kind = filecalls.conflicting_lock(opened.fd.fileno(), *wanted)
        else:
            with owner:
                start, end, kind = filecalls.conflicting_lock(owner.fd.fileno(), *wanted)
    return Answer([start, end, kind, _PID_OF_NOBODY])


def answer_setlock(share: Share, call: Call, message: SetLock) -> Answer:
    wanted = _range_of(message)
    with share.files.pin(message.nodeid, message.fh, call.session) as opened:
        try:
            if message.flock:
                opened.flocked = True
                filecalls.flock(opened.fd.fileno(), message.kind)
            else:
                _set_posix_lock(share, call, opened, message.owner, wanted)
        except BlockingIOError:
            if message.wait:
                raise WouldWait from None
            raise
    if message.kind != F_WRLCK:
        share.locks.freed(message.nodeid)
    return NOTHING


def _set_posix_lock(share: Share, call: Call, opened: OpenFile, owner_id: int, wanted: _Range) -> None:
    owner = share.locks.find(opened.nodeid, owner_id)
    if owner is None:
        if wanted.kind == F_UNLCK:
            return
        owner = _add_owner(share, call, opened, owner_id)
    with owner:
        owner.fh = opened.fh
        filecalls.set_lock(owner.fd.fileno(), *wanted)


def _add_owner(share: Share, call: Call, opened: OpenFile, owner_id: int) -> LockOwner:
    """A description for another owner, that takes read and write locks if the share lets anybody write."""
    if not share.has_room_for_fd():
        raise ReplyErrno(errno.ENOLCK)
    with share.store.pin(opened.nodeid, call.session) as inode:
        if inode.is_directory:
            raise ReplyErrno(errno.EBADF)
        try:
            fd = share.open_inode(inode, os.O_RDONLY if share.settings.readonly else os.O_RDWR)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            fd = share.open_inode(inode, os.O_RDONLY)
        fd = share.own_open(fd.detach(), opened.traits, inode.mount_id)
        return share.locks.add(call.session, opened.nodeid, owner_id, fd, remote=bool(opened.traits & TRAIT_FLUSH))
