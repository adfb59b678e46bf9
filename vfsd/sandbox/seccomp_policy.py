"""seccomp_policy.toml, read and checked: which system calls a role may make, with which arguments, and why.

Pure: no system call, no libseccomp; `seccomp` compiles what this accepts. The file is the administrator's. It is refused,
with a ConfigError that names role, rule and reason, where it is not understood completely, and where a rule would permit more
than it says: see `seccomp_conditions`, which has the grammar of a condition. All conditions of a rule must hold.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vfsd.errors import ConfigError
from vfsd.sandbox.role_names import ROLES
from vfsd.sandbox.seccomp_conditions import Comparison, Refused, parse_conditions
from vfsd.sandbox.seccomp_constants import ARCHITECTURES

__all__ = ["ARCHITECTURES", "ROLES", "VERSION", "Action", "Comparison", "RolePolicy", "Rule", "examine_policy", "parse_policy"]

VERSION = 1

_LARGEST_ERRNO = 4095
_ERRNO_ACTION = re.compile(r"errno\((\w+)\)")
_ERRNO_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")
_SYSCALL = re.compile(r"[a-z][a-z0-9_]*")

_RULE_KEYS = {"syscall", "when", "action", "arch", "reason", "used_by"}
_NEEDED_RULE_KEYS = {"syscall", "reason", "used_by"}

# What a rule makes of a call. A number: the errno that it fails with (0: it "succeeds" with 0). What "kill" means is a KillMode.
Action = Literal["allow", "kill"] | int


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the policy; one for each machine if they number a constant of its conditions differently."""

    syscall: str
    conditions: tuple[str, ...]  # as written
    comparisons: tuple[Comparison, ...]
    action: Action
    architectures: tuple[str, ...]
    reason: str
    used_by: str
    where: str  # "role worker, rule 3 (fcntl)"

    def matches(self, syscall: str, arguments: tuple[int, ...]) -> bool:
        return self.syscall == syscall and all(each.holds(arguments[each.argument]) for each in self.comparisons)


@dataclass(frozen=True, slots=True)
class RolePolicy:
    """What a policy says of one role. `default`: what happens to a call that no rule matches."""

    name: str
    default: Literal["allow", "kill"]
    rules: tuple[Rule, ...]

    def rules_for(self, architecture: str) -> list[Rule]:
        return [rule for rule in self.rules if architecture in rule.architectures]

    def deciding_rule(self, syscall: str, arguments: tuple[int, ...], architecture: str) -> Rule | None:
        """None: the default decides."""
        return next((rule for rule in self.rules_for(architecture) if rule.matches(syscall, arguments)), None)

    def verdict(self, syscall: str, arguments: tuple[int, ...], architecture: str) -> Action:
        """What the policy says of one call: the yardstick for the compiled filter, and for tools."""
        rule = self.deciding_rule(syscall, arguments, architecture)
        return self.default if rule is None else rule.action


def parse_policy(document: dict[str, Any]) -> dict[str, RolePolicy]:
    """All roles of a parsed TOML document. Raises ConfigError for whatever is not exactly as it must be."""
    roles, findings = examine_policy(document)
    if findings:
        more = f" (and {len(findings) - 1} more: vfsdctl policy check lists them)" if len(findings) > 1 else ""
        raise ConfigError(f"seccomp policy: {findings[0]}{more}")
    return roles


def examine_policy(document: dict[str, Any]) -> tuple[dict[str, RolePolicy], list[str]]:
    """The roles, without what is not exactly as it must be, and everything that is not."""
    findings: list[str] = []
    roles: dict[str, RolePolicy] = {}
    try:
        _refuse_unknown_keys(document, {"version", "group", "role"})
        if document.get("version") != VERSION or document["version"] is True:
            raise Refused(f"version {document.get('version')!r} is not the version this vfsd understands ({VERSION})")
        groups = {name: _table(body, f"group {name}") for name, body in _table(document.get("group", {}), "group").items()}
        bodies = {name: _table(body, f"role {name}") for name, body in _table(document.get("role", {}), "role").items()}
    except Refused as refusal:
        return {}, [str(refusal)]
    for name, body in bodies.items():
        try:
            roles[name] = _parse_role(name, body, groups, findings)
        except Refused as refusal:
            findings.append(str(refusal))
    findings += _find_unused_groups(groups, bodies)
    return roles, list(dict.fromkeys(findings))


def _find_unused_groups(groups: dict[str, Any], roles: dict[str, Any]) -> list[str]:
    used = {name for body in roles.values() if isinstance(body.get("use"), list) for name in body["use"] if isinstance(name, str)}
    return [f"group {name}: no role uses it" for name in sorted(set(groups) - used)]


