"""`make bench`: the same operations against vfsd, the Rust and the C virtiofsd, in one run, and the ratios between them.

All contenders run at the same time and take turns within every round, so that what the machine does meanwhile hits all of
them alike. Two ways in: a User-Mode Linux guest (what an application sees) and the in-process frontend (single FUSE
requests, whose client is Python and costs every contender the same). Time is wall-clock; CPU is what the daemon's
processes used, which load on other CPUs disturbs less.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import FuseClient
from tests.support.frontend.sequences import QEMU_10
from tests.support.guest.daemons import CDaemon, Daemon, DaemonError, RustDaemon, VfsdDaemon
from tests.support.guest.guest import Guest, GuestError, GuestRaisedError, UmlGuest
from tests.support.guest.packages import PackageError
from tools import bench_frontend, bench_guest

GUEST_WORKLOADS = {
    "stat of 2000 cold names, each": bench_guest.stat_cold,
    "stat of missing names, each": bench_guest.stat_missing,
    "list 2000 cold entries, each": bench_guest.list_cold,
    "open, read 2 KB, close; cold, each": bench_guest.read_small_cold,
    "create, write 2 KB, close; each": bench_guest.create_small,
    "remove, each": bench_guest.remove_small,
    "random read 4 KiB O_DIRECT, each": bench_guest.read_4k_direct,
    "read 64 MiB cold, per MiB": bench_guest.read_large_cold,
    "write 64 MiB, per MiB": bench_guest.write_large,
}
LARGE_MIB = 64


@dataclass(frozen=True)
class Contender:
    """A daemon with the options it is measured with."""

    name: str
    kind: type[Daemon]
    options: tuple[str, ...] = ()


CONTENDERS = (
    Contender("vfsd", VfsdDaemon, ("--inode-file-handles=prefer",)),
    Contender("Rust, handles", RustDaemon, ("--inode-file-handles=prefer", "--modcaps=+dac_read_search")),
    Contender("Rust", RustDaemon, ("--inode-file-handles=never",)),
    Contender("C", CDaemon),
)


@dataclass
class Sample:
    """Microseconds per operation, one value a round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


Results = dict[str, dict[str, Sample]]  # workload, contender
Measurement = Callable[[], tuple[int, float]]  # how many operations, and how many seconds they took


