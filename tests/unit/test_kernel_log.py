"""Which system call a process died of by its filter: from the kernel's own log, or unknown."""

import os

import pytest

from tests.support.frontend.checks import eventually
from vfsd.kernel_log import KERNEL_LOG, KernelLog

LINE = (
    'audit: type=1326 audit(1795400926.238:2): auid=4294967295 uid=0 gid=0 ses=4294967295 pid={pid} comm="python" '
    'exe="/usr/bin/python3" sig={signal} arch=c000003e syscall={number} compat=0 ip=0x7f code=0x80000000'
)


@pytest.fixture
def log():
    if not (os.access(KERNEL_LOG, os.R_OK | os.W_OK) and os.readlink("/proc/self/ns/pid") == "pid:[4026531836]"):
        pytest.skip("the kernel's log may not be read and written here")
    log = KernelLog()
    yield log
    log.close()


def write(**values):
    with open(KERNEL_LOG, "wb", buffering=0) as file:
        file.write(LINE.format(**{"pid": 4194305, "signal": 31, "number": 41} | values).encode())


def test_the_number_is_that_of_this_process_and_this_signal(log):
    """Numbers that no process has."""
    write(pid=4194306, number=1)
    write(signal=9, number=2)
    write(number=321)
    write(pid=4194307, number=3)
    assert eventually(lambda: log.syscall_of(4194305)) == 321
    assert log.syscall_of(4194305) is None, "it was read"


def test_what_was_written_before_does_not_count(log):
    write(number=5)
    later = KernelLog()
    assert later.syscall_of(4194305) is None
    later.close()


def test_a_log_that_cannot_be_read_says_nothing(tmp_path):
    log = KernelLog(str(tmp_path / "none"))
    assert log.syscall_of(1) is None
    log.close()
