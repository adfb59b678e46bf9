"""A policy as text for people: a table, and the file itself with its groups resolved."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vfsd.sandbox.seccomp_policy import ARCHITECTURES, VERSION, RolePolicy, Rule
from vfsd.tools.policy_foreign import Shown
from vfsd.tools.policy_words import action_word, condition_words, counted_syscalls, outcome_words

_HEADINGS = ("SYSTEM CALL", "OUTCOME", "IF", "USED BY", "REASON")


def table(roles: Sequence[RolePolicy], architecture: str) -> Shown:
    return Shown("\n".join(_table_of(role, architecture) for role in roles))


def _table_of(role: RolePolicy, architecture: str) -> str:
    rows = [_HEADINGS, *(_row(rule) for rule in role.rules_for(architecture))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counted = counted_syscalls(role, architecture)
    summary = (
        f"{counted} calls denied, any other allowed" if role.default == "allow" else f"{counted} calls allowed, any other kills the process"
    )
    return "\n".join([f"{role.name} ({architecture}): {summary}", *lines, ""])


def _row(rule: Rule) -> tuple[str, ...]:
    return rule.syscall, outcome_words(rule.action), condition_words(rule), rule.used_by, rule.reason


def toml(roles: Sequence[RolePolicy]) -> Shown:
    """The rules of all machines: what `--seccomp-policy` takes, if it is every role."""
    lines = ["# Groups resolved.", f"version = {VERSION}"]
    for role in roles:
        lines += ["", f"[role.{role.name}]", f"default = {json.dumps(role.default)}", "rules = ["]
        lines += [f"  {_inline_table(rule, machines, role)}," for rule, machines in written_rules(role)]
        lines.append("]")
    return Shown("\n".join(lines) + "\n")


def written_rules(role: RolePolicy) -> list[tuple[Rule, tuple[str, ...]]]:
    """The rules as written, and for which machines: one becomes two where the machines number a constant differently."""
    machines: dict[str, set[str]] = {}
    for rule in role.rules:
        machines.setdefault(rule.where, set()).update(rule.architectures)
    written = {rule.where: rule for rule in role.rules}
    return [(rule, tuple(each for each in ARCHITECTURES if each in machines[where])) for where, rule in written.items()]


def _inline_table(rule: Rule, machines: tuple[str, ...], role: RolePolicy) -> str:
    fields: dict[str, object] = {"syscall": rule.syscall}
    if rule.conditions:
        fields["when"] = list(rule.conditions)
    if rule.action != ("kill" if role.default == "allow" else "allow"):
        fields["action"] = action_word(rule.action)
    if machines != ARCHITECTURES:
        fields["arch"] = list(machines)
    fields |= {"used_by": rule.used_by, "reason": rule.reason}
    # A JSON string is a TOML string, and a list of them a list; ensure_ascii would make surrogates, which TOML refuses.
    return "{ " + ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()) + " }"
