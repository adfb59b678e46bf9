"""An OwnedFd is closed exactly once, by whoever owns it."""

import os

import pytest

from vfsd.fds import OwnedFd, TempFd


def new_fd():
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_close_closes_and_a_second_time_touches_nothing():
    number = new_fd()
    owned = OwnedFd(number)
    owned.close()
    assert owned.closed
    reused = new_fd()
    assert reused == number, "the kernel gives the lowest free number"
    owned.close()
    assert is_open(reused)
    os.close(reused)


def test_a_with_block_closes_also_when_it_is_left_by_an_error():
    number = new_fd()

    def fail():
        with OwnedFd(number) as owned:
            assert owned.fileno() == number
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not is_open(number)


def test_detach_gives_the_descriptor_away():
    owned = OwnedFd(new_fd())
    number = owned.detach()
    owned.close()
    assert owned.closed
    assert is_open(number)
    os.close(number)


@pytest.mark.parametrize("use", [OwnedFd.fileno, OwnedFd.detach])
def test_what_was_given_away_or_closed_cannot_be_used(use):
    owned = OwnedFd(new_fd())
    owned.close()
    with pytest.raises(ValueError, match="closed or given away"):
        use(owned)


@pytest.mark.parametrize("number", [-1, -100])
def test_a_negative_number_is_no_descriptor(number):
    with pytest.raises(ValueError, match="not a file descriptor"):
        OwnedFd(number)


@pytest.mark.parametrize("kind", [OwnedFd, TempFd])
def test_one_that_is_merely_dropped_says_so_and_is_closed(kind):
    number = new_fd()
    owned = kind(number)
    with pytest.warns(ResourceWarning, match=rf"<{kind.__name__} {number}> was never closed"):
        del owned
    assert not is_open(number)


def test_it_shows_its_number_until_it_is_closed():
    owned = OwnedFd(new_fd())
    assert repr(owned) == f"<OwnedFd {owned.fileno()}>"
    owned.close()
    assert repr(owned) == "<OwnedFd closed>"
