"""The Unix sockets that a daemon's processes hold: of which kind each is, and which is its other end.

The kernel tells of a network namespace's sockets only who is in it. A socket belongs to the one it was made in, and a daemon has
some of several: its own pairs of the supervisor's, a socket that listens of the service manager's, an accepted one of the
frontend's. Who controls the bytes: the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vfsd.sandbox.census import ProcessCensus
from vfsd.sandbox.fd_census import Fd, UnixSocket, unix_sockets


@dataclass(slots=True)
class Sockets:
    """`by_inode` has at least those of the daemon that are not `unseen`; other processes' too."""

    by_inode: dict[int, UnixSocket] = field(default_factory=dict)
    unseen: frozenset[int] = frozenset()  # Unix sockets of namespaces into which we may not go, or that this kernel does not tell of


def is_unix(fd: Fd) -> bool:
    return fd.protocol is not None and fd.protocol.startswith("UNIX")


def sockets_of(processes: Iterable[ProcessCensus]) -> Sockets:
    """`processes`: the supervisor first.

    Other namespaces than ours are looked at only while something is missing: the supervisor's, then that of any process.
    """
    processes = list(processes)
    wanted = {fd.inode for process in processes for fd in (process.fds or {}).values() if is_unix(fd) and fd.inode is not None}
    ours = unix_sockets()
    if ours is None:
        return Sockets(unseen=frozenset(wanted))
    found = Sockets(ours)
    looked_at, may_look = {os.readlink("/proc/thread-self/ns/net")}, True
    for pid in _in_turn(processes[0].pid):
        if wanted <= found.by_inode.keys():
            return found
        try:
            name = os.readlink(f"/proc/{pid}/ns/net")
            if name not in looked_at:
                found.by_inode |= unix_sockets(network_of=pid) or {}
                looked_at.add(name)
        except PermissionError:
            may_look = False
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    if not may_look:
        found.unseen = frozenset(wanted - found.by_inode.keys())
    return found


def _in_turn(first: int) -> Iterator[int]:
    yield first
    yield from sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
