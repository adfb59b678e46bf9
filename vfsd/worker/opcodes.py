"""Opcode → handler. What is not here is answered ENOSYS, and the guest does not ask again."""

from __future__ import annotations

from vfsd.wire import fuse_abi as abi
from vfsd.worker import ops_dirs, ops_files, ops_inodes, ops_locks, ops_names, ops_session, ops_xattrs
from vfsd.worker.file_system import Handler

HANDLERS: dict[int, Handler] = {
    abi.FUSE_LOOKUP: ops_names.lookup,
    abi.FUSE_FORGET: ops_session.forget,
    abi.FUSE_GETATTR: ops_inodes.getattr_,
    abi.FUSE_SETATTR: ops_inodes.setattr_,
    abi.FUSE_READLINK: ops_inodes.readlink,
    abi.FUSE_SYMLINK: ops_names.symlink,
    abi.FUSE_MKNOD: ops_names.mknod,
    abi.FUSE_MKDIR: ops_names.mkdir,
    abi.FUSE_UNLINK: ops_names.unlink,
    abi.FUSE_RMDIR: ops_names.rmdir,
    abi.FUSE_RENAME: ops_names.rename,
    abi.FUSE_LINK: ops_names.link,
    abi.FUSE_OPEN: ops_files.open_,
    abi.FUSE_READ: ops_files.read,
    abi.FUSE_WRITE: ops_files.write,
    abi.FUSE_STATFS: ops_inodes.statfs,
    abi.FUSE_RELEASE: ops_files.release,
    abi.FUSE_FSYNC: ops_files.fsync,
    abi.FUSE_FLUSH: ops_files.flush,
    abi.FUSE_INIT: ops_session.init,
    abi.FUSE_OPENDIR: ops_files.opendir,
    abi.FUSE_READDIR: ops_dirs.readdir,
    abi.FUSE_RELEASEDIR: ops_files.release,
    abi.FUSE_FSYNCDIR: ops_files.fsync,
    abi.FUSE_ACCESS: ops_inodes.access,
    abi.FUSE_CREATE: ops_names.create,
    abi.FUSE_TMPFILE: ops_names.tmpfile,
    abi.FUSE_GETXATTR: ops_xattrs.getxattr,
    abi.FUSE_SETXATTR: ops_xattrs.setxattr,
    abi.FUSE_LISTXATTR: ops_xattrs.listxattr,
    abi.FUSE_REMOVEXATTR: ops_xattrs.removexattr,
    abi.FUSE_STATX: ops_inodes.statx,
    abi.FUSE_IOCTL: ops_files.ioctl,
    abi.FUSE_GETLK: ops_locks.getlk,
    abi.FUSE_SETLK: ops_locks.setlk,
    abi.FUSE_SETLKW: ops_locks.setlkw,
    abi.FUSE_INTERRUPT: ops_session.interrupt,
    abi.FUSE_DESTROY: ops_session.destroy,
    abi.FUSE_BATCH_FORGET: ops_session.batch_forget,
    abi.FUSE_FALLOCATE: ops_files.fallocate,
    abi.FUSE_READDIRPLUS: ops_dirs.readdirplus,
    abi.FUSE_RENAME2: ops_names.rename2,
    abi.FUSE_LSEEK: ops_inodes.lseek,
    abi.FUSE_COPY_FILE_RANGE: ops_files.copy_file_range,
    abi.FUSE_COPY_FILE_RANGE_64: ops_files.copy_file_range_64,
    abi.FUSE_SYNCFS: ops_inodes.syncfs,
}

WITHOUT_REPLY = frozenset({abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET, abi.FUSE_INTERRUPT})
