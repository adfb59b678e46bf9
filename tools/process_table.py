"""A table of vfsd's processes with what the kernel holds each of them to: made from /proc, not from what vfsd says of itself."""

import os
import platform
import textwrap
from collections.abc import Iterator

from vfsd.sandbox.census import NAMESPACES, ProcessCensus, take_census
from vfsd.sandbox.seccomp import load_policy
from vfsd.sandbox.seccomp_policy import RolePolicy
from vfsd.tools.daemon import members

CAPABILITIES_WIDTH = 44
HEADINGS = ("PROCESS", "PID", "THREADS", "UID", "SECCOMP", "SYSCALLS", "FDS", "OWN NAMESPACES", "CAPABILITIES")


def process_table(supervisor: int) -> str:
    """One row per process of a vfsd; capabilities and filters are those of its least confined thread."""
    ours = take_census(os.getpid())
    policy = load_policy().roles
    rows: list[list[str]] = [list(HEADINGS)]
    for member in members(supervisor):
        rows.extend(_rows(take_census(member.pid), member.role, policy, ours))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _rows(census: ProcessCensus, role: str, policy: dict[str, RolePolicy], ours: ProcessCensus) -> Iterator[list[str]]:
    """A process, and as many further lines as its capabilities take."""
    capabilities = sorted({name for thread in census.threads for name in (*thread.permitted, *thread.effective)})
    lines = textwrap.wrap(" ".join(capabilities), CAPABILITIES_WIDTH) or ["none"]
    mode = min(thread.seccomp_mode for thread in census.threads)
    yield [
        role,
        str(census.pid),
        str(len(census.threads)),
        "/".join(sorted({str(thread.uids[1]) for thread in census.threads})),
        {0: "none", 1: "strict", 2: "filter"}[mode],
        _allowed(policy[role]) if mode == 2 else "all",
        "?" if census.fds is None else str(len(census.fds)),
        _own_namespaces(census, ours),
        lines[0],
    ]
    for line in lines[1:]:
        yield [""] * (len(HEADINGS) - 1) + [line]


def _allowed(role: RolePolicy) -> str:
    """How many system calls the role's filter lets through, with whatever arguments."""
    rules = role.rules_for(platform.machine())
    if role.default == "allow":
        return f"all but {len({rule.syscall for rule in rules if rule.action != 'allow'})}"
    return str(len({rule.syscall for rule in rules if rule.action == "allow"}))


def _own_namespaces(census: ProcessCensus, ours: ProcessCensus) -> str:
    if census.namespaces is None or ours.namespaces is None:
        return "?"
    return " ".join(kind for kind in NAMESPACES if census.namespaces[kind] != ours.namespaces[kind]) or "none"
