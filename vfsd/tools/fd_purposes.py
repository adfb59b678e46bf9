"""What each open descriptor of a running vfsd is for, told from outside: by its kind, its holder, and who holds the other end.

No process is asked: one that is taken over would lie. Sockets are told apart by the process at their other end, eventfds by
the process that holds the same one, files by the mount they lie on, memory by who maps it. What that does not explain has no
purpose, which is a finding. It cannot tell which ring a kick belongs to, nor call from err.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vfsd.record import RECORD_NAME
from vfsd.sandbox.census import ProcessCensus
from vfsd.sandbox.fd_census import Fd, UnixSocket
from vfsd.tools.daemon import Daemon, Process

_O_PATH = os.O_PATH
_STANDARD = 3
_LAST_WORDS = "/memfd:vfsd-last-words (deleted)"
_INFLIGHT = "/memfd:vfsd-inflight (deleted)"
_FAULTS = "/memfd:vfsd-faults (deleted)"  # COUNTERS_NAME of the fault desk, which no process without faults imports
_FAULT_COUNTERS = "fault injection: how often each rule was hit"
_KERNEL_LOG = "/dev/kmsg"
_RECORD = f"/memfd:{RECORD_NAME} (deleted)"
_ANY_SIGNAL = "a ring's kick, call or err: the frontend's"
_LOG_OR_MANAGER = "the system's log, or the service manager that started vfsd"
OTHER_END_UNSEEN = "a socket whose other end is not visible to this user or from here"
_CHANNEL_TO = {
    ("supervisor", "broker"): "channel to the broker",
    ("supervisor", "control"): "channel to control",
    ("supervisor", "worker"): "channel to a worker",
    ("broker", "supervisor"): "channel to the supervisor",
    ("control", "supervisor"): "channel to the supervisor",
    ("worker", "supervisor"): "channel to the supervisor",
    ("broker", "worker"): "link to a worker: its requests",
    ("worker", "broker"): "link to the broker: requests, and the descriptors it donates",
    ("control", "worker"): "link to a worker: memory and rings",
    ("worker", "control"): "link to control: memory and rings",
}

# For people: who may hold what, and how it is told. The tests hold the functions below to this list.
TOLD_BY: tuple[tuple[str, str, str], ...] = (
    ("supervisor", "stdin of who started vfsd", "its number, 0"),
    ("supervisor", "stdout of who started vfsd", "its number, 1"),
    ("supervisor", "log (stderr)", "its number, 2"),
    ("supervisor", "pid file, and its lock", "its name, that of the socket and .pid"),
    ("supervisor", "the vhost-user socket: waits for the frontend", "a stream socket that listens"),
    ("supervisor", "the frontend, before it is handed over", "a connected stream socket, the other end in no process of vfsd"),
    ("supervisor", "signals that end vfsd", "a stream socket, the other end in the supervisor too"),
    ("supervisor", "the system's log, or the service manager that started vfsd", "a datagram socket, the other end in no process of vfsd"),
    ("supervisor", "channel to the broker", "the process at the other end"),
    ("supervisor", "channel to control", "the process at the other end"),
    ("supervisor", "channel to a worker", "the process at the other end"),
    ("supervisor", "itself: children look at it once, whether it lives", "a pidfd of its own"),
    ("supervisor", "the death of CHILD", "a pidfd of that child"),
    ("supervisor", "last words of a child", "its name, memfd:vfsd-last-words"),
    ("supervisor", "record of its processes, for vfsdctl status", f"its name, memfd:{RECORD_NAME}"),
    ("supervisor", "the kernel's log: which system call a child died of", f"its name, {_KERNEL_LOG}"),
    ("supervisor", "epoll: waits for the others", "its kind"),
    ("supervisor", "fault injection: waits for the operator", "a packet socket that listens, where faults are injected"),
    ("supervisor", "fault injection: the operator", "a packet socket, the other end in no process of vfsd, where faults are injected"),
    ("supervisor broker control worker", _FAULT_COUNTERS, "its name, memfd:vfsd-faults, where faults are injected"),
    ("broker control worker", "nothing (/dev/null)", "its number, 0 or 1, and its name"),
    ("broker control worker", "last words: stderr, read when it died", "its number, 2, and its name"),
    ("broker control worker", "channel to the supervisor", "the process at the other end"),
    ("broker worker", "epoll: waits for the others", "its kind"),
    ("broker worker", "wakes its own threads", "an eventfd that no other process has"),
    ("broker", "link to a worker: its requests", "the process at the other end"),
    ("broker", "its own /proc/self/fd: how it opens inodes again, and attributes", "O_PATH, its name, on no mount of the share"),
    ("broker", "of the share: an inode, by O_PATH", "its mount and O_PATH"),
    ("broker", "of the share: a file that is open", "its mount"),
    ("broker", "of the share: a directory that is open, or holds a mount", "its mount and O_DIRECTORY"),
    ("control", "the frontend: its connection, or what vfsd would ask it by", "a stream socket, the other end in no process of vfsd"),
    ("control", "link to a worker: memory and rings", "the process at the other end"),
    ("control", "a ring's kick, call or err: the frontend's", "an eventfd; a pipe or socket that a worker has too, as below"),
    ("control worker", "what a queue has in flight, for a worker's successor", "its name, memfd:vfsd-inflight"),
    ("control worker", "the guest's memory", "a memfd or file that a worker maps shared"),
    ("worker", "link to the broker: requests, and the descriptors it donates", "the process at the other end"),
    ("worker", "link to control: memory and rings", "the process at the other end"),
    ("worker", "a ring's kick: the frontend's", "an eventfd that control has too, and that its epoll waits for"),
    ("worker", "a ring's call or err: the frontend's", "an eventfd that control has too, and that its epoll does not wait for"),
    ("worker", "a ring's kick, call or err: the frontend's", "a pipe or socket that control has too, the other end in no process of vfsd"),
    ("worker", "of the share, donated: a file that the guest opened", "its mount"),
    ("worker", "of the share, donated: a directory that the guest opened", "its mount and O_DIRECTORY"),
    ("worker", "of the share, donated: an inode, by O_PATH", "its mount and O_PATH"),
)


@dataclass(frozen=True, slots=True)
class Context:
    """One process, and what the others hold that it may share."""

    daemon: Daemon
    process: Process
    holders: dict[str, set[int]]  # a socket or pipe, as its link shows it -> pids
    eventfds: dict[int, set[str]]  # an eventfd -> roles
    memory: frozenset[tuple[int, str]]  # what a worker maps shared
    share_mounts: frozenset[int] | None  # None: the broker's mounts are those of the host


def purposes(daemon: Daemon) -> dict[int, dict[int, str | None]]:
    """By pid and descriptor: what it is for, None if unknown. A process whose descriptors we may not see is not in it."""
    holders: dict[str, set[int]] = {}
    eventfds: dict[int, set[str]] = {}
    for process in daemon.processes:
        for fd in (process.census.fds or {}).values():
            if fd.target.startswith(("socket:", "pipe:")):
                holders.setdefault(fd.target, set()).add(process.pid)
            if fd.eventfd is not None:
                eventfds.setdefault(fd.eventfd, set()).add(process.role)
    memory = frozenset(mapped for process in _of_role(daemon, "worker") for mapped in process.census.mapped or ())
    mounts = _share_mounts(daemon)
    return {
        process.pid: {
            fd.number: purpose(Context(daemon, process, holders, eventfds, memory, mounts), fd) for fd in process.census.fds.values()
        }
        for process in daemon.processes
        if process.census.fds is not None
    }


def purpose(context: Context, fd: Fd) -> str | None:
    """None: nothing that is known explains it."""
    explain: tuple[Callable[[Context, Fd], str | None], ...] = (_standard, _own_kind, _signal, _socket, _guest_memory, _of_share)
    return next((found for each in explain if (found := each(context, fd)) is not None), None)


def _of_role(daemon: Daemon, role: str) -> Iterator[Process]:
    return (process for process in daemon.processes if process.role == role)


def _share_mounts(daemon: Daemon) -> frozenset[int] | None:
    """In a namespace of its own the broker has no other mounts than the share's."""
    if daemon.options.sandbox != "namespace":
        return None
    return frozenset(mount.number for broker in _of_role(daemon, "broker") for mount in broker.census.mounts or ())


