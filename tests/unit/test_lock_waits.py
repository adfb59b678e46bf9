"""Requests that wait for a lock: when they are tried again, in which order, and how they end."""

import errno

import pytest

from vfsd.broker import lock_waits
from vfsd.broker.lock_waits import LAST_RETRY_SECONDS, MAX_WAITS, MOST_AT_ONCE, LockWaits
from vfsd.broker.server import Task
from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire


class Link:
    def __init__(self):
        self.closed = False
        self.expected = 0

    def expect(self, tasks):
        self.expected += tasks


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lock_waits, "time", clock)
    return clock


@pytest.fixture
def nudges():
    return []


@pytest.fixture
def waits(clock, nudges):
    return LockWaits(lambda: nudges.append(clock.now))


@pytest.fixture
def link():
    return Link()


def task(link, request_id, nodeid=5):
    return Task(link, 1, wire.SPEC_OF[wire.SetLock], request_id, wire.SetLock(nodeid, 1, 1, 0, 9, 1, 0, 1))


def parked(waits, *tasks):
    for one in tasks:
        assert waits.begin(one)
        waits.park(one)


def test_nothing_is_due_where_nothing_waits(waits):
    assert waits.seconds() == -1
    assert list(waits.take_due()) == []


def test_it_is_tried_after_1_ms_then_ever_more_rarely(waits, clock, link, nudges):
    one = task(link, 1)
    pauses = []
    for _ in range(9):
        parked(waits, one)
        assert list(waits.take_due()) == []
        pauses.append(waits.seconds())
        clock.now += pauses[-1] + 1e-9
        assert list(waits.take_due()) == [one]
    assert [round(pause * 1000) for pause in pauses] == [1, 2, 4, 8, 16, 32, 50, 50, 50]
    assert len(nudges) == 9, "whoever sleeps must hear of an earlier time"
    assert link.expected == 9


def test_a_freed_lock_is_tried_for_at_once_in_the_order_of_asking(waits, clock, link, nudges):
    tasks = [task(link, number, nodeid=5 + number % 2) for number in range(1, 7)]
    parked(waits, *reversed(tasks))
    nudges.clear()
    waits.wake(6)
    assert nudges == [clock.now]
    assert waits.seconds() == 0
    assert [one.request_id for one in waits.take_due()] == [5, 3, 1]
    assert list(waits.take_due()) == []
    waits.wake(99)
    assert nudges == [clock.now], "nobody waits there"
    waits.wake_all()
    assert [one.request_id for one in waits.take_due()] == [6, 4, 2]


def test_a_wait_that_was_woken_is_not_tried_a_second_time_by_its_old_time(waits, clock, link):
    one = task(link, 1)
    parked(waits, one)
    waits.wake(5)
    waits.wake(5)
    assert list(waits.take_due()) == [one]
    clock.now += 0.01
    assert list(waits.take_due()) == []
    parked(waits, one)
    assert waits.seconds() == pytest.approx(0.002)


def test_a_turn_tries_few_so_that_others_are_served_between(waits, clock, link):
    tasks = [task(link, number) for number in range(3 * MOST_AT_ONCE)]
    parked(waits, *tasks)
    clock.now += 1
    turns = [list(waits.take_due()) for _ in range(4)]
    assert turns == [tasks[:MOST_AT_ONCE], tasks[MOST_AT_ONCE : 2 * MOST_AT_ONCE], tasks[2 * MOST_AT_ONCE :], []]


def test_who_is_answered_waits_no_longer(waits, clock, link):
    one = task(link, 1)
    waits.begin(one)
    waits.finished(one)
    assert len(waits) == 0
    parked(waits, one)
    clock.now += 1
    assert list(waits.take_due()) == [one]
    waits.finished(one)
    assert len(waits) == 0


@pytest.mark.parametrize("when", ["while it waits", "while it is tried"])
def test_a_cancelled_wait_is_tried_once_more_and_ends(waits, clock, link, when):
    one = task(link, 1)
    parked(waits, one)
    if when == "while it waits":
        waits.cancel(link, 1)
        assert list(waits.take_due()) == [one]
    else:
        waits.wake(5)
        assert list(waits.take_due()) == [one]
        waits.cancel(link, 1)
    assert waits.begin(one)
    with pytest.raises(ReplyErrno) as raised:
        waits.park(one)
    assert raised.value.errno == errno.EAGAIN
    assert len(waits) == 0


def test_cancelling_what_does_not_wait_is_harmless(waits, link, clock):
    parked(waits, task(link, 1))
    waits.cancel(link, 2)
    waits.cancel(Link(), 1)
    assert list(waits.take_due()) == []


def test_a_worker_cannot_ask_twice_by_one_id(waits, link):
    assert waits.begin(task(link, 1))
    assert not waits.begin(task(link, 1)._replace(session=2))
    assert waits.begin(task(Link(), 1))


def test_a_worker_waits_for_so_many_locks_and_no_more(waits, link, clock):
    parked(waits, *[task(link, number) for number in range(MAX_WAITS)])
    one = task(link, MAX_WAITS)
    waits.begin(one)
    with pytest.raises(ReplyErrno) as raised:
        waits.park(one)
    assert raised.value.errno == errno.ENOLCK
    parked(waits, task(Link(), 1))
    clock.now += 1
    waits.take_due()
    parked(waits, one)


def test_what_waits_for_a_worker_that_is_gone_is_dropped(waits, clock, link):
    other = task(Link(), 1)
    parked(waits, task(link, 1), other)
    link.closed = True
    waits.wake_all()
    assert list(waits.take_due()) == [other]
    assert link.expected == 0
    assert len(waits) == 1


def test_the_pause_never_exceeds_its_limit(waits, clock, link):
    one = task(link, 1)
    for _ in range(100):
        parked(waits, one)
        assert waits.seconds() <= LAST_RETRY_SECONDS + 1e-6
        waits.wake_all()
        waits.take_due()


def test_a_request_that_is_cancelled_before_it_runs_does_not_wait(waits, link):
    waits.cancel(link, 7)
    one = task(link, 7)
    assert waits.begin(one)
    with pytest.raises(ReplyErrno) as raised:
        waits.park(one)
    assert raised.value.errno == errno.EAGAIN
    assert len(waits) == 0


def test_cancelling_what_never_comes_costs_a_bounded_amount(waits, link):
    for request_id in range(3 * MAX_WAITS):
        waits.cancel(link, request_id)
    assert len(waits._cancelled) == MAX_WAITS


def test_a_request_that_is_refused_on_its_way_leaves_nothing(waits, link, clock):
    one = task(link, 7)
    parked(waits, one)
    clock.now += 1
    assert list(waits.take_due()) == [one]
    waits.finished(one)
    assert len(waits) == 0
    waits.finished(one)  # it may not even have begun
