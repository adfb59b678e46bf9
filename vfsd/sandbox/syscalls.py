"""The system calls of confinement that Python 3.11 and python-prctl lack, one thin function each.

Used while a process is set up, never afterwards. Every function raises OSError with the kernel's errno. File calls of the
running daemon are in `filecalls`. Nothing here reads what a peer controls. Imports nothing of vfsd.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MNT_DETACH = 2

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_NOSYMFOLLOW = 0x00200000

PR_GET_SECUREBITS = 27
PR_SET_SECUREBITS = 28
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_IS_SET = 1
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC = 1

LANDLOCK_CREATE_RULESET_VERSION = 1

_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITY_WORDS = 2  # version 3 has two 32-bit words per set

# Calls numbered before the numbers became the same everywhere (424 and up), and without a wrapper in glibc 2.36.
_NUMBERS = {
    "x86_64": {"clone": 56, "pivot_root": 155, "seccomp": 317},
    "aarch64": {"clone": 220, "pivot_root": 41, "seccomp": 277},
}
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_MOUNT_SETATTR = 442
_NR_LANDLOCK_CREATE_RULESET = 444
_NR_LANDLOCK_RESTRICT_SELF = 446

_NR = _NUMBERS[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc_holding_the_gil = ctypes.PyDLL(None, use_errno=True)
_libc_holding_the_gil.syscall.restype = ctypes.c_long


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *arguments: int | bytes | ctypes.Structure | None) -> int:
    """syscall(2) with every argument as wide as a register; structures are passed by address."""
    converted = [_register(argument) for argument in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *converted))


def _register(argument: int | bytes | ctypes.Structure | None) -> object:
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_char_p(argument)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags))


def fork_into(namespaces: int) -> int:
    """fork(2), but the child, where this returns 0, is in new namespaces; only from the only thread of a process.

    libc and the interpreter do not know of the child: it must do little, and end by exec or os._exit. The GIL is held over
    the call, so the child has it too.
    """
    arguments = [ctypes.c_long(each) for each in (_NR["clone"], namespaces | signal.SIGCHLD, 0, 0, 0, 0)]
    return _check(_libc_holding_the_gil.syscall(*arguments))


def mount(source: bytes, target: bytes, file_system: bytes | None, flags: int) -> None:
    _check(_libc.mount(source, target, file_system, ctypes.c_ulong(flags), None))


def umount2(target: bytes, flags: int) -> None:
    _check(_libc.umount2(target, flags))


def pivot_root(new_root: bytes, put_old: bytes) -> None:
    _syscall(_NR["pivot_root"], new_root, put_old)


def open_tree(dir_fd: int, path: bytes, flags: int) -> int:
    return _syscall(_NR_OPEN_TREE, dir_fd, path, flags)


def move_mount(from_fd: int, from_path: bytes, to_fd: int, to_path: bytes, flags: int) -> None:
    _syscall(_NR_MOVE_MOUNT, from_fd, from_path, to_fd, to_path, flags)


def mount_setattr(dir_fd: int, path: bytes, flags: int, attributes: int) -> None:
    """Set (never clear) MOUNT_ATTR_* on a mount, with AT_RECURSIVE on all mounts below it."""
    attr = _MountAttr(attr_set=attributes)
    _syscall(_NR_MOUNT_SETATTR, dir_fd, path, flags, attr, ctypes.sizeof(attr))


def new_mount(file_system: bytes, options: dict[bytes, bytes], attributes: int) -> int:
    """A mount that is attached nowhere; it lives as long as the descriptor returned, or until it is moved somewhere."""
    context = _syscall(_NR_FSOPEN, file_system, FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            _syscall(_NR_FSCONFIG, context, FSCONFIG_SET_STRING, key, value, 0)
        _syscall(_NR_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_NR_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def prctl(option: int, argument: int, argument3: int = 0) -> int:
    """For what python-prctl refuses: an argument it does not know, an option it lacks."""
    arguments = [ctypes.c_ulong(each) for each in (argument, argument3, 0, 0)]
    return _check(_libc.prctl(option, *arguments))


def capget() -> tuple[int, int, int]:
    """The calling thread's effective, permitted and inheritable sets, as bit masks."""
    header, data = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0), (_CapData * _CAPABILITY_WORDS)()
    _check(_libc.capget(ctypes.byref(header), data))
    low, high = data
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set this thread's three sets exactly."""
    header, data = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0), (_CapData * _CAPABILITY_WORDS)()
    for word in range(_CAPABILITY_WORDS):
        low_bits = [mask >> 32 * word & 0xFFFFFFFF for mask in (effective, permitted, inheritable)]
        data[word] = _CapData(*low_bits)
    _check(_libc.capset(ctypes.byref(header), data))


def seccomp_load(program: bytes, instructions: int) -> int:
    """Put a filter on every thread of this process (TSYNC). A positive result is the thread that could not take it."""
    return _syscall(_NR["seccomp"], SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, _SockFprog(instructions, program))


def landlock_abi() -> int:
    """The version of Landlock's interface that the kernel has; OSError ENOSYS or EOPNOTSUPP where it has none."""
    return _syscall(_NR_LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)


def landlock_create_ruleset(attribute: bytes) -> int:
    """A ruleset that handles the rights named in a struct landlock_ruleset_attr; no rule in it means all are denied."""
    return _syscall(_NR_LANDLOCK_CREATE_RULESET, attribute, len(attribute), 0)


def landlock_restrict_self(ruleset_fd: int) -> None:
    """For this thread and those it starts."""
    _syscall(_NR_LANDLOCK_RESTRICT_SELF, ruleset_fd, 0)
