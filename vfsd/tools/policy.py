"""`vfsdctl policy`: its subcommands, each a module of its own."""

from __future__ import annotations

import argparse

from vfsd.tools import policy_check, policy_coverage, policy_diff, policy_dump, policy_emulate, policy_explain, policy_learn, policy_show

_COMMANDS = (policy_check, policy_coverage, policy_diff, policy_dump, policy_emulate, policy_explain, policy_learn, policy_show)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("policy", help="read, check and explain the system call policy", allow_abbrev=False)
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_to(subcommands)
