"""A few threads for calls that may wait for a device, so that the ring thread does not.

The threads run one callable each and nothing else: they see no ring, no table, no socket. Results come back to the ring
thread through a queue and an eventfd. A mount that hangs keeps at most half of the threads; its further jobs wait.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from vfsd.errors import drop_traceback

THREADS = 4


class Job(NamedTuple):
    """`work` runs on a pool thread; what it returns, or the OSError it raises, is its result."""

    mount_key: int
    work: Callable[[], Any]


class Waiter(Protocol):
    """Who waits for a job."""

    def finished(self, result: Any, error: Exception | None) -> None: ...


class _Task(NamedTuple):
    job: Job
    waiter: Waiter


class _Done(NamedTuple):
    task: _Task
    result: Any
    error: Exception | None


class IoPool:
    """`submit` and `collect` are the ring thread's; `fileno()` becomes readable when there is something to collect."""

    def __init__(self) -> None:
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._jobs: SimpleQueue[_Task] = SimpleQueue()
        self._done: deque[_Done] = deque()
        self._running: dict[int, int] = {}
        self._waiting: dict[int, deque[_Task]] = {}
        self._per_mount = max(1, THREADS // 2)

    def fileno(self) -> int:
        return self._event_fd

    def start(self) -> None:
        """Start the threads; returns when all run, so that a filter can be put on them."""
        ready = threading.Barrier(THREADS + 1)
        for index in range(THREADS):
            threading.Thread(target=self._work, args=(ready,), name=f"io{index}", daemon=True).start()
        ready.wait()

    def _work(self, ready: threading.Barrier) -> None:
        ready.wait()
        while True:
            task = self._jobs.get()
            result, error = None, None
            try:
                result = task.job.work()
            except Exception as raised:  # noqa: BLE001  # the ring thread decides what it means
                drop_traceback(raised)  # it would keep views of guest memory alive
                error = raised
            self._done.append(_Done(task, result, error))
            del task, result, error
            os.eventfd_write(self._event_fd, 1)

    def submit(self, job: Job, waiter: Waiter) -> None:
        running = self._running.get(job.mount_key, 0)
        task = _Task(job, waiter)
        if running >= self._per_mount:
            self._waiting.setdefault(job.mount_key, deque()).append(task)
            return
        self._running[job.mount_key] = running + 1
        self._jobs.put(task)

    def collect(self) -> None:
        """Hand finished jobs to their waiters."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return
        while self._done:
            done = self._done.popleft()
            self._next_of(done.task.job.mount_key)
            done.task.waiter.finished(done.result, done.error)

    def _next_of(self, mount_key: int) -> None:
        """A thread is free of this mount: give it the mount's next job, or count it off."""
        waiting = self._waiting.get(mount_key)
        if waiting:
            self._jobs.put(waiting.popleft())
            if not waiting:
                del self._waiting[mount_key]
            return
        self._running[mount_key] -= 1
        if not self._running[mount_key]:
            del self._running[mount_key]
