"""When the supervisor wakes to ask workers whether they live."""

import time

import pytest

from vfsd.heartbeat import ASK_SECONDS, LATE_SECONDS, Heartbeat
from vfsd.vigil import TICK_SECONDS, Vigil
from vfsd.worker.worker_links import ANSWER_SECONDS


class FakeChild:
    """A worker that serves, and answers nothing."""

    role, pid, ready = "worker 0", 1, True

    def __init__(self, now, reads=True):
        self.heartbeat = Heartbeat(now)
        self.reads = reads
        self.killed = False

    def send(self, message):
        return self.reads

    def kill(self):
        self.killed = True


class SilentLog:
    def log(self, level, text):
        pass


@pytest.fixture
def seconds_to_kill(monkeypatch):
    """How long a worker lives that hung just after it had answered, if the supervisor has something else to do at those times."""

    def seconds_to_kill(wakes_at, reads=True):
        now = begun = time.monotonic()
        monkeypatch.setattr("vfsd.vigil.time.monotonic", lambda: now)
        child, vigil = FakeChild(now, reads), Vigil(SilentLog())
        while not child.killed:
            now = min([now + vigil.seconds([child]), *(begun + wake for wake in wakes_at if begun + wake > now)])
            vigil.watch([child], now)
            assert now < begun + 100.0
        return now - begun

    return seconds_to_kill


def test_what_else_wakes_the_supervisor_does_not_put_off_its_question(seconds_to_kill):
    undisturbed = seconds_to_kill([])
    assert ASK_SECONDS + LATE_SECONDS < undisturbed <= ASK_SECONDS + LATE_SECONDS + 2 * TICK_SECONDS
    assert seconds_to_kill([ASK_SECONDS - 0.01]) <= undisturbed + 0.01


def test_control_waits_longer_for_a_worker_than_the_supervisor_lets_it_hang(seconds_to_kill):
    """Then a worker that hangs is replaced; the other way round the device would end."""
    assert max(seconds_to_kill([ASK_SECONDS * part]) for part in (0, 0.5, 0.9, 0.999)) < ANSWER_SECONDS


def test_a_worker_that_cannot_be_asked_is_late_as_one_that_does_not_answer(seconds_to_kill):
    assert seconds_to_kill([], reads=False) == seconds_to_kill([])