# --- one function for each reason ---------------------------------------------------------------------------------------------


def _standard(context: Context, fd: Fd) -> str | None:
    if fd.number >= _STANDARD:
        return None
    if context.process.role == "supervisor":
        return "log (stderr)" if fd.number == 2 else f"{('stdin', 'stdout')[fd.number]} of who started vfsd"
    if fd.number < 2:
        return "nothing (/dev/null)" if fd.target == "/dev/null" else None
    return "last words: stderr, read when it died" if fd.target == _LAST_WORDS else None


def _own_kind(context: Context, fd: Fd) -> str | None:
    """What can be told by itself."""
    role = context.process.role
    if fd.target == "anon_inode:[eventpoll]":
        return "epoll: waits for the others" if role != "control" else None
    if fd.target == _FAULTS and context.daemon.options.faults:
        return _FAULT_COUNTERS
    if role in ("control", "worker") and fd.target == _INFLIGHT:
        return "what a queue has in flight, for a worker's successor"
    if role == "broker" and fd.target.endswith("/fd") and fd.flags & _O_PATH and not _on_share(context, fd):
        return "its own /proc/self/fd: how it opens inodes again, and attributes"
    return _of_supervisor(context, fd) if role == "supervisor" else None


def _of_supervisor(context: Context, fd: Fd) -> str | None:
    if fd.process is not None:
        return _pidfd(context, fd.process)
    if _is_pid_file(context, fd.target):
        return "pid file, and its lock"
    return {
        _LAST_WORDS: "last words of a child",
        _RECORD: "record of its processes, for vfsdctl status",
        _KERNEL_LOG: "the kernel's log: which system call a child died of",
    }.get(fd.target)


def _pidfd(context: Context, pid: int) -> str | None:
    if pid == context.process.pid:
        return "itself: children look at it once, whether it lives"
    child = next((each for each in context.daemon.processes if each.pid == pid), None)
    return None if child is None else f"the death of {child.name}"


