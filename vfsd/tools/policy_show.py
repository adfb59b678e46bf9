"""`vfsdctl policy show`: a policy in the forms that other tools and auditors know."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import compile_role, describe_role
from vfsd.sandbox.seccomp_policy import RolePolicy
from vfsd.tools import policy_disasm, policy_foreign, policy_formats
from vfsd.tools.policy_foreign import Shown
from vfsd.tools.policy_words import add_arch_option, add_policy_argument, add_role_option, chosen_roles


@dataclass(frozen=True, slots=True)
class _Format:
    render: Callable[[Sequence[RolePolicy], str], Shown]
    roles_in_one: bool = True  # False: the format is for one process, so a role must be named


def _pfc(roles: Sequence[RolePolicy], architecture: str) -> Shown:
    return Shown("".join(f"# role {role.name}\n{describe_role(role, architecture)}" for role in roles))


_FORMATS = {
    "table": _Format(policy_formats.table),
    "toml": _Format(lambda roles, _architecture: policy_formats.toml(roles)),
    "oci": _Format(policy_foreign.oci, roles_in_one=False),
    "minijail": _Format(policy_foreign.minijail, roles_in_one=False),
    "firecracker": _Format(policy_foreign.firecracker),
    "pfc": _Format(_pfc),
    "bpf": _Format(lambda _roles, _architecture: Shown(""), roles_in_one=False),
    "disasm": _Format(policy_disasm.disassemble_roles),
}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "show",
        help="print a policy, or the filters that it becomes",
        description="toml: of all machines, what --seccomp-policy takes; oci: seccomp profile of the OCI runtime specification; minijail: .policy, for its compile_seccomp_policy.py; firecracker: "
        "JSON for seccompiler; pfc: libseccomp's pseudo code; bpf: the program itself; disasm: the program, readable. What a format cannot "
        "say is left out, so that no more is allowed, and told on stderr.",
        allow_abbrev=False,
    )
    add_policy_argument(parser)
    add_role_option(parser)
    add_arch_option(parser)
    parser.add_argument("--format", choices=tuple(_FORMATS), default="table", help="(default: table)")
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    chosen = _FORMATS[found.format]
    if found.role is None and not chosen.roles_in_one:
        raise ConfigError(f"--format={found.format}: is for one process; choose it with --role")
    roles = chosen_roles(found.policy, found.role)
    if found.format == "bpf":
        sys.stdout.buffer.write(compile_role(roles[0], "kill", found.arch))
        return 0
    shown = chosen.render(roles, found.arch)
    sys.stdout.write(shown.text)
    for problem in shown.left_out:
        print(f"vfsdctl: --format={found.format}: {problem}", file=sys.stderr)
    return 0
