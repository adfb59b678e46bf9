"""How long a guest waits when a worker is killed: kills one again and again while requests are under way.

`tools/measure_pauses.py [--kills N] [--spare-workers N]` prints one row of docs/performance.md's table: from the kill to the
completion of a request that was sent just before it, which is the longest that any request waited. Needs root, as vfsd's sandbox does.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.frontend.checks import eventually
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import worker_pids
from tests.support.frontend.serving import Served, start

REQUESTS_BETWEEN = 200
SETTLE_SECONDS = 0.1  # for the supervisor to hear that a spare worker is ready


def confined(pid: int) -> bool:
    """Whether a worker is at the end of its start: it has its own filter besides the supervisor's."""
    try:
        return "Seccomp_filters:\t2" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_workers(served: Served, count: int) -> None:
    eventually(lambda: sum(map(confined, worker_pids(served))) == count, 60.0)
    time.sleep(SETTLE_SECONDS)


def measure(served: Served, kills: int, spares: int) -> list[float]:
    """Milliseconds, one for each kill."""
    client = served.client
    (served.share / "file").write_bytes(b"content")
    nodeid = client.lookup(ROOT, b"file").nodeid
    fh = client.open(nodeid, os.O_RDWR).fh
    pauses = []
    for _ in range(kills):
        wait_for_workers(served, 1 + spares)
        for _ in range(REQUESTS_BETWEEN):
            client.read(nodeid, fh, 0, 7)
        victim = worker_pids(served)[0]
        pending = [client.send_read(nodeid, fh, 0, 7) for _ in range(8)]
        killed = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        pending.append(client.send_read(nodeid, fh, 0, 7))
        client.finish_all(pending)
        pauses.append((time.perf_counter() - killed) * 1000)
        if {client.result(one) for one in pending} != {b"content"}:
            raise SystemExit("a read was answered wrongly")
    return pauses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--spare-workers", type=int, default=0)
    found = parser.parse_args()
    extra = (f"--spare-workers={found.spare_workers}",)
    with tempfile.TemporaryDirectory() as folder:
        served = start(Path(folder), Options(extra=extra))
        try:
            pauses = sorted(measure(served, found.kills, found.spare_workers))
        finally:
            served.close()
    p99 = pauses[max(0, -(-99 * len(pauses) // 100) - 1)]
    print(
        f"spare workers: {found.spare_workers}; {len(pauses)} kills; ms from kill to answer: "
        f"least {pauses[0]:.0f}, p50 {statistics.median(pauses):.0f}, p99 {p99:.0f}, most {pauses[-1]:.0f}; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
