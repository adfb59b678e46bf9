"""`make demo-crash [KILLS_PER_SECOND=n] [GUEST=uml|qemu] [FILES=n] [VFSD_OPTIONS=…]`: a guest copies a tree while its worker is killed.

Prints what was killed, how long the guest had to wait each time, and whether copy and original are the same, as the guest and
as the host read them. The exit status is 1 unless they are, and no program of the guest saw an error.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.guest import probes
from tests.support.guest.daemons import DaemonError, VfsdDaemon
from tests.support.guest.guest import Guest, GuestError, GuestRaisedError, QemuGuest, UmlGuest
from tests.support.guest.packages import PackageError
from tests.support.killer import Kill, Killer, quantile
from tools import crash_probe

GUESTS: dict[str, type[Guest]] = {"uml": UmlGuest, "qemu": QemuGuest}
LARGE_FILES = 4
LARGE_MIB = 16
SMALL_BYTES = 6000  # at most
FOLDER_FILES = 100
COPY_SECONDS = 3000.0


def main() -> int:
    arguments = parse_arguments()
    if os.geteuid() != 0:
        print("demo-crash: vfsd takes root to confine its processes: run `make demo-crash` as root", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the guest and vfsd are ended on the way out
    try:
        return run(arguments)
    except (DaemonError, GuestError, GuestRaisedError, PackageError) as error:
        print(f"demo-crash: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo-crash", description="Copy a tree in a guest while vfsd's workers are killed.")
    parser.add_argument("--kills-per-second", type=float, default=2.0, help="on average (default: 2)")
    parser.add_argument("--guest", default="uml", choices=sorted(GUESTS), help="User-Mode Linux (default) or QEMU")
    parser.add_argument("--files", type=int, default=3000, help="how many small files the tree has (default: 3000)")
    parser.add_argument("--seed", type=int, help="of the moments of the kills; default: a random one, printed")
    parser.add_argument("--vfsd-options", default=os.environ.get("VFSD_OPTIONS", ""), help="more options for vfsd, separated by spaces")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    with ExitStack() as stack:
        share = tempfile.mkdtemp(prefix="vfsd-demo-crash-", dir="/var/tmp")
        stack.callback(shutil.rmtree, share, ignore_errors=True)
        size = make_tree(Path(share, "original"), arguments.files)
        print(f"A tree of {arguments.files} small files and {LARGE_FILES} of {LARGE_MIB} MiB, {size / 1e6:.0f} MB in all.")
        vfsd = stack.enter_context(VfsdDaemon(share, options=arguments.vfsd_options.split()))
        guest = stack.enter_context(GUESTS[arguments.guest]([vfsd.socket]))
        guest.daemon_ended = vfsd.ended
        guest.mount()
        print(f"{' '.join(guest.uname[:3:2])} copies it within the share; a worker of vfsd is killed (SIGKILL)", end=" ")
        print(f"{arguments.kills_per_second:g} times a second, seed {seed} ...", flush=True)
        killer = Killer(vfsd.processes, seed, arguments.kills_per_second)
        ahead = clock_ahead(guest)
        with killer.at_work():
            seen = guest.call(crash_probe.copy_and_look, "/mnt/original", "/mnt/copy", timeout=COPY_SECONDS)
        print_kills(killer, seen)
        print_pauses(killer.kills, [(at - ahead, took) for at, took in seen["slow"]])
        return verdict(guest, share, len(killer.kills), seen, vfsd.log())


def make_tree(root: Path, files: int) -> int:
    """Its size in bytes."""
    source = random.Random(1)
    total = 0
    for number in range(files):
        folder = root / f"{number // FOLDER_FILES:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        data = source.randbytes(source.randrange(SMALL_BYTES))
        (folder / f"small-{number:05d}").write_bytes(data)
        total += len(data)
    for number in range(LARGE_FILES):
        with (root / f"large-{number}").open("wb") as large:
            for _ in range(LARGE_MIB):
                total += large.write(source.randbytes(1 << 20))
    (root / "link").symlink_to("000/small-00000")
    return total


def clock_ahead(guest: Guest) -> float:
    """How many seconds the guest's clock is ahead of ours."""
    from_here = crash_probe.now()
    there = float(guest.call(crash_probe.now))
    return there - (from_here + crash_probe.now()) / 2


def print_kills(killer: Killer, seen: dict[str, float]) -> None:
    kills, seconds = killer.kills, seen["seconds"]
    met = sum(kill.in_flight > 0 for kill in kills)
    print(f"\n{len(kills)} kills in {seconds:.1f} s, {len(kills) / seconds:.2f} a second; {met} of them met requests in flight")


def print_pauses(kills: Sequence[Kill], slow: list[tuple[float, float]]) -> None:
    """What each kill cost: the longest of the guest's looks that it fell into, or that began within a second after it."""
    pauses = []
    for kill in kills:
        around = [took for at, took in slow if at <= kill.at + 1.0 and at + took >= kill.at]
        pauses.append(max(around, default=crash_probe.NOTED_SECONDS))
    show("pause that a program in the guest saw", sorted(pauses))
    show("from a kill to the next answer, on the host", sorted(kill.pause_seconds for kill in kills if kill.pause_seconds is not None))


def show(what: str, pauses: list[float]) -> None:
    if pauses:
        values = [f"{quantile(pauses, share) * 1000:.0f}" for share in (0.5, 0.99)]
        print(f"{what + ':':<46} p50 {values[0]} ms, p99 {values[1]} ms, longest {pauses[-1] * 1000:.0f} ms")


def verdict(guest: Guest, share: str, kills: int, seen: dict[str, object], log: str) -> int:
    """Both trees as host and guest read them, one line, and the exit status."""
    original = probes.contents_digest(f"{share}/original")
    on_host = probes.contents_digest(f"{share}/copy") if os.path.isdir(f"{share}/copy") else None
    guest.drop_caches()
    in_guest = guest.call(probes.contents_digest, "/mnt/copy", timeout=COPY_SECONDS) if on_host else None
    problems = []
    if seen["code"]:
        problems.append(f"cp ended with {seen['code']}: {seen['said']}")
    for reader, digest in (("the host", on_host), ("the guest", in_guest)):
        print(f"{reader + ' reads the copy as':<26} {digest[1][:40] if digest else 'nothing'}")
        if digest != original:
            problems.append(f"{reader} does not find what the original has, {original[1][:40]}")
    problems += [line for line in log.splitlines() if " ERROR " in line]
    if not kills:
        problems.append("nothing was killed")
    for problem in problems:
        print(f"  {problem}")
    if problems:
        print("\nFAILED: this is a defect of vfsd, please report it")
        return 1
    print(f"\nALL THERE: {original[0]} files and directories, copied while {kills} workers died; every checksum matches, no error was seen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
