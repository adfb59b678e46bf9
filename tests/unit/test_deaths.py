"""When a worker that died is not replaced any more."""

import signal

import pytest

from vfsd.deaths import Deaths

KILLED = -signal.SIGKILL


def die(deaths, *, index=0, by=KILLED, completed=False, now=0.0, breach=False):
    return deaths.too_many(index, by, completed=completed, now=now, breach=breach)


def test_the_fifth_successive_death_without_a_completion_is_the_last():
    deaths = Deaths()
    assert [bool(die(deaths)) for _ in range(5)] == [False, False, False, False, True]


def test_a_completion_in_between_begins_the_count_anew():
    deaths = Deaths()
    for _ in range(4):
        die(deaths)
    assert not die(deaths, completed=True)
    assert [bool(die(deaths)) for _ in range(4)] == [False, False, False, True]


def test_workers_that_complete_something_may_die_for_ever():
    deaths = Deaths()
    assert not any(die(deaths, completed=True) for _ in range(1000))


def test_each_worker_has_its_own_count():
    deaths = Deaths()
    assert not any(die(deaths, index=number % 2) for number in range(8))
    assert "5 times" in die(deaths, index=0)


@pytest.mark.parametrize("by", [-signal.SIGSYS, -signal.SIGSEGV, -signal.SIGILL, -signal.SIGTRAP])
def test_three_suspicious_deaths_within_a_minute_are_too_many_whatever_was_completed(by):
    deaths = Deaths()
    assert not die(deaths, by=by, completed=True, now=0.0)
    assert not die(deaths, by=by, completed=True, index=1, now=30.0)
    assert "within a minute" in die(deaths, by=by, completed=True, now=59.0)


def test_a_breach_of_the_brokers_protocol_is_suspicious_however_its_worker_died():
    deaths = Deaths()
    assert [bool(die(deaths, completed=True, breach=True, now=float(now))) for now in range(3)] == [False, False, True]


def test_memory_that_was_taken_away_is_no_attack():
    deaths = Deaths()
    assert not any(die(deaths, by=-signal.SIGBUS, completed=True) for _ in range(20))


def test_three_suspicious_deaths_in_more_than_a_minute_are_not():
    deaths = Deaths()
    assert not any(die(deaths, by=-signal.SIGSYS, completed=True, now=31.0 * number) for number in range(20))
