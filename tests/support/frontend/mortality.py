"""Killing a served daemon's workers, and knowing when others have taken their places."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.frontend.checks import eventually
from tests.support.frontend.daemon import Daemon
from tests.support.frontend.serving import Served

REPLACED = "another one takes its place"
PATIENCE = 30.0


def pids_of(daemon: Daemon, module: bytes) -> list[int]:
    """Of the daemon's processes that run this module, by age."""
    found = []
    for pid in daemon.pids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if {module, module + b".faulty"} & set(words):
            found.append(pid)
    return found


def worker_pids(served: Served) -> list[int]:
    """Of all workers that run, by age."""
    return pids_of(served.daemon, b"vfsd.worker")


def kill_worker(served: Served, number: int = 0, how: signal.Signals = signal.SIGKILL) -> int:
    """Kill one worker, the `number`-th by age; its pid. Returns at once."""
    served.expect_log(REPLACED)
    workers = eventually(lambda: pids if len(pids := worker_pids(served)) > number else [], PATIENCE)
    assert workers, served.daemon.describe()
    os.kill(workers[number], how)
    return workers[number]
