"""`vfsdctl policy check`: whether vfsd would take a policy."""

from __future__ import annotations

import argparse

from vfsd.sandbox.seccomp import POLICY_FILE, load_policy


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("check", help="say whether a policy can be used, and why not", allow_abbrev=False)
    parser.add_argument("policy", nargs="?", default=POLICY_FILE, metavar="FILE", help="(default: the one that vfsd comes with)")
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    roles = load_policy(found.policy).roles
    for role in roles.values():
        print(f"{role.name}: {len(role.rules)} rules, everything else: {role.default}")
    return 0
