"""Errors keep nothing alive once they have been dealt with: the collector is off in the daemon's processes."""

import gc
import weakref

import pytest

from vfsd.errors import Breach, ChildBreach, ConfigError, FrontendBreach, GuestBreach, ReplyErrno, WorkerBreach, drop_traceback


class Held:
    """What a frame holds while an error passes through it."""


def fail(chain):
    held = Held()
    chain.append(weakref.ref(held))
    try:
        raise KeyError(1)
    except KeyError as error:
        kept = error  # the cycle: this frame holds the error, whose traceback holds this frame
        raise ValueError(str(kept)) from error


def test_nothing_that_an_error_passed_through_stays():
    chain = []
    gc.collect()
    gc.disable()
    try:
        try:
            fail(chain)
        except ValueError as error:
            drop_traceback(error)
        assert chain[0]() is None
    finally:
        gc.enable()


def test_no_error_has_no_traceback():
    drop_traceback(None)


@pytest.mark.parametrize("kind", [GuestBreach, FrontendBreach, WorkerBreach, ChildBreach])
def test_a_breach_is_never_taken_for_an_answer(kind):
    assert issubclass(kind, Breach)
    assert not issubclass(kind, ReplyErrno | OSError | ConfigError)


def test_an_errno_says_what_it_means():
    assert str(ReplyErrno(2)) == "No such file or directory"
