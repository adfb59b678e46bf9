"""Handlers that read and change inodes: attributes, link targets, access, the file system's figures."""

from __future__ import annotations

import errno
import os

from vfsd.broker.answers import NOTHING, Answer, Call, Granted
from vfsd.broker.inode_store import Pin
from vfsd.broker.inode_table import ROOT_NODEID
from vfsd.broker.path_fds import PathFd
from vfsd.broker.set_id_bits import SET_ID_BITS
from vfsd.broker.share import Share, encode_attr, encode_statx
from vfsd.broker.xattrs import drop_remapped_capability
from vfsd.errors import ReplyErrno
from vfsd.sandbox import filecalls
from vfsd.sandbox.filecalls import UTIME_NOW, UTIME_OMIT
from vfsd.wire import attr
from vfsd.wire.broker_messages import TRAIT_SLOW, Access, Forget, GetAttr, ReadLink, SetAttr, StatFs, StatX, SyncFs

_KEEP = 0xFFFFFFFF  # (uid_t)-1: chown leaves it as it is
_U64 = (1 << 64) - 1
_EXECUTE, _WRITE, _READ = 1, 2, 4


def answer_forget(share: Share, call: Call, message: Forget) -> None:
    share.store.forget(share.reply_slots.not_yet_forgotten(call.worker, message), call.session)


def answer_getattr(share: Share, call: Call, message: GetAttr) -> Answer:
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        seen = path.statx()
        fields = [encode_attr(share.as_guest(seen))]
        slow = share.traits.of(path.fd, inode.mount_id, inode.device) & TRAIT_SLOW  # fstat would hold up the worker's ring
        if slow or not share.donations.worthwhile(inode.nodeid) or not share.has_room_for_fd():
            return Answer(fields)
        return Answer(fields, share.path_again(path.fd), Granted.NODE, inode.nodeid)


def answer_setattr(share: Share, call: Call, message: SetAttr) -> Answer:
    """Owner, mode, size, times. The first failure ends it, as on a local file system.

    The owner before the mode: changing it takes set-id bits away, and the guest's kernel has decided which of them are to stay.
    """
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        if message.valid & (attr.SET_MODE | attr.SET_UID | attr.SET_GID):
            _set_owner_and_mode(share, inode, path, message)
        if message.valid & attr.SET_SIZE:
            drop_remapped_capability(share, path.fd)
            _set_size(share, call, inode, message)
        times = _times(message)
        if times is not None:
            filecalls.utimensat(share.proc_self_fd, b"%d" % path.fd, times)
        return Answer([encode_attr(share.as_guest(path.statx()))])


def _set_owner_and_mode(share: Share, inode: Pin, path: PathFd, message: SetAttr) -> None:
    """Noted under the lock, so that bits are put back after a write before all this or after it, and then by what is known now.

    The kernel takes set-id bits away at a change of owner, root's too.
    """
    with share.files.set_id.changing(inode.nodeid) as record:
        if message.valid & (attr.SET_UID | attr.SET_GID):
            drop_remapped_capability(share, path.fd)
            _change_owner(path.fd, *_new_owner(share, message))
            record.known &= path.statx().mode
        if message.valid & attr.SET_MODE:
            os.chmod(b"%d" % path.fd, message.mode & 0o7777, dir_fd=share.proc_self_fd)
            record.known = message.mode & SET_ID_BITS


def _new_owner(share: Share, message: SetAttr) -> tuple[int, int]:
    uid = message.uid if message.valid & attr.SET_UID else _KEEP
    gid = message.gid if message.valid & attr.SET_GID else _KEEP
    ids = share.settings.ids
    if ids is None:
        return uid, gid
    return ids.uids.to_host(uid), ids.gids.to_host(gid)


def _change_owner(fd: int, uid: int, gid: int) -> None:
    """EPERM also for ids that vfsd's user namespace has not: EINVAL would say that the guest asked for nonsense."""
    try:
        filecalls.fchownat(fd, uid, gid)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ReplyErrno(errno.EPERM) from None
        raise


