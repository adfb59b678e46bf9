"""Which workers hold an O_PATH descriptor of which inode, and when one is worth donating.

An inode whose attributes are asked for twice within a second is likely asked again: from the second time on, the worker
gets a descriptor and answers by itself. Bounded: what is forgotten here is merely donated later.
"""

from __future__ import annotations

import threading
import time

INTEREST_SECONDS = 1.0
_MOST_ASKED = 4096


class NodeDonations:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[int, float] = {}
        self._holders: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def worthwhile(self, nodeid: int) -> bool:
        """Note a question about an inode; whether there was another within the last second."""
        now = time.monotonic()
        with self._lock:
            last = self._asked.pop(nodeid, None)
            self._asked[nodeid] = now
            if len(self._asked) > _MOST_ASKED:
                del self._asked[next(iter(self._asked))]
        return last is not None and now - last < INTEREST_SECONDS

    def grant(self, nodeid: int, worker: int) -> None:
        with self._lock:
            self._holders[nodeid] = self._holders.get(nodeid, 0) | 1 << worker

    def forget(self, nodeid: int) -> int:
        """The inode is gone; returns its holders, as bits."""
        with self._lock:
            self._asked.pop(nodeid, None)
            return self._holders.pop(nodeid, 0)

    def clear(self) -> None:
        """A new session: every worker drops all it holds."""
        with self._lock:
            self._asked.clear()
            self._holders.clear()
