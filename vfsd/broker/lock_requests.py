"""Serves requests for locks: they may have to wait, for a lock or for all workers to know that there are locks."""

from __future__ import annotations

import time
from collections.abc import Callable
from errno import EINVAL
from fcntl import F_UNLCK
from typing import TYPE_CHECKING

from vfsd.broker.answers import Answer, WouldWait
from vfsd.broker.lock_waits import LockWaits
from vfsd.broker.locks_in_use import LocksInUse
from vfsd.errors import ReplyErrno, drop_traceback
from vfsd.wire import broker_messages as wire

if TYPE_CHECKING:
    from vfsd.broker.links import Links
    from vfsd.broker.share import Share
    from vfsd.broker.worker_link import Task, WorkerLink


class LockRequests:
    def __init__(self, links: Links) -> None:
        self._links = links
        self.waits = LockWaits(links.wake)
        self._in_use = LocksInUse()

    def serve(self, share: Share, task: Task, answer_task: Callable[[Task], Answer | None]) -> Answer | None:
        """As `answer_task`; None if it must wait: the task comes again. EINVAL: its worker waits by the same id already."""
        if not self.waits.begin(task):
            raise ReplyErrno(EINVAL)
        try:
            answer = answer_task(task) if self._all_know_of_locks(share, task) else None
        except WouldWait as error:
            drop_traceback(error)
            answer = None
        except Exception:
            self.waits.finished(task)
            raise
        if answer is None:
            self.waits.park(task)
        else:
            self.waits.finished(task)
        return answer

    def _all_know_of_locks(self, share: Share, task: Task) -> bool:
        """Before the first POSIX lock of a session every worker must know that it asks for each FLUSH from now on."""
        session, message = task.session, task.message
        if message.flock or message.kind == F_UNLCK or session != share.session or self._in_use.known(session):
            return True
        share.note_locks(session)
        links = [link for link in self._links.all() if link.greeted]
        if self._in_use.begin(session, links, time.monotonic()):
            for link in links:
                self._links.post(link, [], [wire.LocksNotice(session)])
                if link.closed:  # it went before it could be waited for
                    self._in_use.gone(link)
        return self._in_use.known(session)

    def acknowledged(self, session: int, link: WorkerLink) -> None:
        self._in_use.acknowledged(session, link)
        self.waits.wake_all()

    def gone(self, link: WorkerLink) -> None:
        """Its own requests go, and others may have waited for its acknowledgement."""
        self._in_use.gone(link)
        self.waits.wake_all()

    def overdue(self, now: float) -> list[WorkerLink]:
        """The workers that have not acknowledged in time."""
        return self._in_use.overdue(now)
