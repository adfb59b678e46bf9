"""A few threads for calls that may wait for a device, so that the ring thread does not.

The threads run one callable each and nothing else: they see no ring, no table, no socket. Results come back to the ring
thread through a queue and an eventfd. A mount that hangs keeps at most half of the threads; its further jobs wait. Mounts
whose calls wait for somebody else keep all threads but one, however many of them hang.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from vfsd.errors import drop_traceback

THREADS = 4
_MOST_PER_MOUNT = THREADS // 2
_MOST_REMOTE = THREADS - 1


class Job(NamedTuple):
    """`work` runs on a pool thread; what it returns, or the OSError it raises, is its result."""

    mount_key: Hashable
    work: Callable[[], Any]
    remote: bool = False  # its file system waits for a network or another process


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
        self._running: dict[Hashable, int] = {}
        self._running_remote = 0
        self._waiting: dict[Hashable, deque[_Task]] = {}

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
        task = _Task(job, waiter)
        if job.mount_key in self._waiting or not self._may_run(job):
            self._waiting.setdefault(job.mount_key, deque()).append(task)
        else:
            self._run(task)

    def _may_run(self, job: Job) -> bool:
        return self._running.get(job.mount_key, 0) < _MOST_PER_MOUNT and not (job.remote and self._running_remote >= _MOST_REMOTE)

    def _run(self, task: _Task) -> None:
        key = task.job.mount_key
        self._running[key] = self._running.get(key, 0) + 1
        self._running_remote += task.job.remote
        self._jobs.put(task)

    def withdraw(self, waiter: Waiter) -> bool:
        """Take back a job that waits for its mount; False if it runs, or may."""
        for key, waiting in self._waiting.items():
            for task in waiting:
                if task.waiter is waiter:
                    waiting.remove(task)
                    if not waiting:
                        del self._waiting[key]
                    return True
        return False

    def collect(self) -> None:
        """Hand finished jobs to their waiters."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return
        while self._done:
            done = self._done.popleft()
            self._count_off(done.task.job)
            self._run_waiting()
            done.task.waiter.finished(done.result, done.error)

    def _count_off(self, job: Job) -> None:
        self._running_remote -= job.remote
        self._running[job.mount_key] -= 1
        if not self._running[job.mount_key]:
            del self._running[job.mount_key]

    def _run_waiting(self) -> None:
        """Start what may run now, mount by mount."""
        for key in list(self._waiting):
            waiting = self._waiting[key]
            while waiting and self._may_run(waiting[0].job):
                self._run(waiting.popleft())
            if not waiting:
                del self._waiting[key]