def _is_pid_file(context: Context, target: str) -> bool:
    path = context.daemon.options.socket_path
    return path is not None and os.path.basename(target) == os.path.basename(path) + ".pid"


def _socket(context: Context, fd: Fd) -> str | None:
    if not fd.target.startswith("socket:") or fd.inode is None:
        return None
    if fd.inode in context.daemon.sockets.unseen:
        return OTHER_END_UNSEEN
    found = context.daemon.sockets.by_inode.get(fd.inode)
    return None if found is None else _unix_socket(context, found)


def _unix_socket(context: Context, found: UnixSocket) -> str | None:
    process, peers = context.process, context.holders.get(f"socket:[{found.peer}]", set())
    if found.kind == socket.SOCK_STREAM:
        return _stream(process, listens=found.listens, peers=peers, connected=found.peer is not None)
    if found.kind == socket.SOCK_DGRAM:
        return _LOG_OR_MANAGER if process.role == "supervisor" and not peers else None
    return _packets(context, peers, listens=found.listens)


def _packets(context: Context, peers: set[int], *, listens: bool) -> str | None:
    process = context.process
    if process.role == "supervisor" and context.daemon.options.faults and not peers:
        return "fault injection: waits for the operator" if listens else "fault injection: the operator"
    other = next((each.role for each in context.daemon.processes if each.pid in peers and each.pid != process.pid), None)
    if other is None and not peers and any(each.census.fds is None for each in context.daemon.processes):
        return OTHER_END_UNSEEN
    return None if other is None else _CHANNEL_TO.get((process.role, other))


def _stream(process: Process, *, listens: bool, peers: set[int], connected: bool) -> str | None:
    """The only stream sockets are the frontend's, and the pair by which the supervisor's signals wake it."""
    if process.role == "supervisor":
        if listens:
            return "the vhost-user socket: waits for the frontend"
        if peers == {process.pid}:
            return "signals that end vfsd"
        return "the frontend, before it is handed over" if connected and not peers else None
    return "the frontend: its connection, or what vfsd would ask it by" if process.role == "control" and not peers and not listens else None


def _signal(context: Context, fd: Fd) -> str | None:
    """Kicks, calls and errs come from the frontend by way of control. QEMU's are eventfds, User-Mode Linux has stream sockets too."""
    if fd.eventfd is None:
        return _ANY_SIGNAL if _is_the_frontends(context, fd) else None
    role, holders = context.process.role, context.eventfds.get(fd.eventfd, set())
    if role == "control":
        return _ANY_SIGNAL
    if role == "worker" and "control" in holders:
        return "a ring's kick: the frontend's" if fd.number in _watched(context.process.census) else "a ring's call or err: the frontend's"
    return "wakes its own threads" if holders == {role} and role in ("broker", "worker") else None


def _is_the_frontends(context: Context, fd: Fd) -> bool:
    """A pipe or socket that control and a worker have both, and the other end of which no process of ours has."""
    holders = context.holders.get(fd.target, set())
    if {each.role for each in context.daemon.processes if each.pid in holders} != {"control", "worker"}:
        return False
    if fd.target.startswith("pipe:"):
        return True
    found = context.daemon.sockets.by_inode.get(fd.inode or 0)
    return found is not None and not found.listens and f"socket:[{found.peer}]" not in context.holders


def _watched(census: ProcessCensus) -> set[int]:
    return {number for fd in (census.fds or {}).values() for number in fd.watched}


def _guest_memory(context: Context, fd: Fd) -> str | None:
    """What workers map shared is guest memory: their filter permits them no other shared mapping."""
    is_file = fd.target.startswith("/") and not fd.flags & _O_PATH and not _is_directory(fd)
    if context.process.role not in ("control", "worker") or not is_file or fd.target == _LAST_WORDS:
        return None
    return "the guest's memory" if (fd.inode, fd.target) in context.memory and not _on_share(context, fd) else None


def _of_share(context: Context, fd: Fd) -> str | None:
    role = context.process.role
    if role not in ("broker", "worker") or not _on_share(context, fd):
        return None
    kind = "directory" if _is_directory(fd) else "file"
    if role == "worker":
        return "of the share, donated: " + ("an inode, by O_PATH" if fd.flags & _O_PATH else f"a {kind} that the guest opened")
    if fd.flags & _O_PATH:
        return "of the share: an inode, by O_PATH"
    return f"of the share: a {kind} that is open" + (", or holds a mount" if kind == "directory" else "")


def _is_directory(fd: Fd) -> bool:
    """O_TMPFILE has the bit of O_DIRECTORY in it."""
    return bool(fd.flags & os.O_DIRECTORY) and fd.flags & os.O_TMPFILE != os.O_TMPFILE


def _on_share(context: Context, fd: Fd) -> bool:
    if not fd.target.startswith("/"):
        return False
    if context.share_mounts is not None:
        return fd.mount in context.share_mounts
    share = context.daemon.options.shared_dir
    return fd.target == share or fd.target.startswith(share.rstrip("/") + "/")
