"""Log lines about what runs short: descriptors, memory, room on a disk; and a disk that fails.

The guest gets the errno of each request. The operator gets one line for each errno at once, then one a minute at most, which
says how many requests failed meanwhile: a guest that tries again and again, or provokes it, fills no log. Imports the log alone.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Final

from vfsd.log import Logger

QUIET_SECONDS: Final = 60.0
WHAT: Final = {
    errno.EMFILE: "this process has no descriptor left (--rlimit-nofile)",
    errno.ENFILE: "open files: what the guest may have (--rlimit-nofile, --inode-file-handles=prefer), or the host's fs.file-max, is used up",
    # Once in a while the host's kernel answers open_by_handle_at(2) so, of a file that is being replaced.
    errno.ENOMEM: "the memory of the host, or what the limits of its processes allow, is used up; now and then it is only a file that was just replaced",
    errno.ENOSPC: "the room of the host's storage is used up",
    errno.EDQUOT: "a quota of the host's storage is used up",
    errno.EIO: "an error of the host's storage",
}


class Shortages:
    """Threads may share it: a line too many, or a failure not counted, does no harm."""

    def __init__(self, log: Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._said: dict[int, float] = {}
        self._unsaid: dict[int, int] = {}

    def note(self, number: int) -> None:
        """A request fails with this errno; those that tell of no shortage are of no interest."""
        what = WHAT.get(number)
        if what is None:
            return
        now = self._clock()
        said = self._said.get(number)
        if said is not None and now - said < QUIET_SECONDS:
            self._unsaid[number] = self._unsaid.get(number, 0) + 1
            return
        self._said[number] = now
        more = self._unsaid.pop(number, 0)
        since = f"; {more} more requests failed so since the last such line" if more else ""
        self._log.warning(f"a request fails with {errno.errorcode[number]}: {what}{since}")
