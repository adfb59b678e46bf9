"""One call, or a few, for every rule of the policy: as the rule permits it, and what comes of it then.

The last call of a case is the one that a rule decides about; which rule that is, is worked out from the policy. An argument is a
number, `Fd` (a descriptor that the process holds), or a text: "buf:NAME" or "buf:NAME=HEX" (the address of a page that begins with
these bytes; the same name is the same page), "text:WORDS" (of a string), "page:N" (of mapped memory that nothing else uses).

All calls return at once and are harmless outside of the test's own directory, whether or not a filter stops them.
"""

import errno
import fcntl
import os
import socket
import stat
from dataclasses import dataclass
from enum import StrEnum

from vfsd.sandbox.seccomp_constants import constants_of

CONSTANTS = constants_of(os.uname().machine)
PAGE = 4096
CLOCK_MONOTONIC = 1
FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE, FUTEX_WAIT_BITSET_PRIVATE = 128, 129, 137
EPOLL_CTL_DEL = 2
PROT_RW = 3
MAP_SHARED, MAP_PRIVATE_ANONYMOUS = 0x01, 0x22
MREMAP_MAYMOVE = 1
AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = 0x400, 0x1000
THIS_INODE = AT_EMPTY_PATH | 0x100  # and AT_SYMLINK_NOFOLLOW
STATX_MASK = CONSTANTS["STATX_BASIC_STATS"] | CONSTANTS["STATX_BTIME"] | CONSTANTS["STATX_MNT_ID"]
UNCHANGED = 0xFFFFFFFF
NO_XATTRS = (errno.ENODATA, errno.EOPNOTSUPP)
NO_FLAGS = (errno.ENOTTY, errno.EOPNOTSUPP)
CAPABILITY_HEADER = "buf:header=2205082000000000"  # version 3, this thread
ONE = "buf:one=0100000000000000"


class Fd(StrEnum):
    """What `descriptors` of test_every_rule opens."""

    FILE = "fd:file"
    OTHER_FILE = "fd:other file"
    DIRECTORY = "fd:directory"
    SOCKET = "fd:socket"
    EPOLL = "fd:epoll"
    NULL = "fd:null"
    MEMFD = "fd:memfd"
    BROKEN_PIPE = "fd:broken pipe"
    SPARE = "fd:spare"


Call = tuple[str | int, ...]


@dataclass(frozen=True)
class Case:
    """`fails`: errnos that are as good as success, or all there can be. `ends`: the process ends with this status."""

    calls: tuple[Call, ...]
    gives: int | None = None
    fails: tuple[int, ...] = ()
    ends: int | None = None
    about: str | None = None  # a system call that the kernel makes us make

    @property
    def syscall(self) -> str:
        return self.about or str(self.calls[-1][0])


def case(*calls: Call, gives: int | None = None, fails: tuple[int, ...] = (), ends: int | None = None, about: str | None = None) -> Case:
    return Case(calls, gives, fails, ends, about)


def fails(number: int, *calls: Call) -> Case:
    return Case(calls, gives=-1, fails=(number,))


