"""How one expectation is looked at: each function makes a `Rule`, a sentence for people and a look at one process of a daemon.

The look gives what was seen, and whether it is as expected; None where the kernel does not let us see it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vfsd.sandbox.capabilities import NAMES
from vfsd.sandbox.census import NAMESPACES, UNLIMITED, Mount, ThreadCensus
from vfsd.sandbox.id_maps import OVERFLOW_ID
from vfsd.tools.daemon import Daemon, Process
from vfsd.tools.fd_purposes import OTHER_END_UNSEEN

OWN_NAMESPACES = ("mnt", "pid", "net", "ipc", "uts")
UNSEEN = "not visible to this user"
_SUID_DUMPABLE = "/proc/sys/fs/suid_dumpable"
_SECUREBITS = (
    "NOROOT", "NOROOT_LOCKED", "NO_SETUID_FIXUP", "NO_SETUID_FIXUP_LOCKED",
    "KEEP_CAPS", "KEEP_CAPS_LOCKED", "NO_CAP_AMBIENT_RAISE", "NO_CAP_AMBIENT_RAISE_LOCKED",
)  # fmt: skip


class Seen(NamedTuple):
    holds: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Subject:
    """One process of a daemon. `purposes`: of its descriptors, None if they may not be seen."""

    daemon: Daemon
    process: Process
    purposes: dict[int, str | None] | None


@dataclass(frozen=True, slots=True)
class Rule:
    text: str
    look: Callable[[Subject], Seen]


def anything(text: str, show: Callable[[Subject], str]) -> Rule:
    """What the starter decides: shown, not judged."""
    return Rule(text, lambda subject: Seen(True, show(subject)))


# --- ids ----------------------------------------------------------------------------------------------------------------------


def every_id(text: str, allowed: Callable[[Subject], set[int] | None]) -> Rule:
    """All uids and gids of all threads are one of these; None allows any but the starter's, if more than that is mapped."""

    def look(subject: Subject) -> Seen:
        threads = subject.process.census.threads
        found = {number for thread in threads for number in (*thread.uids, *thread.gids)}
        permitted = allowed(subject)
        holds = found <= permitted if permitted is not None else not found & starter_ids(subject)
        return Seen(holds, show_ids(subject))

    return Rule(text, look)


def nobody(_subject: Subject) -> set[int]:
    return {OVERFLOW_ID}


def starter_ids(subject: Subject) -> set[int]:
    leader = subject.daemon.supervisor.census.leader
    return {*leader.uids, *leader.gids}


def powerless_in_user_namespace(subject: Subject) -> set[int] | None:
    """The starter's own ids are allowed only where the namespace has no others."""
    return starter_ids(subject) if sum(each.size for each in subject.daemon.uid_map) == 1 else None


def real_ids(text: str, allowed: Callable[[Subject], set[int]]) -> Rule:
    """Of the broker: a thread of its pool is somebody else for the moment in which it makes a file, the leader never."""

    def look(subject: Subject) -> Seen:
        census = subject.process.census
        found = {*census.leader.uids, *census.leader.gids}
        for thread in census.threads:
            found |= {thread.uids[0], thread.uids[2], thread.gids[0], thread.gids[2]}
        return Seen(found <= allowed(subject), show_ids(subject))

    return Rule(text, look)


def starter_or_namespace_root(subject: Subject) -> set[int]:
    return starter_ids(subject) | {each.outside for each in subject.daemon.uid_map if each.inside == 0}


def show_ids(subject: Subject) -> str:
    threads = subject.process.census.threads
    return (
        "uid " + _join({number for each in threads for number in each.uids}) + ", gid " + _join({n for each in threads for n in each.gids})
    )


def groups(text: str, allowed: Callable[[Subject], set[int]]) -> Rule:
    """Of the leader; of a broker's other threads but for the moment in which they make a file."""

    def look(subject: Subject) -> Seen:
        census = subject.process.census
        threads = (census.leader,) if subject.process.role == "broker" else census.threads
        found = {number for thread in threads for number in thread.groups}
        return Seen(found <= allowed(subject), _join(found) or "none")

    return Rule(text, look)


def starter_groups(subject: Subject) -> set[int]:
    return set(subject.daemon.supervisor.census.leader.groups)


# --- capabilities, seccomp ----------------------------------------------------------------------------------------------------


