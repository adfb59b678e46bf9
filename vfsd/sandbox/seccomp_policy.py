"""seccomp_policy.toml, read and checked: which system calls a role may make, with which arguments, and why.

Pure: no system call, no libseccomp; `seccomp` compiles what this accepts. The file is the administrator's. It is refused,
with a ConfigError that names role, rule and reason, where it is not understood completely, and where a rule would permit more
than it says: see `Condition.parse`.

Grammar of a condition: `argN == V`, `argN != V`, `argN < V` (`<=`, `>`, `>=`), `argN & V == V`, `argN only V` (no bit but
these), `argN has V` (all of these bits), `argN is fd` (not negative). V: numbers and names of `seccomp_constants`, joined by `|`.
All conditions of a rule must hold.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp_constants import CONSTANTS, WIDE_ARGUMENTS

VERSION = 1
ARCHITECTURES = ("x86_64", "aarch64")

_ALL_BITS = (1 << 64) - 1
_LOW_BITS = (1 << 32) - 1
_NEGATIVE_FD_BITS = _ALL_BITS & ~0x7FFFFFFF
_LARGEST_ERRNO = 4095

_CONDITION = re.compile(r"arg([0-5]) (?:(==|!=|<=|>=|<|>|only|has) (.+)|(is) fd|& (.+) == (.+))")
_ERRNO_ACTION = re.compile(r"errno\((\w+)\)")
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|[0-9]+")
_SYSCALL = re.compile(r"[a-z][a-z0-9_]*")

_RULE_KEYS = {"syscall", "when", "action", "arch", "reason", "used_by"}
_NEEDED_RULE_KEYS = {"syscall", "reason", "used_by"}


Operator = Literal["masked", "!=", "<", "<=", ">", ">="]
_ORDER: dict[str, Operator] = {"!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class _Refused(Exception):
    """Why a part of the policy is refused; the loader adds which part."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison as BPF can make it. "masked": `argument & value == operand`, the others: `argument OP value`."""

    argument: int
    operator: Operator
    value: int
    operand: int = 0

    def holds(self, actual: int) -> bool:
        match self.operator:
            case "masked":
                return actual & self.value == self.operand
            case "!=":
                return actual != self.value
            case "<":
                return actual < self.value
            case "<=":
                return actual <= self.value
            case ">":
                return actual > self.value
            case ">=":
                return actual >= self.value


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the policy. `action`: "allow", "kill", or the errno that the call fails with (0: it "succeeds" with 0)."""

    syscall: str
    comparisons: tuple[Comparison, ...]
    action: Literal["allow", "kill"] | int
    architectures: tuple[str, ...]
    reason: str
    used_by: str
    where: str  # "role worker, rule 3 (fcntl)"


@dataclass(frozen=True, slots=True)
class Role:
    """`default`: what happens to a call that no rule matches."""

    name: str
    default: Literal["allow", "kill"]
    rules: tuple[Rule, ...]

    def rules_for(self, architecture: str) -> list[Rule]:
        return [rule for rule in self.rules if architecture in rule.architectures]

    def verdict(self, syscall: str, arguments: tuple[int, ...], architecture: str) -> Literal["allow", "kill"] | int:
        """What the policy says of one call: the yardstick for the compiled filter, and for tools."""
        for rule in self.rules_for(architecture):
            if rule.syscall == syscall and all(each.holds(arguments[each.argument]) for each in rule.comparisons):
                return rule.action
        return self.default


def parse_policy(document: dict[str, Any]) -> dict[str, Role]:
    """All roles of a parsed TOML document. Raises ConfigError for whatever is not exactly as it must be."""
    try:
        _refuse_unknown_keys(document, {"version", "group", "role"})
        if document.get("version") != VERSION or document["version"] is True:
            raise _Refused(f"version {document.get('version')!r} is not the version this vfsd understands ({VERSION})")
        groups = {name: _table(body, f"group {name}") for name, body in _table(document.get("group", {}), "group").items()}
        roles = {name: _table(body, f"role {name}") for name, body in _table(document.get("role", {}), "role").items()}
        parsed = {name: _parse_role(name, body, groups) for name, body in roles.items()}
        _refuse_unused_groups(groups, roles)
    except _Refused as refusal:
        raise ConfigError(f"seccomp policy: {refusal}") from None
    return parsed


def _refuse_unused_groups(groups: dict[str, Any], roles: dict[str, Any]) -> None:
    used = {name for body in roles.values() for name in body.get("use", [])}
    if unused := sorted(set(groups) - used):
        raise _Refused(f"group {unused[0]}: no role uses it")


def _parse_role(name: str, body: dict[str, Any], groups: dict[str, dict[str, Any]]) -> Role:
    where = f"role {name}"
    _refuse_unknown_keys(body, {"default", "use", "rules"}, where)
    default = body.get("default")
    if default not in ("allow", "kill"):
        raise _Refused(f"{where}: default must be allow or kill, not {default!r}")
    rules: list[Rule] = []
    for group in _strings(body.get("use", []), f"{where}: use"):
        if group not in groups:
            raise _Refused(f"{where}: uses group {group}, which is not there")
        _refuse_unknown_keys(groups[group], {"rules"}, f"group {group}")
        rules += _parse_rules(groups[group].get("rules"), f"{where}, group {group}", default)
    rules += _parse_rules(body.get("rules", []), where, default)
    if not rules:  # libseccomp 2.5 ignores the default action of a filter without rules (libseccomp issue 370)
        raise _Refused(f"{where}: has no rule")
    _refuse_overlaps(rules)
    return Role(name, default, tuple(rules))


def _parse_rules(rows: Any, where: str, default: str) -> Iterator[Rule]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _Refused(f"{where}: rules must be a list of tables")
    for number, row in enumerate(rows, 1):
        place = f"{where}, rule {number} ({row.get('syscall', 'no syscall')})"
        try:
            yield _parse_rule(row, place, default)
        except _Refused as refusal:
            raise _Refused(f"{place}: {refusal}{_quoted_reason(row)}") from None


def _quoted_reason(row: dict[str, Any]) -> str:
    reason = row.get("reason")
    return f' [the rule\'s reason: "{reason}"]' if reason else ""


def _parse_rule(row: dict[str, Any], where: str, default: str) -> Rule:
    _refuse_unknown_keys(row, _RULE_KEYS)
    for key in sorted(_NEEDED_RULE_KEYS):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise _Refused(f"{key} is missing or not a text")
    if not _SYSCALL.fullmatch(row["syscall"]):
        raise _Refused(f"{row['syscall']!r} is not the name of a system call")
    action = _parse_action(row.get("action", "kill" if default == "allow" else "allow"))
    if action == default:
        raise _Refused(f"the action is {action}, which is what the role does anyway")
    comparisons = [_parse_condition(text, row["syscall"], denies=default == "allow") for text in _strings(row.get("when", []), "when")]
    architectures = tuple(_strings(row.get("arch", list(ARCHITECTURES)), "arch"))
    if not architectures or not set(architectures) <= set(ARCHITECTURES):
        raise _Refused(f"arch must be among {', '.join(ARCHITECTURES)}")
    return Rule(row["syscall"], _merge(comparisons), action, architectures, row["reason"], row["used_by"], where)


def _parse_action(text: Any) -> Literal["allow", "kill"] | int:
    if text in ("allow", "kill"):
        return text  # type: ignore[no-any-return]  # one of the two literals
    matched = _ERRNO_ACTION.fullmatch(text) if isinstance(text, str) else None
    if matched is None:
        raise _Refused(f"action {text!r}: must be allow, kill or errno(NAME)")
    name = matched[1]
    number = int(name) if name.isdecimal() else getattr(errno, name, None)
    if not isinstance(number, int) or number > _LARGEST_ERRNO:
        raise _Refused(f"action {text!r}: there is no such errno")
    return number


def _parse_condition(text: str, syscall: str, *, denies: bool) -> Comparison:
    """One condition, refused where 64-bit comparison and 32-bit argument would make it mean something else.

    The kernel looks at the low half of a narrow argument, the filter at all of it. An order comparison or `!=` is satisfied
    by high bits alone: write(0x100000001) satisfies `fd >= 3` and writes to fd 1. A denial is evaded by them, so there they
    must be masked away. `==`, `only`, `has`, `is fd` and masks are exact where they permit.
    """
    matched = _CONDITION.fullmatch(text)
    if matched is None:
        raise _Refused(f'condition "{text}" is not understood')
    argument = int(matched[1])
    narrow = argument not in WIDE_ARGUMENTS.get(syscall, frozenset())
    comparison = _comparison_of(matched, argument)
    if narrow and comparison.operator != "masked":
        raise _Refused(
            f'condition "{text}": argument {argument} of {syscall} is 32 bits wide, and this comparison does not test the upper half, '
            "which the caller sets as it likes; use ==, only, or a mask"
        )
    if narrow and denies and comparison.value & ~_LOW_BITS:
        raise _Refused(
            f'condition "{text}": argument {argument} of {syscall} is 32 bits wide, and a caller could evade this denial by its upper half; '
            "mask it away (& 0xffffffff)"
        )
    return comparison


def _comparison_of(matched: re.Match[str], argument: int) -> Comparison:
    _, operator, value, is_fd, mask, operand = matched.groups()
    if is_fd:
        return Comparison(argument, "masked", _NEGATIVE_FD_BITS, 0)
    if mask:
        return _masked(argument, _value(mask), _value(operand))
    number = _value(value)
    match operator:
        case "==":
            return _masked(argument, _ALL_BITS, number)
        case "only":
            return _masked(argument, _ALL_BITS & ~number, 0)
        case "has":
            return _masked(argument, number, number)
        case _:
            return Comparison(argument, _ORDER[operator], number)


def _masked(argument: int, mask: int, operand: int) -> Comparison:
    if operand & ~mask or not mask:
        raise _Refused(f"argument {argument} can never satisfy, or always satisfies, a mask of {mask:#x} with {operand:#x}")
    return Comparison(argument, "masked", mask, operand)


def _value(text: str) -> int:
    total = 0
    for word in text.split("|"):
        name = word.strip()
        if _NUMBER.fullmatch(name):
            total |= int(name, 0)
        elif name in CONSTANTS:
            total |= CONSTANTS[name]
        else:
            raise _Refused(f"{name!r} is neither a number nor a known constant")
    if total > _ALL_BITS:
        raise _Refused(f"{text!r} does not fit into 64 bits")
    return total


def _merge(comparisons: list[Comparison]) -> tuple[Comparison, ...]:
    """At most one comparison per argument, as libseccomp wants it: masks of one argument become one mask."""
    merged: dict[int, Comparison] = {}
    for each in comparisons:
        other = merged.get(each.argument)
        if other is None:
            merged[each.argument] = each
            continue
        if not each.operator == other.operator == "masked":
            raise _Refused(f"argument {each.argument} is compared more than once")
        if (each.operand ^ other.operand) & each.value & other.value:
            raise _Refused(f"the conditions on argument {each.argument} contradict each other")
        merged[each.argument] = _masked(each.argument, each.value | other.value, each.operand | other.operand)
    return tuple(merged[argument] for argument in sorted(merged))


def _refuse_overlaps(rules: list[Rule]) -> None:
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
                raise _Refused(f"{rule.where}: {other.where} already decides about this call{_quoted_reason({'reason': rule.reason})}")


def _are_disjoint(rule: Rule, other: Rule) -> bool:
    """Whether some argument's masks can never both hold."""
    masks = {each.argument: each for each in other.comparisons if each.operator == "masked"}
    pairs = [(each, masks[each.argument]) for each in rule.comparisons if each.operator == "masked" and each.argument in masks]
    return any((one.operand ^ two.operand) & one.value & two.value for one, two in pairs)


def _refuse_unknown_keys(table: dict[str, Any], known: set[str], where: str = "") -> None:
    if unknown := sorted(set(table) - known):
        raise _Refused(f"{where + ': ' if where else ''}unknown key {unknown[0]!r}")


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Refused(f"{where} must be a table")
    return value


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _Refused(f"{where} must be a list of texts")
    return value
