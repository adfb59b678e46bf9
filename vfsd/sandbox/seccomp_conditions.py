"""The conditions of a rule in seccomp_policy.toml: their grammar, and what they mean for the 64 bits of an argument.

Grammar: `argN == V`, `argN != V`, `argN < V` (`<=`, `>`, `>=`), `argN & V == V`, `argN only V` (no bit but these), `argN has V`
(all of these bits), `argN is fd` (not negative). V: numbers and names of `seccomp_constants`, joined by `|`, which some machines
number differently. Pure; the text is the administrator's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vfsd.sandbox.seccomp_constants import WIDE_ARGUMENTS, constants_of

_ALL_BITS = (1 << 64) - 1
_LOW_BITS = (1 << 32) - 1
_NEGATIVE_FD_BITS = _ALL_BITS & ~0x7FFFFFFF

_CONDITION = re.compile(r"arg([0-5]) (?:(==|!=|<=|>=|<|>|only|has) (.+)|(is) fd|& (.+) == (.+))")
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,32}|0|[1-9][0-9]{0,31}")  # no leading zero: is 010 eight or ten?

Operator = Literal["masked", "!=", "<", "<=", ">", ">="]
_ORDER: dict[str, Operator] = {"!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class Refused(Exception):
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


def parse_conditions(texts: Sequence[str], syscall: str, architecture: str, *, denies: bool) -> tuple[Comparison, ...]:
    """All conditions of a rule about `syscall`; Refused where one cannot be. `denies`: the rule takes away what is allowed."""
    return _merge([_parse_condition(text, syscall, architecture, denies=denies) for text in texts])


def value_of(text: str, architecture: str) -> int:
    """Numbers and names, joined by `|`, as one number."""
    constants = constants_of(architecture)
    total = 0
    for word in text.split("|"):
        name = word.strip()
        if _NUMBER.fullmatch(name):
            total |= int(name, 0)
        elif name in constants:
            total |= constants[name]
        else:
            raise Refused(f"{name!r} is neither a number nor a known constant")
    if total > _ALL_BITS:
        raise Refused(f"{text!r} does not fit into 64 bits")
    return total


def _parse_condition(text: str, syscall: str, architecture: str, *, denies: bool) -> Comparison:
    """One condition, refused where 64-bit comparison and 32-bit argument would make it mean something else.

    The kernel looks at the low half of a narrow argument, the filter at all of it. An order comparison or `!=` is satisfied
    by high bits alone: write(0x100000001) satisfies `fd >= 3` and writes to fd 1. A denial is evaded by them, so there they
    must be masked away. `==`, `only`, `has`, `is fd` and masks are exact where they permit, unless they ask for one of those bits.
    """
    matched = _CONDITION.fullmatch(text)
    if matched is None:
        raise Refused(f'condition "{text}" is not understood')
    argument = int(matched[1])
    narrow = argument not in WIDE_ARGUMENTS.get(syscall, frozenset())
    comparison = _comparison_of(matched, argument, architecture)
    if narrow and comparison.operator != "masked":
        raise Refused(
            f'condition "{text}": argument {argument} of {syscall} is 32 bits wide, and this comparison does not test the upper half, '
            "which the caller sets as it likes; use ==, only, or a mask"
        )
    if narrow and comparison.operand & ~_LOW_BITS:
        raise Refused(
            f'condition "{text}": argument {argument} of {syscall} is 32 bits wide: the kernel looks at no bit above them, which the caller '
            "sets as it likes"
        )
    if narrow and denies and comparison.value & ~_LOW_BITS:
        raise Refused(
            f'condition "{text}": argument {argument} of {syscall} is 32 bits wide, and a caller could evade this denial by its upper half; '
            "mask it away (& 0xffffffff)"
        )
    return comparison


def _comparison_of(matched: re.Match[str], argument: int, architecture: str) -> Comparison:
    _, operator, value, is_fd, mask, operand = matched.groups()
    if is_fd:
        return Comparison(argument, "masked", _NEGATIVE_FD_BITS, 0)
    if mask:
        return _masked(argument, value_of(mask, architecture), value_of(operand, architecture))
    number = value_of(value, architecture)
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
        raise Refused(f"argument {argument} can never satisfy, or always satisfies, a mask of {mask:#x} with {operand:#x}")
    return Comparison(argument, "masked", mask, operand)


def _merge(comparisons: list[Comparison]) -> tuple[Comparison, ...]:
    """At most one comparison per argument, as libseccomp wants it: masks of one argument become one mask."""
    merged: dict[int, Comparison] = {}
    for each in comparisons:
        other = merged.get(each.argument)
        if other is None:
            merged[each.argument] = each
            continue
        if not each.operator == other.operator == "masked":
            raise Refused(f"argument {each.argument} is compared more than once")
        if (each.operand ^ other.operand) & each.value & other.value:
            raise Refused(f"the conditions on argument {each.argument} contradict each other")
        merged[each.argument] = _masked(each.argument, each.value | other.value, each.operand | other.operand)
    return tuple(merged[argument] for argument in sorted(merged))