def capabilities(sets: Sequence[str], at_most: Iterable[str] = ()) -> Rule:
    """`sets`: fields of ThreadCensus. Nothing else in any of them, in any thread."""
    allowed = frozenset(at_most)
    text = "at most " + " ".join(name for name in NAMES if name in allowed) if allowed else "none"

    def look(subject: Subject) -> Seen:
        found = {name for thread in subject.process.census.threads for kind in sets for name in getattr(thread, kind)}
        shown = "all that there are" if len(found) >= len(NAMES) else " ".join(sorted(found)) or "none"
        return Seen(found <= allowed, shown)

    return Rule(text, look)


def chosen_capabilities(sets: Sequence[str], usual: Sequence[str], of_handles: str) -> Rule:
    """Of a broker that --modcaps gave more."""

    def look(subject: Subject) -> Seen:
        options = subject.daemon.options
        handles = () if options.inode_file_handles == "never" else (of_handles,)
        return capabilities(sets, (*usual, *handles, *options.broker_extra.split())).look(subject)

    return Rule("also those that the option adds", look)


def securebits(bits: int) -> Rule:
    def look(subject: Subject) -> Seen:
        report = subject.process.report
        return Seen(None, UNSEEN) if report is None else Seen(report.securebits == bits, _show_securebits(report.securebits))

    return Rule(_show_securebits(bits), look)


def _show_securebits(bits: int) -> str:
    return " ".join(name for at, name in enumerate(_SECUREBITS) if bits >> at & 1) or "none"


def every_thread(text: str, test: Callable[[ThreadCensus], bool]) -> Rule:
    def look(subject: Subject) -> Seen:
        threads = subject.process.census.threads
        good = sum(1 for thread in threads if test(thread))
        return Seen(good == len(threads), f"{good} of {len(threads)} threads")

    return Rule(text, look)


def filters(text: str, own: int) -> Rule:
    """`own`: how many of vfsd's a process has; those that the starter brought along come on top, and are the supervisor's too."""

    def look(subject: Subject) -> Seen:
        threads = subject.process.census.threads
        modes, counts = {thread.seccomp_mode for thread in threads}, {thread.seccomp_filters for thread in threads}
        shown = f"mode {_join(modes)}, " + ("filters not counted by this kernel" if None in counts else f"{_join(counts)} filters")
        least = subject.daemon.supervisor.census.leader.seccomp_filters
        expected = None if least is None else max(least - 1, 0) + own
        return Seen((own == 0 or modes == {2}) and (None in counts or counts == {expected}), shown)

    return Rule(text, look)


def no_filters(text: str) -> Rule:
    """With --seccomp=none: what there is was there before."""

    def look(subject: Subject) -> Seen:
        modes = {thread.seccomp_mode for thread in subject.process.census.threads}
        return Seen(True, f"mode {_join(modes)}")

    return Rule(text, look)


def filter_action(action: str, text: str) -> Rule:
    return Rule(text, lambda subject: Seen(subject.daemon.options.seccomp == action, f"--seccomp={subject.daemon.options.seccomp}"))


def policy(text: str, *, shipped: bool) -> Rule:
    def look(subject: Subject) -> Seen:
        path = subject.daemon.options.seccomp_policy
        return Seen((path is None) == shipped, "no --seccomp-policy" if path is None else path)

    return Rule(text, look)


def landlock(text: str) -> Rule:
    def look(subject: Subject) -> Seen:
        report = subject.process.report
        if report is None:
            return Seen(None, UNSEEN)
        return Seen(report.landlock > 0, f"version {report.landlock}" if report.landlock else "not in this kernel")

    return Rule(text, look)


# --- namespaces, root, memory, limits -----------------------------------------------------------------------------------------


def own_namespaces(text: str) -> Rule:
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

    return Rule(text, look)


def show_namespaces(subject: Subject) -> str:
    """Which differ from those of who looks."""
    theirs = subject.process.census.namespaces
    if theirs is None:
        return UNSEEN
    differ = [kind for kind in NAMESPACES if theirs[kind] != os.readlink(f"/proc/self/ns/{kind}")]
    return "as of who looks" + (", but for " + " ".join(differ) if differ else "")


def mounts(text: str, needed: Callable[[Subject, Mount], Iterable[str]], *, alone: bool) -> Rule:
    """`needed`: what a mount must have and has not. `alone`: there is only one."""

    def look(subject: Subject) -> Seen:
        found = subject.process.census.mounts
        if not found:
            return Seen(None, UNSEEN)
        lacks = [f"{mount.point} has not {' '.join(missing)}" for mount in found if (missing := list(needed(subject, mount)))]
        shown = f"{len(found)} mount{'s' if len(found) > 1 else ''}, / is {found[0].fs_type} {','.join(sorted(found[0].options))}"
        return Seen(not lacks and not (alone and len(found) > 1), "; ".join([shown, *lacks[:3]]))

    return Rule(text, look)


