"""One row per message: its handler, and whether it writes. What is not in the table is not permitted.

`fields`, bounds and donations are in wire/broker_messages.py; Hello and the Session messages change the broker itself and
are the server's (server.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vfsd.broker import answer_files as files
from vfsd.broker import answer_inodes as inodes
from vfsd.broker import answer_locks as locks
from vfsd.broker import answer_names as names
from vfsd.broker import answer_xattrs as xattrs
from vfsd.broker.answers import Answer, Call
from vfsd.broker.share import Share
from vfsd.wire import broker_messages as messages

Handler = Callable[[Share, Call, Any], Answer | None]


class Row(NamedTuple):
    handler: Handler
    writes: bool  # refused with EROFS when the share is read-only


HANDLERS: dict[type[Any], Row] = {
    messages.Lookup: Row(names.answer_lookup, writes=False),
    messages.LookupMany: Row(names.answer_lookup_many, writes=False),
    messages.Forget: Row(inodes.answer_forget, writes=False),
    messages.GetAttr: Row(inodes.answer_getattr, writes=False),
    messages.SetAttr: Row(inodes.answer_setattr, writes=True),
    messages.ReadLink: Row(inodes.answer_readlink, writes=False),
    messages.SymLink: Row(names.answer_symlink, writes=True),
    messages.MkNod: Row(names.answer_mknod, writes=True),
    messages.MkDir: Row(names.answer_mkdir, writes=True),
    messages.Unlink: Row(names.answer_unlink, writes=True),
    messages.RmDir: Row(names.answer_rmdir, writes=True),
    messages.Rename: Row(names.answer_rename, writes=True),
    messages.Link: Row(names.answer_link, writes=True),
    messages.Open: Row(files.answer_open, writes=False),  # by its flags: see _refuse_writing
    messages.OpenDir: Row(files.answer_opendir, writes=False),
    messages.Create: Row(files.answer_create, writes=True),
    messages.TmpFile: Row(files.answer_tmpfile, writes=True),
    messages.Release: Row(files.answer_release, writes=False),
    messages.Fetch: Row(files.answer_fetch, writes=False),
    messages.StatFs: Row(inodes.answer_statfs, writes=False),
    messages.FSync: Row(files.answer_fsync, writes=False),
    messages.Flush: Row(files.answer_flush, writes=False),
    messages.FAllocate: Row(files.answer_fallocate, writes=True),
    messages.AfterWrite: Row(files.answer_after_write, writes=True),
    messages.Access: Row(inodes.answer_access, writes=False),
    messages.SyncFs: Row(inodes.answer_syncfs, writes=False),
    messages.StatX: Row(inodes.answer_statx, writes=False),
    messages.GetLock: Row(locks.answer_getlock, writes=False),
    messages.SetLock: Row(locks.answer_setlock, writes=False),  # a lock changes nothing in the file
    messages.GetXattr: Row(xattrs.answer_getxattr, writes=False),
    messages.SetXattr: Row(xattrs.answer_setxattr, writes=True),
    messages.ListXattr: Row(xattrs.answer_listxattr, writes=False),
    messages.RemoveXattr: Row(xattrs.answer_removexattr, writes=True),
    messages.Ioctl: Row(files.answer_ioctl, writes=False),  # by its command
}
