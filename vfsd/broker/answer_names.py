"""Handlers that resolve, make and remove names.

**Trust.** Names come from the guest through a worker: bytes, one component. They are checked here, whatever was checked
before, and are only ever used relative to a directory descriptor, never followed if they name a symlink.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext

from vfsd.broker.answers import NOTHING, Answer, Call
from vfsd.broker.credentials import caller_of
from vfsd.broker.inode_store import ROOT_NODEID, Pin
from vfsd.broker.new_files import NewFile, label_by_name
from vfsd.broker.path_fds import PathFd
from vfsd.broker.share import Entry, Share
from vfsd.broker.xattrs import label_of
from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls
from vfsd.wire.attr import decode_rdev
from vfsd.wire.broker_messages import Link, Lookup, LookupMany, MkDir, MkNod, Rename, RmDir, SymLink, Unlink

_AS_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_PERMISSIONS = 0o7777
_RENAME_WHITEOUT = 4
_RENAME_FLAGS = 1 | 2 | _RENAME_WHITEOUT  # RENAME_NOREPLACE, RENAME_EXCHANGE
_UNKNOWN_ID = 0xFFFFFFFF  # not told


def check_name(name: bytes) -> None:
    """ENOENT if it is empty, EINVAL if it is more than one ordinary component."""
    if not name:
        raise ReplyErrno(errno.ENOENT)
    if name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise ReplyErrno(errno.EINVAL)


def answer_lookup(share: Share, call: Call, message: Lookup) -> Answer:
    with share.store.pin(message.parent, call.session) as parent:
        return Answer([*look_up(share, call, parent, message.name)])


def answer_lookup_many(share: Share, call: Call, message: LookupMany) -> Answer:
    """One [errno, nodeid, attr] per name: one that cannot be looked up, or hangs by now, does not spoil the others."""
    results: list[list[object]] = []
    with share.store.pin(message.parent, call.session) as parent:
        for name in message.names:
            if not share.whereabouts.go_on_to(name) or share.whereabouts.hanging_at(parent.nodeid, name):
                results.append([errno.EAGAIN, 0, b""])
                continue
            try:
                results.append([0, *look_up(share, call, parent, name)])
            except ReplyErrno as error:
                results.append([error.errno, 0, b""])
            except OSError as error:
                results.append([error.errno or errno.EIO, 0, b""])
    return Answer(results)


def look_up(share: Share, call: Call, parent: Pin, name: bytes) -> Entry:
    """Find a name and count the lookup. `.` and `..` of the root are the root: there is nothing above it."""
    if parent.nodeid == ROOT_NODEID and name in (b".", b".."):
        with share.path_of(parent) as root:
            return share.adopt(call.session, share.path_again(root.fd), parent)
    check_name(name)
    with share.path_of(parent) as directory:
        return _look_up_in(share, call, parent, directory, name)


def _look_up_in(share: Share, call: Call, parent: Pin, directory: PathFd, name: bytes) -> Entry:
    try:
        found = OwnedFd(os.open(name, _AS_PATH, dir_fd=directory.fd))
    except FileNotFoundError:
        directory.refuse_deleted()
        raise
    return share.adopt(call.session, found, parent)


def answer_mkdir(share: Share, call: Call, message: MkDir) -> Answer:
    check_name(message.name)
    label = label_of(share, message)
    with share.store.pin(message.parent, call.session) as parent, share.path_of(parent) as directory:
        with share.credentials.of_caller(caller_of(message)):
            os.mkdir(message.name, message.mode & _PERMISSIONS, dir_fd=directory.fd)
        if label is not None:
            label_by_name(directory, message.name, label, os.rmdir)
        return Answer([*_look_up_in(share, call, parent, directory, message.name)])


def answer_mknod(share: Share, call: Call, message: MkNod) -> Answer:
    check_name(message.name)
    label = label_of(share, message)
    with share.store.pin(message.parent, call.session) as parent, share.path_of(parent) as directory:
        if stat.S_IFMT(message.mode) in (stat.S_IFREG, 0):
            file = NewFile(share, directory, message.name, message.mode & _PERMISSIONS, caller_of(message), label)
            with file.open(os.O_WRONLY) as made:
                return Answer([*share.adopt(call.session, share.path_again(made.fileno()), parent)])
        with share.credentials.of_caller(caller_of(message)):
            _make_node(directory, message)
        if label is not None:
            label_by_name(directory, message.name, label, os.unlink)
        return Answer([*_look_up_in(share, call, parent, directory, message.name)])


def _make_node(directory: PathFd, message: MkNod) -> None:
    kind = stat.S_IFMT(message.mode)
    if kind in (stat.S_IFIFO, stat.S_IFSOCK):
        os.mknod(message.name, message.mode, 0, dir_fd=directory.fd)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        os.mknod(message.name, message.mode, os.makedev(*decode_rdev(message.rdev)), dir_fd=directory.fd)
    else:
        raise ReplyErrno(errno.EINVAL)


def answer_symlink(share: Share, call: Call, message: SymLink) -> Answer:
    check_name(message.name)
    if b"\0" in message.target:
        raise ReplyErrno(errno.EINVAL)
    label = label_of(share, message)
    with share.store.pin(message.parent, call.session) as parent, share.path_of(parent) as directory:
        with share.credentials.of_caller(caller_of(message)):
            os.symlink(message.target, message.name, dir_fd=directory.fd)
        if label is not None:
            label_by_name(directory, message.name, label, os.unlink)
        return Answer([*_look_up_in(share, call, parent, directory, message.name)])


def answer_link(share: Share, call: Call, message: Link) -> Answer:
    """The source is the inode itself, a symlink too: /proc's magic link leads to it and no further."""
    check_name(message.name)
    with (
        share.store.pin(message.nodeid, call.session) as inode,
        share.store.pin(message.parent, call.session) as parent,
        share.path_of(inode) as source,
        share.path_of(parent) as directory,
    ):
        os.link(b"%d" % source.fd, message.name, src_dir_fd=share.proc_self_fd, dst_dir_fd=directory.fd, follow_symlinks=True)
        return Answer([*_look_up_in(share, call, parent, directory, message.name)])