def _set_size(share: Share, call: Call, inode: Pin, message: SetAttr) -> None:
    if message.fh:
        with share.files.pin(inode.nodeid, message.fh, call.session) as opened, share.killing_set_id(inode, message.kill):
            os.ftruncate(opened.fd.fileno(), message.size)
        return
    with share.open_inode(inode, os.O_RDWR) as fd, share.killing_set_id(inode, message.kill):
        os.ftruncate(fd.fileno(), message.size)


def _times(message: SetAttr) -> tuple[int, int, int, int] | None:
    """The four numbers of utimensat(2), None if no time changes."""
    if not message.valid & (attr.SET_ATIME | attr.SET_MTIME | attr.SET_ATIME_NOW | attr.SET_MTIME_NOW):
        return None
    atime = _time(message.valid, attr.SET_ATIME_NOW, attr.SET_ATIME, message.atime, message.atime_nsec)
    mtime = _time(message.valid, attr.SET_MTIME_NOW, attr.SET_MTIME, message.mtime, message.mtime_nsec)
    return *atime, *mtime


def _time(valid: int, now_bit: int, set_bit: int, seconds: int, nsec: int) -> tuple[int, int]:
    if valid & now_bit:
        return 0, UTIME_NOW
    return (seconds, nsec) if valid & set_bit else (0, UTIME_OMIT)


def answer_readlink(share: Share, call: Call, message: ReadLink) -> Answer:
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        return Answer([os.readlink(b"", dir_fd=path.fd)])


def answer_statfs(share: Share, call: Call, message: StatFs) -> Answer:
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        seen = os.fstatvfs(path.fd)
    counts = (seen.f_blocks, seen.f_bfree, seen.f_bavail, seen.f_files, seen.f_ffree)
    # Python gives them signed: "as many as you like" (2^64 - 1, some network file systems) would be -1.
    return Answer([*(count & _U64 for count in counts), seen.f_bsize, seen.f_namemax, seen.f_frsize])


def answer_access(share: Share, call: Call, message: Access) -> Answer:
    """By mode bits, for the caller's uid and gid; root may all but execute what nobody may execute."""
    if message.mask & ~(_READ | _WRITE | _EXECUTE):
        raise ReplyErrno(errno.EINVAL)
    if message.mask & _WRITE and share.settings.readonly:
        raise ReplyErrno(errno.EROFS)
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        if not _permits(share, path, message):
            raise ReplyErrno(errno.EACCES)
    return NOTHING


def _permits(share: Share, path: PathFd, message: Access) -> bool:
    """The guest's root is root, whatever it is on the host."""
    seen = path.statx()
    ids = share.settings.ids
    uid, gid = (message.uid, message.gid) if ids is None else ids.to_host(message.uid, message.gid)
    if message.uid == 0:
        is_directory = seen.mode & 0o170000 == 0o040000
        return not message.mask & _EXECUTE or is_directory or bool(seen.mode & 0o111)
    shift = 6 if uid == seen.uid else 3 if gid == seen.gid else 0
    return message.mask & ~(seen.mode >> shift) & 7 == 0


def answer_statx(share: Share, call: Call, message: StatX) -> Answer:
    """All that statx(2) says, the birth time too, which the attribute record has no place for."""
    with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
        return Answer([encode_statx(share.as_guest(path.statx()))])


def answer_syncfs(share: Share, call: Call, message: SyncFs) -> Answer:
    """By a description as old as possible: one that is opened now does not learn of errors that somebody else was told before."""
    with share.store.pin(message.nodeid, call.session) as inode:
        if not inode.may_be_opened:
            raise ReplyErrno(errno.EBADF)
        if inode.handle_key is not None:
            filecalls.syncfs(share.mounts.borrow(inode.mount_id))
        elif inode.nodeid == ROOT_NODEID:
            filecalls.syncfs(share.root.fileno())
        else:
            with share.open_inode(inode, os.O_RDONLY) as fd:
                filecalls.syncfs(fd.fileno())
    return NOTHING
