"""Handlers of open files and directories: open, create, hand out again, sync, allocate, release.

A worker gets descriptors of regular files and directories only, opened with the flags in `Settings.open_flags` and no others.
"""

from __future__ import annotations

import errno
import fcntl
import os

from vfsd.broker.answer_names import check_name, look_up
from vfsd.broker.answers import NOTHING, Answer, Call, Granted
from vfsd.broker.credentials import caller_of
from vfsd.broker.inode_store import Pin
from vfsd.broker.new_files import NewFile
from vfsd.broker.open_files import OpenFile
from vfsd.broker.reply_slots import Stored
from vfsd.broker.share import Entry, Share
from vfsd.broker.xattrs import Label, drop_remapped_capability, label_of
from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls
from vfsd.wire.broker_messages import (
    TRAIT_FLUSH,
    AfterWrite,
    Create,
    FAllocate,
    Fetch,
    Flush,
    FSync,
    Ioctl,
    Open,
    OpenDir,
    Release,
    TmpFile,
)

_REFUSED_FLAGS = os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)
_MOST_UNCLOSED = 128
_READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_UNNAMED_FILE = os.O_TMPFILE | os.O_CLOEXEC
# linux/falloc.h, without NO_HIDE_STALE (4), which no file system has: as the filter allows it.
_KEEP_SIZE, _PUNCH_HOLE, _COLLAPSE_RANGE, _ZERO_RANGE, _INSERT_RANGE, _UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
_FALLOCATE_MODES = _KEEP_SIZE | _PUNCH_HOLE | _COLLAPSE_RANGE | _ZERO_RANGE | _INSERT_RANGE | _UNSHARE_RANGE


def answer_open(share: Share, call: Call, message: Open) -> Answer:
    if message.flags & _REFUSED_FLAGS:
        raise ReplyErrno(errno.EINVAL)
    with share.store.pin(message.nodeid, call.session) as inode:
        return _open_existing(share, call, inode, message.flags, message.kill)


def _open_existing(share: Share, call: Call, inode: Pin, flags: int, kill: int) -> Answer:
    _refuse_writing(share, flags)
    if inode.is_directory and flags & os.O_ACCMODE != os.O_RDONLY:
        raise ReplyErrno(errno.EISDIR)
    share.require_room_for_fd()  # before anything is truncated
    if flags & os.O_TRUNC:
        with share.path_of(inode) as path:
            drop_remapped_capability(share, path.fd)
    with share.killing_set_id(inode, kill and flags & os.O_TRUNC):
        fd = _open(share, inode, flags)
    return _keep(share, call, inode, fd)


def _open(share: Share, inode: Pin, flags: int) -> OwnedFd:
    """O_APPEND reaches the host only for a file that cannot be opened for writing otherwise (chattr +a): there it can do no harm."""
    try:
        return share.open_inode(inode, flags & share.settings.open_flags)
    except PermissionError:
        if not flags & os.O_APPEND:
            raise
        return share.open_inode(inode, flags & share.settings.open_flags | os.O_APPEND)


def _refuse_writing(share: Share, flags: int) -> None:
    if share.settings.readonly and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
        raise ReplyErrno(errno.EROFS)


def _keep(share: Share, call: Call, inode: Pin, fd: OwnedFd) -> Answer:
    """Enter an open file and donate a copy. Takes over `fd`."""
    try:
        share.require_room_for_fd()
        traits = share.traits.of(fd.fileno(), inode.mount_id, inode.device)
        writable = fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        fd = share.own_open(fd.detach(), traits, inode.mount_id)
        copy = share.own_open(os.dup(fd.fileno()), traits, inode.mount_id)
    except (ReplyErrno, OSError):
        fd.close()
        raise
    try:
        opened = share.files.add(
            call.session, inode.nodeid, fd, traits, inode.mount_id, is_directory=inode.is_directory, is_writable=writable
        )  # fmt: skip
    except ReplyErrno:
        copy.close()
        raise
    if writable:
        _learn_set_id_bits(share, call, opened, copy)
    return Answer([opened.fh, traits, inode.mount_id], copy, Granted.FILE, opened.fh)


def _learn_set_id_bits(share: Share, call: Call, opened: OpenFile, copy: OwnedFd) -> None:
    """After the file was entered, since what changes from then on is noted; if it fails, the file was not opened."""
    try:
        share.files.set_id.learn(opened.nodeid, copy.fileno())
    except OSError:
        copy.close()
        share.release_file(opened.nodeid, opened.fh, call.session, call.worker)
        raise


def answer_opendir(share: Share, call: Call, message: OpenDir) -> Answer:
    with share.store.pin(message.nodeid, call.session) as inode:
        if not inode.is_directory:
            raise ReplyErrno(errno.ENOTDIR)
        return _keep(share, call, inode, share.open_inode(inode, _READ_DIRECTORY))


def answer_create(share: Share, call: Call, message: Create) -> Answer:
    """Make and open a file as the caller; an existing one is opened as OPEN would, unless the caller wanted it new."""
    check_name(message.name)
    share.require_room_for_fd()  # before anything is made
    with share.store.pin(message.parent, call.session) as parent:
        made = _create(share, parent, message)
        if made is None:
            return _open_found(share, call, parent, message)
        return _adopt_created(share, call, parent, made)


def _create(share: Share, parent: Pin, message: Create) -> OwnedFd | None:
    """The new file's descriptor, None if the name exists and may."""
    flags = message.flags & share.settings.open_flags & ~os.O_TRUNC
    label = label_of(share, message)
    try:
        with share.path_of(parent) as directory:
            return NewFile(share, directory, message.name, message.mode & 0o7777, caller_of(message), label).open(flags)
    except FileExistsError:
        if message.flags & os.O_EXCL:
            raise
        return None


