"""What can be made to fail, how, and what the guest then sees: the one list that the grammar and docs/faults.md are made from.

A *target* is what a rule is about: a FUSE operation, a system call of a process, a process at a named point, a signal between
driver and device, the connection. Pure data; imports nothing but the names of messages.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vfsd.wire import broker_messages, fuse_abi, vhost_user

Role = Literal["worker", "broker", "control"]
ROLES: tuple[Role, ...] = ("worker", "broker", "control")

# --- targets -----------------------------------------------------------------------------------------------------------

_OPERATIONS = """
    LOOKUP FORGET GETATTR SETATTR READLINK SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME LINK OPEN READ WRITE STATFS RELEASE FSYNC
    SETXATTR GETXATTR LISTXATTR REMOVEXATTR FLUSH INIT OPENDIR READDIR RELEASEDIR FSYNCDIR GETLK SETLK SETLKW ACCESS CREATE
    INTERRUPT DESTROY IOCTL BATCH_FORGET FALLOCATE READDIRPLUS RENAME2 LSEEK COPY_FILE_RANGE SYNCFS TMPFILE STATX COPY_FILE_RANGE_64
"""
OPERATIONS: dict[str, int] = {name: getattr(fuse_abi, f"FUSE_{name}") for name in _OPERATIONS.split()}
ANY_OPERATION = "*"

# As the kernel calls them; which functions make them is in worker/faulty/__main__.py and broker/faulty/__main__.py.
WORKER_CALLS = ("preadv2", "pwritev2", "lseek", "getdents64", "copy_file_range", "fstat", "mmap")
BROKER_CALLS = (
    "openat", "open_by_handle_at", "name_to_handle_at", "statx", "fstatfs", "readlinkat", "mkdirat", "mknodat", "symlinkat", "linkat",
    "unlinkat", "renameat2", "fchmodat", "fchownat", "utimensat", "ftruncate", "fallocate", "fsync", "fdatasync", "syncfs", "dup",
    "getxattr", "setxattr", "listxattr", "removexattr",
)  # fmt: skip
CALLS: dict[str, tuple[str, ...]] = {"worker": WORKER_CALLS, "broker": BROKER_CALLS}
CALL_ALIASES = {"open_by_handle": "open_by_handle_at", "name_to_handle": "name_to_handle_at", "open": "openat", "rename": "renameat2"}

KICK, CALL, SEND_FDS, FRONTEND = "kick", "call", "send_fds", "frontend"

# --- actions -----------------------------------------------------------------------------------------------------------

OF_OPERATIONS = ("error", "delay", "hang", "short", "drop", "duplicate", "corrupt")
OF_CALLS = ("error", "delay")
OF_PROCESSES = ("kill", "hang", "delay")
ACTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ROLES, OF_PROCESSES),
    KICK: ("lose",),
    CALL: ("lose",),
    SEND_FDS: ("truncate", "error"),
    FRONTEND: ("close",),
}
# What sendmsg(2) says of descriptors that cannot be sent now; another error would be the end of the broker, and never comes.
SEND_ERRORS = ("ETOOMANYREFS", "ENOBUFS", "ENOMEM", "EAGAIN")
SHORTENED = ("READ", "WRITE")  # which `short` is for

# --- points ------------------------------------------------------------------------------------------------------------

NOW = "now"


class Point(NamedTuple):
    """A moment in a process's life, `kill`, `hang` and `delay` can be put `at=` it."""

    role: Role
    name: str
    moment: str


POINTS = (
    Point("worker", "after-pop", "a request was taken from a ring and noted as in flight; nothing of it is done"),
    Point("worker", "before-ask", "questions to the broker stand ready, none of them is sent"),
    Point("worker", "after-ask", "they are sent, none is answered"),
    Point("worker", "before-publish", "requests are done, the driver has been shown none of it"),
    Point("worker", "after-link", "the in-flight table says which are about to be shown, the used index does not"),
    Point("worker", "before-clear", "the used index shows them, the in-flight table still has them"),
    Point("worker", "after-publish", "all is noted, the driver has not been called"),
    Point("worker", NOW, "the rule arrives"),
    Point("broker", "before-request", "a request of a worker is about to be done"),
    Point("broker", "after-request", "it is done, and not answered"),
    Point("broker", NOW, "the rule arrives"),
    Point("control", "before-message", "a vhost-user message has come, nothing of it is done"),
    Point("control", "before-reply", "it is done, and not answered"),
    Point("control", NOW, "the rule arrives"),
)
# What is not known at a point cannot be selected by there.
UNKNOWN_AT: dict[str, tuple[str, ...]] = {"queue": ("before-ask", "after-ask", NOW), "message": (NOW,)}
# Where a connection can be closed.
CLOSING_POINTS = ("before-message", "before-reply", NOW)


def points_of(role: str) -> tuple[str, ...]:
    return tuple(point.name for point in POINTS if point.role == role)


# --- selectors ---------------------------------------------------------------------------------------------------------

COUNTING = ("when", "nth", "every", "after", "times", "prob", "seed", "during")
_OF_OPERATIONS = ("path", "nodeid", "uid", "queue")
SELECTORS: dict[str, tuple[str, ...]] = {
    "operation": (*_OF_OPERATIONS, *COUNTING),
    "syscall": COUNTING,
    "worker": ("at", "queue", *COUNTING),
    "broker": ("at", "message", *COUNTING),
    "control": ("at", "message", *COUNTING),
    KICK: ("queue", *COUNTING),
    CALL: ("queue", *COUNTING),
    SEND_FDS: COUNTING,
    FRONTEND: ("at", "message", *COUNTING),
}
BROKER_MESSAGES = tuple(spec.message.__name__ for spec in broker_messages.REQUESTS)
_PREFIX = "VHOST_USER_"
VHOST_USER_MESSAGES = tuple(
    name.removeprefix(_PREFIX) for number in range(1, 64) if (name := vhost_user.request_name(number)).startswith(_PREFIX)
)
MESSAGES: dict[str, tuple[str, ...]] = {"broker": BROKER_MESSAGES, "control": VHOST_USER_MESSAGES, FRONTEND: VHOST_USER_MESSAGES}
