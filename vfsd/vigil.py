"""The supervisor's watch over children that live but do not do their part: not ready in time, or no answer for too long."""

from __future__ import annotations

import time

from vfsd.children import Child
from vfsd.heartbeat import ASK_SECONDS, LATE_SECONDS, is_uninterruptible
from vfsd.log import ERROR, StderrLog
from vfsd.wire.channel import Ping

TICK_SECONDS = 1.0


class Vigil:
    """`watch` is to be called after each sleep, which lasts at most `seconds`."""

    def __init__(self, log: StderrLog) -> None:
        self._log = log
        self._watched_at = time.monotonic()

    def seconds(self, children: list[Child], *, hurry: bool = False) -> float:
        """How long to sleep at most: longer while all is well, and there is no hurry."""
        waiting = hurry or any(not child.ready or (child.heartbeat is not None and child.heartbeat.is_asked) for child in children)
        return TICK_SECONDS if waiting else ASK_SECONDS

    def watch(self, children: list[Child], now: float) -> None:
        """Ask workers whether they live, and kill those that do not answer."""
        overslept, self._watched_at = now - self._watched_at > 2 * ASK_SECONDS, now
        for child in children:
            heartbeat = child.heartbeat
            if heartbeat is None:
                continue
            if overslept:
                heartbeat.forgive(now)
            if heartbeat.due(now) and child.send(Ping()):
                heartbeat.asked(now)
            if heartbeat.late(now) and not is_uninterruptible(child.pid):
                self.kill(child, f"has not answered for {LATE_SECONDS:.0f} s")

    def kill(self, child: Child, why: str) -> None:
        """Once: its death is dealt with as any other."""
        self._log.log(ERROR, f"{child.role} (pid {child.pid}) {why} and is killed")
        child.heartbeat = None
        child.kill()


def late_to_start(children: list[Child], now: float, seconds: float) -> list[Child]:
    """Those that had so much time to get ready."""
    return [child for child in children if not child.ready and now - child.started_at > seconds]
