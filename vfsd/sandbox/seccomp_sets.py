"""Sets of a system call's arguments, and whether one lies within another: what a rule covers, decided without trying values.

A cube is a set in which some bits of the six arguments are given and the others are free: what masks and equality describe. An
order comparison is up to 64 cubes. Everything here is exact, and where sets differ an example is given. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vfsd.sandbox.seccomp_conditions import Comparison
from vfsd.sandbox.seccomp_policy import RolePolicy

_WIDTH = 64
_ALL_BITS = (1 << _WIDTH) - 1

Arguments = tuple[int, int, int, int, int, int]


class Cube(NamedTuple):
    """All arguments, joined to one number of 384 bits, of which those in `mask` are as in `value` (0 outside `mask`)."""

    mask: int
    value: int

    def example(self) -> Arguments:
        first, second, third, fourth, fifth, sixth = (self.value >> _WIDTH * index & _ALL_BITS for index in range(6))
        return first, second, third, fourth, fifth, sixth


EVERYTHING = Cube(0, 0)


@dataclass(frozen=True, slots=True)
class Region:
    """The arguments in one of the cubes of `inside` and in none of `outside`."""

    inside: tuple[Cube, ...]
    outside: tuple[Cube, ...] = ()


def cubes_of(comparisons: Iterable[Comparison]) -> list[Cube]:
    """The arguments for which all comparisons hold."""
    found = [EVERYTHING]
    for each in comparisons:
        shift = _WIDTH * each.argument
        options = [Cube(cube.mask << shift, cube.value << shift) for cube in _cubes_of_one(each)]
        found = [both for one in found for other in options if (both := intersection(one, other)) is not None]
    return found


def allowed_arguments(role: RolePolicy, syscall: str, architecture: str) -> Region:
    """With which arguments the role may make a call."""
    rules = [rule for rule in role.rules_for(architecture) if rule.syscall == syscall]
    allowing = [cube for rule in rules if rule.action == "allow" for cube in cubes_of(rule.comparisons)]
    if role.default == "kill":
        return Region(tuple(allowing))
    denying = [cube for rule in rules if rule.action != "allow" for cube in cubes_of(rule.comparisons)]
    return Region((EVERYTHING,), tuple(denying))


def intersection(one: Cube, other: Cube) -> Cube | None:
    if (one.value ^ other.value) & one.mask & other.mask:
        return None
    return Cube(one.mask | other.mask, one.value | other.value)


def find_uncovered(cubes: Iterable[Cube], covers: Sequence[Cube]) -> Cube | None:
    """A part of one of the cubes that none of the covers touches; None: they cover all of it."""
    for cube in cubes:
        touching = [cover for cover in covers if intersection(cube, cover) is not None]
        if not touching:
            return cube
        found = find_uncovered(_remainder(cube, touching[0]), touching[1:])
        if found is not None:
            return found
    return None


def find_new(old: Region, new: Region) -> Cube | None:
    """Arguments that are in `new` and not in `old`."""
    found = find_uncovered(new.inside, [*new.outside, *old.inside])
    if found is not None:
        return found
    left_out_of_old = [both for cube in new.inside for hole in old.outside if (both := intersection(cube, hole)) is not None]
    return find_uncovered(left_out_of_old, new.outside)


def _remainder(cube: Cube, cover: Cube) -> Iterable[Cube]:
    """The cube without what the cover has of it, in cubes that have nothing in common: each differs in one more given bit."""
    given = cover.mask & ~cube.mask
    mask, value = cube
    while given:
        bit = given & -given
        given ^= bit
        yield Cube(mask | bit, value | bit & ~cover.value)
        mask |= bit
        value |= bit & cover.value


def _cubes_of_one(comparison: Comparison) -> list[Cube]:
    number = comparison.value
    match comparison.operator:
        case "masked":
            return [Cube(comparison.value, comparison.operand)]
        case "!=":
            return _beyond(number, larger=True) + _beyond(number, larger=False)
        case "<" | "<=" as operator:
            return _beyond(number, larger=False) + ([Cube(_ALL_BITS, number)] if operator == "<=" else [])
        case ">" | ">=" as operator:
            return _beyond(number, larger=True) + ([Cube(_ALL_BITS, number)] if operator == ">=" else [])


def _beyond(number: int, *, larger: bool) -> list[Cube]:
    """What is larger (smaller) than a number: equal to it down to some bit, which is 1 (0) where the number has it otherwise."""
    found = []
    for position in range(_WIDTH):
        bit = 1 << position
        if bool(number & bit) != larger:
            above = _ALL_BITS & ~(bit - 1) & ~bit
            found.append(Cube(above | bit, number & above | (bit if larger else 0)))
    return found
