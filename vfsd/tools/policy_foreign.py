"""A policy in the formats of other sandboxes.

None of them can say everything that a policy says. What one cannot say is left out where the call dies without it, so that
nothing more is allowed; and it is told, in a comment where the format has comments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp_conditions import Comparison
from vfsd.sandbox.seccomp_policy import Action, RolePolicy, Rule
from vfsd.tools.policy_words import action_word

_ALL_BITS = (1 << 64) - 1

_OCI_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_OCI_OPERATORS = {"!=": "SCMP_CMP_NE", "<": "SCMP_CMP_LT", "<=": "SCMP_CMP_LE", ">": "SCMP_CMP_GT", ">=": "SCMP_CMP_GE"}
_FIRECRACKER_OPERATORS = {"!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}


@dataclass(frozen=True, slots=True)
class Shown:
    """`left_out`: what the format cannot say."""

    text: str
    left_out: tuple[str, ...] = ()


def oci(roles: Sequence[RolePolicy], architecture: str) -> Shown:
    """linux.seccomp of the OCI runtime specification."""
    (role,) = roles
    profile = {
        "defaultAction": _oci_action(role.default),
        "architectures": [_OCI_ARCHITECTURES[architecture]],
        "syscalls": [_oci_rule(rule) for rule in role.rules_for(architecture)],
    }
    note = "the runtime, not the profile, decides what a call by another architecture's entry does: check that it kills the process"
    return Shown(json.dumps(profile, indent=2) + "\n", (note,))


def _oci_action(action: Action) -> str:
    if isinstance(action, int):
        return "SCMP_ACT_ERRNO"
    return "SCMP_ACT_ALLOW" if action == "allow" else "SCMP_ACT_KILL_PROCESS"


def _oci_rule(rule: Rule) -> dict[str, Any]:
    row: dict[str, Any] = {"names": [rule.syscall], "action": _oci_action(rule.action)}
    if isinstance(rule.action, int):
        row["errnoRet"] = rule.action
    if rule.comparisons:
        row["args"] = [_oci_argument(each) for each in rule.comparisons]
    return row


def _oci_argument(comparison: Comparison) -> dict[str, Any]:
    if comparison.operator != "masked":
        return {"index": comparison.argument, "value": comparison.value, "op": _OCI_OPERATORS[comparison.operator]}
    if comparison.value == _ALL_BITS:
        return {"index": comparison.argument, "value": comparison.operand, "op": "SCMP_CMP_EQ"}
    return {"index": comparison.argument, "value": comparison.value, "valueTwo": comparison.operand, "op": "SCMP_CMP_MASKED_EQ"}


def firecracker(roles: Sequence[RolePolicy], architecture: str) -> Shown:
    """Seccompiler's JSON: a filter for each thread category, here for each role; one action for all that match."""
    filters: dict[str, Any] = {}
    left_out: list[str] = []
    for role in roles:
        matching: Action = "kill" if role.default == "allow" else "allow"
        rules = role.rules_for(architecture)
        left_out += [
            f"{rule.where}: left out, so the call is killed: it has one action for all rules" for rule in rules if rule.action != matching
        ]
        filters[role.name] = {
            "default_action": _firecracker_action(role.default),
            "filter_action": _firecracker_action(matching),
            "filter": [_firecracker_rule(rule) for rule in rules if rule.action == matching],
        }
    return Shown(json.dumps(filters, indent=2) + "\n", tuple(left_out))


def _firecracker_action(action: Action) -> str:
    return "allow" if action == "allow" else "kill_process"


def _firecracker_rule(rule: Rule) -> dict[str, Any]:
    row: dict[str, Any] = {"syscall": rule.syscall, "comment": rule.reason}
    if rule.comparisons:
        # dword would compare the low half only.
        row["args"] = [{"index": each.argument, "type": "qword", **_firecracker_comparison(each)} for each in rule.comparisons]
    return row


def _firecracker_comparison(comparison: Comparison) -> dict[str, Any]:
    if comparison.operator != "masked":
        return {"op": _FIRECRACKER_OPERATORS[comparison.operator], "val": comparison.value}
    if comparison.value == _ALL_BITS:
        return {"op": "eq", "val": comparison.operand}
    return {"op": {"masked_eq": comparison.value}, "val": comparison.operand}


def minijail(roles: Sequence[RolePolicy], architecture: str) -> Shown:
    """A .policy of minijail and crosvm. They have no masked comparison, but "no bit but" (in) and "this bit" (&) amount to one."""
    (role,) = roles
    if role.default == "allow":
        raise ConfigError(
            f"--format=minijail: role {role.name} denies a list of calls and allows the rest, and a minijail policy that denies can only make "
            "calls fail, not kill; use another format"
        )
    by_syscall: dict[str, list[Rule]] = {}
    for rule in role.rules_for(architecture):
        by_syscall.setdefault(rule.syscall, []).append(rule)
    lines = [
        f"# vfsd's role {role.name}, for {architecture} alone. Compile it with minijail's compile_seccomp_policy.py.",
        "@default kill-process",
    ]
    for syscall, rules in by_syscall.items():
        lines += ["", *(f"# {action_word(rule.action)}: {rule.reason}" for rule in rules), f"{syscall}: {_minijail_filter(rules)}"]
    return Shown("\n".join(lines) + "\n")


def _minijail_filter(rules: list[Rule]) -> str:
    filters = [_minijail_rule(rule) for rule in rules]
    return filters[0] if len(filters) == 1 and not rules[0].comparisons else "{ " + ", ".join(filters) + " }"


def _minijail_rule(rule: Rule) -> str:
    action = f"return {rule.action}" if isinstance(rule.action, int) else "allow"
    atoms = [atom for each in rule.comparisons for atom in _minijail_atoms(each)]
    return f"{' && '.join(atoms)}; {action}" if atoms else action


def _minijail_atoms(comparison: Comparison) -> list[str]:
    """Atoms that hold together exactly where the comparison does."""
    name = f"arg{comparison.argument}"
    if comparison.operator != "masked":
        return [f"{name} {comparison.operator} {comparison.value:#x}"]
    mask, operand = comparison.value, comparison.operand
    if mask == _ALL_BITS:
        return [f"{name} == {operand:#x}"]
    must_be_clear = mask & ~operand
    atoms = [f"{name} in {_ALL_BITS & ~must_be_clear:#x}"] if must_be_clear else []
    return atoms + [f"{name} & {1 << bit:#x}" for bit in range(64) if operand >> bit & 1]
