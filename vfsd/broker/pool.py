"""Leader and followers: who serves requests while somebody is stuck in the kernel.

One thread, the leader, takes packets and runs their requests itself: handing each to another thread would cost more than
the request. All other threads wait. A leader that stays in one step of a request for longer than STUCK_SECONDS is late: the
watchdog promotes a follower, which takes over the rest of the packet and the sockets. The late thread finishes its own
request, delivers that answer itself and becomes a follower.

What hangs must not eat all threads. Each late thread is charged to a mount, or to a directory if it hangs at one of its
names while the directory's own mount is known to answer: something else is mounted there.
* A request for the very name at which a thread hangs waits for that thread.
* At most half of the threads are late for one mount or directory; its further requests wait for one of those threads.
* When three quarters of all are late, that goes for every mount and directory with a late thread.
* While only names hang on a mount, a request that looks up none may go on: it shows whether the mount itself answers.
Requests wait only for a thread that is late on their account: when it comes back, it runs them, in the order they came.
This module knows nothing of sockets or messages: `Work` does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, NoReturn, Protocol, TypeVar

from vfsd.broker.whereabouts import Place, PoolThread, Whereabouts

STUCK_SECONDS = 0.005

Task = TypeVar("Task")


class Work(Protocol[Task]):
    """What the threads do. What it raises ends the process."""

    generation: int  # changes whenever tasks may have become outdated

    def next_turn(self) -> deque[Task]:
        """Wait for the next packet; its tasks."""

    def place_of(self, task: Task) -> Place:
        """Where a task works."""

    def run(self, task: Task) -> Callable[[bool], None]:
        """Do the task; returns what delivers its result, to be called with whether it is late."""

    def is_outdated(self, task: Task) -> bool:
        """Whether nobody needs the result of a task that has not begun."""

    def refuse(self, task: Task) -> None:
        """Be done with an outdated task without doing it."""

    def finish_turn(self) -> None:
        """All tasks of the packet are done or in other hands."""


class Pool(Generic[Task]):
    """`crashed` is told of an exception that got out of `Work`, and does not return: a thread less is no state to go on in."""

    def __init__(
        self, work: Work[Task], threads: int, whereabouts: Whereabouts, wake_watchdog: Callable[[], None],
        crashed: Callable[[BaseException], NoReturn],
    ) -> None:  # fmt: skip
        self._crashed = crashed
        self._work = work
        self._wake_watchdog = wake_watchdog
        self._baton = threading.Lock()
        self._members = [PoolThread(f"pool{index}") for index in range(threads)]
        self._late_for_one = max(1, threads // 2)
        self._late_in_all = max(1, threads - threads // 4)
        self._leader = self._members[0]
        self._followers = deque(self._members[1:])
        self._turn: deque[Task] = deque()
        self._whereabouts = whereabouts
        self._late_threads = whereabouts.late
        self._late: dict[int, int] = {}  # mount, or minus a directory's nodeid → threads that are late for it
        self._waiting: dict[int, deque[Task]] = {}  # the same → tasks that wait for one of them
        self._resumed: deque[Task] = deque()  # tasks that have waited and need not; the leader's, beside its packet
        self._generation = 0
        self._watchdog_asleep = False
        self._released = threading.Event()

    def start(self, prepare_thread: Callable[[], None]) -> None:
        """Start the threads; returns when `prepare_thread` has run on each. They serve after `Pool.release`."""
        ready = threading.Barrier(len(self._members) + 1)
        for member in self._members:
            threading.Thread(target=self._live, args=(member, prepare_thread, ready), name=member.name, daemon=True).start()
        ready.wait()

    def release(self) -> None:
        """Let the threads serve."""
        self._released.set()

    def _live(self, member: PoolThread, prepare_thread: Callable[[], None], ready: threading.Barrier) -> None:
        prepare_thread()
        self._whereabouts.i_am(member)
        ready.wait()
        self._released.wait()
        if member is not self._members[0]:  # the first leader; it may no longer be the leader, but then it is late
            member.wake.acquire()
        try:
            while True:
                self._lead(member)
                member.wake.acquire()
        except BaseException as error:  # noqa: BLE001  # the interpreter would print a traceback, which opens files
            self._crashed(error)

    def _lead(self, member: PoolThread) -> None:
        """Serve until another thread was promoted."""
        while True:
            if not self._run_turn(member):
                return
            self._work.finish_turn()
            if self._work.generation != self._generation:
                self._refuse_outdated()
            turn = self._work.next_turn()
            with self._baton:
                self._turn = turn

    def _run_turn(self, member: PoolThread) -> bool:
        """Run what is left of the packet; False if this thread lost the lead on the way."""
        while True:
            task, apart = self._take(member)
            if task is None:
                return True
            deliver = self._work.run(task)
            with self._baton:
                member.busy_since = 0.0
                late = self._leader is not member
                if not late:
                    if self._late:
                        self._mount_answers(self._work.place_of(task).mount)
                    if not apart:
                        deliver(False)
            if late or apart:
                deliver(True)
            if late:
                self._serve_waiting(member)
                return False

    def _take(self, member: PoolThread) -> tuple[Task | None, bool]:
        """The next task, and whether it is not of this packet: then its answer goes out by itself, as a late one does."""
        with self._baton:
            while self._turn or self._resumed:
                apart = bool(self._resumed)
                task = (self._resumed or self._turn).popleft()
                queue = self._queue_for(self._work.place_of(task)) if self._late_threads else None
                if queue is not None:
                    queue.append(task)
                    continue
                member.begin(task)
                if self._watchdog_asleep:
                    self._watchdog_asleep = False
                    self._wake_watchdog()
                return task, apart
        return None, False

    # --- late threads, and what waits for them -------------------------------------------------------------------------

    def _queue_for(self, place: Place) -> deque[Task] | None:
        """Where a task must wait, None if it may run. Under the baton."""
        if place.name:
            for thread in self._late_threads:
                if thread.is_at(place.nodeid, place.name):
                    return thread.waiting
        if place.mount and self._is_full(place.mount) and not (place.name is None and self._only_names_hang(place.mount)):
            return self._waiting.setdefault(place.mount, deque())
        if place.name is not None and self._is_full(-place.nodeid):
            return self._waiting.setdefault(-place.nodeid, deque())
        return None

    def _is_full(self, key: int) -> bool:
        late = self._late.get(key, 0)
        return late >= self._late_for_one or (late > 0 and len(self._late_threads) >= self._late_in_all)

    def _only_names_hang(self, mount: int) -> bool:
        return not any(thread.charged_to == mount and thread.place.name is None for thread in self._late_threads)

    def _charge(self, thread: PoolThread, key: int) -> None:
        thread.charged_to = key
        self._late[key] = self._late.get(key, 0) + 1

    def _discharge(self, thread: PoolThread) -> None:
        key = thread.charged_to
        self._late[key] -= 1
        if not self._late[key]:
            del self._late[key]

    def _mount_answers(self, mount: int) -> None:
        """Threads that hang at a name on this mount hang in something that is mounted there. Under the baton."""
        if mount not in self._late or not self._only_names_hang(mount):
            return
        for thread in self._late_threads:
            if thread.charged_to == mount:
                self._discharge(thread)
                self._charge(thread, -thread.place.nodeid)
        self._resumed += self._waiting.pop(mount, ())

    def _serve_waiting(self, member: PoolThread) -> None:
        """A late thread goes on with what waits for it, then becomes a follower."""
        while True:
            with self._baton:
                task = self._next_waiting(member)
                if task is None:
                    self._late_threads.remove(member)
                    self._discharge(member)
                    member.busy_since = 0.0
                    member.task = None
                    self._followers.append(member)
                    return
                member.begin(task)
                member.place = self._work.place_of(task)
            self._work.run(task)(True)

    def _next_waiting(self, member: PoolThread) -> Task | None:
        """First what waits for this very thread, whose place must not change before; then for what it is charged to."""
        if member.waiting:
            task: Task = member.waiting.popleft()
            return task
        waiting = self._waiting.get(member.charged_to)
        if waiting:
            return waiting.popleft()
        self._waiting.pop(member.charged_to, None)
        return None

    def _refuse_outdated(self) -> None:
        """Of a session that is over or a worker that is gone nothing goes on waiting: a dead mount may never answer."""
        self._generation = self._work.generation
        outdated: list[Task] = []
        with self._baton:
            for queue in [*self._waiting.values(), *(thread.waiting for thread in self._late_threads)]:
                for _ in range(len(queue)):
                    task = queue.popleft()
                    (outdated if self._work.is_outdated(task) else queue).append(task)
        for task in outdated:
            self._work.refuse(task)

    # --- the watchdog's ------------------------------------------------------------------------------------------------

    def promote_if_stuck(self, now: float) -> bool:
        """The watchdog's tick. True while there is something to watch."""
        with self._baton:
            leader = self._leader
            if not leader.busy_since:
                return False
            if now - leader.busy_since < STUCK_SECONDS or not self._followers:
                return True
            leader.place = self._work.place_of(leader.task)
            self._charge(leader, -leader.place.nodeid if leader.found and leader.place.name is not None else leader.place.mount)
            self._late_threads.append(leader)
            self._leader = self._followers.popleft()
            self._leader.wake.release()
            return True

    def all_hang(self) -> bool:
        """Whether every thread is late: then nobody serves, and it is the host's file systems that keep them."""
        with self._baton:
            return bool(self._leader.busy_since) and not self._followers

    def let_watchdog_sleep(self) -> bool:
        """Whether the watchdog may stop ticking: it is woken by the next task. False while a task runs."""
        with self._baton:
            self._watchdog_asleep = not self._leader.busy_since
            return self._watchdog_asleep