class Bench:
    """Runs workloads in turns, and leaves out, with the reason, a contender that fails one."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.results: Results = {}
        self.failures: list[str] = []

    def run(self, workloads: dict[str, dict[str, Measurement]], daemons: dict[str, Daemon]) -> None:
        for number in range(self.rounds + 1):
            print(f"  round {number} of {self.rounds}{' (warm-up, not counted)' if number == 0 else ''}", file=sys.stderr, flush=True)
            for workload, measurements in workloads.items():
                names = list(measurements)
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    self._measure(workload, name, measurements, daemons[name], counted=number > 0)

    def _measure(self, workload: str, name: str, measurements: dict[str, Measurement], daemon: Daemon, *, counted: bool) -> None:
        before = cpu_seconds(daemon)
        try:
            operations, seconds = measurements[name]()
        except (OSError, AssertionError, GuestError, GuestRaisedError) as error:
            self.failures.append(f"{name} failed at {workload!r} and is left out of it: {type(error).__name__}: {str(error)[:300]}")
            del measurements[name]
            return
        if counted:
            sample = self.results.setdefault(workload, {}).setdefault(name, Sample())
            sample.wall.append(seconds / operations * 1e6)
            sample.cpu.append((cpu_seconds(daemon) - before) / operations * 1e6)


def main() -> int:
    arguments = parse_arguments()
    if os.geteuid() != 0:
        print("bench: the daemons confine themselves with privileges that only root has: run `make bench` as root", file=sys.stderr)
        return 1
    chosen = [one for one in CONTENDERS if not arguments.only or one.name in arguments.only]
    try:
        for title, measure in {"frontend": measure_frontend, "guest": measure_guest}.items():
            if title in arguments.through:
                bench = Bench(arguments.rounds)
                measure(bench, chosen, arguments)
                report(title, bench, [one.name for one in chosen])
        print_notes(arguments)
    except (DaemonError, GuestError, PackageError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Compare vfsd with the Rust and the C virtiofsd.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender does each workload (default: 5)")
    parser.add_argument("--through", nargs="+", choices=["frontend", "guest"], default=["frontend", "guest"])
    parser.add_argument("--only", nargs="+", choices=[one.name for one in CONTENDERS], help="contenders (default: all)")
    parser.add_argument("--cpu", default="0", help="the CPU that daemons and guests run on, or 'any' (default: 0)")
    parser.add_argument("--folder", default="/var/tmp", help="where the shares are made")
    return parser.parse_args()


def pinned(arguments: argparse.Namespace) -> tuple[str, ...]:
    return () if arguments.cpu == "any" else ("taskset", "--cpu-list", arguments.cpu)


def start_daemons(stack: ExitStack, chosen: Sequence[Contender], arguments: argparse.Namespace) -> dict[str, Daemon]:
    """One daemon for each contender, each with a share of its own and the same files in it."""
    daemons: dict[str, Daemon] = {}
    for one in chosen:
        share = tempfile.mkdtemp(prefix="vfsd-bench-", dir=arguments.folder)
        stack.callback(shutil.rmtree, share, ignore_errors=True)
        make_files(Path(share))
        daemons[one.name] = stack.enter_context(one.kind(share, options=one.options, prefix=pinned(arguments)))
    return daemons


def make_files(share: Path) -> None:
    share.chmod(0o755)
    small = share / "data" / "small"
    small.mkdir(parents=True)
    for number in range(2000):
        (small / f"{number:04d}").write_bytes(bytes([number % 251]) * 2000)
    with (share / "data" / "large").open("wb") as large:
        for number in range(LARGE_MIB):
            large.write(bytes([number + 1]) * (1 << 20))


def measure_frontend(bench: Bench, chosen: Sequence[Contender], arguments: argparse.Namespace) -> None:
    print("through the in-process frontend:", file=sys.stderr)
    with ExitStack() as stack:
        if arguments.cpu != "any":
            everywhere = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {int(arguments.cpu)})
            stack.callback(os.sched_setaffinity, 0, everywhere)
        daemons = start_daemons(stack, chosen, arguments)
        workloads: dict[str, dict[str, Measurement]] = {workload: {} for workload in bench_frontend.WORKLOADS}
        for name, daemon in daemons.items():
            device = stack.enter_context(Device(daemon.socket))
            device.attach(QEMU_10)
            client = FuseClient(device)
            client.init()
            session = bench_frontend.open_session(client)
            for workload, action in bench_frontend.WORKLOADS.items():
                workloads[workload][name] = _timed_here(action, session)
        bench.run(workloads, daemons)


def _timed_here(action: Callable[[bench_frontend.Session], int], session: bench_frontend.Session) -> Measurement:
    def measure() -> tuple[int, float]:
        start = time.perf_counter()
        operations = action(session)
        return operations, time.perf_counter() - start

    return measure


def measure_guest(bench: Bench, chosen: Sequence[Contender], arguments: argparse.Namespace) -> None:
    print("through User-Mode Linux guests:", file=sys.stderr)
    with ExitStack() as stack:
        daemons = start_daemons(stack, chosen, arguments)
        guests: dict[str, Guest] = {}
        for name, daemon in daemons.items():
            guests[name] = stack.enter_context(UmlGuest([daemon.socket], memory_mib=512, prefix=pinned(arguments)))
            guests[name].daemon_ended = daemon.ended
            guests[name].mount()
        workloads = {
            workload: {name: _timed_in_guest(guest, function) for name, guest in guests.items()}
            for workload, function in GUEST_WORKLOADS.items()
        }
        bench.run(workloads, daemons)


def _timed_in_guest(guest: Guest, function: Callable[[str], list[float]]) -> Measurement:
    def measure() -> tuple[int, float]:
        operations, seconds = guest.call(function, "/mnt")
        return int(operations), float(seconds)

    return measure


def cpu_seconds(daemon: Daemon) -> float:
    """What all threads of all processes of a daemon have run so far, to the nanosecond."""
    total = 0
    with suppress(DaemonError):
        for pid in daemon.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with suppress(FileNotFoundError, ProcessLookupError):
                        total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def report(title: str, bench: Bench, names: Sequence[str]) -> None:
    """Two Markdown tables: ratios to each peer, and what they were made from."""
    peers = [name for name in names if name != "vfsd"]
    where = {"guest": "In a User-Mode Linux guest", "frontend": "Single FUSE requests, in-process frontend"}[title]
    if "vfsd" in names and peers:
        print(f"\n### {where}: vfsd's time divided by the peer's (below 1: vfsd is faster)\n")
        table(
            ["", *(f"vs {peer}" for peer in peers)],
            [[workload, *(ratio(row, peer) for peer in peers)] for workload, row in bench.results.items()],
        )
    print(f"\n### {where}: microseconds per operation, median of {bench.rounds} (fastest to slowest round; daemon's CPU time)\n")
    table(["", *names], [[workload, *(cell(row.get(name)) for name in names)] for workload, row in bench.results.items()])
    for failure in bench.failures:
        print(f"\n{failure}")


def ratio(row: dict[str, Sample], peer: str) -> str:
    if "vfsd" not in row or peer not in row:
        return "-"
    return f"{statistics.median(row['vfsd'].wall) / statistics.median(row[peer].wall):.2f}"


def cell(sample: Sample | None) -> str:
    if sample is None:
        return "-"
    low, high = min(sample.wall), max(sample.wall)
    return f"{statistics.median(sample.wall):.1f} ({low:.1f} to {high:.1f}; {statistics.median(sample.cpu):.1f})"


def table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |")


def print_notes(arguments: argparse.Namespace) -> None:
    place = "any CPU" if arguments.cpu == "any" else f"CPU {arguments.cpu}"
    system = os.uname()
    print(f"""
Measured on Linux {system.release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f} at the end; daemons and clients on {place}; shares below {arguments.folder}.

* Read ratios whose two ranges do not overlap; the others say "about the same". Run it again on a quiet machine before quoting any.
* On one CPU, daemon and client take turns: no wake-up of a sleeping CPU is measured, and no overlap between the two either.
* Every contender confines itself with its default sandbox and seccomp filter, one request queue in use. vfsd keeps file handles (its
  default); "Rust, handles" does too, "Rust" and C keep a descriptor per inode.
* The frontend's own Python is part of every wall-clock figure there, so its ratios are closer to 1 than the daemons are; the CPU
  time is the daemon's alone.
* User-Mode Linux 6.1 cannot talk to the Rust and the C daemon as they are: a proxy trims one set-up message, and answers the
  question for the tag in the C daemon's place. Requests do not pass through it (tests/support/guest/uml_proxy.py).""")


if __name__ == "__main__":
    sys.exit(main())
