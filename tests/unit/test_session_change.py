"""A new session is announced as done when every worker has dropped what was of the old one, or is gone."""

import pytest

from vfsd.broker.session_change import ACKNOWLEDGE_SECONDS, SessionChange

TASK, NEWER = object(), object()


@pytest.fixture
def change():
    return SessionChange()


def test_the_task_is_finished_by_the_last_acknowledgement(change):
    assert change.begin(1, TASK, [0, 1, 2], now=10.0) is None
    assert change.acknowledged(1, 1) is None
    assert change.acknowledged(1, 0) is None
    assert change.acknowledged(1, 2) is TASK


def test_it_is_finished_once(change):
    change.begin(1, TASK, [0], now=10.0)
    assert change.acknowledged(1, 0) is TASK
    assert change.acknowledged(1, 0) is None
    assert change.gone(0) is None


def test_one_worker_that_says_it_twice_is_still_one(change):
    change.begin(1, TASK, [0, 1], now=10.0)
    assert change.acknowledged(1, 0) is None
    assert change.acknowledged(1, 0) is None
    assert change.acknowledged(1, 7) is None
    assert change.acknowledged(1, 1) is TASK


@pytest.mark.parametrize("session", [0, 1, 3, 2**64 - 1])
def test_an_acknowledgement_of_another_session_does_not_count(change, session):
    change.begin(2, TASK, [0], now=10.0)
    assert change.acknowledged(session, 0) is None
    assert change.acknowledged(2, 0) is TASK


def test_a_worker_that_is_gone_holds_nothing(change):
    change.begin(1, TASK, [0, 1], now=10.0)
    assert change.gone(1) is None
    assert change.acknowledged(1, 0) is TASK
    change.begin(2, TASK, [0, 1], now=10.0)
    change.acknowledged(2, 0)
    assert change.gone(1) is TASK


def test_a_newer_change_supersedes_an_older(change):
    change.begin(1, TASK, [0, 1], now=10.0)
    change.acknowledged(1, 0)
    assert change.begin(2, NEWER, [0, 1], now=10.5) is TASK
    assert change.acknowledged(1, 1) is None
    assert change.acknowledged(2, 1) is None
    assert change.overdue(10.0 + ACKNOWLEDGE_SECONDS + 0.1) == [], "its time began anew"
    assert change.acknowledged(2, 0) is NEWER


def test_who_is_silent_for_over_a_second_is_overdue(change):
    assert change.overdue(1e9) == []
    change.begin(1, TASK, [2, 0, 1], now=10.0)
    change.acknowledged(1, 0)
    assert change.overdue(10.0 + ACKNOWLEDGE_SECONDS) == []
    assert change.overdue(10.01 + ACKNOWLEDGE_SECONDS) == [1, 2]
    change.gone(1)
    change.gone(2)
    assert change.overdue(1e9) == []