def answer_unlink(share: Share, call: Call, message: Unlink) -> Answer:
    check_name(message.name)
    with (
        share.store.pin(message.parent, call.session) as parent,
        share.path_of(parent) as directory,
        share.outliving(call.session, directory, message.name),
    ):
        os.unlink(message.name, dir_fd=directory.fd)
    return NOTHING


def answer_rmdir(share: Share, call: Call, message: RmDir) -> Answer:
    check_name(message.name)
    with (
        share.store.pin(message.parent, call.session) as parent,
        share.path_of(parent) as directory,
        share.outliving(call.session, directory, message.name),
    ):
        os.rmdir(message.name, dir_fd=directory.fd)
    return NOTHING


def answer_rename(share: Share, call: Call, message: Rename) -> Answer:
    check_name(message.name)
    check_name(message.new_name)
    if message.flags & ~_RENAME_FLAGS:
        raise ReplyErrno(errno.EINVAL)
    with (
        share.store.pin(message.parent, call.session) as parent,
        share.store.pin(message.new_parent, call.session) as new_parent,
        share.path_of(parent) as old,
        share.path_of(new_parent) as new,
    ):
        whiteout = message.flags & _RENAME_WHITEOUT and _UNKNOWN_ID not in (message.uid, message.gid)
        as_owner = share.credentials.of_owner(message.uid, message.gid) if whiteout else nullcontext()
        with share.outliving(call.session, new, message.new_name), as_owner:
            filecalls.renameat2(old.fd, message.name, new.fd, message.new_name, message.flags)
    return NOTHING
