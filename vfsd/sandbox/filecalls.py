"""File system calls that Python's `os` lacks, or makes through a system call a confined process must not have.

`os.fstat` is newfstatat(2) in glibc 2.36, a call that takes a path; the worker uses fstat(2) itself. All work on
descriptors, raise OSError with the kernel's errno, and release the GIL while the kernel works. Buffers are per thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800
STATX_MNT_ID = 0x1000
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

MAX_ENTRIES_BYTES = 64 * 1024  # of one getdents64
HANDLE_BYTES_MAX = 128  # MAX_HANDLE_SZ

# The commands that pass, and the size of each one's argument: linux/fs.h. Inode flags (chattr), project ids (struct fsxattr).
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
IOCTL_BYTES = {FS_IOC_GETFLAGS: 4, FS_IOC_SETFLAGS: 4, FS_IOC_FSGETXATTR: 28, FS_IOC_FSSETXATTR: 28}
IOCTLS_THAT_WRITE = frozenset({FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR})
_IOCTL_ROOM = 32

_FLOCK = struct.Struct("<hhxxxxqqixxxx")  # struct flock: type, whence, start, length (0: to the end), pid
_LAST_OFFSET = (1 << 63) - 1

_HANDLE_HEADER = struct.Struct("<Ii")  # struct file_handle: handle_bytes, handle_type; the bytes follow

# Calls that libc does not make as they are: it adds a path (fstat), changes all threads (setresuid), or takes another call
# when no flag is set (renameat2). x86_64 and aarch64.
_NUMBERS = {
    "x86_64": {
        "fstat": 5,
        "getdents64": 217,
        "setresuid": 117,
        "setresgid": 119,
        "setgroups": 116,
        "capset": 126,
        "fchownat": 260,
        "renameat2": 316,
        "ioctl": 16,
    },
    "aarch64": {
        "fstat": 80,
        "getdents64": 61,
        "setresuid": 147,
        "setresgid": 149,
        "setgroups": 159,
        "capset": 91,
        "fchownat": 54,
        "renameat2": 276,
        "ioctl": 29,
    },
}
_MACHINE = platform.machine()
_NR = _NUMBERS[_MACHINE]

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _raise(path: str | None = None) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


class Statx(NamedTuple):
    """What statx(2) says of an inode, in the order of the kernel's structure. Times: seconds and nanoseconds."""

    mask: int
    blksize: int
    attributes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    attributes_mask: int
    atime: int
    atime_nsec: int
    btime: int
    btime_nsec: int
    ctime: int
    ctime_nsec: int
    mtime: int
    mtime_nsec: int
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int
    mnt_id: int


_STATX = struct.Struct("<IIQIIIHxxQQQQ qIxxxx qIxxxx qIxxxx qIxxxx IIIIQ")

# struct stat of fstat(2): x86_64 has dev ino nlink mode uid gid . rdev size blksize blocks and the times;
# the generic layout has dev ino mode nlink uid gid rdev . size blksize . blocks and the times.
_STAT = struct.Struct("<QQQIIIxxxxQqqqqQqQqQ" if _MACHINE == "x86_64" else "<QQIIIIQxxxxxxxxqixxxxqqQqQqQ")
_STAT_MODE = struct.Struct("<24xI" if _MACHINE == "x86_64" else "<16xI")


class Stat(NamedTuple):
    """What fstat(2) says, the parts a FUSE attribute is made of."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev_major: int
    rdev_minor: int
    size: int
    blksize: int
    blocks: int
    atime: int
    atime_nsec: int
    mtime: int
    mtime_nsec: int
    ctime: int
    ctime_nsec: int


class _Buffers(threading.local):
    """One set per thread: two threads may be inside the kernel at once."""

    def __init__(self) -> None:
        super().__init__()
        self.statx = ctypes.create_string_buffer(256)
        self.stat = ctypes.create_string_buffer(144)
        self.statfs = ctypes.create_string_buffer(128)
        self.handle = ctypes.create_string_buffer(_HANDLE_HEADER.size + HANDLE_BYTES_MAX)
        self.mount_id = ctypes.c_int()
        self.entries = ctypes.create_string_buffer(MAX_ENTRIES_BYTES)


_buffers = _Buffers()

_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_libc.name_to_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_libc.open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)


def statx(fd: int) -> Statx:
    """Attributes, birth time and mount id of the inode behind `fd` (any descriptor, O_PATH included)."""
    buffer = _buffers.statx
    if _libc.statx(fd, b"", AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID, buffer) < 0:
        _raise()
    return Statx._make(_STATX.unpack_from(buffer))


def fstat(fd: int) -> Stat:
    """Attributes of an open file, by the system call that takes no path."""
    buffer = _buffers.stat
    if _syscall(_NR["fstat"], fd, buffer) < 0:
        _raise()
    return _decode_stat(_STAT.unpack_from(buffer))


def mode_of(fd: int) -> int:
    """Type and permissions of an open file, as `fstat`: asked for before every write, so nothing else is decoded."""
    buffer = _buffers.stat
    if _syscall(_NR["fstat"], fd, buffer) < 0:
        _raise()
    mode: int = _STAT_MODE.unpack_from(buffer)[0]
    return mode


def _decode_stat(raw: tuple[int, ...]) -> Stat:
    if _MACHINE == "x86_64":
        _dev, ino, nlink, mode, uid, gid, rdev, size, blksize, blocks, *times = raw
    else:
        _dev, ino, mode, nlink, uid, gid, rdev, size, blksize, blocks, *times = raw
    return Stat(ino, mode, nlink, uid, gid, os.major(rdev), os.minor(rdev), size, blksize, blocks, *times)


def getdents64(fd: int, most_bytes: int) -> bytes:
    """Directory entries from the description's position on, as the kernel lays them out (struct linux_dirent64)."""
    # One buffer for all sizes: each size of a ctypes array is a type of its own, and types are freed by the collector only.
    buffer = _buffers.entries
    most_bytes = min(most_bytes, MAX_ENTRIES_BYTES)
    length = _syscall(_NR["getdents64"], fd, buffer, ctypes.c_uint(most_bytes))
    if length < 0:
        _raise()
    return buffer.raw[:length]


