"""What runs short is said at once, and then seldom."""

import errno

import pytest

from vfsd.log import Logger
from vfsd.shortages import QUIET_SECONDS, WHAT, Shortages


class Lines(Logger):
    def __init__(self):
        super().__init__(2)
        self.lines = []

    def _emit(self, level, text):
        self.lines.append(text)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def log():
    return Lines()


@pytest.mark.parametrize("number", WHAT)
def test_each_errno_has_a_line_at_once(log, number):
    Shortages(log).note(number)
    assert len(log.lines) == 1
    assert f"a request fails with {errno.errorcode[number]}: " in log.lines[0]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.EAGAIN, 0])
def test_other_errors_are_the_guests_affair(log, number):
    Shortages(log).note(number)
    assert log.lines == []


def test_ten_thousand_failures_are_a_line_a_minute_that_counts_the_others(log):
    clock = Clock()
    shortages = Shortages(log, clock)
    for _ in range(10_000):
        shortages.note(errno.ENOSPC)
    shortages.note(errno.ENFILE)
    assert len(log.lines) == 2
    clock.now = QUIET_SECONDS
    shortages.note(errno.ENOSPC)
    assert len(log.lines) == 3
    assert log.lines[-1].endswith("; 9999 more requests failed so since the last such line")
    clock.now += QUIET_SECONDS
    shortages.note(errno.ENOSPC)
    assert "more requests" not in log.lines[-1]
