"""vfsd, with one of its children in hostile hands: argv is MODULE or MODULE#N, SCRIPT, then vfsd's own arguments.

Everything else is the daemon as it is. The child of that module (of several only the N-th that is started) starts and confines itself as always, and plays the script
when it should begin to serve (`puppet.py`).
"""

import itertools
import sys
from typing import NoReturn

from tests.security.arena import PUPPET
from vfsd import cli
from vfsd.children import Child

ROLES = {"vfsd.worker": "worker", "vfsd.worker.control": "control"}


def main() -> NoReturn:
    (hostile, _, which), script = sys.argv[1].partition("#"), sys.argv[2]
    start, starts = Child._command, itertools.count(1)

    def command(module: str, config_fd: int) -> list[str]:
        if module != hostile or (next(starts) != int(which) if which else False):
            return start(module, config_fd)
        return [sys.executable, "-I", str(PUPPET), str(config_fd), ROLES[module], script]

    Child._command = staticmethod(command)  # type: ignore[method-assign]
    del sys.argv[1:3]
    cli.main()


if __name__ == "__main__":
    main()
