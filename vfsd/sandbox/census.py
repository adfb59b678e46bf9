"""What the kernel says a process is confined to: ids, capabilities, seccomp, namespaces, limits, descriptors, thread by thread.

Who controls the bytes: the kernel; only a thread's name and the target of a descriptor may have been chosen by a process
that is taken over, so they are escaped. `/proc/PID/status` shows one thread; capabilities, no_new_privs and filters are
each thread's own, so this reads /proc/PID/task/*/status. Namespaces, descriptors and the root of a process that is not
dumpable are shown only to CAP_SYS_PTRACE: they are None where they may not be seen. Environment and command line lie in the
process's own memory: they are what it was started with until it is taken over. /proc has neither securebits nor Landlock.
Reading the census of another process changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from vfsd.sandbox.capabilities import names_of
from vfsd.sandbox.fd_census import Fd, read_fds

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "user")
UNLIMITED = -1
_LIMIT_NAME_BYTES = 26  # the width of the first column of /proc/PID/limits


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
    namespaces: dict[str, str] | None  # "mnt" -> "mnt:[4026531841]"
    root: str | None  # as our own root shows them: "/" also where it is the root of another mount namespace
    cwd: str | None

    @property
    def has_no_capability(self) -> bool:
        """In none of the five sets."""
        return not (self.inheritable or self.permitted or self.effective or self.bounding or self.ambient)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of mountinfo: what the process can reach by names."""

    number: int
    point: str
    options: frozenset[str]  # of this mount
    fs_type: str
    fs_options: frozenset[str]  # of the file system


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCensus:
    """All threads of one process, and what they share."""

    pid: int
    parent: int
    threads: tuple[ThreadCensus, ...]
    command: tuple[str, ...]
    environment: tuple[str, ...] | None  # names only: values may be secrets
    limits: dict[str, tuple[int, int]]  # "open files" -> soft, hard; UNLIMITED
    mounts: tuple[Mount, ...] | None
    memory_owner: int  # the uid to whom the kernel shows its memory: not its own while it is not dumpable
    fds: dict[int, Fd] | None
    mapped: frozenset[tuple[int, str]] | None  # files mapped shared: inode and name, escaped as the targets of descriptors
    root_entries: tuple[str, ...] | None  # what its root directory holds

    @property
    def leader(self) -> ThreadCensus:
        return next(thread for thread in self.threads if thread.tid == self.pid)

    @property
    def namespaces(self) -> dict[str, str] | None:
        """Of the leader."""
        return self.leader.namespaces


def take_census(pid: int, *, list_root: bool = True) -> ProcessCensus:
    """Raises ProcessLookupError or FileNotFoundError when there is no such process (any more).

    `list_root`: whether to look into its root directory, which is the one thing that touches a file system.
    """
    threads = [read_thread(pid, int(tid)) for tid in os.listdir(f"/proc/{pid}/task")]
    environment = _read_if_permitted(pid, "environ")
    maps = _read_if_permitted(pid, "maps")
    return ProcessCensus(
        pid=pid,
        parent=int(_status(pid, pid)["PPid"]),
        threads=tuple(sorted(threads, key=lambda thread: thread.tid)),
        command=tuple(word.decode(errors="surrogateescape") for word in _read(pid, "cmdline").split(b"\0")[:-1]),
        environment=None if environment is None else tuple(_variable_names(environment)),
        limits=_limits(_read(pid, "limits").decode()),
        mounts=_mounts(pid),
        memory_owner=os.stat(f"/proc/{pid}/mem").st_uid,
        fds=read_fds(pid),
        mapped=None if maps is None else frozenset(_shared_mappings(maps.decode(errors="surrogateescape"))),
        root_entries=_root_entries(pid) if list_root else None,
    )


def read_thread(pid: int, tid: int) -> ThreadCensus:
    fields = _status(pid, tid)
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
        namespaces=_namespaces(pid, tid),
        root=_link(f"/proc/{pid}/task/{tid}/root"),
        cwd=_link(f"/proc/{pid}/task/{tid}/cwd"),
    )


def open_fds(pid: int) -> dict[int, str] | None:
    """Number and target of each open descriptor, None if we may not see them."""
    fds = read_fds(pid)
    return None if fds is None else {number: fd.target for number, fd in fds.items()}


def _status(pid: int, tid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/task/{tid}/status", "rb") as file:
        return dict(line.split(":", 1) for line in file.read().decode(errors="backslashreplace").splitlines())


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _read_if_permitted(pid: int, name: str) -> bytes | None:
    try:
        return _read(pid, name)
    except PermissionError:
        return None


def _link(path: str) -> str | None:
    try:
        return ascii(os.readlink(path))[1:-1]
    except PermissionError:
        return None


def _variable_names(environment: bytes) -> list[str]:
    return [ascii(entry.partition(b"=")[0])[2:-1] for entry in environment.split(b"\0") if entry]


def _limits(text: str) -> dict[str, tuple[int, int]]:
    """Two values behind the name; the last word of most lines is a unit."""
    found = {}
    for line in text.splitlines()[1:]:
        name, values = line[:_LIMIT_NAME_BYTES], line[_LIMIT_NAME_BYTES:].split()
        soft, hard = (UNLIMITED if word == "unlimited" else int(word) for word in values[:2])
        found[name.strip().removeprefix("Max ")] = (soft, hard)
    return found


def _mounts(pid: int) -> tuple[Mount, ...] | None:
    """proc(5), mountinfo: fields up to a `-`, then type, source and options of the file system."""
    text = _read_if_permitted(pid, "mountinfo")
    if text is None:
        return None
    found = []
    for line in text.decode(errors="backslashreplace").splitlines():
        before, _, after = line.partition(" - ")
        of_mount, of_fs = before.split(" "), after.split(" ")
        found.append(Mount(int(of_mount[0]), of_mount[4], frozenset(of_mount[5].split(",")), of_fs[0], frozenset(of_fs[2].split(","))))
    return tuple(found)


def _shared_mappings(maps: str) -> Iterator[tuple[int, str]]:
    """proc(5), maps: address, permissions, offset, device, inode, name."""
    for line in maps.splitlines():
        words = line.split(None, 5)
        if words[1].endswith("s") and len(words) == 6:
            yield int(words[4]), ascii(words[5])[1:-1]


def _namespaces(pid: int, tid: int) -> dict[str, str] | None:
    try:
        return {kind: os.readlink(f"/proc/{pid}/task/{tid}/ns/{kind}") for kind in NAMESPACES}
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