def name_to_handle_at(fd: int) -> bytes:
    """The file handle of the inode behind `fd`, as the kernel's struct file_handle (header and bytes)."""
    buffer, mount_id = _buffers.handle, _buffers.mount_id
    _HANDLE_HEADER.pack_into(buffer, 0, HANDLE_BYTES_MAX, 0)
    if _libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), AT_EMPTY_PATH) < 0:
        _raise()
    length, _kind = _HANDLE_HEADER.unpack_from(buffer)
    return buffer.raw[: _HANDLE_HEADER.size + length]


def open_by_handle_at(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open a struct file_handle that `name_to_handle_at` gave; the caller owns the descriptor. Needs CAP_DAC_READ_SEARCH."""
    fd: int = _libc.open_by_handle_at(mount_fd, handle, flags | os.O_CLOEXEC)
    if fd < 0:
        _raise()
    return fd


def ioctl(fd: int, command: int, argument: bytes) -> bytes:
    """A command of IOCTL_BYTES; returns its argument as the kernel left it."""
    buffer = ctypes.create_string_buffer(argument, _IOCTL_ROOM)  # one size for all: see getdents64
    if _syscall(_NR["ioctl"], fd, ctypes.c_ulong(command), buffer) < 0:
        _raise()
    return buffer.raw[: IOCTL_BYTES[command]]


def set_lock(fd: int, kind: int, start: int, end: int) -> None:
    """Lock (F_RDLCK, F_WRLCK) or unlock (F_UNLCK) bytes for the description behind `fd`, without waiting: EAGAIN if another has them."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, _lock_length(start, end), 0))


def conflicting_lock(fd: int, kind: int, start: int, end: int) -> tuple[int, int, int]:
    """(first byte, last byte, kind) of a lock in the way of this one; kind F_UNLCK if none is."""
    packed = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(kind, os.SEEK_SET, start, _lock_length(start, end), 0))
    kind, _whence, start, length, _pid = _FLOCK.unpack(packed)
    return start, start + length - 1 if length else _LAST_OFFSET, kind


def _lock_length(start: int, end: int) -> int:
    return 0 if end == _LAST_OFFSET else end - start + 1


def flock(fd: int, kind: int) -> None:
    """Lock the description behind `fd`, or unlock it, by the kinds of fcntl, without waiting: EAGAIN if another has it."""
    operation = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}[kind]
    fcntl.flock(fd, operation | fcntl.LOCK_NB)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length) < 0:
        _raise()


def renameat2(old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int) -> None:
    names = ctypes.c_char_p(old_name), ctypes.c_char_p(new_name)
    if _syscall(_NR["renameat2"], old_dir, names[0], new_dir, names[1], ctypes.c_uint(flags)) < 0:
        _raise()


def fchownat(fd: int, uid: int, gid: int) -> None:
    """Change the owner of the inode behind `fd` (O_PATH too, a symlink itself); -1 leaves a side as it is."""
    empty = ctypes.c_char_p(b"")
    if _syscall(_NR["fchownat"], fd, empty, ctypes.c_uint(uid), ctypes.c_uint(gid), AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0:
        _raise()


def utimensat(dir_fd: int, name: bytes, times: tuple[int, int, int, int]) -> None:
    """Set (atime s, ns, mtime s, ns); ns may be UTIME_NOW or UTIME_OMIT."""
    packed = (ctypes.c_int64 * 4)(*times)
    if _libc.utimensat(dir_fd, name, packed, 0) < 0:
        _raise()


def syncfs(fd: int) -> None:
    if _libc.syncfs(fd) < 0:
        _raise()


def file_system_type(fd: int) -> int:
    """The f_type of fstatfs(2): a magic number, which Python's statvfs leaves out."""
    buffer = _buffers.statfs
    if _libc.fstatfs(fd, buffer) < 0:
        _raise()
    return int.from_bytes(buffer.raw[:8], "little") & 0xFFFFFFFF


def set_thread_gid(gid: int) -> None:
    """setresgid(-1, gid, -1) for this thread only; os.setresgid would change every thread."""
    if _syscall(_NR["setresgid"], ctypes.c_uint(-1), ctypes.c_uint(gid), ctypes.c_uint(-1)) < 0:
        _raise()


def set_thread_uid(uid: int) -> None:
    """setresuid(-1, uid, -1) for this thread only."""
    if _syscall(_NR["setresuid"], ctypes.c_uint(-1), ctypes.c_uint(uid), ctypes.c_uint(-1)) < 0:
        _raise()


def set_thread_groups(groups: Sequence[int]) -> None:
    """setgroups(2) for this thread only."""
    packed = struct.pack(f"={len(groups)}I", *groups)
    if _syscall(_NR["setgroups"], ctypes.c_ulong(len(groups)), ctypes.c_char_p(packed)) < 0:
        _raise()


def set_thread_effective_capabilities(effective: int, permitted: int) -> None:
    """capset(2) for this thread: the two masks; nothing inheritable."""
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    low, high = 0xFFFFFFFF, 32
    data = struct.pack("<6I", effective & low, permitted & low, 0, effective >> high, permitted >> high, 0)
    if _syscall(_NR["capset"], ctypes.c_char_p(header), ctypes.c_char_p(data)) < 0:
        _raise()
