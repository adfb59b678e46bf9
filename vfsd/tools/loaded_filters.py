"""What the kernel really has loaded on a process, thread by thread, and which compiled filter of a policy each is.

Who controls the bytes: see `daemon` and `ptrace`: a filter is only ever compared as bytes, or taken apart as numbers.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from vfsd.errors import ConfigError
from vfsd.sandbox.ptrace import read_filters
from vfsd.sandbox.seccomp import KILL_MODES, KillMode, Policy
from vfsd.sandbox.seccomp_load import INSTRUCTION_BYTES
from vfsd.tools.daemon import Member

# Filters are inherited over exec. The broker starts before the supervisor confines itself, the others after. Before these come
# those that whoever started vfsd brought along: they are no fault, as a filter can only take away from what the others allow.
EXPECTED: dict[str, tuple[str, ...]] = {
    "supervisor": ("supervisor",),
    "broker": ("broker",),
    "control": ("supervisor", "control"),
    "worker": ("supervisor", "worker"),
}


@dataclass(frozen=True, slots=True)
class Filter:
    """One loaded program; `role` and `action` are None when the policy makes no such filter."""

    program: bytes
    role: str | None
    action: KillMode | None

    @property
    def digest(self) -> str:
        return digest_of(self.program)

    @property
    def instructions(self) -> int:
        return len(self.program) // INSTRUCTION_BYTES

    def __str__(self) -> str:
        return "unknown" if self.role is None else f"{self.role} ({self.action})"


@dataclass(frozen=True, slots=True)
class LoadedFilters:
    """One process. `threads`: thread id -> its filters, oldest first: the order in which they were loaded.

    `inherited`: those that vfsd was started with, as the supervisor has them. All threads of all its processes must begin with them.
    """

    pid: int
    role: str
    name: str
    threads: dict[int, tuple[Filter, ...]]
    inherited: tuple[Filter, ...] = ()

    def faults(self) -> list[str]:
        """What is not as the policy would have it."""
        return [text for tid, filters in self.threads.items() if (text := self._fault(tid, filters))]

    def own(self, filters: tuple[Filter, ...]) -> tuple[Filter, ...]:
        """Of one thread's, those that vfsd loaded itself."""
        return filters[len(self.inherited) :] if self._begins_as_it_must(filters) else filters

    def _begins_as_it_must(self, filters: tuple[Filter, ...]) -> bool:
        return filters[: len(self.inherited)] == self.inherited

    def _fault(self, tid: int, filters: tuple[Filter, ...]) -> str | None:
        expected = EXPECTED.get(self.role)
        if expected is None:
            return f"thread {tid} is of a process that the supervisor does not know, or that is not ready yet"
        if not self._begins_as_it_must(filters):
            return f"thread {tid} has {_listed(filters)}, and not first the {len(self.inherited)} that vfsd was started with"
        found = self.own(filters)
        if tuple(each.role for each in found) != expected:
            return f"thread {tid} has {_listed(found)}, a {self.role} should have {_counted(expected)}"
        if any(each.action == "log" for each in found):
            return f"thread {tid} has a filter that only logs: the daemon was started with --seccomp=log"
        return None


def _listed(filters: tuple[Filter, ...]) -> str:
    return _counted(tuple(each.role or "unknown" for each in filters))


def _counted(roles: tuple[str, ...]) -> str:
    if not roles:
        return "no filter of vfsd's"
    return f"{'one filter' if len(roles) == 1 else f'{len(roles)} filters'} ({', '.join(roles)})"


def brought_along(supervisor: LoadedFilters) -> tuple[Filter, ...]:
    """What vfsd was started with: all that the supervisor had before it loaded its own. Without its own nothing counts as such."""
    filters = supervisor.threads.get(supervisor.pid, ())
    return filters[:-1] if filters and filters[-1].role == "supervisor" else ()


def digest_of(program: bytes) -> str:
    return hashlib.sha256(program).hexdigest()


def compiled_filters(policy: Policy) -> dict[bytes, tuple[str, KillMode]]:
    """Every program that this policy can become, with each meaning of "kill" that --seccomp knows."""
    return {policy.compile(role, action): (role, action) for role in policy.roles for action in KILL_MODES}


def look_at(member: Member, known: dict[bytes, tuple[str, KillMode]]) -> LoadedFilters:
    """Raises ConfigError when the process is gone or may not be looked at."""
    threads = {}
    for tid in _threads_of(member.pid):
        try:
            programs = read_filters(tid)
        except ProcessLookupError:
            continue  # that thread has ended since
        except OSError as error:
            raise ConfigError(_refusal(member.pid, tid, error)) from None
        threads[tid] = tuple(Filter(program, *known.get(program, (None, None))) for program in programs)
    if not threads:
        raise ConfigError(_gone(member.pid))
    return LoadedFilters(member.pid, member.role, member.name, threads)


def _threads_of(pid: int) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        raise ConfigError(_gone(pid)) from None


def _gone(pid: int) -> str:
    return f"process {pid} does not run any more; look again"


def _refusal(pid: int, tid: int, error: OSError) -> str:
    what = f"process {pid}: the filters of thread {tid} cannot be read: {error.strerror}"
    match error:
        case TimeoutError():
            return f"{what}; try again when what it waits for has come"
        case PermissionError():
            if _is_filtered():
                return f"{what}; the kernel tells them to nobody who has a seccomp filter himself: ask from outside of this container"
            return f"{what}; it takes CAP_SYS_ADMIN and CAP_SYS_PTRACE, and that nobody else traces it: run as root on the host"
        case _:
            return f"{what}; it takes a kernel with CONFIG_CHECKPOINT_RESTORE"


def _is_filtered() -> bool:
    with open(f"/proc/{os.getpid()}/status", encoding="utf-8", errors="backslashreplace") as file:
        return any(line.split() == ["Seccomp:", "2"] for line in file)
