"""The broker's work: packets of workers in, requests to their handlers, answers out; and sessions.

The threads are the pool's (pool.py); the main thread is the watchdog and hears the supervisor (watchdog.py). What a worker
breaks costs that worker its link, nothing else. What vfsd itself breaks costs one request an EIO and the log a line.
"""

from __future__ import annotations

import errno
import select
import time
from collections import deque
from collections.abc import Callable

from vfsd.broker.answers import Answer, Call, Granted
from vfsd.broker.links import Links
from vfsd.broker.lock_requests import LockRequests
from vfsd.broker.once import Once
from vfsd.broker.requests import HANDLERS
from vfsd.broker.session_change import SessionChange
from vfsd.broker.share import Share
from vfsd.broker.whereabouts import NOWHERE, Place
from vfsd.broker.worker_link import UNREAD_SECONDS, Outcome, Task, WorkerLink
from vfsd.errors import ReplyErrno, WorkerBreach, drop_traceback
from vfsd.log import ChildLog
from vfsd.shortages import Shortages
from vfsd.wire import broker_messages as wire
from vfsd.wire.channel import Breach, Silent, bounded

# Messages whose second field is a name in the directory that the first one names.
_NAMING = {message for message in HANDLERS if message._fields[:2] == ("parent", "name")}


