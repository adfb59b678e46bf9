"""From seccomp_policy.toml to BPF. Only the supervisor does this; roles get the compiled program and `load_filter` it.

pyseccomp asks ctypes.util.find_library where libseccomp is, which runs ldconfig and gcc. vfsd starts nothing but itself, so the
library is named to it. Nothing here reads what a peer controls.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp_load import load_filter
from vfsd.sandbox.seccomp_policy import Comparison, Role, Rule, parse_policy

__all__ = ["POLICY_FILE", "Policy", "load_filter", "load_policy"]

# Package data; in the source tree it is a link to the file at the top.
POLICY_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "seccomp_policy.toml")
_SONAMES = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}
_UNKNOWN_SYSCALL = -1  # of seccomp_syscall_resolve_name; other negative numbers: exists, but not on this machine
_POLICY_BYTES_MAX = 1 << 20


@contextmanager
def _libraries_by_name() -> Iterator[None]:
    search = ctypes.util.find_library
    ctypes.util.find_library = _SONAMES.get  # type: ignore[assignment]  # for the length of one import
    try:
        yield
    finally:
        ctypes.util.find_library = search


try:
    with _libraries_by_name():
        import pyseccomp
except OSError as error:
    raise ConfigError(f"seccomp: libseccomp cannot be loaded: {error}; install it (Debian: libseccomp2)") from error

_OPERATORS = {
    "masked": pyseccomp.MASKED_EQ,
    "!=": pyseccomp.NE,
    "<": pyseccomp.LT,
    "<=": pyseccomp.LE,
    ">": pyseccomp.GT,
    ">=": pyseccomp.GE,
}
_KILL = {"kill": pyseccomp.KILL_PROCESS, "log": pyseccomp.LOG, "trap": pyseccomp.TRAP}


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy whose system calls all exist on this machine."""

    roles: dict[str, Role]

    def compile(self, role: str, action: Literal["kill", "log", "trap"]) -> bytes:
        """The BPF program (struct sock_filter[]) of one role; `action` is what "kill" in the policy means."""
        found = self.roles.get(role)
        if found is None:
            raise ConfigError(f"seccomp policy: there is no role {role}")
        actions = {"allow": pyseccomp.ALLOW, "kill": _KILL[action]}
        program = pyseccomp.SyscallFilter(actions[found.default])
        # libseccomp's own default kills one thread. A call by the 32-bit or x32 entry is never a mistake of ours.
        program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
        for rule in found.rules_for(platform.machine()):
            _add(program, rule, actions)
        return _export(program)


def load_policy(path: str | None = None) -> Policy:
    """Read and check a policy, by default the one vfsd came with. Raises ConfigError that names rule and reason."""
    path = path or POLICY_FILE
    try:
        with open(path, "rb") as file:
            text = file.read(_POLICY_BYTES_MAX)
        document = tomllib.loads(text.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"seccomp policy {path}: {error}; reinstall vfsd, or use --seccomp=none") from error
    roles = parse_policy(document)
    for role in roles.values():
        for rule in role.rules_for(platform.machine()):
            _resolve(rule)
    return Policy(roles)


def _resolve(rule: Rule) -> int:
    number: int = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, rule.syscall)
    if number == _UNKNOWN_SYSCALL:
        raise ConfigError(f'seccomp policy: {rule.where}: libseccomp knows no such system call [the rule\'s reason: "{rule.reason}"]')
    if number < 0:
        raise ConfigError(f"seccomp policy: {rule.where}: {platform.machine()} has no such system call: give the rule an arch")
    return number


def _add(program: pyseccomp.SyscallFilter, rule: Rule, actions: dict[str, int]) -> None:
    action = pyseccomp.ERRNO(rule.action) if isinstance(rule.action, int) else actions[rule.action]
    try:
        # "exactly": libseccomp may otherwise widen a rule that it cannot express.
        program.add_rule_exactly(action, _resolve(rule), *[_argument(each) for each in rule.comparisons])
    except OSError as error:
        raise ConfigError(f"seccomp policy: {rule.where}: libseccomp refuses the rule: {error}") from error


def _argument(comparison: Comparison) -> pyseccomp.Arg:
    return pyseccomp.Arg(comparison.argument, _OPERATORS[comparison.operator], comparison.value, comparison.operand)


def _export(program: pyseccomp.SyscallFilter) -> bytes:
    with open(os.memfd_create("vfsd-bpf", os.MFD_CLOEXEC), "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()
