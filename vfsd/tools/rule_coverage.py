"""Which rules of a policy recorded runs exercised, and why the others are there nevertheless.

A rule that no run exercises is either in `seldom_used.toml`, which says what it takes and that a test executes it, or it is
superfluous. A denial is the other way round: it is there not to be used.
"""

from __future__ import annotations

import os
import platform
import tomllib
from dataclasses import dataclass
from enum import StrEnum

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import Policy
from vfsd.sandbox.seccomp_policy import RolePolicy
from vfsd.tools.syscall_record import SyscallRecord, rule_name

SELDOM_USED_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "seldom_used.toml")


class State(StrEnum):
    """Of one rule of one role."""

    RECORDED = "recorded"
    SELDOM = "by test only"
    DENIAL = "denial"
    OTHER_MACHINE = "other machine"
    NEVER = "never exercised"
    ATTEMPTED = "denied call attempted"


FINDINGS = (State.NEVER, State.ATTEMPTED)


@dataclass(frozen=True, slots=True)
class RuleCoverage:
    """`why`: of a rule that is seldom used, what it takes."""

    role: str
    rule: str
    action: str
    state: State
    count: int
    why: str = ""


def load_seldom_used(policy: Policy, path: str = SELDOM_USED_FILE) -> dict[tuple[str, str], str]:
    """(role, rule) -> why. Raises ConfigError for an entry that is about no rule of the policy."""
    with open(path, "rb") as file:
        document = tomllib.load(file)
    there = {(role.name, rule_name(rule)) for role in policy.roles.values() for rule in role.rules}
    found: dict[tuple[str, str], str] = {}
    for entry in document["rule"]:
        for key in ((role, entry["rule"]) for role in entry["roles"]):
            if key not in there:
                raise ConfigError(f"{path}: role {key[0]} has no rule {key[1]!r}; take the entry out, or correct it")
            found[key] = entry["why"]
    return found


def cover(policy: Policy, record: SyscallRecord, seldom: dict[tuple[str, str], str]) -> list[RuleCoverage]:
    """Every rule of every role, in the policy's order."""
    return [each for role in policy.roles.values() for each in _cover_role(role, record, seldom)]


def _cover_role(role: RolePolicy, record: SyscallRecord, seldom: dict[tuple[str, str], str]) -> list[RuleCoverage]:
    used = record.roles[role.name].used if role.name in record.roles else {}
    rows = []
    here = {rule_name(rule) for rule in role.rules_for(platform.machine())}
    for rule in role.rules:
        name = rule_name(rule)
        if platform.machine() not in rule.architectures and name in here:
            continue  # the same rule, with that machine's numbers
        why = seldom.get((role.name, name), "")
        count = used.get(name, 0)
        action = rule.action if isinstance(rule.action, str) else f"errno {os.strerror(rule.action)}" if rule.action else "answers 0"
        if platform.machine() not in rule.architectures:
            state, why = State.OTHER_MACHINE, f"only on {', '.join(rule.architectures)}"
        elif role.default == "allow":
            state = State.ATTEMPTED if count else State.DENIAL
        elif count:
            state = State.RECORDED
        else:
            state = State.SELDOM if why else State.NEVER
        rows.append(RuleCoverage(role.name, name, action, state, count, why))
    return rows


def unused_rules(policy: Policy, record: SyscallRecord, role: str) -> list[str]:
    """Names of the rules that permit or answer something, and decided nothing. Denials are left out."""
    found = policy.roles[role]
    if found.default == "allow":
        return []
    used = record.roles[role].used
    return [rule_name(rule) for rule in found.rules_for(platform.machine()) if rule_name(rule) not in used]
