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
        """How long to sleep at most: until the next worker is to be asked; less while there is a hurry, or something is waited for."""
        hearts = [child.heartbeat for child in children if child.heartbeat is not None]
        if hurry or any(heart.is_asked for heart in hearts) or not all(child.ready for child in children):
            return TICK_SECONDS
        now = time.monotonic()
        return min([ASK_SECONDS, *(heart.seconds_until_due(now) for heart in hearts)])

    def watch(self, children: list[Child], now: float) -> None:
        """Ask workers whether they live, and kill those that do not answer."""
        overslept, self._watched_at = now - self._watched_at > 2 * ASK_SECONDS, now
        for child in children:
            heartbeat = child.heartbeat
            if heartbeat is None:
                continue
            if overslept:
                heartbeat.forgive(now)
            if heartbeat.due(now):
                child.send(Ping())  # one that has closed its channel, or does not read it, gives no answer either
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
