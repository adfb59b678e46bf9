"""Locks between the guest and the host, and within the guest: who is refused, who waits, and what ends the wait."""

import subprocess
import sys
import time

import pytest

from tests.guest import feature_probes as probes
from tests.guest.conftest import Share

SOON, LONG = 0.3, 20.0
LOCKER = "import sys; from tests.guest import feature_probes as p; pid = p.start_locking(*sys.argv[1:]); p.with_lock([pid], 600); print('has', flush=True); input(); p.end_locking(pid)"


class HostLocker:
    """A process of the host that takes the lock and keeps it until told."""

    def __init__(self, path: str, kind: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", LOCKER, path, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_until_held(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"has\n"

    def end(self) -> None:
        self.process.communicate(b"\n")


@pytest.fixture
def path(share: Share) -> str:
    with open(f"{share.host}/file", "w") as file:
        file.write("to be locked")
    return "file"


KINDS = pytest.mark.parametrize("kind", ["flock", "lockf"])


@KINDS
def test_a_lock_of_the_guest_keeps_the_host_out(share: Share, path: str, kind: str) -> None:
    holder = share.call(probes.start_locking, f"{share.inside}/{path}", kind)
    assert share.call(probes.with_lock, [holder], LONG) == [holder]
    assert probes.try_lock(f"{share.host}/{path}", kind) == "EAGAIN"
    waiting = HostLocker(f"{share.host}/{path}", kind)
    share.call(probes.end_locking, holder)
    waiting.wait_until_held()
    assert share.call(probes.try_lock, f"{share.inside}/{path}", kind) == "EAGAIN"
    waiting.end()
    assert_free(share, path, kind)


@KINDS
def test_a_lock_of_the_host_keeps_the_guest_waiting(share: Share, path: str, kind: str) -> None:
    holder = HostLocker(f"{share.host}/{path}", kind)
    holder.wait_until_held()
    assert share.call(probes.try_lock, f"{share.inside}/{path}", kind) == "EAGAIN"
    waiting = share.call(probes.start_locking, f"{share.inside}/{path}", kind)
    assert share.call(probes.with_lock, [waiting], SOON) == []
    assert share.guest.check("cat", f"{share.inside}/{path}") == "to be locked"  # one that waits holds nobody up
    holder.end()
    assert share.call(probes.with_lock, [waiting], LONG) == [waiting]
    share.call(probes.end_locking, waiting)
    assert_free(share, path, kind)


@KINDS
def test_several_processes_of_the_guest_wait_for_one_lock(share: Share, path: str, kind: str) -> None:
    inside = f"{share.inside}/{path}"
    processes = [share.call(probes.start_locking, inside, kind) for _ in range(4)]
    while processes:
        # Whoever has it ends, and then another one must get it.
        holders = share.call(probes.with_lock, processes, LONG)
        assert len(holders) == 1
        share.call(probes.end_locking, holders[0])
        processes.remove(holders[0])
    assert_free(share, path, kind)


def assert_free(share: Share, path: str, kind: str) -> None:
    """Soon: a flock ends with RELEASE, which the guest's kernel sends without waiting for it."""
    assert share.call(probes.try_lock, f"{share.inside}/{path}", kind) is None
    deadline = time.monotonic() + LONG
    while (refused := probes.try_lock(f"{share.host}/{path}", kind)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert refused is None
