"""Kills a daemon's workers at random moments while something runs, and measures how long each queue then stood still.

vfsd promises that a worker's death is a pause, within limits: a request that was *run* by two workers that died is answered
EIO, and five successive deaths of one worker without a completion end the device (docs/operations.md). A killer that is
faster than a successor starts would only find these limits. So it looks at the in-flight tables, which control keeps for
all workers, and waits until the worker that it is about to kill has completed something, and no request of its queues is
being run again: requests in flight meet the kill in every state but that. And after a pause it lets the guest work for as
long again, or else on a busy machine, where a successor takes seconds to start, the guest would get nothing done.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vfsd.wire.inflight import ENTRY_BYTES, HEADER_BYTES, TABLE_BYTES

_POLL_SECONDS = 0.002  # between two looks whether a queue goes on: how exact a pause is measured
_LOOK_SECONDS = 0.01  # between two looks for a worker that may be killed
_LINK = "/memfd:vfsd-inflight"
_DESC_NUM, _USED_IDX = 5, 7  # in units of u16


@dataclass
class Kill:
    """One death that we caused: when (time.time()), how many requests were in flight, and how long these waited for the next answer."""

    at: float
    pid: int
    in_flight: int = 0
    pause_seconds: float | None = None


class Table:
    """One queue's in-flight table, read only."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(descriptor, TABLE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def _half(self, index: int) -> int:
        return int.from_bytes(self._map[2 * index : 2 * index + 2], "little")

    @property
    def used_idx(self) -> int:
        """Of the last completions that were shown to the driver."""
        return self._half(_USED_IDX)

    def _entries(self) -> bytes:
        return self._map[HEADER_BYTES : HEADER_BYTES + ENTRY_BYTES * self._half(_DESC_NUM)]

    @property
    def in_flight(self) -> int:
        """How many requests were taken and are not completed."""
        return sum(map(bool, self._entries()[::ENTRY_BYTES]))

    @property
    def run_twice(self) -> bool:
        """Whether a request is in flight that is being run for the second time."""
        entries = self._entries()
        return any(flag and deaths for flag, deaths in zip(entries[::ENTRY_BYTES], entries[1::ENTRY_BYTES], strict=True))

    def close(self) -> None:
        self._map.close()


class Killer:
    """`with Killer(pids, seed, per_second).at_work()`: `pids` gives the daemon and all its descendants."""

    def __init__(self, pids: Callable[[], list[int]], seed: int, per_second: float = 2.0) -> None:
        self._pids = pids
        self._rng = random.Random(seed)
        self._interval = 1 / per_second
        self._tables: dict[int, Table] = {}  # by inode
        self._left_at: dict[int, int] = {}  # a table's used index when its last worker was killed
        self._paused: list[tuple[Kill, float, dict[int, int]]] = []  # killed when, and where its tables stood
        self._not_before = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer")
        self.kills: list[Kill] = []
        self.failure: BaseException | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()
            for table in self._tables.values():
                table.close()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while True:
                due = max(due + self._interval * self._rng.uniform(0.5, 1.5), time.monotonic(), self._not_before)
                if self._watch_until(due):
                    return
                while time.monotonic() < self._not_before or not self._try():
                    if self._watch_until(time.monotonic() + _LOOK_SECONDS):
                        return
        except BaseException as error:  # noqa: BLE001  # raised again in the thread that waits for us
            self.failure = error

    def _watch_until(self, moment: float) -> bool:
        """Sleep, and meanwhile note which queues go on again. Whether it is over."""
        while (left := moment - time.monotonic()) > 0:
            if self._over.wait(min(left, _POLL_SECONDS) if self._paused else left):
                return True
            self._look_at_paused()
        return self._over.is_set()

    def _look_at_paused(self) -> None:
        for paused in list(self._paused):
            kill, began, left_at = paused
            if any(self._tables[inode].used_idx != index for inode, index in left_at.items()):
                kill.pause_seconds = time.monotonic() - began
                self._not_before = max(self._not_before, time.monotonic() + kill.pause_seconds)
                self._paused.remove(paused)

    def _try(self) -> bool:
        """Kill a worker, if there is one that may die."""
        workers = self._workers()
        self._rng.shuffle(workers)
        for pid in workers:
            inodes = self._tables_of(pid)
            if inodes and self._may_die(inodes):
                self._kill(pid, inodes)
                return True
        return False

    def _may_die(self, inodes: list[int]) -> bool:
        completed = any(self._left_at.get(inode, 0) != self._tables[inode].used_idx for inode in inodes)
        return completed and not any(self._tables[inode].run_twice for inode in inodes)

    def _kill(self, pid: int, inodes: list[int]) -> None:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                kill, began = Kill(time.time(), pid), time.monotonic()
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [])
            finally:
                os.close(pidfd)
            self.kills.append(kill)
            left_at = {inode: self._tables[inode].used_idx for inode in inodes}
            self._left_at.update(left_at)
            kill.in_flight = sum(self._tables[inode].in_flight for inode in inodes)
            if kill.in_flight:
                self._paused.append((kill, began, left_at))

    def _workers(self) -> list[int]:
        found = []
        for pid in self._pids():
            with suppress(FileNotFoundError, ProcessLookupError):
                if b"vfsd.worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.append(pid)
        return found

    def _tables_of(self, pid: int) -> list[int]:
        """The inodes of the in-flight tables that a worker has mapped: of the queues that it serves."""
        found = []
        with suppress(FileNotFoundError, ProcessLookupError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{name}"
                with suppress(FileNotFoundError):
                    if os.readlink(path).startswith(_LINK):
                        inode = os.stat(path).st_ino
                        if inode not in self._tables:
                            self._tables[inode] = Table(path)
                        found.append(inode)
        return found

    @property
    def pauses(self) -> list[float]:
        """In seconds, of the kills that met requests in flight, shortest first."""
        return sorted(kill.pause_seconds for kill in self.kills if kill.pause_seconds is not None)


def quantile(ordered: list[float], share: float) -> float:
    """Of values in order: the smallest that so large a share of them does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
