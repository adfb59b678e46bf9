"""`vfsdctl policy diff`: what a new policy lets each role do that the old one did not, and the other way round.

Exact, over all arguments of every call (see `seccomp_sets`): it does not compare texts, so a rule that was only written differently
is no difference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES, RolePolicy, Rule
from vfsd.sandbox.seccomp_sets import Region, allowed_arguments, cubes_of, find_new
from vfsd.tools.policy_words import add_json_option, add_role_option, condition_words, outcome_words, readable_roles

_ANY_OTHER = "(any other call)"

Kind = Literal["possible", "impossible", "fails differently"]
_SIGNS: dict[Kind, str] = {"possible": "+", "impossible": "-", "fails differently": "~"}


@dataclass(frozen=True, slots=True)
class Change:
    """`example`: arguments for which it is so. `old` and `new`: all that the two say of that call."""

    role: str
    kind: Kind
    syscall: str
    example: tuple[int, ...]
    old: tuple[str, ...]
    new: tuple[str, ...]


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "diff",
        help="say what becomes possible and what impossible with another policy",
        description="Exit status 1 if anything becomes possible that was not.",
        allow_abbrev=False,
    )
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    add_role_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=_run)


def find_changes(old: RolePolicy, new: RolePolicy, architecture: str) -> Iterator[Change]:
    names = {rule.syscall for role in (old, new) for rule in role.rules_for(architecture)}
    if old.default != new.default:
        kind: Kind = "possible" if new.default == "allow" else "impossible"
        yield Change(new.name, kind, _ANY_OTHER, (), (outcome_words(old.default),), (outcome_words(new.default),))
    for syscall in sorted(names):
        texts = _say(old, syscall, architecture), _say(new, syscall, architecture)
        before, after = allowed_arguments(old, syscall, architecture), allowed_arguments(new, syscall, architecture)
        if (gained := find_new(before, after)) is not None:
            yield Change(new.name, "possible", syscall, gained.example(), *texts)
        if (lost := find_new(after, before)) is not None:
            yield Change(new.name, "impossible", syscall, lost.example(), *texts)
        if gained is None and lost is None and (example := _find_other_failure(old, new, syscall, architecture)) is not None:
            yield Change(new.name, "fails differently", syscall, example, *texts)


def _find_other_failure(old: RolePolicy, new: RolePolicy, syscall: str, architecture: str) -> tuple[int, ...] | None:
    """Arguments with which the call fails by another errno than before, or is killed instead."""
    errnos = {rule.action for role in (old, new) for rule in _about(role, syscall, architecture) if isinstance(rule.action, int)}
    for errno in sorted(errnos):
        before, after = (_failing_with(errno, role, syscall, architecture) for role in (old, new))
        found = find_new(before, after) or find_new(after, before)
        if found is not None:
            return found.example()
    return None


def _failing_with(errno: int, role: RolePolicy, syscall: str, architecture: str) -> Region:
    rules = [rule for rule in _about(role, syscall, architecture) if rule.action == errno and not isinstance(rule.action, str)]
    return Region(tuple(cube for rule in rules for cube in cubes_of(rule.comparisons)))


def _about(role: RolePolicy, syscall: str, architecture: str) -> list[Rule]:
    return [rule for rule in role.rules_for(architecture) if rule.syscall == syscall]


def _say(role: RolePolicy, syscall: str, architecture: str) -> tuple[str, ...]:
    rules = _about(role, syscall, architecture)
    return tuple(f"{condition_words(rule)}: {outcome_words(rule.action)}" for rule in rules) or (f"no rule: {outcome_words(role.default)}",)


def _run(found: argparse.Namespace) -> int:
    old, new = readable_roles(found.old), readable_roles(found.new)
    changes: dict[Change, list[str]] = {}
    for role in ROLES:
        for architecture in ARCHITECTURES:
            if found.role in (None, role):
                for change in find_changes(old[role], new[role], architecture):
                    changes.setdefault(change, []).append(architecture)
    if found.json:
        print(json.dumps([asdict(change) | {"architectures": where} for change, where in changes.items()], indent=2))
    else:
        for change, where in changes.items():
            print("\n".join(_describe(change, where)))
    return 1 if any(change.kind == "possible" for change in changes) else 0


def _describe(change: Change, where: list[str]) -> Iterator[str]:
    on = "" if len(where) == len(ARCHITECTURES) else f" [{', '.join(where)}]"
    example = f", e.g. {change.syscall}({', '.join(f'{value:#x}' for value in change.example)})" if change.example else ""
    yield f"{_SIGNS[change.kind]} {change.role}: {change.syscall}: {change.kind}{on}{example}"
    yield from (f"    old: {text}" for text in change.old if text not in change.new)
    yield from (f"    new: {text}" for text in change.new if text not in change.old)
