"""Checks of who a process is and what it may do: ids, groups, capabilities, securebits, filters, Landlock. See `check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vfsd.sandbox.capabilities import NAMES
from vfsd.sandbox.census import ThreadCensus
from vfsd.sandbox.id_maps import OVERFLOW_ID
from vfsd.tools.check import UNSEEN, Check, Seen, Subject, join

_SECUREBITS = (
    "NOROOT", "NOROOT_LOCKED", "NO_SETUID_FIXUP", "NO_SETUID_FIXUP_LOCKED",
    "KEEP_CAPS", "KEEP_CAPS_LOCKED", "NO_CAP_AMBIENT_RAISE", "NO_CAP_AMBIENT_RAISE_LOCKED",
)  # fmt: skip


def every_id(text: str, allowed: Callable[[Subject], set[int] | None]) -> Check:
    """All uids and gids of all threads are one of these; None allows any but the starter's, if more than that is mapped."""

    def look(subject: Subject) -> Seen:
        threads = subject.process.census.threads
        found = {number for thread in threads for number in (*thread.uids, *thread.gids)}
        permitted = allowed(subject)
        holds = found <= permitted if permitted is not None else not found & starter_ids(subject)
        return Seen(holds, show_ids(subject))

    return Check(text, look)


def nobody(_subject: Subject) -> set[int]:
    return {OVERFLOW_ID}


def starter_ids(subject: Subject) -> set[int]:
    leader = subject.daemon.supervisor.census.leader
    return {*leader.uids, *leader.gids}


def powerless_in_user_namespace(subject: Subject) -> set[int] | None:
    """The starter's own ids are allowed only where the namespace has no others."""
    return starter_ids(subject) if sum(each.size for each in subject.daemon.uid_map) == 1 else None


def real_ids(text: str, allowed: Callable[[Subject], set[int]]) -> Check:
    """Of the broker: a thread of its pool is somebody else for the moment in which it makes a file, the leader never."""

    def look(subject: Subject) -> Seen:
        census = subject.process.census
        found = {*census.leader.uids, *census.leader.gids}
        for thread in census.threads:
            found |= {thread.uids[0], thread.uids[2], thread.gids[0], thread.gids[2]}
        return Seen(found <= allowed(subject), show_ids(subject))

    return Check(text, look)


def starter_or_namespace_root(subject: Subject) -> set[int]:
    return starter_ids(subject) | {each.outside for each in subject.daemon.uid_map if each.inside == 0}


def show_ids(subject: Subject) -> str:
    threads = subject.process.census.threads
    return "uid " + join({number for each in threads for number in each.uids}) + ", gid " + join({n for each in threads for n in each.gids})


def groups(text: str, allowed: Callable[[Subject], set[int]]) -> Check:
    """Of the leader; of a broker's other threads but for the moment in which they make a file."""

    def look(subject: Subject) -> Seen:
        census = subject.process.census
        threads = (census.leader,) if subject.process.role == "broker" else census.threads
        found = {number for thread in threads for number in thread.groups}
        return Seen(found <= allowed(subject), join(found) or "none")

    return Check(text, look)


def starter_groups(subject: Subject) -> set[int]:
    return set(subject.daemon.supervisor.census.leader.groups)


def capabilities(sets: Sequence[str], at_most: Iterable[str] = ()) -> Check:
    """`sets`: fields of ThreadCensus. Nothing else in any of them, in any thread."""
    allowed = frozenset(at_most)
    text = "at most " + " ".join(name for name in NAMES if name in allowed) if allowed else "none"

    def look(subject: Subject) -> Seen:
        found = {name for thread in subject.process.census.threads for kind in sets for name in getattr(thread, kind)}
        shown = "all that there are" if len(found) >= len(NAMES) else " ".join(sorted(found)) or "none"
        return Seen(found <= allowed, shown)

    return Check(text, look)


def chosen_capabilities(sets: Sequence[str], usual: Sequence[str], of_handles: str) -> Check:
    """Of a broker that --modcaps gave more."""

    def look(subject: Subject) -> Seen:
        options = subject.daemon.options
        handles = () if options.inode_file_handles == "never" else (of_handles,)
        return capabilities(sets, (*usual, *handles, *options.broker_extra.split())).look(subject)

    return Check("also those that the option adds", look)


def securebits(bits: int) -> Check:
    def look(subject: Subject) -> Seen:
        report = subject.process.report
        return Seen(None, UNSEEN) if report is None else Seen(report.securebits == bits, _show_securebits(report.securebits))

    return Check(_show_securebits(bits), look)


def _show_securebits(bits: int) -> str:
    return " ".join(name for at, name in enumerate(_SECUREBITS) if bits >> at & 1) or "none"


def every_thread(text: str, test: Callable[[ThreadCensus], bool]) -> Check:
    def look(subject: Subject) -> Seen:
        threads = subject.process.census.threads
        good = sum(1 for thread in threads if test(thread))
        return Seen(good == len(threads), f"{good} of {len(threads)} threads")

    return Check(text, look)


def filters(text: str, own: int) -> Check:
    """`own`: how many, at least one, of vfsd's a process has; those that the starter brought along come on top, and are the supervisor's too."""

    def look(subject: Subject) -> Seen:
        threads = subject.process.census.threads
        modes, counts = {thread.seccomp_mode for thread in threads}, {thread.seccomp_filters for thread in threads}
        shown = f"mode {join(modes)}, " + ("filters not counted by this kernel" if None in counts else f"{join(counts)} filters")
        least = subject.daemon.supervisor.census.leader.seccomp_filters
        expected = None if least is None else max(least - 1, 0) + own
        return Seen(modes == {2} and (None in counts or counts == {expected}), shown)

    return Check(text, look)


def no_filters(text: str) -> Check:
    """With --seccomp=none: what there is was there before."""

    def look(subject: Subject) -> Seen:
        modes = {thread.seccomp_mode for thread in subject.process.census.threads}
        return Seen(True, f"mode {join(modes)}")

    return Check(text, look)


def filter_action(action: str, text: str) -> Check:
    return Check(text, lambda subject: Seen(subject.daemon.options.seccomp == action, f"--seccomp={subject.daemon.options.seccomp}"))


def policy(text: str, *, shipped: bool) -> Check:
    def look(subject: Subject) -> Seen:
        path = subject.daemon.options.seccomp_policy
        return Seen((path is None) == shipped, "no --seccomp-policy" if path is None else path)

    return Check(text, look)


def landlock(text: str) -> Check:
    def look(subject: Subject) -> Seen:
        report = subject.process.report
        if report is None:
            return Seen(None, UNSEEN)
        return Seen(report.landlock > 0, f"version {report.landlock}" if report.landlock else "not in this kernel")

    return Check(text, look)