class Server:
    """Implements pool.Work. `report` tells the supervisor of a worker that is served no more; False if it cannot be told now."""

    def __init__(self, log: ChildLog, report: Callable[[Breach | Silent], bool]) -> None:
        self._log = log
        self._report = report
        self._shortages = Shortages(log)
        self._share: Share | None = None
        self.links = Links(lambda index, sock: WorkerLink(index, sock, self.share.lock, self._still_granted))
        self._unreported: deque[Breach | Silent] = deque()
        self._condemned: deque[tuple[WorkerLink, str]] = deque()
        self._leader_calls: deque[Callable[[], None]] = deque()
        self._turn_link: WorkerLink | None = None
        self._outcomes: list[Outcome] = []
        self._strays: list[tuple[WorkerLink, Outcome]] = []  # of lock requests that were tried again: of any worker
        self._changes = SessionChange()
        self._locks = LockRequests(self.links)
        self._once = Once(self._attempt, lambda link, outcomes: self.links.post(link, outcomes, []))
        self.generation = 0  # counts sessions and links that ended

    def serve(self, share: Share) -> None:
        self._share = share
        share.locks.freed = self._locks.waits.wake
        share.queued_copies = lambda: sum(link.queued_fds for link in self.links.all())

    @property
    def share(self) -> Share:
        if self._share is None:
            raise RuntimeError("the broker has no share yet")
        return self._share

    # --- links -------------------------------------------------------------------------------------------------------

    def remove(self, link: WorkerLink) -> None:
        """The leader's alone: nobody else may be receiving from it."""
        if self.links.remove(link):
            self.generation += 1
            self._settle_change(self._changes.gone(link))
            self._locks.gone(link)

    def _breach(self, link: WorkerLink, text: str) -> None:
        self._log.error(f"worker {link.index} broke the broker protocol: {text}")
        self._give_up(link, Breach(link.index, bounded(text)))

    def _give_up(self, link: WorkerLink, report: Breach | Silent) -> None:
        """Reported first: when the worker sees its socket closed, and ends, the supervisor can know why."""
        self._unreported.append(report)
        self._report_all()
        self.remove(link)

    def _report_all(self) -> None:
        """The supervisor ends those workers. What it does not take now comes again with the next tick."""
        while self._unreported and self._report(self._unreported[0]):
            self._unreported.popleft()

    def _still_granted(self, worker: int, outcome: Outcome) -> bool:
        """Enter a grant if what it belongs to still lives. Called under the share's lock."""
        answer, share = outcome.answer, self.share
        if answer is None:
            return False
        if answer.granted is Granted.NODE:
            alive = share.store.alive(answer.granted_id)
            if alive:
                share.donations.grant(answer.granted_id, worker)
            return alive
        alive = share.files.alive(answer.granted_id)
        if alive:
            share.files.grant(answer.granted_id, worker)
        return alive

    def tick(self, now: float) -> None:
        """The watchdog's slower duties: workers that do not read or do not acknowledge, descriptors nobody uses."""
        for link in self.links.all():
            if link.starved:
                self.links.flush(link)
            if link.unread_for(now) > UNREAD_SECONDS:
                self._condemn(link, f"has not read its replies for {UNREAD_SECONDS:.0f} s")
        for link in self._changes.overdue(now):
            self._condemn(link, "has not acknowledged a new session")
        for link in self._locks.overdue(now):
            self._condemn(link, "has not acknowledged that locks are in use")
        if self._unreported:
            self.links.wake()
        self.share.paths.sweep(now)

    def _condemn(self, link: WorkerLink, text: str) -> None:
        """Have the leader end the link of a worker that does not do its part: a socket must not be closed under its hands."""
        self._condemned.append((link, text))
        self.links.wake()

    def have_leader_call(self, function: Callable[[], None]) -> None:
        """Once, between two packets, from any thread; the same wish twice at once is one."""
        if function not in self._leader_calls:
            self._leader_calls.append(function)
        self.links.wake()

    def _look_around(self) -> None:
        while self._leader_calls:
            self._leader_calls.popleft()()
        while self._condemned:
            link, text = self._condemned.popleft()
            if not link.closed:
                self._give_up(link, Silent(link.index, bounded(text)))
        self._report_all()

    # --- pool.Work ---------------------------------------------------------------------------------------------------

    def next_turn(self) -> deque[Task]:
        while True:
            event = self.links.next_event()
            if event is None:
                due = self._locks.waits.take_due()
                self.links.poll(0 if due else self._locks.waits.seconds())  # also if some are due: these are not to starve the others
                if due:
                    return due
                continue
            link, events = event
            if link is None:
                self._look_around()
            elif tasks := self._hear(link, events):
                self._turn_link = link
                return tasks

    def _hear(self, link: WorkerLink, events: int) -> deque[Task] | None:
        """The next requests of one worker; `events` 0: of the rest of its packet, whose turn has come."""
        if events & ~select.EPOLLIN:  # at its end too: what waits for it goes
            self.links.flush(link)
        if events & ~select.EPOLLOUT and not link.rest:
            link.rest = self._receive(link) or deque()
        elif events:
            return None
        return self.links.next_portion(link)

    def _receive(self, link: WorkerLink) -> deque[Task] | None:
        try:
            packet = link.receive()
            if packet is None:
                return None
            if not packet:
                self.remove(link)
                return None
            session, requests = wire.decode_requests(packet)
            if not link.greeted and requests[0][0].message is not wire.Hello:
                raise WorkerBreach("its first message was not Hello")
        except WorkerBreach as breach:
            self._breach(link, str(breach))
            return None
        link.greeted = True
        link.expect(len(requests))
        return deque(Task(link, session, *asked) for asked in requests)

    def place_of(self, task: Task) -> Place:
        """What needs no answer waits for no file system either: closing is the closer's."""
        message, spec = task.message, task.spec
        if not spec.in_session or spec.reply is None or not message or type(message[0]) is not int:
            return NOWHERE
        name = message[1] if spec.message in _NAMING else b"" if spec.message is wire.LookupMany else None
        return Place(self.share.store.mount_of(message[0]), message[0], name)

    def is_outdated(self, task: Task) -> bool:
        return task.link.closed or task.session != self.share.session

    def refuse(self, task: Task) -> None:
        if task.spec.message is wire.SetLock:
            self._locks.waits.finished(task)
        task.link.settle()
        self.links.post(task.link, [Outcome(task.request_id, errno.ESTALE, None)], [])

    def run(self, task: Task) -> Callable[[bool], None]:
        outcome = self._serve(task)

        def deliver(late: bool) -> None:
            task.link.settle()
            if outcome is None:
                return
            if late:
                self.links.post(task.link, [outcome], [])
            elif task.link is self._turn_link:
                self._outcomes.append(outcome)
            else:
                self._strays.append((task.link, outcome))

        return deliver

    def finish_turn(self) -> None:
        link, outcomes = self._turn_link, self._outcomes
        self._turn_link, self._outcomes = None, []
        if link is not None and (outcomes or link.owes_acknowledgement):
            self.links.post(link, outcomes, [])
        strays, self._strays = self._strays, []
        for link, outcome in strays:
            self.links.post(link, [outcome], [])

    # --- requests ----------------------------------------------------------------------------------------------------

    def _serve(self, task: Task) -> Outcome | None:
        """Run one request; None if no answer is owed, or not yet."""
        if task.slot is not None and task.session == self.share.session:
            return self._once.serve(self.share, task, task.slot, self._answer)
        return self._attempt(task, self._answer_lock if task.spec.message is wire.SetLock else self._answer)

    def _answer_lock(self, task: Task) -> Answer | None:
        return self._locks.serve(self.share, task, self._answer)

    def _attempt(self, task: Task, answer_task: Callable[[Task], Answer | None]) -> Outcome | None:
        try:
            answer = answer_task(task)
        except Exception as error:  # noqa: BLE001  # the dispatch boundary: sorted out by _errno_of
            number = self._errno_of(task, error)
            drop_traceback(error)
            return None if task.spec.reply is None else Outcome(task.request_id, number, None)
        return None if answer is None else Outcome(task.request_id, 0, answer)

    def _errno_of(self, task: Task, error: Exception) -> int:
        """The errno a request fails with; what nobody foresaw is a bug of ours, and logged."""
        if isinstance(error, MemoryError):
            self._shortages.note(errno.ENOMEM)
            return errno.ENOMEM
        if isinstance(error, (ReplyErrno, OSError)) and error.errno:
            if isinstance(error, OSError) or error.errno == errno.ENFILE:
                self._shortages.note(error.errno)
            return error.errno
        self._log.bug(task.spec.message.__name__, error)
        return errno.EIO

    def _answer(self, task: Task) -> Answer | None:
        if not task.spec.in_session:
            return self._change_session(task)
        row = HANDLERS[task.spec.message]
        if task.session != self.share.session:
            raise ReplyErrno(errno.ESTALE)
        if row.writes and self.share.settings.readonly:
            raise ReplyErrno(errno.EROFS)
        return row.handler(self.share, Call(task.session, task.link.index), task.message)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _change_session(self, task: Task) -> Answer | None:
        message = task.message
        if isinstance(message, wire.Hello):
            if message.version != wire.PROTOCOL_VERSION:
                raise ReplyErrno(errno.EPROTO)
            return Answer([self.share.session, self.share.session_flags])
        if isinstance(message, wire.SessionAck):
            self._settle_change(self._changes.acknowledged(message.session, task.link))
            return None
        if isinstance(message, wire.LocksAck):
            self._locks.acknowledged(message.session, task.link)
            return None
        if isinstance(message, wire.CancelLock):
            self._locks.waits.cancel(task.link, message.request_id)
            return None
        self._begin_session(task, message.flags | wire.SESSION_ACTIVE if isinstance(message, wire.SessionStart) else 0)
        return None

    def _begin_session(self, task: Task, flags: int) -> None:
        """Wipe, tell every worker, and answer when all have dropped what was of the old session."""
        session = self.share.begin_session(flags)
        self.generation += 1
        self._locks.waits.wake_all()  # what waits is of the session before, and refused
        links = self.links.all()
        # A worker that is only starting holds nothing yet; Hello tells it the session.
        greeted = [link for link in links if link.greeted]
        superseded = self._changes.begin(session, task, greeted, time.monotonic())
        if superseded is not None:
            self.links.post(superseded.link, [Outcome(superseded.request_id, errno.ESTALE, None)], [])
        if superseded is task:
            return
        for link in links:
            self.links.post(link, [], [wire.SessionNotice(session, flags)])
            if link.closed:  # it went before it could be waited for
                self._settle_change(self._changes.gone(link))

    def _settle_change(self, finished: Task | None) -> None:
        if finished is not None:
            fields = [self.share.session] if finished.spec.message is wire.SessionStart else []
            self.links.post(finished.link, [Outcome(finished.request_id, 0, Answer(fields))], [])
