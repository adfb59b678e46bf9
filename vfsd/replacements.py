"""Workers that could not be started for want of something (a process, a descriptor, memory): tried again, but not for ever.

The guest's requests wait meanwhile, as they do while a worker starts. The supervisor's alone. Imports the log alone.
"""

from __future__ import annotations

from vfsd.log import StderrLog

RETRY_SECONDS = 1.0
GIVE_UP_SECONDS = 30.0


class Replacements:
    """Times as of time.monotonic()."""

    def __init__(self, log: StderrLog) -> None:
        self._log = log
        self._since: dict[int, float] = {}
        self._tried = 0.0

    def failed(self, index: int, error: Exception, now: float) -> str:
        """Note that worker `index` could not be started; why no further try is made, "" if one is."""
        self._tried = now
        if index not in self._since:
            self._since[index] = now
            self._log.warning(f"worker {index} cannot be started, trying again for {GIVE_UP_SECONDS:.0f} s: {error}")
        elif now - self._since[index] > GIVE_UP_SECONDS:
            return f"worker {index} could not be started for {GIVE_UP_SECONDS:.0f} s: {error}"
        return ""

    def started(self, index: int) -> None:
        if self._since.pop(index, None) is not None:
            self._log.warning(f"worker {index} could be started now")

    def forget(self) -> None:
        """Nobody needs them any more."""
        self._since.clear()

    def due(self, now: float) -> list[int]:
        """Those whose next try it is time for."""
        return list(self._since) if now - self._tried >= RETRY_SECONDS else []

    def seconds(self, otherwise: float) -> float:
        """How long to sleep at most."""
        return min(otherwise, RETRY_SECONDS) if self._since else otherwise
