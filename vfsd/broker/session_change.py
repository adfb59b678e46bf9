"""Who has not yet acknowledged a new session.

INIT and DESTROY are answered only when every worker has dropped what belonged to the session before: the guest's next
request may come through any of them. A worker has a second; then it is in breach.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfsd.broker.worker_link import Task, WorkerLink

ACKNOWLEDGE_SECONDS = 1.0


class SessionChange:
    """Thread-safe. At most one change is under way; a newer one supersedes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._session = 0
        self._waiting: set[WorkerLink] = set()
        self._deadline = 0.0

    def begin(self, session: int, task: Task, links: list[WorkerLink], now: float) -> Task | None:
        """Wait for these workers on behalf of `task`.

        Returns the task of a change that this one supersedes; `task` itself if a later one is already under way.
        """
        with self._lock:
            if session < self._session:
                return task
            superseded, self._task = self._task, task
            self._session = session
            self._waiting = set(links)
            self._deadline = now + ACKNOWLEDGE_SECONDS
        return superseded

    def acknowledged(self, session: int, link: WorkerLink) -> Task | None:
        """The task to answer, if this was the last acknowledgement it waited for."""
        with self._lock:
            if session != self._session:
                return None
            return self._without(link)

    def gone(self, link: WorkerLink) -> Task | None:
        """As `acknowledged`: a worker that is no longer there holds nothing."""
        with self._lock:
            return self._without(link)

    def _without(self, link: WorkerLink) -> Task | None:
        self._waiting.discard(link)
        if self._waiting:
            return None
        finished, self._task = self._task, None
        return finished

    def overdue(self, now: float) -> list[WorkerLink]:
        """The workers that had their second and are silent."""
        with self._lock:
            return list(self._waiting) if self._task is not None and now > self._deadline else []