def answer_tmpfile(share: Share, call: Call, message: TmpFile) -> Answer:
    """A file without a name, made as the caller; with O_EXCL it never gets one."""
    if message.flags & os.O_ACCMODE == os.O_RDONLY:
        raise ReplyErrno(errno.EINVAL)
    share.require_room_for_fd()
    flags = message.flags & (share.settings.open_flags | os.O_EXCL) & ~os.O_TRUNC | _UNNAMED_FILE
    label = label_of(share, message)
    with share.store.pin(message.parent, call.session) as parent:
        with share.path_of(parent) as directory, share.credentials.of_caller(caller_of(message)):
            made = OwnedFd(os.open(b".", flags, message.mode & 0o7777, dir_fd=directory.fd))
        return _adopt_created(share, call, parent, made, label)


def _adopt_created(share: Share, call: Call, parent: Pin, made: OwnedFd, label: Label | None = None) -> Answer:
    """Make a new, open file known to the guest, as an inode and as an open file, labelled first. Takes over `made`."""
    with made:
        if label is not None:
            label.put(made.fileno())
        entry = share.adopt(call.session, share.path_again(made.fileno()), parent)
        return _created(share, call, entry, made)


def _created(share: Share, call: Call, entry: Entry, made: OwnedFd) -> Answer:
    """The inode comes from the descriptor itself, not from the name, which another may have changed meanwhile."""
    try:
        with share.store.pin(entry.nodeid, call.session) as inode:
            answer = _keep(share, call, inode, OwnedFd(made.detach()))
        return answer._replace(fields=[*entry, *answer.fields])
    except (ReplyErrno, OSError):
        share.store.forget([entry.nodeid, 1], call.session)
        raise


def _open_found(share: Share, call: Call, parent: Pin, message: Create) -> Answer:
    entry = look_up(share, call, parent, message.name)
    try:
        with share.store.pin(entry.nodeid, call.session) as inode:
            answer = _open_existing(share, call, inode, message.flags, message.kill)
        return answer._replace(fields=[*entry, *answer.fields])
    except (ReplyErrno, OSError):
        share.store.forget([entry.nodeid, 1], call.session)
        raise


def answer_fetch(share: Share, call: Call, message: Fetch) -> Answer:
    """Another copy of an open file. A directory is opened anew: two workers must not share one reading position."""
    with share.files.pin(message.nodeid, message.fh, call.session) as opened:
        if len(share.closer) > _MOST_UNCLOSED:  # of a server that does not answer
            raise ReplyErrno(errno.ENFILE)
        share.require_room_for_copy()
        if opened.is_directory:
            copy = OwnedFd(os.open(b".", _READ_DIRECTORY | os.O_CLOEXEC, dir_fd=opened.fd.fileno()))
        else:
            copy = share.own_open(opened.duplicate().detach(), opened.traits, opened.mount_key)
        return Answer([opened.traits, opened.mount_key], copy, Granted.FILE, opened.fh)


def answer_again(share: Share, call: Call, stored: Stored) -> Answer:
    """What was answered before, to a worker that is no more: an open file, by another copy."""
    return answer_fetch(share, call, Fetch(stored.nodeid, stored.fh))._replace(fields=stored.fields)


def answer_release(share: Share, call: Call, message: Release) -> None:
    share.release_file(message.nodeid, message.fh, call.session, call.worker)


def answer_fsync(share: Share, call: Call, message: FSync) -> Answer:
    with share.files.pin(message.nodeid, message.fh, call.session) as opened:
        (os.fdatasync if message.data_only else os.fsync)(opened.fd.fileno())
    return NOTHING


def answer_flush(share: Share, call: Call, message: Flush) -> Answer:
    """Closing any descriptor of the description runs the file system's flush method; its locks an owner loses even if that fails."""
    with share.files.pin(message.nodeid, message.fh, call.session) as opened:
        try:
            if opened.traits & TRAIT_FLUSH:
                os.close(os.dup(opened.fd.fileno()))
        finally:
            share.locks.drop_owner(message.nodeid, message.owner)
    return NOTHING


def answer_fallocate(share: Share, call: Call, message: FAllocate) -> Answer:
    if message.mode & ~_FALLOCATE_MODES:
        raise ReplyErrno(errno.EOPNOTSUPP)
    with share.files.pin(message.nodeid, message.fh, call.session) as opened, share.killing_set_id(opened, message.kill):
        drop_remapped_capability(share, opened.fd.fileno())
        filecalls.fallocate(opened.fd.fileno(), message.mode, message.offset, message.length)
    return NOTHING


def answer_after_write(share: Share, call: Call, message: AfterWrite) -> Answer:
    """All that has to be done about a file's privileges after a worker has written to it."""
    with share.files.pin(message.nodeid, message.fh, call.session) as opened:
        drop_remapped_capability(share, opened.fd.fileno())
        share.files.set_id.restore(opened.nodeid, opened.fd.fileno(), message.set_id_bits, share.proc_self_fd)
    return NOTHING


def answer_ioctl(share: Share, call: Call, message: Ioctl) -> Answer:
    """Inode flags and project ids, and nothing else: ENOTTY, as from a file that does not know the command."""
    size = filecalls.IOCTL_BYTES.get(message.command)
    if size is None:
        raise ReplyErrno(errno.ENOTTY)
    if message.command in filecalls.IOCTLS_THAT_WRITE:
        if share.settings.readonly:
            raise ReplyErrno(errno.EROFS)
        if len(message.argument) != size:
            raise ReplyErrno(errno.EINVAL)
    with share.files.pin(message.nodeid, message.fh, call.session) as opened:
        return Answer([filecalls.ioctl(opened.fd.fileno(), message.command, message.argument)])
