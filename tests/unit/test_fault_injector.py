"""Counting and deciding in a process, over memory that outlives it."""

import threading

import pytest

from tests.support.broker import RecordingLog
from vfsd.faults.counters import BROKER, COUNTERS_BYTES, MAX_RULES, Counters, place_of_worker
from vfsd.faults.given import Given, GivenRule, pack_given, unpack_given
from vfsd.faults.grammar import parse_rule
from vfsd.faults.injector import LINES_IN_A_BURST, Armed, Injector

SECOND = 10**9
WORKER_0 = place_of_worker(0)


class Stage:
    """Injectors over one memory, at a time that the test sets."""

    def __init__(self):
        self.memory = bytearray(COUNTERS_BYTES)
        self.log = RecordingLog()
        self.now = 0

    def counters(self):
        return Counters(memoryview(self.memory))

    def injector(self, *rules, place=WORKER_0, first=1):
        injector = Injector(place, self.counters(), self.log, lambda: self.now)
        for number, text in enumerate(rules, first):
            injector.put(Armed(number, number - 1, parse_rule(text), 42, 0))
        return injector

    @staticmethod
    def hits(injector, subject="READ", times=1, **facts):
        """How often something is hit in so many moments."""
        return sum(len(injector.hits(injector.about(subject, **facts), "a moment")) for _ in range(times))


@pytest.fixture
def stage():
    return Stage()


def test_a_count_outlives_the_process_that_counted(stage):
    rule = "worker:kill:at=after-pop:when=100"
    assert stage.hits(stage.injector(rule), "worker", 99, point="after-pop") == 0
    assert stage.hits(stage.injector(rule), "worker", 1, point="after-pop") == 1
    assert stage.hits(stage.injector(rule), "worker", 500, point="after-pop") == 0
    assert stage.counters().totals(0) == (600, 1)


def test_each_place_counts_for_itself_and_the_sum_is_shown(stage):
    first, second = (stage.injector("READ:error=EIO:when=2", place=place_of_worker(index)) for index in (0, 255))
    assert [stage.hits(first), stage.hits(second), stage.hits(first), stage.hits(second)] == [0, 0, 1, 1]
    assert stage.counters().totals(0) == (4, 2)


def test_a_slot_that_is_used_again_begins_anew_and_no_other_does(stage):
    injector = stage.injector(*["READ:error=EIO"] * MAX_RULES)
    assert stage.hits(injector) == MAX_RULES
    counters = stage.counters()
    counters.hear(BROKER, 77)
    counters.clear(MAX_RULES - 1)
    counters.clear(3)
    assert [counters.totals(slot) for slot in (2, 3, 4, MAX_RULES - 1)] == [(1, 1), (0, 0), (1, 1), (0, 0)]
    assert counters.heard(BROKER) == 77


def test_only_what_fits_is_counted(stage):
    injector = stage.injector("READ:error=EIO:queue=1", "WRITE:error=EIO", "worker:delay=1s:at=after-pop", "worker:delay=1s:at=before-ask")
    assert stage.hits(injector, queue=2) == 0
    assert stage.hits(injector, queue=1) == 1
    assert stage.hits(injector, "worker", point="before-ask") == 1
    assert [stage.counters().totals(slot)[0] for slot in range(4)] == [1, 0, 0, 1]


def test_a_rule_that_is_dropped_is_hit_no_more(stage):
    injector = stage.injector("READ,WRITE:error=EIO", "READ:error=EIO")
    injector.drop(1)
    assert [stage.hits(injector), stage.hits(injector, "WRITE")] == [1, 0]


def test_nothing_is_counted_outside_of_the_window(stage):
    injector = stage.injector("READ:error=EIO:when=2:during=10s..20s")
    stage.now = 9 * SECOND
    assert stage.hits(injector, times=5) == 0
    stage.now = 10 * SECOND
    assert stage.hits(injector, times=5) == 1
    stage.now = 20 * SECOND
    assert stage.hits(injector, times=5) == 0
    assert stage.counters().totals(0) == (5, 1)


def test_every_hit_is_counted_and_a_flood_of_lines_is_not_written(stage):
    injector = stage.injector("READ:error=EIO")
    assert stage.hits(injector, times=1000) == 1000
    assert len(stage.log.warnings) == LINES_IN_A_BURST
    stage.now = 2 * SECOND
    stage.hits(injector)
    assert stage.log.warnings[-1].endswith(f"hit 1001: a moment ({1000 - LINES_IN_A_BURST} hits before it are not shown)")
    assert "fault 1 READ:error=EIO: match 1, hit 1" in stage.log.warnings[0]


def test_two_rules_and_two_places_do_not_fail_at_the_same_moments(stage):
    def pattern(place, first):
        injector = stage.injector("READ:error=EIO:prob=0.5", place=place, first=first)
        return [stage.hits(injector) for _ in range(64)]

    patterns = [pattern(2, 1), pattern(3, 1), pattern(2, 2)]
    assert len({tuple(each) for each in patterns}) == 3


def test_threads_do_not_count_one_match_twice(stage):
    injector = stage.injector("READ:error=EIO:every=10")
    found = []
    threads = [threading.Thread(target=lambda: found.append(stage.hits(injector, times=500))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == 200
    assert stage.counters().totals(0) == (2000, 200)


def test_what_a_child_is_given_arrives():
    given = Given(7, place_of_worker(3), (GivenRule(1, 0, 2**64 - 1, 5, "READ:hang"), GivenRule(9, 63, 0, 2**63, "é")))
    assert unpack_given(pack_given(given)) == given
