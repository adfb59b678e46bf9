"""FUSE operations as functions: decoded results, or OSError with the daemon's errno."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from tests.support.frontend.fuse_session import HIPRIO, FuseSession, Pending
from tests.support.frontend.fuse_types import Attr, Attributes, Dirent, Entry, InitOut, Opened, ProtocolViolation, Statfs, decode_dirents
from vfsd.wire import fuse_abi as abi
from vfsd.wire.attr import STATX

ROOT = abi.FUSE_ROOT_ID

# What Linux 6.1 offers (fuse_send_init over virtio-fs), with the flags that only later kernels have left out.
LINUX_INIT_FLAGS = (
    abi.FUSE_ASYNC_READ
    | abi.FUSE_POSIX_LOCKS
    | abi.FUSE_ATOMIC_O_TRUNC
    | abi.FUSE_EXPORT_SUPPORT
    | abi.FUSE_BIG_WRITES
    | abi.FUSE_DONT_MASK
    | abi.FUSE_FLOCK_LOCKS
    | abi.FUSE_HAS_IOCTL_DIR
    | abi.FUSE_AUTO_INVAL_DATA
    | abi.FUSE_DO_READDIRPLUS
    | abi.FUSE_READDIRPLUS_AUTO
    | abi.FUSE_ASYNC_DIO
    | abi.FUSE_WRITEBACK_CACHE
    | abi.FUSE_NO_OPEN_SUPPORT
    | abi.FUSE_PARALLEL_DIROPS
    | abi.FUSE_HANDLE_KILLPRIV
    | abi.FUSE_POSIX_ACL
    | abi.FUSE_ABORT_ERROR
    | abi.FUSE_MAX_PAGES
    | abi.FUSE_CACHE_SYMLINKS
    | abi.FUSE_NO_OPENDIR_SUPPORT
    | abi.FUSE_EXPLICIT_INVAL_DATA
    | abi.FUSE_SUBMOUNTS
    | abi.FUSE_HANDLE_KILLPRIV_V2
    | abi.FUSE_SETXATTR_EXT
    | abi.FUSE_INIT_EXT
    | abi.FUSE_SECURITY_CTX
)
_NO_FH = 0


def _name(*names: bytes) -> bytes:
    return b"".join(name + b"\0" for name in names)


class FuseClient(FuseSession):
    """A guest kernel's calls, one method per operation. Names are bytes."""

    # Session

    def init(self, *, major: int = 7, minor: int = 38, flags: int = LINUX_INIT_FLAGS, max_readahead: int = 1 << 20) -> InitOut:
        body = abi.fuse_init_in.pack(major, minor, max_readahead, flags & 0xFFFF_FFFF, flags >> 32)
        if minor < 36:
            body = body[: abi.FUSE_COMPAT_INIT_IN_SIZE]
        reply = self.request(abi.FUSE_INIT, 0, body, abi.fuse_init_out.size)
        *fields, flags2 = abi.fuse_init_out.unpack(reply)
        fields[3] |= flags2 << 32
        return InitOut(*fields)

    def destroy(self) -> None:
        self.request(abi.FUSE_DESTROY, 0)

    # Lookups

    def lookup(self, parent: int, name: bytes) -> Entry:
        return self._entry(abi.FUSE_LOOKUP, parent, _name(name))

    def forget(self, nodeid: int, nlookup: int = 1, *, queue: int = HIPRIO) -> None:
        self.send_forgotten(abi.FUSE_FORGET, nodeid, abi.fuse_forget_in.pack(nlookup), queue=queue)

    def batch_forget(self, forgets: Sequence[tuple[int, int]], *, queue: int = HIPRIO) -> None:
        """(nodeid, nlookup) pairs."""
        body = abi.fuse_batch_forget_in.pack(len(forgets)) + b"".join(abi.fuse_forget_one.pack(*one) for one in forgets)
        self.send_forgotten(abi.FUSE_BATCH_FORGET, 0, body, queue=queue)

    def interrupt(self, unique: int) -> None:
        self.send_forgotten(abi.FUSE_INTERRUPT, 0, abi.fuse_interrupt_in.pack(unique))

    def walk(self, nodeid: int, path: bytes) -> Entry:
        """LOOKUP component by component; every one counts."""
        *parents, last = path.split(b"/")
        for component in parents:
            nodeid = self.lookup(nodeid, component).nodeid
        return self.lookup(nodeid, last)

    # Attributes

    def getattr(self, nodeid: int, fh: int | None = None, *, queue: int | None = None) -> Attributes:
        body = abi.fuse_getattr_in.pack(0 if fh is None else abi.FUSE_GETATTR_FH, fh or _NO_FH)
        return Attributes.decode(self.request(abi.FUSE_GETATTR, nodeid, body, abi.fuse_attr_out.size, queue=queue))

    def attr(self, nodeid: int, *, queue: int | None = None) -> Attr:
        return self.getattr(nodeid, queue=queue).attr

    def setattr(
        self,
        nodeid: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
        fh: int | None = None,
        extra_valid: int = 0,
    ) -> Attributes:
        """Set what is given. `extra_valid`: FATTR_ATIME_NOW | FATTR_ATIME and the like."""
        given = {
            abi.FATTR_MODE: mode,
            abi.FATTR_UID: uid,
            abi.FATTR_GID: gid,
            abi.FATTR_SIZE: size,
            abi.FATTR_ATIME: atime_ns,
            abi.FATTR_MTIME: mtime_ns,
            abi.FATTR_CTIME: ctime_ns,
            abi.FATTR_FH: fh,
        }
        valid = extra_valid | sum(bit for bit, value in given.items() if value is not None)
        times = [divmod(value or 0, 1_000_000_000) for value in (atime_ns, mtime_ns, ctime_ns)]
        seconds = [second & 0xFFFF_FFFF_FFFF_FFFF for second, _ in times]
        nanoseconds = [nsec for _, nsec in times]
        body = abi.fuse_setattr_in.pack(valid, fh or _NO_FH, size or 0, 0, *seconds, *nanoseconds, mode or 0, uid or 0, gid or 0)
        return Attributes.decode(self.request(abi.FUSE_SETATTR, nodeid, body, abi.fuse_attr_out.size))

    def statx(self, nodeid: int) -> tuple[int, ...]:
        """The fields of wire.attr.STATX."""
        reply = self.request(abi.FUSE_STATX, nodeid, abi.fuse_statx_in.pack(0, 0, 0, 0xFFF), abi.FUSE_STATX_OUT_HEAD.size + STATX.size)
        return STATX.unpack_from(reply, abi.FUSE_STATX_OUT_HEAD.size)

    def access(self, nodeid: int, mask: int) -> None:
        self.request(abi.FUSE_ACCESS, nodeid, abi.fuse_access_in.pack(mask))

    def statfs(self, nodeid: int = ROOT) -> Statfs:
        return Statfs(*abi.fuse_statfs_out.unpack(self.request(abi.FUSE_STATFS, nodeid, b"", abi.fuse_statfs_out.size)))

    # Names

    def readlink(self, nodeid: int) -> bytes:
        return self.request(abi.FUSE_READLINK, nodeid, b"", 4096)

    def symlink(self, parent: int, name: bytes, target: bytes, *, extensions: bytes = b"") -> Entry:
        return self._entry(abi.FUSE_SYMLINK, parent, _name(name, target) + extensions)

    def mknod(self, parent: int, name: bytes, mode: int, *, rdev: int = 0, umask: int = 0, extensions: bytes = b"") -> Entry:
        return self._entry(abi.FUSE_MKNOD, parent, abi.fuse_mknod_in.pack(mode, rdev, umask) + _name(name) + extensions)

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755, *, umask: int = 0, extensions: bytes = b"") -> Entry:
        return self._entry(abi.FUSE_MKDIR, parent, abi.fuse_mkdir_in.pack(mode, umask) + _name(name) + extensions)

    def link(self, nodeid: int, newparent: int, newname: bytes) -> Entry:
        return self._entry(abi.FUSE_LINK, newparent, abi.fuse_link_in.pack(nodeid) + _name(newname))

    def unlink(self, parent: int, name: bytes) -> None:
        self.request(abi.FUSE_UNLINK, parent, _name(name))

    def rmdir(self, parent: int, name: bytes) -> None:
        self.request(abi.FUSE_RMDIR, parent, _name(name))

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes) -> None:
        self.request(abi.FUSE_RENAME, parent, abi.fuse_rename_in.pack(newparent) + _name(name, newname))

    def rename2(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int = 0) -> None:
        self.request(abi.FUSE_RENAME2, parent, abi.fuse_rename2_in.pack(newparent, flags) + _name(name, newname))

    def create(
        self,
        parent: int,
        name: bytes,
        mode: int = 0o644,
        flags: int = os.O_RDWR,
        *,
        umask: int = 0,
        open_flags: int = 0,
        extensions: bytes = b"",
    ) -> tuple[Entry, Opened]:
        """`open_flags`: FUSE_OPEN_*."""
        body = abi.fuse_create_in.pack(flags, mode, umask, open_flags) + _name(name) + extensions
        reply = self.request(abi.FUSE_CREATE, parent, body, abi.fuse_entry_out.size + abi.fuse_open_out.size)
        return Entry.decode(reply[: abi.fuse_entry_out.size]), Opened(*abi.fuse_open_out.unpack(reply[abi.fuse_entry_out.size :]))

    def tmpfile(
        self, parent: int, mode: int = 0o644, flags: int = os.O_RDWR, *, umask: int = 0, extensions: bytes = b""
    ) -> tuple[Entry, Opened]:
        """Linux sends the directory's dentry name along."""
        body = abi.fuse_create_in.pack(flags, mode, umask, 0) + _name(b"#1") + extensions
        reply = self.request(abi.FUSE_TMPFILE, parent, body, abi.fuse_entry_out.size + abi.fuse_open_out.size)
        return Entry.decode(reply[: abi.fuse_entry_out.size]), Opened(*abi.fuse_open_out.unpack(reply[abi.fuse_entry_out.size :]))

    def _entry(self, opcode: int, nodeid: int, body: bytes) -> Entry:
        return Entry.decode(self.request(opcode, nodeid, body, abi.fuse_entry_out.size))

    # Extended attributes

    def getxattr(self, nodeid: int, name: bytes, size: int = 4096) -> bytes:
        return self.request(abi.FUSE_GETXATTR, nodeid, abi.fuse_getxattr_in.pack(size) + _name(name), size)

    def listxattr(self, nodeid: int, size: int = 4096) -> set[bytes]:
        """Names, of which none may be there twice."""
        names = self.request(abi.FUSE_LISTXATTR, nodeid, abi.fuse_getxattr_in.pack(size), size).split(b"\0")
        if names.pop() or len(names) != len(set(names)):
            raise ProtocolViolation(f"not a list of names: {names}")
        return set(names)

    def xattr_bytes(self, nodeid: int, name: bytes | None = None) -> int:
        """The length of a value, or of the list of names: an answer to size 0."""
        body = abi.fuse_getxattr_in.pack(0) + (b"" if name is None else _name(name))
        reply = self.request(abi.FUSE_LISTXATTR if name is None else abi.FUSE_GETXATTR, nodeid, body, abi.fuse_getxattr_out.size)
        return int(abi.fuse_getxattr_out.unpack(reply)[0])

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int = 0, *, own_flags: int | None = None) -> None:
        """`own_flags`: FUSE_SETXATTR_*, in a session that agreed on FUSE_SETXATTR_EXT; None: the header of one that has not."""
        head = abi.fuse_setxattr_in.pack(len(value), flags, own_flags or 0)
        head = head[: abi.FUSE_COMPAT_SETXATTR_IN_SIZE] if own_flags is None else head
        self.request(abi.FUSE_SETXATTR, nodeid, head + _name(name) + value)

    def removexattr(self, nodeid: int, name: bytes) -> None:
        self.request(abi.FUSE_REMOVEXATTR, nodeid, _name(name))

    # Open files

    def open(self, nodeid: int, flags: int = os.O_RDONLY, *, open_flags: int = 0) -> Opened:
        """`open_flags`: FUSE_OPEN_*."""
        return self._open(abi.FUSE_OPEN, nodeid, flags, open_flags)

    def opendir(self, nodeid: int, flags: int = os.O_RDONLY | os.O_DIRECTORY) -> Opened:
        return self._open(abi.FUSE_OPENDIR, nodeid, flags)

    def _open(self, opcode: int, nodeid: int, flags: int, open_flags: int = 0) -> Opened:
        body = abi.fuse_open_in.pack(flags, open_flags)
        return Opened(*abi.fuse_open_out.unpack(self.request(opcode, nodeid, body, abi.fuse_open_out.size)))

    def send_read(self, nodeid: int, fh: int, offset: int, size: int, *, queue: int | None = None, kick: bool = True) -> Pending:
        return self.send(abi.FUSE_READ, nodeid, abi.fuse_read_in.pack(fh, offset, size, 0, 0, 0), size, queue=queue, kick=kick)

    def read(self, nodeid: int, fh: int, offset: int, size: int) -> bytes:
        return self.finish(self.send_read(nodeid, fh, offset, size))

    def send_write(
        self,
        nodeid: int,
        fh: int,
        offset: int,
        data: bytes,
        *,
        flags: int = 0,
        open_flags: int = 0,
        queue: int | None = None,
        kick: bool = True,
    ) -> Pending:
        """`flags`: FUSE_WRITE_*; `open_flags`: those that the file has at that moment, as Linux sends with every write."""
        body = abi.fuse_write_in.pack(fh, offset, len(data), flags, 0, open_flags) + data
        return self.send(abi.FUSE_WRITE, nodeid, body, abi.fuse_write_out.size, queue=queue, kick=kick)

    def write(self, nodeid: int, fh: int, offset: int, data: bytes, *, flags: int = 0, open_flags: int = 0) -> int:
        pending = self.send_write(nodeid, fh, offset, data, flags=flags, open_flags=open_flags)
        (size,) = abi.fuse_write_out.unpack(self.finish(pending))
        if size > len(data):
            raise ProtocolViolation(f"{size} of {len(data)} bytes written")
        return int(size)

    def flush(self, nodeid: int, fh: int, *, lock_owner: int = 0) -> None:
        self.request(abi.FUSE_FLUSH, nodeid, abi.fuse_flush_in.pack(fh, lock_owner))

    def fsync(self, nodeid: int, fh: int, *, datasync: bool = False) -> None:
        self.request(abi.FUSE_FSYNC, nodeid, abi.fuse_fsync_in.pack(fh, int(datasync)))

    def fsyncdir(self, nodeid: int, fh: int, *, datasync: bool = False) -> None:
        self.request(abi.FUSE_FSYNCDIR, nodeid, abi.fuse_fsync_in.pack(fh, int(datasync)))

    def release(self, nodeid: int, fh: int, flags: int = 0) -> None:
        self.request(abi.FUSE_RELEASE, nodeid, abi.fuse_release_in.pack(fh, flags, 0, 0))

    def releasedir(self, nodeid: int, fh: int, flags: int = 0) -> None:
        self.request(abi.FUSE_RELEASEDIR, nodeid, abi.fuse_release_in.pack(fh, flags, 0, 0))

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int = 0) -> None:
        self.request(abi.FUSE_FALLOCATE, nodeid, abi.fuse_fallocate_in.pack(fh, offset, length, mode))

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        reply = self.request(abi.FUSE_LSEEK, nodeid, abi.fuse_lseek_in.pack(fh, offset, whence), abi.fuse_lseek_out.size)
        return int(abi.fuse_lseek_out.unpack(reply)[0])

    def copy_file_range(self, source: tuple[int, int, int], target: tuple[int, int, int], length: int, flags: int = 0) -> int:
        """source and target: (nodeid, fh, offset)."""
        nodeid, fh_in, off_in = source
        nodeid_out, fh_out, off_out = target
        body = abi.fuse_copy_file_range_in.pack(fh_in, off_in, nodeid_out, fh_out, off_out, length, flags)
        return int(abi.fuse_write_out.unpack(self.request(abi.FUSE_COPY_FILE_RANGE, nodeid, body, abi.fuse_write_out.size))[0])

    def copy_file_range_64(self, source: tuple[int, int, int], target: tuple[int, int, int], length: int) -> int:
        """As copy_file_range, with the longer answer."""
        nodeid, fh_in, off_in = source
        body = abi.fuse_copy_file_range_in.pack(fh_in, off_in, *target, length, 0)
        reply = self.request(abi.FUSE_COPY_FILE_RANGE_64, nodeid, body, abi.fuse_copy_file_range_out.size)
        return int(abi.fuse_copy_file_range_out.unpack(reply)[0])

    def ioctl(self, nodeid: int, fh: int, command: int, argument: bytes = b"", out_size: int = 0, *, flags: int = 0) -> bytes:
        """A restricted ioctl, as Linux makes one of FS_IOC_GETFLAGS and its like; the data that came back."""
        body = abi.fuse_ioctl_in.pack(fh, flags, command, 0, len(argument), out_size) + argument
        reply = self.request(abi.FUSE_IOCTL, nodeid, body, abi.fuse_ioctl_out.size + out_size)
        if abi.fuse_ioctl_out.unpack_from(reply) != (0, 0, 0, 0):
            raise ProtocolViolation("a restricted ioctl succeeds with result 0 and no retry")
        return reply[abi.fuse_ioctl_out.size :]

    def syncfs(self, nodeid: int = ROOT) -> None:
        self.request(abi.FUSE_SYNCFS, nodeid, abi.fuse_syncfs_in.pack())

    # Directories

    def readdir(self, nodeid: int, fh: int, offset: int = 0, size: int = 4096, *, plus: bool = False) -> list[Dirent]:
        """One READDIR or READDIRPLUS; empty at the end of the directory."""
        body = abi.fuse_read_in.pack(fh, offset, size, 0, 0, 0)
        return decode_dirents(self.request(abi.FUSE_READDIRPLUS if plus else abi.FUSE_READDIR, nodeid, body, size), plus=plus)

    def list(self, nodeid: int, *, size: int = 4096, plus: bool = False) -> list[Dirent]:
        """A whole directory, opened and released."""
        fh = self.opendir(nodeid).fh
        try:
            entries: list[Dirent] = []
            while some := self.readdir(nodeid, fh, entries[-1].off if entries else 0, size, plus=plus):
                entries += some
            return entries
        finally:
            self.releasedir(nodeid, fh)

    # Whole files

    def read_file(self, nodeid: int, *, chunk: int = 1 << 20) -> bytes:
        fh = self.open(nodeid).fh
        try:
            data = bytearray()
            while piece := self.read(nodeid, fh, len(data), chunk):
                data += piece
            return bytes(data)
        finally:
            self.release(nodeid, fh)

    def write_file(self, parent: int, name: bytes, data: bytes, mode: int = 0o644, *, chunk: int = 1 << 20) -> Entry:
        """Create, write, release; the entry's attributes are those from before the writing."""
        entry, opened = self.create(parent, name, mode, os.O_WRONLY | os.O_TRUNC)
        try:
            for start in range(0, len(data), chunk):
                piece = data[start : start + chunk]
                if self.write(entry.nodeid, opened.fh, start, piece) != len(piece):
                    raise ProtocolViolation("a short write to a regular file")
        finally:
            self.release(entry.nodeid, opened.fh)
        return entry


def with_length(message: bytes, length: int) -> bytes:
    """The same message with another value in fuse_in_header.len."""
    return struct.pack("<I", length) + message[4:]
