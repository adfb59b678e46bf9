"""What a daemon's processes hold while a load runs, and whether that grows: memory, descriptors, threads, from /proc."""

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.guest.daemons import Daemon
from vfsd.tools.daemon import members

PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
# What may differ between two quarters of a flat run: some pages, and descriptors that happen to be in use at a sample (a worker
# holds those of inodes whose attributes were asked for twice within a second). A leak of one in a million requests is more.
SLACK = {"KiB": 512, "fds": 16, "threads": 0}


class Holding(NamedTuple):
    """One process at one moment."""

    kib: int
    fds: int
    threads: int


class Sample(NamedTuple):
    """All processes at one moment, by name, and how many requests had been made by then."""

    seconds: float
    requests: int
    processes: dict[str, Holding]


class Sampler:
    """Looks at the daemon's processes now and then."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._start = time.monotonic()
        self.samples: list[Sample] = []

    def take(self, requests: int) -> Sample:
        found: dict[str, Holding] = {}
        for member in members(self._daemon.pid):
            with suppress(FileNotFoundError, ProcessLookupError):
                found[member.name] = _holding(member.pid)
        self.samples.append(Sample(time.monotonic() - self._start, requests, found))
        return self.samples[-1]


def _holding(pid: int) -> Holding:
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_KIB
    return Holding(resident, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))


class Growth(NamedTuple):
    """A process's medians in the first and the last quarter of a run."""

    process: str
    what: str
    first: float
    last: float

    @property
    def grew(self) -> bool:
        return self.last - self.first > SLACK[self.what]


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """By process and kind. Too few samples for quarters say nothing: ValueError."""
    quarter = len(samples) // 4
    if not quarter:
        raise ValueError(f"{len(samples)} samples are too few to compare quarters")
    found = []
    for process in samples[-1].processes:
        for position, what in enumerate(SLACK):
            first, last = (
                statistics.median(sample.processes[process][position] for sample in part if process in sample.processes)
                for part in (samples[:quarter], samples[-quarter:])
            )
            found.append(Growth(process, what, first, last))
    return found


def figure(samples: Sequence[Sample], rows: int = 12) -> str:
    """A table of the run: memory/descriptors/threads of each process, at equal distances."""
    step = max(1, (len(samples) - 1) // (rows - 1))
    names = list(samples[-1].processes)
    shown = [*samples[:-1:step], samples[-1]]
    lines = [["requests", "seconds", *names]]
    for sample in shown:
        cells = [sample.processes.get(name) for name in names]
        lines.append(
            [f"{sample.requests:,}", f"{sample.seconds:.0f}"]
            + ["-" if cell is None else f"{cell.kib / 1024:.1f} MiB, {cell.fds} fds, {cell.threads} thr" for cell in cells]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)
