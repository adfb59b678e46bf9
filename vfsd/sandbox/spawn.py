"""Start a program as the first process of a pid namespace.

Not by unshare(2) before and setns(2) after an ordinary fork: from inside a user namespace there is no way back into the
host's pid namespace. clone(2) makes the namespace for the child alone, and the starting process stays as it is. For the
supervisor, while it has one thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from vfsd.fds import OwnedFd
from vfsd.sandbox import syscalls
from vfsd.sandbox.steps import step

_FAILED = 127
_MOST_DIGITS = 16


class FirstProcess:
    """The program started; `pid` as the starting process sees it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._returncode: int | None = None

    def wait(self) -> int:
        """As of subprocess: the exit status, or the number of the signal that killed it, negative."""
        if self._returncode is None:
            self._returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._returncode


def start_in_pid_namespace(command: Sequence[str], *, stderr: int, pass_fds: Sequence[int], remedy: str) -> FirstProcess:
    """In `/`, a session of its own, an empty environment, /dev/null as stdin and stdout. OSError if it cannot be executed."""
    error_read, error_write = (OwnedFd(fd) for fd in os.pipe())
    with error_read, OwnedFd(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as null:
        with error_write, step("make a pid namespace", remedy):
            pid = syscalls.fork_into(syscalls.CLONE_NEWPID)
            if pid == 0:
                _execute(command, (null.fileno(), null.fileno(), stderr), pass_fds, error_write.fileno())
        process = FirstProcess(pid)
        said = os.read(error_read.fileno(), _MOST_DIGITS)  # its end is a successful exec
    if said:
        process.wait()
        raise OSError(int(said), os.strerror(int(said)))
    return process


def _execute(command: Sequence[str], standard: tuple[int, int, int], pass_fds: Sequence[int], error: int) -> NoReturn:
    """In the child. The standard descriptors are all in use, so none of the others has one of their numbers."""
    try:
        os.setsid()
        os.chdir("/")
        for number, fd in enumerate(standard):
            os.dup2(fd, number)
        for fd in pass_fds:
            os.set_inheritable(fd, True)
        _close_all_but({*pass_fds, error})
        os.execve(command[0], [*command], {})  # noqa: S606  # a fixed program
    except OSError as failure:
        os.write(error, b"%d" % (failure.errno or 0))
    finally:
        os._exit(_FAILED)


def _close_all_but(kept: set[int]) -> None:
    """What vfsd itself opens closes by itself at exec; what its starter left open does not, whatever the limit is by now."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            with suppress(OSError):  # the listing's own
                os.close(fd)
