"""Checks of what a process has around it: namespaces, mounts and root, memory, limits, environment. See `check`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from vfsd.sandbox.census import NAMESPACES, UNLIMITED, Mount
from vfsd.tools.check import UNSEEN, Check, Seen, Subject, join

OWN_NAMESPACES = ("mnt", "pid", "net", "ipc", "uts")
_SUID_DUMPABLE = "/proc/sys/fs/suid_dumpable"


def own_namespaces(text: str) -> Check:
    """Each differs from those of all other processes of the daemon, the supervisor's (the host's) first; all threads are in them."""

    def look(subject: Subject) -> Seen:
        process = subject.process
        others = [each.census.namespaces for each in subject.daemon.processes if each is not process]
        mine = process.census.namespaces
        if mine is None:
            return Seen(None, UNSEEN)
        same = all(thread.namespaces == mine for thread in process.census.threads)
        own = [kind for kind in OWN_NAMESPACES if all(each is None or each[kind] != mine[kind] for each in others)]
        return Seen(same and own == list(OWN_NAMESPACES), " ".join(own) or "none" + ("" if same else "; threads differ"))

    return Check(text, look)


def show_namespaces(subject: Subject) -> str:
    """Which differ from those of who looks."""
    theirs = subject.process.census.namespaces
    if theirs is None:
        return UNSEEN
    differ = [kind for kind in NAMESPACES if theirs[kind] != os.readlink(f"/proc/self/ns/{kind}")]
    return "as of who looks" + (", but for " + " ".join(differ) if differ else "")


def mounts(text: str, needed: Callable[[Subject, Mount], Iterable[str]], *, alone: bool) -> Check:
    """`needed`: what a mount must have and has not. `alone`: there is only one."""

    def look(subject: Subject) -> Seen:
        found = subject.process.census.mounts
        if not found:
            return Seen(None, UNSEEN)
        lacks = [f"{mount.point} has not {' '.join(missing)}" for mount in found if (missing := list(needed(subject, mount)))]
        shown = f"{len(found)} mount{'s' if len(found) > 1 else ''}, / is {found[0].fs_type} {','.join(sorted(found[0].options))}"
        return Seen(not lacks and not (alone and len(found) > 1), "; ".join([shown, *lacks[:3]]))

    return Check(text, look)


def lacks_of_share(subject: Subject, mount: Mount) -> Iterable[str]:
    wanted = {"nosuid", "nodev", "nosymfollow"} | ({"ro"} if subject.daemon.options.readonly else set())
    return sorted(wanted - mount.options)


def lacks_of_nothing(_subject: Subject, mount: Mount) -> Iterable[str]:
    """An empty file system: one inode, its root's."""
    missing = {"ro", "nosuid", "nodev", "noexec"} - mount.options
    return sorted(missing | ({"type tmpfs"} if mount.fs_type != "tmpfs" else set()) | ({"nr_inodes=1"} - mount.fs_options))


def root_link(text: str, test: Callable[[Subject, str], bool]) -> Check:
    """Of all threads: what /proc/PID/root shows."""

    def look(subject: Subject) -> Seen:
        found = {thread.root for thread in subject.process.census.threads}
        if None in found:
            return Seen(None, UNSEEN)
        return Seen(all(test(subject, each or "") for each in found), join(found))

    return Check(text, look)


def working_directory(text: str, leader: Callable[[Subject], set[str]], others: str | None = None) -> Check:
    """`others`: what the directories of other threads end with."""

    def look(subject: Subject) -> Seen:
        census = subject.process.census
        found = {thread.cwd or "" for thread in census.threads}
        if census.leader.cwd is None:
            return Seen(None, UNSEEN)
        allowed = leader(subject)
        return Seen(all(each in allowed or (others and each.endswith(others)) for each in found), join(found))

    return Check(text, look)


def hidden_memory(text: str) -> Check:
    """The kernel gives /proc/PID/mem of a process that is not dumpable to root; of one that is root's only it can tell."""

    def look(subject: Subject) -> Seen:
        process = subject.process
        if process.role == "broker" and _suid_dumpable() == 1:
            return Seen(False, f"{_SUID_DUMPABLE} is 1: each change of uid makes the broker dumpable")
        if process.census.memory_owner != process.census.leader.uids[1]:
            return Seen(True, "not dumpable, as /proc shows it")
        if process.report is None:
            return Seen(None, UNSEEN)
        return Seen(not process.report.dumpable, "dumpable" if process.report.dumpable else "not dumpable, as said at lock-down")

    return Check(text, look)


def _suid_dumpable() -> int:
    with open(_SUID_DUMPABLE, encoding="ascii") as file:
        return int(file.read())


def limits(exact: dict[str, int], most_files: int | None = None) -> Check:
    """Soft and hard ones; `most_files` None: as many as the supervisor."""
    names = [f"{name} {value}" for name, value in exact.items()]
    text = ", ".join([*names, "open files " + ("as the supervisor's" if most_files is None else f"at most {most_files}")])

    def look(subject: Subject) -> Seen:
        found = subject.process.census.limits
        theirs = subject.daemon.supervisor.census.limits["open files"]
        files = found["open files"]
        most = theirs[1] if most_files is None else most_files
        holds = all(found[name] == (value, value) for name, value in exact.items())
        shown = ", ".join(f"{name} {_limit(found[name][1])}" for name in (*exact, "open files"))
        return Seen(holds and (most == UNLIMITED or UNLIMITED < files[1] <= most), shown)

    return Check(text, look)


def _limit(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def no_environment(text: str) -> Check:
    def look(subject: Subject) -> Seen:
        names = subject.process.census.environment
        return Seen(None, UNSEEN) if names is None else Seen(not names, " ".join(names) or "empty")

    return Check(text, look)


def show_environment(subject: Subject) -> str:
    names = subject.process.census.environment
    return UNSEEN if names is None else f"{len(names)} variables"
