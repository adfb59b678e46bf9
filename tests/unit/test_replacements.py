"""Workers that cannot be started are tried again, for a while, with one line in the log."""

import os

import pytest

from vfsd.log import StderrLog
from vfsd.replacements import GIVE_UP_SECONDS, RETRY_SECONDS, Replacements

NO_PROCESS = BlockingIOError(11, "Resource temporarily unavailable")


@pytest.fixture
def log_fd():
    fd = os.memfd_create("log")
    yield fd
    os.close(fd)


@pytest.fixture
def replacements(log_fd):
    return Replacements(StderrLog(fd=log_fd))


def test_a_failed_start_is_tried_again_after_a_second(replacements):
    assert replacements.due(0.0) == []
    assert replacements.seconds(5.0) == 5.0
    assert replacements.failed(3, NO_PROCESS, 100.0) == ""
    assert replacements.seconds(5.0) == RETRY_SECONDS
    assert replacements.due(100.0 + RETRY_SECONDS / 2) == []
    assert replacements.due(100.0 + RETRY_SECONDS) == [3]
    replacements.started(3)
    assert replacements.due(200.0) == []


def test_many_failures_are_one_line_and_then_the_last_one(replacements, log_fd):
    reasons = [replacements.failed(0, NO_PROCESS, now) for now in range(int(GIVE_UP_SECONDS) + 2)]
    assert reasons[:-1] == [""] * (len(reasons) - 1)
    assert reasons[-1] == "worker 0 could not be started for 30 s: [Errno 11] Resource temporarily unavailable"
    assert len(os.pread(log_fd, 10_000, 0).splitlines()) == 1
