"""From seccomp_policy.toml to BPF. Only the supervisor does this; roles get the compiled program and `load_filter` it.

pyseccomp asks ctypes.util.find_library where libseccomp is, which runs ldconfig and gcc. vfsd starts nothing but itself, so the
library is named to it. Nothing here reads what a peer controls.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import platform
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp_load import load_filter
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES, Comparison, RolePolicy, Rule, parse_policy

__all__ = ["POLICY_FILE", "Policy", "load_filter", "load_policy", "read_policy", "syscall_name", "syscall_number"]

# Package data; in the source tree it is a link to the file at the top.
POLICY_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "seccomp_policy.toml")
_SONAMES = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}
_UNKNOWN_SYSCALL = -1  # of seccomp_syscall_resolve_name; other negative numbers: exists, but not on that machine
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


_ARCHITECTURES = {"x86_64": pyseccomp.Arch.X86_64, "aarch64": pyseccomp.Arch.AARCH64}

KillMode = Literal["kill", "log", "trap"]  # of --seccomp: what "kill" in a policy comes to
KILL_MODES: tuple[KillMode, ...] = get_args(KillMode)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy whose system calls all exist on this machine."""

    roles: dict[str, RolePolicy]
    path: str
    sha256: str  # of the file

    def compile(self, role: str, mode: KillMode, architecture: str | None = None) -> bytes:
        """The BPF program (struct sock_filter[]) of one role; `mode` is what "kill" in the policy means."""
        return compile_role(self._role(role), mode, architecture or platform.machine())

    def _role(self, name: str) -> RolePolicy:
        found = self.roles.get(name)
        if found is None:
            raise ConfigError(f"seccomp policy: there is no role {name}")
        return found


def compile_role(role: RolePolicy, mode: KillMode, architecture: str) -> bytes:
    return _export(_build(role, mode, architecture).export_bpf)


def describe_role(role: RolePolicy, architecture: str) -> str:
    """The filter in libseccomp's own pseudo code (PFC)."""
    return _export(_build(role, "kill", architecture).export_pfc).decode()


def load_policy(path: str | None = None) -> Policy:
    """Read and check a policy, by default the one vfsd came with. Raises ConfigError that names rule and reason."""
    path = path or POLICY_FILE
    document, digest = read_policy(path)
    roles = parse_policy(document)
    for role in roles.values():
        for rule in role.rules_for(platform.machine()):
            _check_exists(rule, platform.machine())
    if odd := missing_or_unknown_roles(roles):
        raise ConfigError(f"seccomp policy {path}: {odd[0]}")
    return Policy(roles, path, digest)


def read_policy(path: str) -> tuple[dict[str, Any], str]:
    """The file as TOML, unchecked, and its SHA-256."""
    try:
        with open(path, "rb") as file:
            text = file.read(_POLICY_BYTES_MAX + 1)
        if len(text) > _POLICY_BYTES_MAX:
            raise ConfigError(f"seccomp policy {path}: is longer than {_POLICY_BYTES_MAX} bytes; give another file")
        return tomllib.loads(text.decode()), hashlib.sha256(text).hexdigest()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:  # the last: brackets in brackets
        mend = "reinstall vfsd, or use --seccomp=none" if path == POLICY_FILE else "give another file"
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"seccomp policy {path}: {reason}; {mend}") from error


def missing_or_unknown_roles(roles: Iterable[str]) -> list[str]:
    found = set(roles)
    missing = [f"there is no role {name}, and every process of vfsd needs its filter" for name in ROLES if name not in found]
    return missing + [f"vfsd has no role {name} (only {', '.join(ROLES)})" for name in sorted(found - set(ROLES))]


def missing_syscall(rule: Rule, architecture: str) -> str:
    """Why there is no such system call on that machine; empty if there is."""
    number: int = pyseccomp.resolve_syscall(_ARCHITECTURES[architecture], rule.syscall)
    if number == _UNKNOWN_SYSCALL:
        return f'{rule.where}: libseccomp knows no such system call [the rule\'s reason: "{rule.reason}"]'
    return f"{rule.where}: {architecture} has no such system call: give the rule an arch" if number < 0 else ""


def syscall_number(name: str, architecture: str) -> int | None:
    """None: that machine has no such system call."""
    number: int = pyseccomp.resolve_syscall(_ARCHITECTURES[architecture], name)
    return number if number >= 0 else None


def syscall_name(number: int, architecture: str) -> str | None:
    try:
        name: bytes = pyseccomp.resolve_syscall(_ARCHITECTURES[architecture], number)
    except ValueError:
        return None
    return name.decode()


def _check_exists(rule: Rule, architecture: str) -> None:
    if missing := missing_syscall(rule, architecture):
        raise ConfigError(f"seccomp policy: {missing}")


def _build(role: RolePolicy, mode: KillMode, architecture: str) -> pyseccomp.SyscallFilter:
    if architecture not in _ARCHITECTURES:
        raise ConfigError(f"seccomp policy: there is none for {architecture} (only {', '.join(ARCHITECTURES)})")
    actions = {"allow": pyseccomp.ALLOW, "kill": _KILL[mode]}
    program = pyseccomp.SyscallFilter(actions[role.default])
    native, wanted = pyseccomp.system_arch(), _ARCHITECTURES[architecture]
    if wanted != native:
        program.add_arch(wanted)
        program.remove_arch(native)
    # libseccomp's own default kills one thread. A call by the 32-bit or x32 entry is never a mistake of ours.
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for rule in role.rules_for(architecture):
        _check_exists(rule, architecture)
        _add(program, rule, actions)
    return program


def _add(program: pyseccomp.SyscallFilter, rule: Rule, actions: dict[str, int]) -> None:
    action = pyseccomp.ERRNO(rule.action) if isinstance(rule.action, int) else actions[rule.action]
    # libseccomp takes this machine's number, or a stand-in for what only others have, and translates it.
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, rule.syscall)
    try:
        # "exactly": libseccomp may otherwise widen a rule that it cannot express.
        program.add_rule_exactly(action, number, *[_argument(each) for each in rule.comparisons])
    except OSError as error:
        raise ConfigError(f"seccomp policy: {rule.where}: libseccomp refuses the rule: {error}") from error


def _argument(comparison: Comparison) -> pyseccomp.Arg:
    return pyseccomp.Arg(comparison.argument, _OPERATORS[comparison.operator], comparison.value, comparison.operand)


def _export(export: Callable[[Any], None]) -> bytes:
    with open(os.memfd_create("vfsd-bpf", os.MFD_CLOEXEC), "w+b") as file:
        export(file)
        file.seek(0)
        return file.read()
