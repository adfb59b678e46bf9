"""All that is wrong with a policy, on every machine that may use it: what `vfsdctl policy check` tells.

vfsd refuses a policy at its first mistake; this goes on. The file is the administrator's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import compile_role, missing_or_unknown_roles, missing_syscall, read_policy
from vfsd.sandbox.seccomp_forbidden import find_weaknesses
from vfsd.sandbox.seccomp_load import BPF_MAXINSNS, INSTRUCTION_BYTES
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, RolePolicy, Rule, examine_policy
from vfsd.sandbox.seccomp_sets import cubes_of, find_uncovered

Kind = Literal["schema", "role", "syscall", "redundant", "forbidden", "size"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`architectures`: where it is so; empty: it has nothing to do with the machine."""

    kind: Kind
    text: str
    architectures: tuple[str, ...] = ()

    def __str__(self) -> str:
        on = f" [{', '.join(self.architectures)}]" if self.architectures and self.architectures != ARCHITECTURES else ""
        return f"{self.kind}: {self.text}{on}"


@dataclass(frozen=True, slots=True)
class Examined:
    """`roles` lack what is not understood, which is among the findings."""

    path: str
    sha256: str
    roles: dict[str, RolePolicy]
    findings: list[Finding]


def examine_file(path: str) -> Examined:
    """Raises ConfigError only for a file that is no TOML."""
    document, digest = read_policy(path)
    roles, problems = examine_policy(document)
    found = [Finding("schema", problem) for problem in problems]
    if roles or not problems:
        broken = {name for name in document.get("role", {}) if name not in roles}
        found += [Finding("role", text) for text in missing_or_unknown_roles({*roles, *broken})]
    for role in roles.values():
        found += _join_alike([(architecture, each) for architecture in ARCHITECTURES for each in _examine_role(role, architecture)])
    return Examined(path, digest, roles, found)


def _join_alike(found: list[tuple[str, Finding]]) -> list[Finding]:
    """The same finding on several machines, told once."""
    where: dict[Finding, list[str]] = {}
    for architecture, finding in found:
        where.setdefault(finding, []).append(architecture)
    return [Finding(finding.kind, finding.text, tuple(architectures)) for finding, architectures in where.items()]


def _examine_role(role: RolePolicy, architecture: str) -> Iterator[Finding]:
    missing = [text for rule in role.rules_for(architecture) if (text := missing_syscall(rule, architecture))]
    yield from (Finding("syscall", text) for text in missing)
    yield from (Finding("redundant", text) for text in _find_redundant(role.rules_for(architecture)))
    yield from (Finding("forbidden", str(weakness)) for weakness in find_weaknesses(role, architecture))
    if not missing and role.rules_for(architecture):
        yield from _try_to_compile(role, architecture)


def _find_redundant(rules: list[Rule]) -> Iterator[str]:
    """Rules that other rules make pointless: each of their calls is already decided, and the same way."""
    for rule in rules:
        others = [other for other in rules if other is not rule and other.syscall == rule.syscall and other.action == rule.action]
        if (
            others
            and find_uncovered(cubes_of(rule.comparisons), [cube for other in others for cube in cubes_of(other.comparisons)]) is None
        ):
            named = ", ".join(other.where for other in others)
            yield f'{rule.where}: {named} already cover(s) every call that it is about [the rule\'s reason: "{rule.reason}"]'


def _try_to_compile(role: RolePolicy, architecture: str) -> Iterator[Finding]:
    try:
        program = compile_role(role, "kill", architecture)
    except ConfigError as error:
        yield Finding("syscall", str(error))
        return
    length = len(program) // INSTRUCTION_BYTES
    if length > BPF_MAXINSNS:
        yield Finding("size", f"role {role.name}: its filter has {length} instructions, and the kernel takes {BPF_MAXINSNS}")