LIFE = [
    case(("exit_group", 7), ends=7),
    # The signal of a broken pipe comes before write(2) returns, and its handler ends by rt_sigreturn.
    case(("write", Fd.BROKEN_PIPE, ONE, 1), gives=-1, fails=(errno.EPIPE,), about="rt_sigreturn"),
    fails(errno.EINTR, ("restart_syscall",)),  # nothing was stopped
    case(("clock_gettime", CLOCK_MONOTONIC, "buf:time"), gives=0),
]
THREADS = [
    fails(errno.EAGAIN, ("futex", "buf:word", FUTEX_WAIT_PRIVATE, 1, 0)),
    case(("futex", "buf:word", FUTEX_WAKE_PRIVATE, 1), gives=0),
    fails(errno.EAGAIN, ("futex", "buf:word", FUTEX_WAIT_BITSET_PRIVATE, 1, 0, 0, 0xFFFFFFFF)),
    fails(errno.ENOSYS, ("clone3", 0, 0)),
]
WAIT = [
    case(("epoll_wait", Fd.EPOLL, "buf:events", 1, 0), gives=0),
    case(("epoll_pwait", Fd.EPOLL, "buf:events", 1, 0, 0, 8), gives=0),
    fails(errno.ENOENT, ("epoll_ctl", Fd.EPOLL, EPOLL_CTL_DEL, Fd.SOCKET, 0)),
]
POLL = [
    case(("poll", 0, 0, 0), gives=0),
    case(("ppoll", 0, 0, "buf:no time", 0, 0), gives=0),
]
MESSAGES = [
    fails(errno.EAGAIN, ("recvmsg", Fd.SOCKET, "buf:header", socket.MSG_DONTWAIT)),
    case(("sendmsg", Fd.SOCKET, "buf:header", socket.MSG_DONTWAIT), gives=0),
    case(("write", Fd.NULL, "buf:bytes", 8), gives=8),
    case(("close", Fd.SPARE), gives=0),
]
FILES = [
    case(("read", Fd.FILE, "buf:bytes", 0), gives=0),
    case(("fstat", Fd.FILE, "buf:stat"), gives=0),
]
RECEIVED_SOCKETS = [case(("getsockname", Fd.SOCKET, "buf:address", "buf:length=10"), gives=0)]
FIXED_MEMORY = [
    case(("brk", 0), gives=0),
    fails(errno.ENOMEM, ("mremap", "page:0", PAGE, 2 * PAGE, MREMAP_MAYMOVE)),
    case(("munmap", "page:0", PAGE), gives=0),
    fails(errno.ENOMEM, ("mmap", 0, PAGE, PROT_RW, MAP_PRIVATE_ANONYMOUS, UNCHANGED, 0)),
]
DUPLICATE = case(("fcntl", Fd.FILE, fcntl.F_DUPFD_CLOEXEC, 0))
SEND = case(("sendto", Fd.SOCKET, "buf:bytes", 0, socket.MSG_DONTWAIT, 0, 0), gives=0)

