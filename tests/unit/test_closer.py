"""Closing on other threads, with real descriptors; one whose close hangs is one whose number the test's os.close holds."""

import os
import threading

import pytest

from vfsd.broker import closer as module
from vfsd.broker.closer import THREADS, Closer

PATIENCE = 20.0


class Recorder(Closer):
    """Closes nothing: keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def take(self, fd, mount):
        self.taken.append((fd, mount))


def at_end(read):
    """Whether the pipe's only writer was closed; waits for it."""
    ended = os.read(read, 1) == b""
    os.close(read)
    return ended


@pytest.fixture
def slow_close(monkeypatch):
    """Closing these descriptors waits for `go`."""

    class Slow(set):
        def __init__(self):
            super().__init__()
            self.go = threading.Event()
            self.waiting = threading.Semaphore(0)

    slow, close = Slow(), os.close

    def close_slowly(fd):
        if fd in slow:
            slow.waiting.release()
            assert slow.go.wait(PATIENCE)
            slow.discard(fd)
        close(fd)

    monkeypatch.setattr(module.os, "close", close_slowly)
    yield slow
    slow.go.set()


def test_closing_is_left_to_another_thread():
    closer = Recorder()
    read, write = os.pipe()
    deferred = closer.own(write, 7)
    deferred.close()
    assert deferred.closed
    os.write(write, b"still open")
    deferred.close()
    assert closer.taken == [(write, 7)], "closed once"
    os.close(read)
    os.close(write)


def test_a_thread_closes_what_it_is_given_and_goes_on_after_an_error():
    closer = Closer()
    closer.start()
    not_open = 1 << 20
    closer.own(not_open, 1).close()
    read, write = os.pipe()
    closer.own(write, 1).close()
    assert at_end(read)


def test_a_mount_on_which_closing_hangs_keeps_one_thread(slow_close):
    closer = Closer()
    dead = [os.pipe() for _ in range(2 * THREADS)]
    slow_close.update(write for _read, write in dead)
    closer.start()
    for _read, write in dead:
        closer.own(write, 1).close()
    assert slow_close.waiting.acquire(timeout=PATIENCE)
    read, write = os.pipe()
    closer.own(write, 2).close()
    assert at_end(read)
    assert not slow_close.waiting.acquire(blocking=False), "the others of that mount wait"
    slow_close.go.set()
    assert all(at_end(read) for read, _write in dead)


def test_nothing_is_kept_of_a_mount_whose_descriptors_are_closed():
    closer = Closer()
    closer.start()
    for mount in range(50):
        read, write = os.pipe()
        closer.own(write, mount).close()
        assert at_end(read)
    read, write = os.pipe()
    for _ in range(2):  # a thread that has closed a mount's last one takes the mount out before it goes on
        closer.own(os.dup(write), 99).close()
    os.close(write)
    assert at_end(read)
    deadline = threading.Event()
    for _ in range(2000):
        if not closer._fds:
            break
        deadline.wait(0.01)
    assert closer._fds == {}
