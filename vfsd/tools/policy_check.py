"""`vfsdctl policy check`: whether vfsd would take a policy, and everything that is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys

from vfsd.sandbox.seccomp_policy import ARCHITECTURES
from vfsd.tools.policy_findings import Examined, examine_file
from vfsd.tools.policy_words import add_json_option, add_policy_argument, counted_syscalls


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="say whether a policy can be used, and everything that is wrong with it",
        description="Looks for: what is not understood; system calls that a machine does not have; rules that other rules make pointless; "
        "what no policy should allow; comparisons that the upper half of an argument gets past. For every machine. Exit status 1 if there is any.",
        allow_abbrev=False,
    )
    add_policy_argument(parser)
    add_json_option(parser)
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    examined = examine_file(found.policy)
    if found.json:
        print(json.dumps(_as_data(examined), indent=2))
    else:
        _print(examined)
    return 1 if examined.findings else 0


def _print(examined: Examined) -> None:
    for finding in examined.findings:
        print(f"{examined.path}: {finding}", file=sys.stderr)
    if examined.findings:
        print(f"{examined.path}: {len(examined.findings)} finding(s)", file=sys.stderr)
        return
    for role in examined.roles.values():
        numbers = " and ".join(f"{counted_syscalls(role, each)} on {each}" for each in ARCHITECTURES)
        kind, rest = ("denied", "allowed") if role.default == "allow" else ("allowed", "kills the process")
        print(f"{role.name}: calls {kind}: {numbers}; any other: {rest}")


def _as_data(examined: Examined) -> dict[str, object]:
    return {
        "policy": examined.path,
        "sha256": examined.sha256,
        "usable": not examined.findings,
        "findings": [{"kind": each.kind, "text": each.text, "architectures": list(each.architectures)} for each in examined.findings],
        "roles": {
            role.name: {"default": role.default, "syscalls": {each: counted_syscalls(role, each) for each in ARCHITECTURES}}
            for role in examined.roles.values()
        },
    }