WORKER = [
    case(("mmap", 0, PAGE, PROT_RW, MAP_SHARED, Fd.MEMFD, 0)),
    fails(errno.ENOSYS, ("newfstatat", Fd.DIRECTORY, "text:file", "buf:stat", 0)),
    DUPLICATE,
    case(("preadv2", Fd.FILE, "buf:vector", 1, 0, 0, 0), gives=0),
    case(("pwritev2", Fd.FILE, "buf:vector", 1, 0, 0, 0), gives=0),
    case(("lseek", Fd.FILE, 0, os.SEEK_SET), gives=0),
    case(("lseek", Fd.FILE, 0, os.SEEK_HOLE)),
    SEND,
    case(("getdents64", Fd.DIRECTORY, "buf:entries", PAGE)),
    case(("copy_file_range", Fd.FILE, 0, Fd.OTHER_FILE, 0, 0, 0), gives=0),
]
CONTROL = [SEND, case(("fcntl", Fd.MEMFD, fcntl.F_GET_SEALS))]
BROKER = [
    case(("openat", Fd.DIRECTORY, "text:file", os.O_RDONLY | os.O_CLOEXEC, 0)),
    case(
        ("name_to_handle_at", Fd.FILE, "text:", "buf:handle=80000000", "buf:mount", AT_EMPTY_PATH),
        ("open_by_handle_at", Fd.DIRECTORY, "buf:handle", os.O_PATH | os.O_CLOEXEC),
    ),
    case(("name_to_handle_at", Fd.FILE, "text:", "buf:handle=80000000", "buf:mount", AT_EMPTY_PATH), gives=0),
    case(("statx", Fd.FILE, "text:", THIS_INODE, STATX_MASK, "buf:statx"), gives=0),
    case(("newfstatat", Fd.FILE, "text:", "buf:stat", AT_EMPTY_PATH), gives=0),
    case(("fstatfs", Fd.DIRECTORY, "buf:statfs"), gives=0),
    fails(errno.EINVAL, ("readlinkat", Fd.DIRECTORY, "text:file", "buf:text", 100)),
    case(("mkdirat", Fd.DIRECTORY, "text:made", 0o700), gives=0),
    case(("mknodat", Fd.DIRECTORY, "text:fifo", stat.S_IFIFO | 0o600, 0), gives=0),
    case(("symlinkat", "text:nowhere", Fd.DIRECTORY, "text:symlink"), gives=0),
    case(("linkat", Fd.DIRECTORY, "text:file", Fd.DIRECTORY, "text:link", AT_SYMLINK_FOLLOW), gives=0),
    fails(errno.ENOENT, ("unlinkat", Fd.DIRECTORY, "text:nothing", 0)),
    fails(errno.ENOENT, ("renameat2", Fd.DIRECTORY, "text:nothing", Fd.DIRECTORY, "text:still nothing", 0)),
    case(("fchmodat", Fd.DIRECTORY, "text:file", 0o600), gives=0),
    case(("fchownat", Fd.FILE, "text:", UNCHANGED, UNCHANGED, THIS_INODE), gives=0),
    case(("utimensat", Fd.DIRECTORY, "text:file", 0, 0), gives=0),
    case(("ftruncate", Fd.OTHER_FILE, 0), gives=0),
    case(("fallocate", Fd.OTHER_FILE, 0, 0, PAGE), gives=0),
    case(("fsync", Fd.FILE), gives=0),
    case(("fdatasync", Fd.FILE), gives=0),
    case(("syncfs", Fd.DIRECTORY), gives=0),
    case(("getxattr", "text:/file", "text:user.none", 0, 0), fails=NO_XATTRS),
    case(("setxattr", "text:/file", "text:user.made", ONE, 1, 0), gives=0, fails=NO_XATTRS),
    case(("listxattr", "text:/file", 0, 0), fails=NO_XATTRS),
    case(("removexattr", "text:/file", "text:user.none"), fails=NO_XATTRS),
    case(("umask", 0o77)),
    case(("ioctl", Fd.FILE, CONSTANTS["FS_IOC_GETFLAGS"], "buf:flags"), gives=0, fails=NO_FLAGS),
    case(
        ("ioctl", Fd.FILE, CONSTANTS["FS_IOC_GETFLAGS"], "buf:flags"),
        ("ioctl", Fd.FILE, CONSTANTS["FS_IOC_SETFLAGS"], "buf:flags"),
        gives=0,
        fails=NO_FLAGS,
    ),
    case(("ioctl", Fd.FILE, CONSTANTS["FS_IOC_FSGETXATTR"], "buf:project"), gives=0, fails=NO_FLAGS),
    case(
        ("ioctl", Fd.FILE, CONSTANTS["FS_IOC_FSGETXATTR"], "buf:project"),
        ("ioctl", Fd.FILE, CONSTANTS["FS_IOC_FSSETXATTR"], "buf:project"),
        gives=0,
        fails=NO_FLAGS,
    ),
    case(("fcntl", Fd.FILE, fcntl.F_GETFL)),
    DUPLICATE,
    case(("fcntl", Fd.FILE, fcntl.F_OFD_SETLK, "buf:lock"), gives=0),
    case(("fcntl", Fd.FILE, fcntl.F_OFD_GETLK, "buf:lock"), gives=0),
    case(("flock", Fd.FILE, fcntl.LOCK_SH | fcntl.LOCK_NB), gives=0),
    case(("setresuid", UNCHANGED, 1000, UNCHANGED), gives=0),
    case(("setresgid", UNCHANGED, 1000, UNCHANGED), gives=0),
    case(("setgroups", 0, 0), gives=0),
    case(("capset", CAPABILITY_HEADER, "buf:nothing"), gives=0),
    case(("mmap", 0, PAGE, PROT_RW, MAP_PRIVATE_ANONYMOUS, UNCHANGED, 0)),
    case(("mremap", "page:0", PAGE, 2 * PAGE, MREMAP_MAYMOVE)),
    case(("munmap", "page:0", PAGE), gives=0),
    case(("brk", 0)),
]

CASES = {
    "worker": [*LIFE, *THREADS, *WAIT, *MESSAGES, *FILES, *FIXED_MEMORY, *WORKER],
    "control": [*LIFE, *POLL, *MESSAGES, *RECEIVED_SOCKETS, *FIXED_MEMORY, *CONTROL],
    "broker": [*LIFE, *THREADS, *WAIT, *POLL, *MESSAGES, *FILES, *RECEIVED_SOCKETS, *BROKER],
}
