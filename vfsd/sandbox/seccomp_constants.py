"""The names that seccomp_policy.toml may use for numbers, and which system call arguments are 64 bits wide.

Kernel names and values, verbatim. They are the same on both machines that have a policy, except those of `_OF_AARCH64`: a policy
is checked for both on either.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket

# These are the same on every machine that has a policy, so Python's own modules know them.
_FROM_OS = (
    "O_RDONLY", "O_WRONLY", "O_RDWR", "O_CREAT", "O_EXCL", "O_NOCTTY", "O_TRUNC", "O_APPEND", "O_NONBLOCK", "O_DSYNC",
    "O_SYNC", "O_ASYNC", "O_NOATIME", "O_CLOEXEC", "O_PATH",
    "RWF_HIPRI", "RWF_DSYNC", "RWF_SYNC", "RWF_NOWAIT", "RWF_APPEND", "XATTR_CREATE", "XATTR_REPLACE",
)  # fmt: skip

_COMMON: dict[str, int] = {
    **{name: getattr(os, name) for name in _FROM_OS},
    **{name: getattr(fcntl, name) for name in ("F_GETFL", "F_SETFL", "F_DUPFD_CLOEXEC", "F_OFD_GETLK", "F_OFD_SETLK", "F_GET_SEALS")},
    **{name: getattr(fcntl, name) for name in ("F_SETOWN", "F_SETSIG", "F_SETLEASE", "F_NOTIFY")},
    **{name: getattr(fcntl, name) for name in ("LOCK_SH", "LOCK_EX", "LOCK_UN", "LOCK_NB")},
    **{name: getattr(mmap, name) for name in ("PROT_READ", "PROT_WRITE", "PROT_EXEC", "MAP_SHARED", "MAP_PRIVATE", "MAP_ANONYMOUS")},
    **{name: getattr(mmap, name) for name in ("MADV_DONTNEED", "MADV_FREE")},
    **{name: getattr(socket, name) for name in ("SOL_SOCKET", "SO_TYPE", "SO_PROTOCOL", "SO_DOMAIN")},
    "F_SETOWN_EX": 15,
    "PROT_NONE": 0,
    "MAP_NORESERVE": 0x4000,
    "MREMAP_MAYMOVE": 1,
    "AT_SYMLINK_NOFOLLOW": 0x100,
    "AT_REMOVEDIR": 0x200,
    "AT_SYMLINK_FOLLOW": 0x400,
    "AT_NO_AUTOMOUNT": 0x800,
    "AT_EMPTY_PATH": 0x1000,
    "AT_STATX_FORCE_SYNC": 0x2000,
    "AT_STATX_DONT_SYNC": 0x4000,
    "RENAME_NOREPLACE": 1,
    "RENAME_EXCHANGE": 2,
    "RENAME_WHITEOUT": 4,
    "FALLOC_FL_KEEP_SIZE": 0x01,
    "FALLOC_FL_PUNCH_HOLE": 0x02,
    "FALLOC_FL_COLLAPSE_RANGE": 0x08,
    "FALLOC_FL_ZERO_RANGE": 0x10,
    "FALLOC_FL_INSERT_RANGE": 0x20,
    "FALLOC_FL_UNSHARE_RANGE": 0x40,
    "FS_IOC_GETFLAGS": 0x80086601,
    "FS_IOC_SETFLAGS": 0x40086602,
    "FS_IOC_FSGETXATTR": 0x801C581F,
    "FS_IOC_FSSETXATTR": 0x401C5820,
    "TIOCSTI": 0x5412,
    "TIOCLINUX": 0x541C,
    "FUTEX_WAIT": 0,
    "FUTEX_WAKE": 1,
    "FUTEX_WAIT_BITSET": 9,
    "FUTEX_PRIVATE_FLAG": 128,
    "FUTEX_CLOCK_REALTIME": 256,
    "CLOCK_REALTIME": 0,
    "CLOCK_MONOTONIC": 1,
    "EPOLL_CTL_ADD": 1,
    "EPOLL_CTL_DEL": 2,
    "EPOLL_CTL_MOD": 3,
    "MSG_DONTWAIT": 0x40,
    "MSG_NOSIGNAL": 0x4000,
    "MSG_CMSG_CLOEXEC": 0x40000000,
    "SEEK_SET": 0,
    "SEEK_CUR": 1,
    "SEEK_END": 2,
    "SEEK_DATA": 3,
    "SEEK_HOLE": 4,
    "STATX_BASIC_STATS": 0x7FF,
    "STATX_BTIME": 0x800,
    "STATX_MNT_ID": 0x1000,
    "UNCHANGED_ID": 0xFFFFFFFF,  # (uid_t) -1: leave this id as it is
    "NULL": 0,
}

_OF_X86_64 = {"O_DIRECT": 0o40000, "O_DIRECTORY": 0o200000, "O_NOFOLLOW": 0o400000, "O_TMPFILE": 0o20200000}
_OF_AARCH64 = {"O_DIRECT": 0o200000, "O_DIRECTORY": 0o40000, "O_NOFOLLOW": 0o100000, "O_TMPFILE": 0o20040000}

_CONSTANTS = {"x86_64": _COMMON | _OF_X86_64, "aarch64": _COMMON | _OF_AARCH64}
ARCHITECTURES = tuple(_CONSTANTS)


def constants_of(architecture: str) -> dict[str, int]:
    return _CONSTANTS[architecture]


# Arguments that the kernel takes as 64 bits: addresses, lengths, offsets, `unsigned long`. Of any other argument it looks at
# the low 32 bits only, while a filter compares all 64; an argument that is missing here is treated as the narrow kind.
WIDE_ARGUMENTS: dict[str, frozenset[int]] = {
    "mmap": frozenset({0, 1, 2, 3, 4, 5}),  # prot, flags and fd are unsigned long in the system call
    "munmap": frozenset({0, 1}),
    "mprotect": frozenset({0, 1, 2}),
    "mremap": frozenset({0, 1, 2, 3, 4}),
    "madvise": frozenset({0, 1}),
    "brk": frozenset({0}),
    "read": frozenset({1, 2}),
    "write": frozenset({1, 2}),
    "sendto": frozenset({1, 2, 4}),
    "recvfrom": frozenset({1, 2, 4, 5}),
    "sendmsg": frozenset({1}),
    "recvmsg": frozenset({1}),
    "lseek": frozenset({1}),
    "ftruncate": frozenset({1}),
    "fallocate": frozenset({2, 3}),
    "fcntl": frozenset({2}),
    "preadv": frozenset({1, 2, 3, 4}),
    "pwritev": frozenset({1, 2, 3, 4}),
    "preadv2": frozenset({1, 2, 3, 4}),
    "pwritev2": frozenset({1, 2, 3, 4}),
    "copy_file_range": frozenset({1, 3, 4}),
}
