"""Run a command that looks at a vfsd: `python -m tools.audit_daemon COMMAND…`, to which the pid of one is added.

That vfsd serves two queues of a frontend, which has a file open. Exit status: the command's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vfsd-audit-", dir="/var/tmp") as folder:
        served = start(Path(folder), Options(request_queues=2), queues=3)
        try:
            served.client.open(served.client.write_file(ROOT, b"file", b"x").nodeid)
            return subprocess.run([*sys.argv[1:], str(served.daemon.pid)], check=False).returncode
        finally:
            served.close()


if __name__ == "__main__":
    sys.exit(main())
