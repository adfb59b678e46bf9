"""Start things below harmless seccomp filters, which allow everything: as containers and service managers start vfsd below theirs.

`python -m tests.security.filtered COUNT COMMAND…`: the command, below that many different filters.
`python -m tests.security.filtered MODULE OPTION…`: vfsd with these options; its children of that module start below one more.
"""

import os
import sys
from typing import NoReturn

from vfsd import cli
from vfsd.children import Child
from vfsd.sandbox.seccomp_load import load_filter

SECCOMP_RET_ALLOW = 0x7FFF0000
BPF_RET = (6).to_bytes(4, "little")


def load_harmless(number: int) -> None:
    """The kernel ignores the lower half of what a filter returns to allow a call, so there are many such filters."""
    load_filter(BPF_RET + (SECCOMP_RET_ALLOW + number).to_bytes(4, "little"))


def run(count: int, command: list[str]) -> NoReturn:
    for number in range(count):
        load_harmless(number)
    os.execv(command[0], command)


def run_vfsd(filtered: str) -> None:
    start = Child._command

    def command(module: str, config_fd: int) -> list[str]:
        usual = start(module, config_fd)
        # Without the variable by which an interpreter in an empty environment tells the next one of its locale.
        return [sys.executable, "-P", __file__, "1", "/usr/bin/env", "-i", *usual] if module == filtered else usual

    Child._command = staticmethod(command)  # type: ignore[method-assign]
    del sys.argv[1]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        run(int(sys.argv[1]), sys.argv[2:])
    else:
        run_vfsd(sys.argv[1])
