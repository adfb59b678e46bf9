"""Read the seccomp filters that the kernel has on a thread, as they were loaded (PTRACE_SECCOMP_GET_FILTER).

For tools, never for a role of the daemon. Who controls the bytes: the kernel; a filter is what the thread, or who started it,
once gave to seccomp(2), so what reads a program as a program must not trust it. The thread is stopped for a moment and goes on as
it was: no signal is sent, and the calls that a stop interrupts go on by restart_syscall(2), or with EINTR, which Python repeats.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vfsd.sandbox.seccomp_load import INSTRUCTION_BYTES

PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_SECCOMP_GET_FILTER = 0x420C

_WALL = 0x40000000  # __WALL: also threads that are not the leader
_STOP_SECONDS = 2.0  # only a thread that the kernel holds in an uninterruptible call takes longer
_LOOK_AGAIN_SECONDS = 0.001

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def read_filters(tid: int) -> tuple[bytes, ...]:
    """The BPF programs (struct sock_filter[]) on one thread, oldest first.

    Raises ProcessLookupError when it is gone; PermissionError when we may not look, which takes CAP_SYS_PTRACE and
    CAP_SYS_ADMIN in the first user namespace and no filter of our own; TimeoutError when it does not stop; OSError EIO or
    EINVAL from a kernel without CONFIG_CHECKPOINT_RESTORE.
    """
    with _stopped(tid):
        return tuple(_programs(tid))


@contextmanager
def _stopped(tid: int) -> Iterator[None]:
    _ptrace(PTRACE_SEIZE, tid)
    # A tracer can let go only of what has stopped. If it does not stop, or dies, our own end lets go of it.
    _ptrace(PTRACE_INTERRUPT, tid)
    _wait_for_stop(tid)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile
            _ptrace(PTRACE_DETACH, tid)


def _wait_for_stop(tid: int) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
    while True:
        try:
            waited, status = os.waitpid(tid, _WALL | os.WNOHANG)
        except ChildProcessError:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
        if waited and os.WIFSTOPPED(status):
            return
        if waited:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "it does not stop: the kernel holds it in an uninterruptible call")
        time.sleep(_LOOK_AGAIN_SECONDS)


def _programs(tid: int) -> Iterator[bytes]:
    index = 0
    while True:
        try:
            instructions = _ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index)
        except FileNotFoundError:  # ENOENT: there is no such filter
            return
        except OSError as error:
            if error.errno == errno.EINVAL and not _is_filtered(tid):
                return
            raise
        buffer = ctypes.create_string_buffer(instructions * INSTRUCTION_BYTES)
        _ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index, ctypes.addressof(buffer))
        yield buffer.raw
        index += 1


def _is_filtered(tid: int) -> bool:
    """Whether it has any filter: without one the kernel says EINVAL, as it does when it was built without this question."""
    with open(f"/proc/{tid}/status", encoding="utf-8", errors="backslashreplace") as file:
        return any(line.split() == ["Seccomp:", "2"] for line in file)


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    result: int = _libc.ptrace(request, tid, address, data)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
