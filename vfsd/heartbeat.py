"""Whether a worker still lives: it is asked now and then, by its ring thread's own channel, and has to answer. Pure but for /proc.

A worker that is in an uninterruptible call of the host's kernel is not late: it could not be killed either, and what it waits
for may come.
"""

from __future__ import annotations

from pathlib import Path

ASK_SECONDS = 5.0
LATE_SECONDS = 10.0


class Heartbeat:
    """Of one worker, from the moment it serves. Times are time.monotonic()."""

    def __init__(self, now: float) -> None:
        self._heard_at = now
        self._asked_at: float | None = None

    @property
    def is_asked(self) -> bool:
        """Whether its answer is waited for."""
        return self._asked_at is not None

    def seconds_until_due(self, now: float) -> float:
        """Until it is to be asked, unless it is being asked; 0 from then on."""
        return max(0.0, self._heard_at + ASK_SECONDS - now)

    def due(self, now: float) -> bool:
        """Whether it is to be asked."""
        return self._asked_at is None and not self.seconds_until_due(now)

    def asked(self, now: float) -> None:
        self._asked_at = now

    def answered(self, now: float) -> None:
        self._heard_at, self._asked_at = now, None

    def late(self, now: float) -> bool:
        return self._asked_at is not None and now - self._asked_at > LATE_SECONDS

    def forgive(self, now: float) -> None:
        """We did not run ourselves (the machine slept, all of us were frozen): its time begins anew."""
        if self._asked_at is not None:
            self._asked_at = now


def is_uninterruptible(pid: int) -> bool:
    """Whether a process's first thread, which is a worker's ring thread, waits in the kernel and cannot be killed."""
    return _state(pid) == b"D"


def is_half_dead(pid: int) -> bool:
    """Whether a process's first thread has ended, and others perhaps cannot: the kernel calls it dead only when all have."""
    return _state(pid) == b"Z"


def _state(pid: int) -> bytes:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return b""
    return stat.rpartition(b")")[2].split()[0]
