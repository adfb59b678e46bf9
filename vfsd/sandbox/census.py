"""What the kernel says a process is confined to: ids, capabilities, seccomp, namespaces, descriptors, thread by thread.

Who controls the bytes: the kernel; only a thread's name and the target of a descriptor may have been chosen by a process
that is taken over, so they are escaped. `/proc/PID/status` shows one thread; capabilities, no_new_privs and filters are
each thread's own, so this reads /proc/PID/task/*/status. Namespaces, descriptors and the root of a process that is not
dumpable are shown only to CAP_SYS_PTRACE: they are None where they may not be seen. Reading the census of another process
changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vfsd.sandbox.capabilities import names_of

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "user")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadCensus:
    """One thread. Ids: real, effective, saved, file system. Capabilities: names without CAP_."""

    tid: int
    name: str
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    inheritable: tuple[str, ...]
    permitted: tuple[str, ...]
    effective: tuple[str, ...]
    bounding: tuple[str, ...]
    ambient: tuple[str, ...]
    no_new_privs: bool
    seccomp_mode: int  # 0 none, 2 filter
    seccomp_filters: int | None  # None: the kernel does not say (before Linux 5.9)

    @property
    def has_no_capability(self) -> bool:
        """In none of the five sets."""
        return not (self.inheritable or self.permitted or self.effective or self.bounding or self.ambient)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCensus:
    """All threads of one process, and what they share."""

    pid: int
    threads: tuple[ThreadCensus, ...]
    namespaces: dict[str, str] | None  # "mnt" -> "mnt:[4026531841]"
    fds: dict[int, str] | None  # number -> what /proc shows
    root_entries: tuple[str, ...] | None  # what its root directory holds

    @property
    def leader(self) -> ThreadCensus:
        return next(thread for thread in self.threads if thread.tid == self.pid)


def take_census(pid: int) -> ProcessCensus:
    """Raises ProcessLookupError or FileNotFoundError when there is no such process (any more)."""
    threads = [read_thread(pid, int(tid)) for tid in os.listdir(f"/proc/{pid}/task")]
    return ProcessCensus(
        pid=pid,
        threads=tuple(sorted(threads, key=lambda thread: thread.tid)),
        namespaces=_namespaces(pid),
        fds=open_fds(pid),
        root_entries=_root_entries(pid),
    )


def read_thread(pid: int, tid: int) -> ThreadCensus:
    with open(f"/proc/{pid}/task/{tid}/status", "rb") as file:
        fields = dict(line.split(":", 1) for line in file.read().decode(errors="backslashreplace").splitlines())
    filters = fields.get("Seccomp_filters")
    return ThreadCensus(
        tid=tid,
        name=ascii(fields["Name"].strip())[1:-1],
        uids=_numbers(fields["Uid"]),
        gids=_numbers(fields["Gid"]),
        groups=_numbers(fields["Groups"]),
        inheritable=_capabilities(fields["CapInh"]),
        permitted=_capabilities(fields["CapPrm"]),
        effective=_capabilities(fields["CapEff"]),
        bounding=_capabilities(fields["CapBnd"]),
        ambient=_capabilities(fields["CapAmb"]),
        no_new_privs=fields["NoNewPrivs"].strip() == "1",
        seccomp_mode=int(fields["Seccomp"]),
        seccomp_filters=None if filters is None else int(filters),
    )


def open_fds(pid: int) -> dict[int, str] | None:
    """Number and target of each open descriptor, None if we may not see them."""
    try:
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        targets = {number: _read_link(f"/proc/{pid}/fd/{number}") for number in numbers}
    except PermissionError:
        return None
    return {number: target for number, target in targets.items() if target is not None}  # one may be closed while we look


def _read_link(path: str) -> str | None:
    try:
        return ascii(os.readlink(path))[1:-1]
    except FileNotFoundError:
        return None


def _namespaces(pid: int) -> dict[str, str] | None:
    try:
        return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in NAMESPACES}
    except PermissionError:
        return None


def _root_entries(pid: int) -> tuple[str, ...] | None:
    try:
        return tuple(ascii(name)[1:-1] for name in sorted(os.listdir(f"/proc/{pid}/root")))
    except PermissionError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


def _capabilities(text: str) -> tuple[str, ...]:
    return names_of(int(text, 16))
