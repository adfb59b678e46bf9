"""`vfsdctl policy explain`: what becomes of one system call in each role, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import syscall_name, syscall_number
from vfsd.sandbox.seccomp_forbidden import FORBIDDEN, Forbidden
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, RolePolicy, Rule
from vfsd.tools.policy_words import (
    action_word,
    add_arch_option,
    add_json_option,
    add_policy_option,
    add_role_option,
    chosen_roles,
    condition_words,
    outcome_words,
)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("explain", help="say what becomes of a system call in each role, and why", allow_abbrev=False)
    parser.add_argument("syscall", metavar="SYSCALL", help="name or number, as the kernel's audit gives it")
    add_role_option(parser)
    add_arch_option(parser)
    add_policy_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=_run)


def name_of_syscall(text: str, architecture: str) -> str:
    """Of a name or a number of that machine. Raises ConfigError for what libseccomp does not know on any."""
    if text.isdecimal():
        found = syscall_name(int(text), architecture)
        if found is None:
            raise ConfigError(f"{architecture} has no system call {text} that libseccomp knows")
        return found
    if all(syscall_number(text, each) is None for each in ARCHITECTURES):
        raise ConfigError(f"libseccomp knows no system call {text}")
    return text


def _run(found: argparse.Namespace) -> int:
    syscall = name_of_syscall(found.syscall, found.arch)
    number = syscall_number(syscall, found.arch)
    roles = chosen_roles(found.policy, found.role)
    if found.json:
        data = {
            "syscall": syscall,
            "arch": found.arch,
            "number": number,
            "roles": {role.name: _as_data(role, syscall, found.arch) for role in roles},
        }
        print(json.dumps(data, indent=2))
        return 0
    print(f"{syscall}: number {number} on {found.arch}" if number is not None else f"{syscall}: {found.arch} has no such call")
    for role in roles:
        print("\n".join(["", *_explain(role, syscall, found.arch)]))
    return 0


def _explain(role: RolePolicy, syscall: str, architecture: str) -> Iterator[str]:
    rules = _rules_about(role, syscall, architecture)
    otherwise = outcome_words(role.default)
    if not rules:
        yield f"{role.name}: {otherwise}: no rule names it"
    elif all(rule.comparisons for rule in rules):
        yield f"{role.name}: depends on the arguments; with others than these: {otherwise}"
    else:
        yield f"{role.name}: {outcome_words(rules[0].action)}"
    for rule in rules:
        yield f"  {condition_words(rule)}: {outcome_words(rule.action)}"
        yield f"    reason: {rule.reason}"
        yield f"    used by: {rule.used_by}"
        yield f"    stands in: {rule.where}"
    for forbidden in _forbidden(role, syscall, architecture):
        yield f"  forbidden to every policy{forbidden.arguments()}: it {forbidden.reason}"


def _rules_about(role: RolePolicy, syscall: str, architecture: str) -> list[Rule]:
    return [rule for rule in role.rules_for(architecture) if rule.syscall == syscall]


def _forbidden(role: RolePolicy, syscall: str, architecture: str) -> list[Forbidden]:
    return [each for each in FORBIDDEN if each.syscall == syscall and role.name in each.roles and architecture in each.architectures]


def _as_data(role: RolePolicy, syscall: str, architecture: str) -> dict[str, Any]:
    return {
        "otherwise": role.default,
        "rules": [
            {
                "when": list(rule.conditions),
                "action": action_word(rule.action),
                "reason": rule.reason,
                "used_by": rule.used_by,
                "where": rule.where,
            }
            for rule in _rules_about(role, syscall, architecture)
        ],
        "forbidden": [
            {"when": list(each.when), "unless": list(each.unless), "reason": each.reason}
            for each in _forbidden(role, syscall, architecture)
        ],
    }
