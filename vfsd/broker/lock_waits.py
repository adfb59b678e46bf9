"""Lock requests that cannot be answered yet. None of them holds a thread, a packet or a descriptor.

A request that would wait is put here and comes back as a task: after 1 ms, 2 ms, … 50 ms, since nothing tells when a program
of the host or another guest unlocks; and at once when the broker itself has dropped a lock on that inode: first come, first
tried, but after those whose time had come before. It ends with the lock, with the session (the task is refused as any other
of an old session), with its worker's link, or by CancelLock.
"""

from __future__ import annotations

import errno
import heapq
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from vfsd.errors import ReplyErrno

if TYPE_CHECKING:
    from vfsd.broker.worker_link import Task, WorkerLink

    Key = tuple[WorkerLink, int]  # and the request id

FIRST_RETRY_SECONDS = 0.001
LAST_RETRY_SECONDS = 0.05
MAX_WAITS = 1024  # of one worker: above a quarter of its rings, which is all that an honest one asks for
_NOT_CANCELLED = object()
MOST_AT_ONCE = 32  # tried between two looks at the workers' sockets


class _Wait:
    """`due`: when it is tried again; None while it is being tried."""

    __slots__ = ("cancelled", "delay", "due", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.due: float | None = None
        self.delay = FIRST_RETRY_SECONDS
        self.cancelled = False


class LockWaits:
    """Thread-safe. `nudge` wakes whoever sleeps until `seconds` are over."""

    def __init__(self, nudge: Callable[[], None]) -> None:
        self._nudge = nudge
        self._lock = threading.Lock()
        self._waits: dict[Key, _Wait] = {}  # in the order of their asking
        self._queue: list[tuple[float, int, _Wait]] = []  # a heap; an entry whose wait has another due time means nothing
        self._entries = 0
        self._parked: Counter[WorkerLink] = Counter()
        self._cancelled: OrderedDict[Key, None] = OrderedDict()  # before they ran, or after they were answered

    def __len__(self) -> int:
        return len(self._waits)

    def begin(self, task: Task) -> bool:
        """The task runs now, for the first time or again. False if its worker has another under way by the same id."""
        with self._lock:
            wait = self._waits.setdefault(_key(task), _Wait(task))
            if wait.task is task and self._cancelled.pop(_key(task), _NOT_CANCELLED) is None:
                wait.cancelled = True
            return wait.task is task

    def finished(self, task: Task) -> None:
        """It is answered, be it before it ever ran."""
        with self._lock:
            self._waits.pop(_key(task), None)
            self._cancelled.pop(_key(task), None)

    def park(self, task: Task) -> None:
        """Try it again later. Raises what it ends with instead: EAGAIN if it was cancelled, ENOLCK if its worker waits for too much."""
        with self._lock:
            wait = self._waits[_key(task)]
            if wait.cancelled or self._parked[task.link] >= MAX_WAITS:
                del self._waits[_key(task)]
                raise ReplyErrno(errno.EAGAIN if wait.cancelled else errno.ENOLCK)
            self._parked[task.link] += 1
            self._schedule(wait, time.monotonic() + wait.delay)
            wait.delay = min(2 * wait.delay, LAST_RETRY_SECONDS)
        self._nudge()

    def _schedule(self, wait: _Wait, due: float) -> None:
        wait.due = due
        self._entries += 1
        heapq.heappush(self._queue, (due, self._entries, wait))

    def seconds(self) -> float:
        """Until the next is due, for epoll: -1 if none is."""
        with self._lock:
            return max(0.0, self._queue[0][0] - time.monotonic()) if self._queue else -1

    def take_due(self) -> deque[Task]:
        """Those to be tried now. Of a worker that has gone none is; it would get a lock for nobody."""
        if not self._queue:
            return deque()
        taken: deque[Task] = deque()
        with self._lock:
            now = time.monotonic()
            while self._queue and self._queue[0][0] <= now and len(taken) < MOST_AT_ONCE:
                due, _entry, wait = heapq.heappop(self._queue)
                if wait.due != due:
                    continue
                self._unpark(wait)
                if wait.task.link.closed:
                    del self._waits[_key(wait.task)]
                else:
                    taken.append(wait.task)
        for task in taken:
            task.link.expect(1)
        return taken

    def _unpark(self, wait: _Wait) -> None:
        wait.due = None
        link = wait.task.link
        self._parked[link] -= 1
        if not self._parked[link]:
            del self._parked[link]

    def wake(self, nodeid: int) -> None:
        """A lock on this inode may have become free."""
        if self._waits:
            self._wake(lambda wait: wait.task.message.nodeid == nodeid)

    def wake_all(self) -> None:
        if self._waits:
            self._wake(lambda _wait: True)

    def _wake(self, chosen: Callable[[_Wait], bool]) -> None:
        with self._lock:
            now = time.monotonic()
            woken = [wait for wait in self._waits.values() if wait.due is not None and wait.due > now and chosen(wait)]
            for wait in woken:
                self._schedule(wait, now)
        if woken:
            self._nudge()

    def cancel(self, link: WorkerLink, request_id: int) -> None:
        """End a wait: it is tried once more, then answered. Nothing if it is answered already."""
        with self._lock:
            wait = self._waits.get((link, request_id))
            if wait is None:  # it may still be on its way to a thread
                self._cancelled[link, request_id] = None
                if len(self._cancelled) > MAX_WAITS:
                    self._cancelled.popitem(last=False)
                return
            wait.cancelled = True
            if wait.due is not None:
                self._schedule(wait, time.monotonic())
        self._nudge()


def _key(task: Task) -> Key:
    return task.link, task.request_id
