"""The processes of a daemon that runs: which there are, and which role each says it has.

Who controls the bytes: the kernel, except a process's command line, which it can overwrite once it is taken over. So what a
process says it is decides only what it is expected to be confined to.
"""

from __future__ import annotations

import os

from vfsd.errors import ConfigError

SUPERVISOR = "supervisor"
_ROLES = {b"vfsd.broker": "broker", b"vfsd.worker.control": "control", b"vfsd.worker": "worker"}
_CHILD_COMMAND = [b"-I", b"-m"]  # as vfsd.children starts them


def role_of_command(words: list[bytes]) -> str:
    """The role of the process that was started with these arguments; whatever is no child of a supervisor is taken for one."""
    return _ROLES.get(words[3], SUPERVISOR) if words[1:3] == _CHILD_COMMAND and len(words) > 3 else SUPERVISOR


def role_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return role_of_command(file.read().split(b"\0"))
    except (FileNotFoundError, ProcessLookupError):
        raise ConfigError(no_process(pid)) from None


def no_process(pid: int) -> str:
    return f"there is no process {pid} (any more); name the pid of a daemon that runs"


def threads_of(pid: int) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        raise ConfigError(no_process(pid)) from None


def children_of(pid: int) -> list[int]:
    """The processes that it started and that still run."""
    found: list[int] = []
    for tid in threads_of(pid):
        try:
            with open(f"/proc/{pid}/task/{tid}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread ended
    return sorted(found)


def supervisor_of(socket_path: str) -> int:
    """The pid of the daemon that made this socket, by the file that it keeps beside it; nobody is connected to."""
    path = f"{socket_path}.pid"
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: does not name a daemon: {error}; name the socket of one that runs, or use --pid") from None
