"""Leader and followers: who serves requests while somebody is stuck in the kernel.

One thread, the leader, takes packets and runs their requests itself: handing each to another thread would cost more than
the request. All other threads wait. A leader that stays in one request for longer than STUCK_SECONDS is late: the watchdog
promotes a follower, which takes over the rest of the packet and the sockets. The late thread finishes its own request,
delivers that answer itself and becomes a follower.

A dead mount must not eat all threads: at most half of them are late in one mount; its further requests wait for one of
those threads. This module knows nothing of sockets or messages: `Work` does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, NoReturn, Protocol, TypeVar

STUCK_SECONDS = 0.005

Task = TypeVar("Task")


class Work(Protocol[Task]):
    """What the threads do. What it raises ends the process."""

    def next_turn(self) -> deque[Task]:
        """Wait for the next packet; its tasks."""

    def mount_of(self, task: Task) -> int:
        """The mount a task works on, 0 if none."""

    def run(self, task: Task) -> Callable[[bool], None]:
        """Do the task; returns what delivers its result, to be called with whether it is late."""

    def finish_turn(self) -> None:
        """All tasks of the packet are done or in other hands."""


class PoolThread:
    """One thread of the pool. `busy_since` is 0.0 between tasks."""

    __slots__ = ("busy_since", "mount", "name", "wake")

    def __init__(self, name: str) -> None:
        self.name = name
        self.wake = threading.Semaphore(0)
        self.busy_since = 0.0
        self.mount = 0


class Pool(Generic[Task]):
    """`crashed` is told of an exception that got out of `Work`, and does not return: a thread less is no state to go on in."""

    def __init__(
        self, work: Work[Task], threads: int, wake_watchdog: Callable[[], None], crashed: Callable[[BaseException], NoReturn]
    ) -> None:
        self._crashed = crashed
        self._work = work
        self._wake_watchdog = wake_watchdog
        self._baton = threading.Lock()
        self._members = [PoolThread(f"pool{index}") for index in range(threads)]
        self._late_per_mount_limit = max(1, threads // 2)
        self._leader = self._members[0]
        self._followers = deque(self._members[1:])
        self._turn: deque[Task] = deque()
        self._late: dict[int, int] = {}  # mount → threads that are late in it
        self._waiting: dict[int, deque[Task]] = {}  # mount → tasks that wait for one of them
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
            turn = self._work.next_turn()
            with self._baton:
                self._turn = turn

    def _run_turn(self, member: PoolThread) -> bool:
        """Run what is left of the packet; False if this thread lost the lead on the way."""
        while True:
            task = self._take(member)
            if task is None:
                return True
            deliver = self._work.run(task)
            with self._baton:
                member.busy_since = 0.0
                late = self._leader is not member
                if not late:
                    deliver(False)
            if late:
                deliver(True)
                self._serve_waiting(member)
                return False

    def _take(self, member: PoolThread) -> Task | None:
        with self._baton:
            while self._turn:
                task = self._turn.popleft()
                mount = self._work.mount_of(task)
                if mount and self._late.get(mount, 0) >= self._late_per_mount_limit:
                    self._waiting.setdefault(mount, deque()).append(task)
                    continue
                member.mount = mount
                member.busy_since = time.monotonic()
                if self._watchdog_asleep:
                    self._watchdog_asleep = False
                    self._wake_watchdog()
                return task
        return None

    def _serve_waiting(self, member: PoolThread) -> None:
        """A late thread goes on with what waits for its mount, then becomes a follower."""
        mount = member.mount
        while True:
            with self._baton:
                waiting = self._waiting.get(mount)
                if not waiting:
                    self._waiting.pop(mount, None)
                    self._late[mount] -= 1
                    if not self._late[mount]:
                        del self._late[mount]
                    self._followers.append(member)
                    return
                task = waiting.popleft()
            self._work.run(task)(True)

    def promote_if_stuck(self, now: float) -> bool:
        """The watchdog's tick. True while there is something to watch."""
        with self._baton:
            leader = self._leader
            if not leader.busy_since:
                return False
            if now - leader.busy_since < STUCK_SECONDS or not self._followers:
                return True
            self._late[leader.mount] = self._late.get(leader.mount, 0) + 1
            self._leader = self._followers.popleft()
            self._leader.wake.release()
            return True

    def let_watchdog_sleep(self) -> bool:
        """Whether the watchdog may stop ticking: it is woken by the next task. False while a task runs."""
        with self._baton:
            self._watchdog_asleep = not self._leader.busy_since
            return self._watchdog_asleep
