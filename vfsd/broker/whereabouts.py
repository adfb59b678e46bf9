"""What each thread of the pool is at: the pool's members, and what a handler says while it works.

A thread that hangs is known by where it hangs, so that the next request for the same place does not cost another thread.
Most requests have one place, which their message names. A handler says more where it knows more: a listing, which name it
looks up now; a lookup, that it has found the name, so that from there on not the directory is waited for but what was found.
Reports are written by the thread itself without a lock; a reader may see the one before.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a request works: a mount (0: none), an inode, and a name in that directory.

    `name` is None where none is looked up, b"" where names are but no single one is known beforehand.
    """

    mount: int
    nodeid: int
    name: bytes | None


NOWHERE = Place(0, 0, None)


class PoolThread:
    """One thread of the pool. `busy_since` is 0.0 between tasks."""

    __slots__ = ("at_name", "busy_since", "charged_to", "found", "name", "place", "task", "waiting", "wake")

    def __init__(self, name: str) -> None:
        self.name = name
        self.wake = threading.Semaphore(0)
        self.busy_since = 0.0
        self.task: Any = None
        self.at_name: bytes | None = None  # what the handler reports
        self.found = False
        # Meaningful while it is late:
        self.place = NOWHERE
        self.charged_to = 0
        self.waiting: deque[Any] = deque()  # tasks for the very place where it hangs

    def begin(self, task: Any) -> None:
        self.task = task
        self.at_name = None
        self.found = False
        self.busy_since = time.monotonic()

    def is_at(self, nodeid: int, name: bytes) -> bool:
        return self.place.nodeid == nodeid and (self.place.name if self.at_name is None else self.at_name) == name


class _Here(threading.local):
    thread: PoolThread | None = None  # not every thread is of the pool


class Whereabouts:
    """One per broker. `late` are the threads that have lost the lead and not yet finished: the pool's to change."""

    def __init__(self) -> None:
        self._here = _Here()
        self.late: list[PoolThread] = []

    def i_am(self, thread: PoolThread) -> None:
        """Called once by each thread of the pool."""
        self._here.thread = thread

    # --- for handlers ------------------------------------------------------------------------------------------------

    def go_on_to(self, name: bytes) -> bool:
        """A request of many steps reports its next; False if it should end here, because other requests wait for this thread."""
        thread = self._here.thread
        if thread is None:
            return True
        thread.at_name = name
        thread.found = False
        thread.busy_since = time.monotonic()
        return not thread.waiting

    def found_it(self) -> None:
        """The name is resolved: what follows waits for the inode behind it, which may be on another mount."""
        thread = self._here.thread
        if thread is not None:
            thread.found = True

    def hanging_at(self, nodeid: int, name: bytes) -> bool:
        """Whether another thread hangs at this name."""
        return any(thread.is_at(nodeid, name) and thread is not self._here.thread for thread in tuple(self.late))
