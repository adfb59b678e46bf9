"""The thread that frees what ended sessions left."""

import threading

import pytest

from vfsd.broker.reaper import Reaper


class Ending:
    """Takes the place of the process's end."""

    def __init__(self):
        self.errors = []
        self.came = threading.Event()

    def crashed(self, error):
        self.errors.append(error)
        self.came.set()


@pytest.fixture
def ending():
    return Ending()


@pytest.fixture
def reaper(ending):
    reaper = Reaper(ending.crashed)
    reaper.start()
    yield reaper
    reaper.wake(fail)
    assert ending.came.wait(5)


def fail():
    raise KeyError


def test_it_works_until_nothing_is_left_each_time_it_is_woken(reaper):
    for _ in range(3):
        bits, done, threads = list(range(5)), threading.Event(), set()

        def work(bits=bits, done=done, threads=threads):
            threads.add(threading.current_thread())
            if bits:
                bits.pop()
                return True
            done.set()
            return False

        reaper.wake(work)
        assert done.wait(5)
        assert bits == []
        assert threading.current_thread() not in threads


def test_an_exception_is_told(reaper, ending):
    reaper.wake(fail)
    assert ending.came.wait(5)
    assert isinstance(ending.errors[0], KeyError)
