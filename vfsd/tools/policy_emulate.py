"""`vfsdctl policy emulate`: what a role's filter answers to one call, by running its program without loading it."""

from __future__ import annotations

import argparse
import fcntl
import json
import mmap
import os
import re
import socket

from vfsd.errors import ConfigError
from vfsd.sandbox import bpf
from vfsd.sandbox.seccomp import compile_role, syscall_number
from vfsd.sandbox.seccomp_constants import constants_of
from vfsd.sandbox.seccomp_policy import ROLES, Action, Rule
from vfsd.tools.policy_disasm import outcome_of
from vfsd.tools.policy_explain import name_of_syscall
from vfsd.tools.policy_words import add_arch_option, add_json_option, add_policy_option, condition_words, readable_roles

_ALL_BITS = (1 << 64) - 1
_MOST_ARGUMENTS = 6
_AT_FDCWD = -100


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "emulate",
        help="say what a role's filter answers to one call, and which rule decided",
        description="Runs the compiled filter in an interpreter: needs no root and loads nothing. Exit status 0 if the call is allowed, else 1.",
        allow_abbrev=False,
    )
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("syscall", metavar="SYSCALL", help="name or number")
    parser.add_argument("arguments", nargs="*", metavar="ARG", help="numbers or names, joined by |: O_RDONLY|O_CLOEXEC (default: 0)")
    add_arch_option(parser)
    add_policy_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=_run)


def parse_argument(text: str, architecture: str) -> int:
    """As the register holds it: 64 bits, negative numbers as their complement."""
    total = 0
    for word in text.split("|"):
        total |= _number(word.strip(), architecture)
    if not -(1 << 63) <= total <= _ALL_BITS:
        raise ConfigError(f"{text} does not fit into 64 bits")
    return total & _ALL_BITS


def _number(word: str, architecture: str) -> int:
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|0o[0-7]+|[0-9]+)", word):
        return int(word, 0) if not re.fullmatch(r"-?0[0-9]+", word) else int(word, 8)
    if word == "AT_FDCWD":
        return _AT_FDCWD
    constants = constants_of(architecture)
    if word in constants:
        return constants[word]
    for module in (os, fcntl, mmap, socket):  # what no policy names, and yet somebody may try
        value = getattr(module, word, None)
        if word.isupper() and isinstance(value, int):
            return int(value)
    raise ConfigError(f"{word!r} is neither a number nor a constant that is known")


def _run(found: argparse.Namespace) -> int:
    role = readable_roles(found.policy)[found.role]
    syscall = name_of_syscall(found.syscall, found.arch)
    number = syscall_number(syscall, found.arch)
    if number is None:
        raise ConfigError(f"{found.arch} has no system call {syscall}")
    if len(found.arguments) > _MOST_ARGUMENTS:
        raise ConfigError(f"a system call has at most {_MOST_ARGUMENTS} arguments")
    given = [parse_argument(text, found.arch) for text in found.arguments]
    arguments = (*given, *[0] * (_MOST_ARGUMENTS - len(given)))
    program = compile_role(role, "kill", found.arch)
    outcome = bpf.trace_filter(program, number, arguments, bpf.AUDIT_ARCH[found.arch])
    rule = role.deciding_rule(syscall, arguments, found.arch)
    expected = rule.action if rule else role.default
    if outcome.value != _return_of(expected):
        raise ConfigError(f"the filter says {outcome_of(outcome.value)} and the policy {expected}: a defect of vfsd or of libseccomp")
    if found.json:
        print(json.dumps(_as_data(syscall, arguments, outcome, rule), indent=2))
    else:
        shown = ", ".join(f"{value:#x}" for value in arguments)
        print(f"{role.name}: {syscall}({shown}) on {found.arch}: {outcome_of(outcome.value)}")
        print(_decided_by(rule))
        print(f"filter: {len(outcome.path)} instructions ran, the return at {outcome.path[-1]}")
    return 0 if outcome.value == bpf.RET_ALLOW else 1


def _return_of(action: Action) -> int:
    if isinstance(action, int):
        return bpf.ret_errno(action)
    return bpf.RET_ALLOW if action == "allow" else bpf.RET_KILL_PROCESS


def _decided_by(rule: Rule | None) -> str:
    if rule is None:
        return "decided by: the role's default, as no rule matches"
    return f"decided by: {rule.where}: {condition_words(rule)}\nreason: {rule.reason}"


def _as_data(syscall: str, arguments: tuple[int, ...], outcome: bpf.Outcome, rule: Rule | None) -> dict[str, object]:
    return {
        "syscall": syscall,
        "arguments": list(arguments),
        "allowed": outcome.value == bpf.RET_ALLOW,
        "outcome": outcome_of(outcome.value),
        "filter_return": outcome.value,
        "instructions": list(outcome.path),
        "rule": rule and {"where": rule.where, "when": list(rule.conditions), "reason": rule.reason, "used_by": rule.used_by},
    }
