"""The first lock of a session waits until every worker knows that FLUSH matters."""

import pytest

from vfsd.broker.locks_in_use import LocksInUse
from vfsd.broker.session_change import ACKNOWLEDGE_SECONDS


@pytest.fixture
def locks():
    return LocksInUse()


def test_all_know_when_the_last_worker_has_said_so(locks):
    assert not locks.known(1)
    assert locks.begin(1, ["a", "b"], now=10.0)
    assert not locks.known(1)
    locks.acknowledged(1, "a")
    locks.acknowledged(1, "a")
    assert not locks.known(1)
    locks.acknowledged(1, "b")
    assert locks.known(1)


def test_it_begins_once_in_a_session(locks):
    assert locks.begin(2, ["a"], now=10.0)
    assert not locks.begin(2, ["a", "b"], now=11.0)
    assert not locks.begin(1, ["a"], now=11.0)
    locks.acknowledged(2, "a")
    assert locks.known(2)
    assert not locks.known(3)
    assert locks.begin(3, ["a"], now=12.0)
    assert not locks.known(2)


def test_a_worker_that_is_gone_asks_for_nothing(locks):
    locks.begin(1, ["a", "b"], now=10.0)
    locks.acknowledged(1, "a")
    locks.gone("b")
    assert locks.known(1)


def test_an_acknowledgement_of_another_session_does_not_count(locks):
    locks.begin(2, ["a"], now=10.0)
    for session in (0, 1, 3):
        locks.acknowledged(session, "a")
    assert not locks.known(2)


def test_who_is_silent_for_over_a_second_is_overdue(locks):
    assert locks.overdue(1e9) == []
    locks.begin(1, ["a", "b"], now=10.0)
    locks.acknowledged(1, "b")
    assert locks.overdue(10.0 + ACKNOWLEDGE_SECONDS) == []
    assert locks.overdue(10.1 + ACKNOWLEDGE_SECONDS) == ["a"]
    locks.gone("a")
    assert locks.overdue(1e9) == []
