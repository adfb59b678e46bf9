"""Checks of what a daemon consists of: processes, their threads, their descriptors. See `check`."""

from __future__ import annotations

from vfsd.tools.check import UNSEEN, Check, Seen, Subject, join
from vfsd.tools.fd_purposes import OTHER_END_UNSEEN


def threads(number: int) -> Check:
    def look(subject: Subject) -> Seen:
        found = len(subject.process.census.threads)
        return Seen(found == number, str(found))

    return Check(str(number), look)


def children(text: str) -> Check:
    """Of the supervisor: one broker, one control, a bounded number of workers, nothing else."""

    def look(subject: Subject) -> Seen:
        roles = [each.role for each in subject.daemon.processes[1:]]
        counts = {role: roles.count(role) for role in sorted(set(roles))}
        workers = counts.pop("worker", 0)
        most = subject.daemon.options.request_queues + subject.daemon.options.spare_workers
        holds = counts == {"broker": 1, "control": 1} and 1 <= workers <= most
        return Seen(holds, ", ".join(f"{count} {role}" for role, count in {**counts, "worker": workers}.items()))

    return Check(text, look)


def child_of_supervisor(text: str) -> Check:
    def look(subject: Subject) -> Seen:
        pid = subject.process.pid
        started = [each.pid for each in subject.daemon.processes if each.census.parent == pid]
        holds = not started and subject.process.census.parent == subject.daemon.supervisor.pid
        return Seen(holds, "none" if not started else f"pids {join(set(started))}")

    return Check(text, look)


def known_descriptors(text: str) -> Check:
    def look(subject: Subject) -> Seen:
        found, targets = subject.purposes, subject.process.census.fds
        if found is None or targets is None:
            return Seen(None, UNSEEN)
        unknown = [f"{number} ({targets[number].target})" for number, purpose in found.items() if purpose is None]
        if not unknown and OTHER_END_UNSEEN in found.values():
            return Seen(None, f"{len(found)} open, among them {OTHER_END_UNSEEN}")
        return Seen(not unknown, f"{len(found)} open" + (", of no known purpose: " + ", ".join(unknown) if unknown else ""))

    return Check(text, look)


def faults(text: str, *, injected: bool) -> Check:
    """By the module that a child was started with."""

    def look(subject: Subject) -> Seen:
        modules = [word for word in subject.process.census.command if word.startswith("vfsd.")]
        return Seen(any("faulty" in module.split(".") for module in modules) == injected, " ".join(modules) or "?")

    return Check(text, look)
