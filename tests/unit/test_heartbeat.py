"""Who is asked when, and who is late."""

import os
import signal
import subprocess
import sys

from vfsd.heartbeat import ASK_SECONDS, LATE_SECONDS, Heartbeat, is_uninterruptible


def test_a_worker_is_asked_after_a_while_and_not_again_before_it_answers():
    heart = Heartbeat(100.0)
    assert not heart.due(100.0 + ASK_SECONDS - 0.1)
    assert heart.due(100.0 + ASK_SECONDS)
    heart.asked(105.0)
    assert heart.is_asked
    assert not heart.due(200.0)
    heart.answered(106.0)
    assert not heart.due(110.9)
    assert heart.due(111.0)


def test_a_worker_that_does_not_answer_is_late_after_ten_seconds():
    heart = Heartbeat(0.0)
    assert not heart.late(1000.0), "it was not asked"
    heart.asked(5.0)
    assert not heart.late(5.0 + LATE_SECONDS)
    assert heart.late(5.1 + LATE_SECONDS)
    heart.answered(16.0)
    assert not heart.late(17.0)


def test_time_in_which_nobody_ran_does_not_count():
    heart = Heartbeat(0.0)
    heart.asked(5.0)
    heart.forgive(3600.0)
    assert not heart.late(3600.0 + LATE_SECONDS)
    assert heart.late(3601.0 + LATE_SECONDS)


def test_a_process_that_runs_sleeps_or_is_stopped_is_not_uninterruptible():
    assert not is_uninterruptible(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert not is_uninterruptible(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not is_uninterruptible(process.pid), "it is gone"


def test_a_parent_of_vfork_is_uninterruptible(tmp_path):
    """It waits in state D until its child executes something or ends."""
    script = "import ctypes, sys\nlibc = ctypes.CDLL(None)\npid = libc.vfork()\nif pid == 0:\n    libc.pause()\n"
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    try:
        while not is_uninterruptible(process.pid):
            assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
