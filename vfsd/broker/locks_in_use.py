"""Whether POSIX locks are in use in this session, and whether every worker knows.

Most sessions see no lock, and then a FLUSH need not come to the broker. The first lock changes that for the whole session: it
is not granted before every worker has acknowledged that it asks for each FLUSH, since the guest may lock through one queue
and close through another. A worker has a second; then it is in breach.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from vfsd.broker.session_change import ACKNOWLEDGE_SECONDS

if TYPE_CHECKING:
    from vfsd.broker.worker_link import WorkerLink


class LocksInUse:
    """Thread-safe. A worker that greets later learns it from the session's flags."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._session = 0
        self._waiting: set[WorkerLink] = set()
        self._deadline = 0.0

    def begin(self, session: int, links: list[WorkerLink], now: float) -> bool:
        """Wait for these workers. False if that has begun already."""
        with self._lock:
            if session <= self._session:
                return False
            self._session = session
            self._waiting = set(links)
            self._deadline = now + ACKNOWLEDGE_SECONDS
            return True

    def known(self, session: int) -> bool:
        """Whether every worker knows."""
        with self._lock:
            return self._session == session and not self._waiting

    def acknowledged(self, session: int, link: WorkerLink) -> None:
        with self._lock:
            if session == self._session:
                self._waiting.discard(link)

    def gone(self, link: WorkerLink) -> None:
        with self._lock:
            self._waiting.discard(link)

    def overdue(self, now: float) -> list[WorkerLink]:
        """The workers that had their second and are silent."""
        with self._lock:
            return list(self._waiting) if now > self._deadline else []