def _parse_role(name: str, body: dict[str, Any], groups: dict[str, dict[str, Any]], findings: list[str]) -> RolePolicy:
    """Rules that cannot be are left out and told in `findings`; Refused where nothing can be made of the role."""
    where = f"role {name}"
    _refuse_unknown_keys(body, {"default", "use", "rules"}, where)
    default = body.get("default")
    if default not in ("allow", "kill"):
        raise Refused(f"{where}: default must be allow or kill, not {default!r}")
    before = len(findings)
    rules: list[Rule] = []
    for group in _strings(body.get("use", []), f"{where}: use"):
        if group not in groups:
            raise Refused(f"{where}: uses group {group}, which is not there")
        _refuse_unknown_keys(groups[group], {"rules"}, f"group {group}")
        rules += _parse_rules(groups[group].get("rules"), f"{where}, group {group}", default, findings)
    rules += _parse_rules(body.get("rules", []), where, default, findings)
    if not rules and len(findings) == before:  # libseccomp 2.5 ignores the default action of a filter without rules (libseccomp issue 370)
        raise Refused(f"{where}: has no rule")
    findings += _find_overlaps(rules)
    return RolePolicy(name, default, tuple(rules))


def _parse_rules(rows: Any, where: str, default: str, findings: list[str]) -> Iterator[Rule]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Refused(f"{where}: rules must be a list of tables")
    for number, row in enumerate(rows, 1):
        place = f"{where}, rule {number} ({row.get('syscall', 'no syscall')})"
        try:
            yield from _parse_rule(row, place, default)
        except Refused as refusal:
            findings.append(f"{place}: {refusal}{_quoted_reason(row)}")


def _quoted_reason(row: dict[str, Any]) -> str:
    reason = row.get("reason")
    return f' [the rule\'s reason: "{reason}"]' if reason else ""


def _parse_rule(row: dict[str, Any], where: str, default: str) -> list[Rule]:
    _refuse_unknown_keys(row, _RULE_KEYS)
    for key in sorted(_NEEDED_RULE_KEYS):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise Refused(f"{key} is missing or not a text")
    syscall = row["syscall"]
    if not _SYSCALL.fullmatch(syscall):
        raise Refused(f"{syscall!r} is not the name of a system call")
    action = _parse_action(row.get("action", "kill" if default == "allow" else "allow"))
    if action == default:
        raise Refused(f"the action is {action}, which is what the role does anyway")
    conditions = tuple(_strings(row.get("when", []), "when"))
    architectures = _strings(row.get("arch", list(ARCHITECTURES)), "arch")
    if not architectures or not set(architectures) <= set(ARCHITECTURES):
        raise Refused(f"arch must be among {', '.join(ARCHITECTURES)}")
    meanings: dict[tuple[Comparison, ...], list[str]] = {}
    for architecture in architectures:
        comparisons = parse_conditions(conditions, syscall, architecture, denies=default == "allow")
        meanings.setdefault(comparisons, []).append(architecture)
    return [
        Rule(syscall, conditions, comparisons, action, tuple(alike), row["reason"], row["used_by"], where)
        for comparisons, alike in meanings.items()
    ]


def _parse_action(text: Any) -> Action:
    if text in ("allow", "kill"):
        return text  # type: ignore[no-any-return]  # one of the two literals
    matched = _ERRNO_ACTION.fullmatch(text) if isinstance(text, str) else None
    if matched is None:
        raise Refused(f"action {text!r}: must be allow, kill or errno(NAME)")
    name = matched[1]
    number = int(name) if _ERRNO_NUMBER.fullmatch(name) else getattr(errno, name, None)
    if not isinstance(number, int) or number > _LARGEST_ERRNO:
        raise Refused(f"action {text!r}: there is no such errno")
    return number


def _find_overlaps(rules: list[Rule]) -> Iterator[str]:
    """Two rules about one call must not both match where that would matter.

    Otherwise compiling would drop one of them without a word, or the result depend on libseccomp's order.
    """
    for index, rule in enumerate(rules):
        for other in rules[:index]:
            if rule.syscall != other.syscall or not set(rule.architectures) & set(other.architectures):
                continue
            same_action = rule.action == other.action
            redundant = same_action and (rule.comparisons == other.comparisons or not rule.comparisons or not other.comparisons)
            if redundant or not (same_action or _are_disjoint(rule, other)):
                yield f"{rule.where}: {other.where} already decides about this call{_quoted_reason({'reason': rule.reason})}"


def _are_disjoint(rule: Rule, other: Rule) -> bool:
    """Whether some argument's masks can never both hold."""
    masks = {each.argument: each for each in other.comparisons if each.operator == "masked"}
    pairs = [(each, masks[each.argument]) for each in rule.comparisons if each.operator == "masked" and each.argument in masks]
    return any((one.operand ^ two.operand) & one.value & two.value for one, two in pairs)


def _refuse_unknown_keys(table: dict[str, Any], known: set[str], where: str = "") -> None:
    if unknown := sorted(set(table) - known):
        raise Refused(f"{where + ': ' if where else ''}unknown key {unknown[0]!r}")


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{where} must be a table")
    return value


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise Refused(f"{where} must be a list of texts")
    return value
