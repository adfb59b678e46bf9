"""The worker's I/O threads: results come back to the ring thread, and a mount that hangs keeps half of them."""

import select
import threading

import pytest

from tests.support.worker import EndingIoPool
from vfsd.worker.io_pool import THREADS, Job

PATIENCE = 20.0


class Waiter:
    def __init__(self):
        self.results = []
        self.thread = None

    def finished(self, result, error):
        self.results.append((result, error))
        self.thread = threading.current_thread()


class Held:
    """Work that runs until it is let go."""

    def __init__(self):
        self.started = threading.Event()
        self.go = threading.Event()

    def __call__(self):
        self.started.set()
        assert self.go.wait(PATIENCE)
        return self


@pytest.fixture
def pool():
    pool = EndingIoPool()
    pool.start()
    yield pool
    pool.end()


def readable(pool):
    poll = select.poll()
    poll.register(pool.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def drain(pool, waiters):
    while not all(waiter.results for waiter in waiters):
        pool.wait()


def test_a_result_comes_back_on_the_threads_that_collects(pool):
    waiter, ran_on = Waiter(), []
    pool.submit(Job(1, lambda: ran_on.append(threading.current_thread()) or 42), waiter)
    pool.wait()
    assert waiter.results == [(42, None)]
    assert waiter.thread is threading.current_thread()
    assert ran_on[0] is not waiter.thread
    assert not readable(pool)


@pytest.mark.parametrize("error", [OSError(5, "no"), ValueError("bug")])
def test_an_error_comes_back_as_one_and_keeps_nothing_alive(pool, error):
    waiter = Waiter()

    def fail():
        raise error

    pool.submit(Job(1, fail), waiter)
    pool.wait()
    assert waiter.results == [(None, error)]
    assert error.__traceback__ is None, "it would hold views of guest memory"


def test_nothing_is_collected_when_nothing_is_done(pool):
    assert not readable(pool)
    pool.collect()


def test_a_mount_takes_at_most_half_of_the_threads(pool):
    held = [Held() for _ in range(THREADS)]
    waiters = [Waiter() for _ in held]
    for work, waiter in zip(held, waiters, strict=True):
        pool.submit(Job(1, work), waiter)
    for work in held[: THREADS // 2]:
        assert work.started.wait(PATIENCE)
    elsewhere = [Waiter() for _ in range(10)]
    for number, waiter in enumerate(elsewhere):
        pool.submit(Job(2 + number % 3, lambda: None), waiter)
    drain(pool, elsewhere)
    assert not any(work.started.is_set() for work in held[THREADS // 2 :])
    held[1].go.set()
    drain(pool, [waiters[1]])
    assert held[THREADS // 2].started.wait(PATIENCE), "the next of the mount takes its place"
    for work in held:
        work.go.set()
    drain(pool, waiters)
    assert [waiter.results for waiter in waiters] == [[(work, None)] for work in held]
    assert pool._running == {}
    assert pool._waiting == {}


def test_remote_mounts_leave_a_thread_to_the_others(pool):
    held = [Held() for _ in range(2 * THREADS)]
    waiters = [Waiter() for _ in held]
    for number, (work, waiter) in enumerate(zip(held, waiters, strict=True)):
        pool.submit(Job(number % 3, work, remote=True), waiter)
    for work in held[: THREADS - 1]:
        assert work.started.wait(PATIENCE)
    local = [Waiter() for _ in range(10)]
    for waiter in local:
        pool.submit(Job(7, lambda: None), waiter)
    drain(pool, local)
    assert sum(work.started.is_set() for work in held) == THREADS - 1
    for work in held:
        work.go.set()
    drain(pool, waiters)
    assert pool._running == {}
    assert pool._running_remote == 0


def test_a_job_that_waits_for_its_mount_can_be_taken_back(pool):
    held = [Held() for _ in range(THREADS)]
    waiters = [Waiter() for _ in held]
    for work, waiter in zip(held, waiters, strict=True):
        pool.submit(Job(1, work), waiter)
    assert held[0].started.wait(PATIENCE)
    assert not pool.withdraw(waiters[0]), "it runs"
    for waiter in waiters[THREADS // 2 :]:
        assert pool.withdraw(waiter)
        assert not pool.withdraw(waiter)
    assert pool._waiting == {}
    for work in held:
        work.go.set()
    drain(pool, waiters[: THREADS // 2])
    assert not any(waiter.results for waiter in waiters[THREADS // 2 :])
    assert not any(work.started.is_set() for work in held[THREADS // 2 :])


def test_a_waiter_may_submit_again_when_it_is_finished(pool):
    class Again(Waiter):
        def finished(self, result, error):
            super().finished(result, error)
            if len(self.results) < 5:
                pool.submit(Job(1, lambda: len(self.results)), self)

    waiter = Again()
    pool.submit(Job(1, lambda: 0), waiter)
    while len(waiter.results) < 5:
        pool.wait()
    assert [result for result, _error in waiter.results] == [0, 1, 2, 3, 4]


def test_many_jobs_of_many_mounts_are_each_done_once(pool):
    waiters = [Waiter() for _ in range(500)]
    for number, waiter in enumerate(waiters):
        pool.submit(Job(number % 7, lambda number=number: number), waiter)
    drain(pool, waiters)
    assert [waiter.results for waiter in waiters] == [[(number, None)] for number in range(500)]
    assert pool._running == {}
