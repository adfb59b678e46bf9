"""What recorded runs made of a policy: per role, how often each rule decided, and the calls for which there was none.

A record is a small JSON file, whatever the length of the run, and records of the same policy can be added up. Who controls the
bytes of a record: who recorded it, an administrator or the build; so it is checked for mistakes, not for attacks.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import Policy
from vfsd.sandbox.seccomp_policy import RolePolicy, Rule

FORMAT = 1
_EXAMPLES_MAX = 16  # arguments that are kept of one call that the policy has no rule for: enough to write one
_CACHE_MAX = 1 << 16
_ARGUMENTS = 6


def rule_name(rule: Rule) -> str:
    """What a record calls a rule: the call and its conditions, as the policy has them. Unique within a role on one machine."""
    return f"{rule.syscall} when {', '.join(rule.conditions)}" if rule.conditions else rule.syscall


def policy_digest(policy: Policy) -> str:
    """Of what decides: rules may be reordered, and reasons rewritten, without making a record worthless."""
    rows = [
        f"{role.name} {role.default} {rule_name(rule)} {rule.action}"
        for role in policy.roles.values()
        for rule in role.rules_for(platform.machine())
    ]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


@dataclass(slots=True)
class Missing:
    """Calls of one name that no rule is about."""

    count: int = 0
    examples: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, count: int, examples: Iterable[tuple[int, ...]]) -> None:
        self.count += count
        for each in examples:
            if each not in self.examples and len(self.examples) < _EXAMPLES_MAX:
                self.examples.append(each)


@dataclass(slots=True)
class RoleRecord:
    """`used`: name of a rule -> how often it decided. A role that is not in a record at all did not run."""

    used: Counter[str] = field(default_factory=Counter)
    missing: dict[str, Missing] = field(default_factory=dict)

    def miss(self, syscall: str, count: int, examples: Iterable[tuple[int, ...]]) -> None:
        self.missing.setdefault(syscall, Missing()).add(count, examples)


@dataclass(slots=True)
class SyscallRecord:
    """What was seen, by role."""

    policy: str
    machine: str
    runs: int = 0
    roles: dict[str, RoleRecord] = field(default_factory=dict)

    def add(self, other: SyscallRecord) -> None:
        if (self.policy, self.machine) != (other.policy, other.machine):
            raise ConfigError("these records are of different policies or machines; record the runs again, with one policy")
        self.runs += other.runs
        for name, theirs in other.roles.items():
            ours = self.roles.setdefault(name, RoleRecord())
            ours.used.update(theirs.used)
            for syscall, missing in theirs.missing.items():
                ours.miss(syscall, missing.count, missing.examples)

    def to_json(self) -> str:
        roles = {
            name: {
                "used": dict(sorted(role.used.items())),
                "missing": {
                    syscall: {"count": missing.count, "examples": [[hex(number) for number in each] for each in missing.examples]}
                    for syscall, missing in sorted(role.missing.items())
                },
            }
            for name, role in sorted(self.roles.items())
        }
        document = {"format": FORMAT, "policy": self.policy, "machine": self.machine, "runs": self.runs, "roles": roles}
        return json.dumps(document, indent=1) + "\n"


def parse_record(text: str, where: str) -> SyscallRecord:
    """Raises ConfigError for what `to_json` did not make."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ConfigError(
                f"{where}: format {document['format']!r} is not the one that this vfsdctl understands ({FORMAT}); record again"
            )
        record = SyscallRecord(document["policy"], document["machine"], document["runs"])
        record.roles = {name: _parse_role(role) for name, role in document["roles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: is no record of system calls: {error!r}; make one with vfsdctl policy learn --record") from None
    return record


def _parse_role(document: dict[str, Any]) -> RoleRecord:
    role = RoleRecord(Counter(document["used"]))
    for syscall, missing in document["missing"].items():
        role.miss(syscall, missing["count"], [tuple(int(number, 0) for number in each) for each in missing["examples"]])
    return role


def new_record(policy: Policy, runs: int = 0) -> SyscallRecord:
    return SyscallRecord(policy_digest(policy), platform.machine(), runs)


@dataclass(slots=True)
class Recorder:
    """Fills a record with the calls that a `SyscallTrace` reports."""

    policy: Policy
    record: SyscallRecord
    _decided: dict[tuple[str, str, tuple[int, ...]], str | None] = field(default_factory=dict)

    def observe(self, role: str, syscall: str, arguments: tuple[int, ...]) -> None:
        record = self.record.roles.setdefault(role, RoleRecord())
        key = (role, syscall, arguments)
        if key not in self._decided:
            if len(self._decided) > _CACHE_MAX:
                self._decided.clear()
            self._decided[key] = _deciding(self.policy.roles[role], syscall, arguments)
        name = self._decided[key]
        if name is not None:
            record.used[name] += 1
        elif self.policy.roles[role].default == "kill":
            record.miss(syscall, 1, [arguments])


def _deciding(role: RolePolicy, syscall: str, arguments: tuple[int, ...]) -> str | None:
    padded = (arguments + (0,) * _ARGUMENTS)[:_ARGUMENTS]
    rule = role.deciding_rule(syscall, padded, platform.machine())
    return None if rule is None else rule_name(rule)
