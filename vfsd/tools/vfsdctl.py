"""`vfsdctl`: what an administrator or auditor asks of a policy, or of a daemon that runs.

Each command is a module with `add_to(subcommands)`, which adds its parser and sets `run`, a function of the parsed arguments
that returns the exit status: 0 all is well, 1 something is not, 2 the command line cannot be.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import vfsd
from vfsd.errors import ConfigError
from vfsd.tools import fault, policy, status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vfsdctl", description="Look at vfsd's confinement, and at daemons that run; make them fail.", allow_abbrev=False
    )
    parser.add_argument("-V", "--version", action="version", version=f"vfsdctl {vfsd.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    policy.add_to(commands)
    status.add_to(commands)
    fault.add_to(commands)
    return parser


def run(argv: Sequence[str]) -> int:
    found = build_parser().parse_args(argv)
    try:
        status: int = found.run(found)
    except ConfigError as error:
        print(f"vfsdctl: {error}", file=sys.stderr)
        return 1
    return status


def main() -> NoReturn:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads the output may stop when they have seen enough
    sys.exit(run(sys.argv[1:]))
