"""Confined processes die of what their filter does not list, and of listed calls with other arguments."""

import errno
import os
import signal
import socket

import pytest

from tests.security.sandbox import Sandbox, broker, call, control, number_of, worker

AT_FDCWD = -100
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
CLONE_NEWUSER = 0x10000000
SIGCHLD = 17
PAGE = 4096
X32_BIT = 0x40000000
NEW_PROCESS = (SIGCHLD, 0, 0, 0, 0)

ROLES = {"worker": worker, "control": control, "broker": lambda **changes: broker("/var/tmp", **changes)}

# What an exploit would do next. Arguments are valid, so that only the filter is in the way.
FATAL = {
    "execve": call("execve", "/bin/sh", 0, 0),
    "execveat": call("execveat", AT_FDCWD, "/bin/sh", 0, 0, 0),
    "fork": call("clone", *NEW_PROCESS),
    "open": call("open", "/etc/passwd", os.O_RDONLY),
    "openat": call("openat", AT_FDCWD, "/etc/passwd", os.O_RDONLY),
    "openat2": call("openat2", AT_FDCWD, "/etc/passwd", 0, 24),
    "stat": call("stat", "/etc/passwd", 0),
    "socket": call("socket", socket.AF_INET, socket.SOCK_STREAM, 0),
    "connect": call("connect", 0, 0, 0),
    "bind": call("bind", 0, 0, 0),
    "accept4": call("accept4", 0, 0, 0, 0),
    "ptrace": call("ptrace", 0, 0, 0, 0),
    "process_vm_readv": call("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "mmap executable": call("mmap", 0, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
    "mprotect executable": call("mprotect", 0, PAGE, PROT_READ | PROT_EXEC),
    "mprotect": call("mprotect", 0, PAGE, PROT_READ | PROT_WRITE),
    "madvise": call("madvise", 0, PAGE, 4),
    "mount": call("mount", "none", "/", "tmpfs", 0, 0),
    "unshare": call("unshare", CLONE_NEWUSER),
    "setns": call("setns", 0, 0),
    "chroot": call("chroot", "/"),
    "pivot_root": call("pivot_root", ".", "."),
    "prctl": call("prctl", 3, 0),
    "seccomp": call("seccomp", 1, 0, 0),
    "ioctl": call("ioctl", 0, 0, 0),
    "bpf": call("bpf", 0, 0, 0),
    "io_uring_setup": call("io_uring_setup", 1, 0),
    "userfaultfd": call("userfaultfd", 0),
    "kill": call("kill", 1, 0),
    "memfd_create": call("memfd_create", "x", 0),
    "x32 entry": [X32_BIT | number_of("close"), 3],
}
# What the broker may do and they may not.
FATAL_WITHOUT_PRIVILEGE = {
    "open_by_handle_at": call("open_by_handle_at", 0, 0, 0),
    "name_to_handle_at": call("name_to_handle_at", 0, "", 0, 0, 0x1000),
    "openat below a descriptor": call("openat", 3, "x", os.O_RDONLY),
    "statx": call("statx", 3, "x", 0, 0, 0),
    "readlinkat": call("readlinkat", 3, "x", 0, 0),
    "unlinkat": call("unlinkat", 3, "x", 0),
    "fchdir": call("fchdir", 3),
    "getxattr": call("getxattr", "3", "user.x", 0, 0),
    "setxattr": call("setxattr", "3", "user.x", 0, 0, 0),
    "listxattr": call("listxattr", "3", 0, 0),
    "removexattr": call("removexattr", "3", "user.x"),
    "setresuid": call("setresuid", -1, 0, -1),
    "setgroups": call("setgroups", 0, 0),
    "capset": call("capset", 0, 0),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("what", FATAL)
def test_every_confined_role_dies_of(sandbox: Sandbox, role, what):
    assert sandbox.attempt(ROLES[role](), FATAL[what]).killed_by_filter


@pytest.mark.parametrize("role", ["worker", "control"])
@pytest.mark.parametrize("what", FATAL_WITHOUT_PRIVILEGE)
def test_control_and_workers_die_of(sandbox: Sandbox, role, what):
    assert sandbox.attempt(ROLES[role](), FATAL_WITHOUT_PRIVILEGE[what]).killed_by_filter


@pytest.mark.parametrize("what", ["open_by_handle_at", "name_to_handle_at", "ptrace", "socket"])
def test_property_30_a_worker_has_no_handles_no_sockets_and_no_other_process(sandbox: Sandbox, what):
    """That the calls it has are enough is shown by every test that runs a daemon: the action is to kill."""
    assert sandbox.attempt(worker(), (FATAL | FATAL_WITHOUT_PRIVILEGE)[what]).killed_by_filter


@pytest.mark.parametrize("role", ["worker", "broker"])
def test_no_thread_ends_before_its_process(sandbox: Sandbox, role):
    """What glibc does at a thread's end is not allowed: a thread less is no state to go on in."""
    assert sandbox.run(ROLES[role](attempt="end_thread", threads=1)).killed_by_filter
    assert sandbox.run(ROLES[role](attempt="end_thread", threads=1), filtered=False).value == "the thread has ended"


@pytest.mark.parametrize("thread_count", [0, 4])
def test_the_whole_process_dies_however_many_threads_it_has(sandbox: Sandbox, thread_count):
    assert sandbox.attempt(worker(threads=thread_count), FATAL["execve"]).killed_by_filter


WORKER_OUT_OF_RANGE = {
    "fcntl F_SETFL": call("fcntl", 0, 4, 0),
    "fcntl F_GETFL in the low half": call("fcntl", 0, 1 << 32 | 3),
    "fcntl F_OFD_SETLK": call("fcntl", 0, 37, 0),
    "preadv2 with an unknown flag": call("preadv2", 0, 0, 0, 0, 0, 0x100),
    "pwritev2 with an unknown flag": call("pwritev2", 0, 0, 0, 0, 0, 0x100),
    "copy_file_range with a flag": call("copy_file_range", 0, 0, 1, 0, 1, 1),
    "sendto an address": call("sendto", 0, "x", 1, 0, "address", 7),
    "sendto with MSG_OOB": call("sendto", 0, "x", 1, 1, 0, 0),
    "sendmsg with MSG_ZEROCOPY": call("sendmsg", 0, 0, 0x4000000),
    "recvmsg with MSG_ERRQUEUE": call("recvmsg", 0, 0, 0x2000),
    "recvfrom": call("recvfrom", 0, 0, 0, 0, 0, 0),
    "futex on priorities": call("futex", 0, 6 | 128, 0, 0, 0, 0),
    "futex shared with others": call("futex", 0, 1, 0, 0, 0, 0),
    "a clock of one process": call("clock_gettime", 2, 0),
    "epoll_ctl with an unknown operation": call("epoll_ctl", 0, 4, 0, 0),
    "mmap at an address": call("mmap", 0x10000, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, 0, 0),
    "mmap fixed": call("mmap", 0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, 0, 0),
    "mmap private": call("mmap", 0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0, 0),
    "mmap read-only": call("mmap", 0, PAGE, PROT_READ, MAP_SHARED, 0, 0),
    "mmap executable shared": call("mmap", 0, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, 0, 0),
}
BROKER_OUT_OF_RANGE = {
    "openat by AT_FDCWD": call("openat", AT_FDCWD, "x", os.O_RDONLY | os.O_CLOEXEC),
    "openat with O_ASYNC": call("openat", 0, "x", os.O_RDONLY | os.O_CLOEXEC | 0o20000),
    "openat without O_CLOEXEC": call("openat", 0, "x", os.O_RDONLY),
    "open_by_handle_at that creates": call("open_by_handle_at", 0, 0, os.O_CREAT | os.O_CLOEXEC),
    "statx with another mask": call("statx", 0, "", 0x1100, 0xFFFF, 0),
    "newfstatat of a name": call("newfstatat", 0, "x", 0, 0),
    "fchownat of a name": call("fchownat", 0, "x", 0, 0, 0x100),
    "a mode with more than permissions": call("fchmodat", 0, "x", 0o10000),
    "sendto": call("sendto", 0, "x", 1, 0, 0, 0),
    "name_to_handle_at of a name": call("name_to_handle_at", 0, "x", 0, 0, 0),
    "fcntl F_SETOWN": call("fcntl", 0, 8, 1),
    "fcntl F_OFD_SETLKW": call("fcntl", 0, 38, 0),
    "fcntl F_SETLKW": call("fcntl", 0, 7, 0),
    "flock that waits": call("flock", 0, 2),
    "setresuid of all three": call("setresuid", 1000, 1000, 1000),
    "setresgid of the real one": call("setresgid", 1000, -1, -1),
    "setgroups with more groups than a message has": call("setgroups", 0x2000, 0),
    "mmap of a file": call("mmap", 0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, 0, 0),
    "mmap at an address": call("mmap", 0x10000, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
    "mmap of reserved memory": call("mmap", 0, PAGE, 0, MAP_PRIVATE | MAP_ANONYMOUS | 0x4000, -1, 0),
    "mremap to an address": call("mremap", 0, PAGE, PAGE, 3, 0x10000),
    "unlinkat with an unknown flag": call("unlinkat", 0, "x", 1),
    "setxattr with an unknown flag": call("setxattr", "0", "user.x", 0, 0, 4),
    "fchdir": call("fchdir", 0),
    "chdir": call("chdir", "/"),
}


@pytest.mark.parametrize("what", WORKER_OUT_OF_RANGE)
def test_a_worker_dies_of_a_listed_call_with_other_arguments(sandbox: Sandbox, what):
    assert sandbox.attempt(worker(), WORKER_OUT_OF_RANGE[what]).killed_by_filter


@pytest.mark.parametrize("what", BROKER_OUT_OF_RANGE)
def test_a_broker_dies_of_a_listed_call_with_other_arguments(sandbox: Sandbox, what):
    assert sandbox.attempt(ROLES["broker"](), BROKER_OUT_OF_RANGE[what]).killed_by_filter


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        (call("clone3", 0, 0), errno.ENOSYS),
        (call("mmap", 0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), errno.ENOMEM),
        (call("mremap", 0, PAGE, 2 * PAGE, 1), errno.ENOMEM),
        (call("newfstatat", 3, "", 0, 0x1000), errno.ENOSYS),
    ],
)
def test_calls_that_a_library_makes_by_itself_fail_with_an_errno(sandbox: Sandbox, attempt, error):
    outcome = sandbox.attempt(worker(), attempt)
    assert (outcome.signal, outcome.errno) == (None, error)


@pytest.mark.parametrize("role", ROLES)
def test_a_harmless_call_is_made(sandbox: Sandbox, role):
    assert sandbox.attempt(ROLES[role](), call("close", 0)).value == 0


def test_with_the_action_log_nobody_dies(filters):
    outcome = Sandbox(filters["log"]).attempt(worker(), call("getppid"))
    assert (outcome.signal, outcome.errno) == (None, None)


def test_with_the_action_trap_the_process_dies_of_sigsys(filters):
    assert Sandbox(filters["trap"]).attempt(worker(), call("getppid")).signal == signal.SIGSYS
