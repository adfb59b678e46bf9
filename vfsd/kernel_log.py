"""The kernel's log, where we may read it: which system call a child died of by its filter. The supervisor's.

To be opened before lock-down, which takes the capability to open it away. Who controls the bytes: the kernel; but any program
that may write there could write such a line, so what is found is said to people and decides nothing. Numbers of processes in
it are those of the machine: inside a pid namespace (a container) they would be mistaken, and nothing is read.
"""

from __future__ import annotations

import errno
import os
import re
import select

from vfsd.fds import OwnedFd

KERNEL_LOG = "/dev/kmsg"
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO
_LONGEST_RECORD = 8192
_MOST_RECORDS = 100_000  # a log that is written faster than we read it has an end nevertheless
_PATIENCE_MS = 50  # such lines are written by a thread of the kernel's own
# audit(7): SECCOMP records, 31 is SIGSYS
_RECORD = re.compile(rb"type=1326 audit\(.* pid=(\d+) .* sig=31 .*\bsyscall=(\d+) ")


class KernelLog:
    """What is written from its making on."""

    def __init__(self, path: str = KERNEL_LOG) -> None:
        self._fd: OwnedFd | None = None
        try:
            if os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE:
                self._fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                os.lseek(self._fd.fileno(), 0, os.SEEK_END)
        except OSError:
            return  # then we do not know

    def syscall_of(self, pid: int) -> int | None:
        """The number of the system call that this process was just killed for; None if that cannot be known."""
        if self._fd is None:
            return None
        poller = select.poll()
        poller.register(self._fd.fileno(), select.POLLIN)
        found: int | None = None
        for _ in range(_MOST_RECORDS):
            record = self._read()
            match = _RECORD.search(record or b"")
            if match is not None and int(match[1]) == pid:
                found = int(match[2])
            if record is None and (found is not None or not poller.poll(_PATIENCE_MS)):
                break
        return found

    def _read(self) -> bytes | None:
        """The next record, None if there is none now; empty for one that was overwritten."""
        if self._fd is None:
            return None
        try:
            return os.read(self._fd.fileno(), _LONGEST_RECORD)
        except BlockingIOError:
            return None
        except OSError as error:
            return b"" if error.errno == errno.EPIPE else None

    def close(self) -> None:
        if self._fd is not None:
            self._fd.close()
            self._fd = None
