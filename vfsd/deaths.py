"""Whether a worker that died is worth another one. Pure: counts, and says so in words.

A worker that dies of what its guest sends would die for ever; and a guest that looks for a way to take a worker over gets a
fresh one for every try that failed. Both have an end here.
"""

from __future__ import annotations

import signal
from collections import Counter, deque

MOST_SUCCESSIVE = 5  # deaths of one worker, between which it completed nothing
MOST_SUSPICIOUS = 3  # deaths of any workers, within a minute, by what looks like an attack, be it one that failed
SUSPICIOUS_SECONDS = 60.0

# A forbidden call (that of abort(3) is one), and what a processor says to a jump to where it should not have gone. Not SIGBUS:
# that is how memory that the frontend took away under a worker's hands is told.
_SUSPICIOUS = (-signal.SIGSYS, -signal.SIGSEGV, -signal.SIGILL, -signal.SIGTRAP)


class Deaths:
    """The deaths of one device's workers."""

    def __init__(self) -> None:
        self._successive: Counter[int] = Counter()
        self._suspicious: deque[float] = deque(maxlen=MOST_SUSPICIOUS)

    def too_many(self, index: int, returncode: int, *, completed: bool, now: float, breach: bool = False) -> str:
        """Note a death. Why that worker is not replaced, "" if it is.

        `completed`: whether it had completed a request; `breach`: whether it was killed for what it had sent to the broker.
        """
        self._successive[index] = 1 if completed else self._successive[index] + 1
        if breach or returncode in _SUSPICIOUS:
            self._suspicious.append(now)
            if len(self._suspicious) == MOST_SUSPICIOUS and now - self._suspicious[0] < SUSPICIOUS_SECONDS:
                return f"{MOST_SUSPICIOUS} workers died so within a minute"
        if self._successive[index] >= MOST_SUCCESSIVE:
            return f"it died {MOST_SUCCESSIVE} times without completing a request in between"
        return ""
