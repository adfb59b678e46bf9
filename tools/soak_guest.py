"""The integrity workload in a guest while workers are killed, round after round with other seeds, as long as one likes."""

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

from tests.guest import integrity
from tests.support.guest.daemons import VfsdDaemon
from tests.support.guest.guest import Guest, QemuGuest, UmlGuest
from tests.support.guest.images import qemu_image
from tests.support.guest.packages import TRIXIE
from tests.support.killer import Killer, quantile

ROUND_SECONDS = 60
PROCESSES = 4
QUEUES = 3  # of the QEMU guest, each with a worker


def start_guest(kind: str, socket: str) -> Guest:
    """User-Mode Linux has one request queue, Linux 6.12 in QEMU uses as many as there are."""
    if kind == "uml":
        return UmlGuest([socket])
    return QemuGuest([socket], image=qemu_image(TRIXIE), device_options=f"queue-size=1024,num-request-queues={QUEUES}")


def run_guest(kind: str, seconds: int, per_second: float, seed: int, options: list[str], interrupted: Callable[[], bool]) -> int:
    """Rounds until the time is over; 1 at the first thing that is not as it must be."""
    kills = rounds = 0
    pauses: list[float] = []
    began = time.monotonic()
    with ExitStack() as stack:
        share = tempfile.mkdtemp(prefix="vfsd-soak-", dir="/var/tmp")
        stack.callback(shutil.rmtree, share, ignore_errors=True)
        vfsd = stack.enter_context(VfsdDaemon(share, options=[f"--num-request-queues={QUEUES}", *options]))
        guest = stack.enter_context(start_guest(kind, vfsd.socket))
        guest.daemon_ended = vfsd.ended
        guest.mount()
        while (left := seconds - (time.monotonic() - began)) > 0 and not interrupted():
            killer = Killer(vfsd.processes, seed + rounds, per_second)
            problems = run_round(guest, killer, share, seed + rounds, min(ROUND_SECONDS, max(1, int(left))))
            problems += [line for line in vfsd.log().splitlines() if " ERROR " in line]
            kills += len(killer.kills)
            pauses += killer.pauses
            rounds += 1
            if problems:
                print(f"FAILED in the round of seed {seed + rounds - 1}, after {kills} kills:", *problems, sep="\n  ")
                return 1
    shown = ", ".join(f"p{share:.0%}".rstrip("%") + f" {quantile(sorted(pauses), share) * 1000:.0f} ms" for share in (0.5, 0.99, 1.0))
    print(f"ALL THERE: {rounds} rounds in {time.monotonic() - began:.0f} s, {kills} kills; from a kill to the next answer {shown}")
    return 0


def run_round(guest: Guest, killer: Killer, share: str, seed: int, seconds: int) -> list[str]:
    """One round in a directory of its own, which is gone afterwards; what was wrong."""
    inside, outside = f"/mnt/seed-{seed}", f"{share}/seed-{seed}"
    with killer.at_work():
        report = guest.call(integrity.run, inside, seed, PROCESSES, seconds, timeout=seconds + 300)
    guest.drop_caches()
    problems: list[str] = report["failures"]
    problems += [f"the guest: {line}" for line in guest.call(integrity.differences, inside, PROCESSES, timeout=600)]
    found = integrity.compare(integrity.survey(outside), guest.call(integrity.expected, PROCESSES))
    problems += [f"the host: {line}" for line in found]
    done = sum(report["operations"].values())
    print(f"seed {seed}: {done} operations, {report['appended']} appends, {len(killer.kills)} kills", flush=True)
    if not problems:
        shutil.rmtree(outside)
        guest.drop_caches()
    return problems