def lacks_of_share(subject: Subject, mount: Mount) -> Iterable[str]:
    wanted = {"nosuid", "nodev", "nosymfollow"} | ({"ro"} if subject.daemon.options.readonly else set())
    return sorted(wanted - mount.options)


def lacks_of_nothing(_subject: Subject, mount: Mount) -> Iterable[str]:
    """An empty file system: one inode, its root's."""
    missing = {"ro", "nosuid", "nodev", "noexec"} - mount.options
    return sorted(missing | ({"type tmpfs"} if mount.fs_type != "tmpfs" else set()) | ({"nr_inodes=1"} - mount.fs_options))


def root_link(text: str, test: Callable[[Subject, str], bool]) -> Rule:
    """Of all threads: what /proc/PID/root shows."""

    def look(subject: Subject) -> Seen:
        found = {thread.root for thread in subject.process.census.threads}
        if None in found:
            return Seen(None, UNSEEN)
        return Seen(all(test(subject, each or "") for each in found), _join(found))

    return Rule(text, look)


def working_directory(text: str, leader: Callable[[Subject], set[str]], others: str | None = None) -> Rule:
    """`others`: what the directories of other threads end with."""

    def look(subject: Subject) -> Seen:
        census = subject.process.census
        found = {thread.cwd or "" for thread in census.threads}
        if census.leader.cwd is None:
            return Seen(None, UNSEEN)
        allowed = leader(subject)
        return Seen(all(each in allowed or (others and each.endswith(others)) for each in found), _join(found))

    return Rule(text, look)


def hidden_memory(text: str) -> Rule:
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

    return Rule(text, look)


def _suid_dumpable() -> int:
    with open(_SUID_DUMPABLE, encoding="ascii") as file:
        return int(file.read())


def limits(exact: dict[str, int], most_files: int | None = None) -> Rule:
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

    return Rule(text, look)


def _limit(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def no_environment(text: str) -> Rule:
    def look(subject: Subject) -> Seen:
        names = subject.process.census.environment
        return Seen(None, UNSEEN) if names is None else Seen(not names, " ".join(names) or "empty")

    return Rule(text, look)


def show_environment(subject: Subject) -> str:
    names = subject.process.census.environment
    return UNSEEN if names is None else f"{len(names)} variables"


# --- processes, threads, descriptors ------------------------------------------------------------------------------------------


def threads(number: int) -> Rule:
    def look(subject: Subject) -> Seen:
        found = len(subject.process.census.threads)
        return Seen(found == number, str(found))

    return Rule(str(number), look)


def children(text: str) -> Rule:
    """Of the supervisor: one broker, one control, a bounded number of workers, nothing else."""

    def look(subject: Subject) -> Seen:
        roles = [each.role for each in subject.daemon.processes[1:]]
        counts = {role: roles.count(role) for role in sorted(set(roles))}
        workers = counts.pop("worker", 0)
        holds = counts == {"broker": 1, "control": 1} and 1 <= workers <= subject.daemon.options.request_queues
        return Seen(holds, ", ".join(f"{count} {role}" for role, count in {**counts, "worker": workers}.items()))

    return Rule(text, look)


def child_of_supervisor(text: str) -> Rule:
    def look(subject: Subject) -> Seen:
        pid = subject.process.pid
        started = [each.pid for each in subject.daemon.processes if each.census.parent == pid]
        holds = not started and subject.process.census.parent == subject.daemon.supervisor.pid
        return Seen(holds, "none" if not started else f"pids {_join(set(started))}")

    return Rule(text, look)


def known_descriptors(text: str) -> Rule:
    def look(subject: Subject) -> Seen:
        found, targets = subject.purposes, subject.process.census.fds
        if found is None or targets is None:
            return Seen(None, UNSEEN)
        unknown = [f"{number} ({targets[number].target})" for number, purpose in found.items() if purpose is None]
        if not unknown and OTHER_END_UNSEEN in found.values():
            return Seen(None, f"{len(found)} open, among them {OTHER_END_UNSEEN}")
        return Seen(not unknown, f"{len(found)} open" + (", of no known purpose: " + ", ".join(unknown) if unknown else ""))

    return Rule(text, look)


def _join(values: Iterable[object]) -> str:
    return " ".join(str(value) for value in sorted(values, key=lambda value: (not isinstance(value, int), value)))
