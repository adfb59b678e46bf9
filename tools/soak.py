"""`make soak [SECONDS=n] [KILLS_PER_SECOND=n] [GUEST=uml|qemu]`, `make soak REQUESTS=n`: what only time brings out.

Without --requests a guest runs the integrity workload while its workers are killed (soak_guest.py); with it, so many requests go
through the in-process frontend while memory, descriptors and threads of every process are watched (soak_requests.py).
The exit status says whether all was well. SIGTERM and ^C end a run early: what was observed by then is printed.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import FuseClient
from tests.support.frontend.sequences import QEMU_10
from tests.support.guest.daemons import DaemonError, VfsdDaemon
from tests.support.guest.guest import GuestError, GuestRaisedError
from tests.support.guest.packages import PackageError
from tools.process_samples import SLACK, Sampler, figure, growth
from tools.soak_guest import run_guest
from tools.soak_requests import ForgetLane, QueueLoad, make_files

SAMPLE_SECONDS = 5.0
REPORT_SECONDS = 60.0
WARM_UP_ROUNDS = 200  # before the first sample: what is taken once and kept


class Interrupted:
    """Set by the first signal that asks for the end."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = True
        print(f"{signal.Signals(number).name}: ending early", flush=True)


def main() -> int:
    arguments = parse_arguments()
    if os.geteuid() != 0:
        print("soak: vfsd takes root to confine its processes: run it as root", file=sys.stderr)
        return 1
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    interrupted = Interrupted()
    options = arguments.vfsd_options.split()
    try:
        if arguments.requests:
            return run_requests(arguments.requests, arguments.queues, seed, options, interrupted)
        rate = arguments.kills_per_second
        return run_guest(arguments.guest, arguments.seconds, rate, seed, options, lambda: interrupted.asked)
    except (DaemonError, GuestError, GuestRaisedError, PackageError) as error:
        print(f"soak: FAILED: {error}", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description="Run a load for long, and see that nothing is lost and nothing grows.")
    parser.add_argument("--requests", type=int, nargs="?", const=20_000_000, help="through the in-process frontend (default: 20 million)")
    parser.add_argument("--queues", type=int, default=2, help="with --requests: request queues, each with a worker (default: 2)")
    parser.add_argument("--seconds", type=int, default=60, help="of the guest's workload (default: 60)")
    parser.add_argument("--kills-per-second", type=float, default=2.0, help="of workers, during the guest's workload (default: 2)")
    parser.add_argument("--guest", default="uml", choices=["qemu", "uml"], help="User-Mode Linux (default), or QEMU with several queues")
    parser.add_argument("--seed", type=int, help="default: a random one, printed")
    parser.add_argument("--vfsd-options", default=os.environ.get("VFSD_OPTIONS", ""), help="more options for vfsd, separated by spaces")
    return parser.parse_args()


def run_requests(wanted: int, queues: int, seed: int, options: list[str], interrupted: Interrupted) -> int:
    with ExitStack() as stack:
        share = Path(tempfile.mkdtemp(prefix="vfsd-soak-", dir="/var/tmp"))
        stack.callback(shutil.rmtree, share, ignore_errors=True)
        make_files(share, queues)
        daemon = stack.enter_context(VfsdDaemon(str(share), options=[f"--num-request-queues={queues}", *options]))
        device = stack.enter_context(Device(daemon.socket, queues=queues + 1)).attach(QEMU_10)
        client = FuseClient(device)
        client.init()
        loads = [QueueLoad(device, client, queue, seed + queue) for queue in range(1, queues + 1)]
        sampler = Sampler(daemon)
        said_before = len(daemon.log())
        made = drive(loads, ForgetLane(device), sampler, wanted, interrupted)
        print(figure(sampler.samples))
        return verdict(sampler, made, daemon.log()[said_before:])


def drive(loads: list[QueueLoad], hiprio: ForgetLane, sampler: Sampler, wanted: int, interrupted: Interrupted) -> int:
    """Rounds on all queues, one of them answered while the others are under way. How many requests it was."""
    made = rounds = 0
    next_sample = next_report = 0.0
    start = time.monotonic()
    for load in loads:
        load.begin()
    while made < wanted and not interrupted.asked:
        for load in loads:
            made += load.finish()
            forgets, listed = load.forgets, load.listed
            load.begin()
            made += hiprio.forget(forgets, listed)
        rounds += 1
        now = time.monotonic()
        if rounds >= WARM_UP_ROUNDS and now >= next_sample:
            sampler.take(made)
            next_sample = now + SAMPLE_SECONDS
        if now >= next_report:
            print(f"{made:>12,} requests in {now - start:6.0f} s: {made / (now - start):,.0f}/s", flush=True)
            next_report = now + REPORT_SECONDS
    for load in loads:
        made += load.finish()
    hiprio.lane.finish()
    sampler.take(made)
    print(f"{made:>12,} requests in {time.monotonic() - start:6.0f} s, every answer as it must be", flush=True)
    return made


def verdict(sampler: Sampler, made: int, logged: str) -> int:
    """First quarter against last: 1 if anything grew, or vfsd warned of anything."""
    bad = [line for line in logged.splitlines() if " WARN" in line or " ERROR" in line]
    try:
        changes = growth(sampler.samples)
    except ValueError as error:
        print(f"NO VERDICT: {error}")
        return 1
    for change in changes:
        sign = "GREW" if change.grew else "flat"
        print(f"{change.process:<12} {change.what:<8} first quarter {change.first:>9,.0f}  last quarter {change.last:>9,.0f}  {sign}")
    for line in bad:
        print(f"logged: {line}")
    flat = not bad and not any(change.grew for change in changes)
    allowed = ", ".join(f"{slack} {what}" for what, slack in SLACK.items())
    print(f"{'FLAT' if flat else 'NOT FLAT'} over {made:,} requests (medians of quarters; allowed between them: {allowed})")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
