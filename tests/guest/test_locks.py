"""Locks of the guest's programs and of the host's, on one file, with Linux's own client."""

import time

import pytest

from tests.guest import probes
from tests.guest.conftest import Share

# Of the same name on both sides: an flock meets flocks only, POSIX locks and those of open files meet each other.
KINDS = [("lockf", "lockf"), ("flock", "flock"), ("ofd", "lockf"), ("lockf", "ofd")]


def eventually(share: Share, how: str, *, free: bool) -> bool:
    deadline = time.monotonic() + 10.0
    while probes.try_lock(f"{share.host}/file", how) is not free:
        if time.monotonic() > deadline:
            return False
    return True


@pytest.mark.parametrize(("inside", "outside"), KINDS)
def test_a_lock_of_the_guest_is_one_on_the_host_until_its_process_ends(share: Share, inside: str, outside: str) -> None:
    probes.write_text(f"{share.host}/file", "x")
    pid = share.call(probes.begin_to_hold_lock, f"{share.inside}/file", inside)
    assert not probes.try_lock(f"{share.host}/file", outside)
    assert not share.call(probes.try_lock, f"{share.inside}/file", outside)
    share.call(probes.kill_and_reap, pid)
    assert eventually(share, outside, free=True)


@pytest.mark.parametrize(("inside", "outside"), KINDS)
def test_a_process_of_the_guest_waits_for_the_host(share: Share, inside: str, outside: str) -> None:
    probes.write_text(f"{share.host}/file", "x")
    holder = probes.begin_to_hold_lock(f"{share.host}/file", outside)
    try:
        assert not share.call(probes.try_lock, f"{share.inside}/file", inside)
        pid = share.call(probes.begin_to_wait_for_lock, f"{share.inside}/file", inside)
    finally:
        probes.kill_and_reap(holder)
    assert eventually(share, outside, free=False), "the guest's process did not get the lock"
    share.call(probes.kill_and_reap, pid)
    assert eventually(share, outside, free=True)
