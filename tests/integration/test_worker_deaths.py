"""A worker's death is a pause: what the guest asked for is answered by another worker, once."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.frontend.checks import eventually
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.fuse_locks import WRITE, Locker
from tests.support.frontend.mortality import REPLACED, kill_worker, worker_pids


@pytest.fixture
def served(serve):
    return serve(Options())


def test_open_files_and_what_was_looked_up_outlive_a_worker(served):
    client = served.client
    (served.share / "file").write_bytes(b"content")
    nodeid = client.lookup(ROOT, b"file").nodeid
    fh = client.open(nodeid, os.O_RDWR).fh
    before = worker_pids(served)
    for number in range(3):
        kill_worker(served)
        pending = [client.send_read(nodeid, fh, 0, 7) for _ in range(20)]
        client.finish_all(pending)
        assert {client.result(one) for one in pending} == {b"content"}
        assert client.write(nodeid, fh, 7 + number, b"%d" % number) == 1
    assert set(worker_pids(served)).isdisjoint(before)
    assert (served.share / "file").read_bytes() == b"content012"
    assert served.unexpected_log() == []


def test_a_spare_worker_takes_the_place_of_a_dead_one(serve):
    served = serve(Options(extra=("--spare-workers=1",)))
    client = served.client
    (served.share / "file").write_bytes(b"content")
    nodeid = client.lookup(ROOT, b"file").nodeid
    fh = client.open(nodeid, os.O_RDWR).fh
    for number in range(3):
        assert eventually(lambda: len(worker_pids(served)) == 2, 20.0)
        _, spare = worker_pids(served)
        assert eventually(lambda spare=spare: "Seccomp_filters:\t2" in Path(f"/proc/{spare}/status").read_text(), 20.0)
        pending = client.send_write(nodeid, fh, 7 + number, b"%d" % number)
        kill_worker(served)
        client.finish(pending)
        assert client.read(nodeid, fh, 0, 7) == b"content"
        assert spare in worker_pids(served)
    assert (served.share / "file").read_bytes() == b"content012"
    assert served.unexpected_log() == []


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_a_worker_may_die_of_anything(serve, how):
    """Without a process id namespace, whose first process ignores signals from outside that it could handle."""
    served = serve(Options(sandbox="none"))
    kill_worker(served, how=how)
    assert served.client.getattr(ROOT).attr.nlink
    served.wait_for_new_log(f"was killed by {how.name}.*{REPLACED}")


def test_queues_of_other_workers_go_on_meanwhile(serve):
    served = serve(Options(request_queues=2), queues=3)
    client = served.client
    client.getattr(ROOT)
    client.queue = 2
    client.getattr(ROOT)
    first, second = worker_pids(served)
    os.kill(first, signal.SIGSTOP)  # as dead as can be without being replaced
    for _ in range(50):
        client.getattr(ROOT)
    os.kill(first, signal.SIGKILL)
    served.expect_log(REPLACED)
    client.queue = 1
    client.getattr(ROOT)
    assert second in worker_pids(served)


def test_a_frontend_can_stop_and_start_its_rings_while_there_is_no_worker(served):
    client, device = served.client, served.device
    client.getattr(ROOT)
    kill_worker(served)
    for ring in device.rings:
        assert device.get_base(ring) == ring.last_used


def test_no_descriptor_is_left_behind_by_the_dead(served):
    client = served.client
    (served.share / "file").write_bytes(b"content")

    def live():
        nodeid = client.lookup(ROOT, b"file").nodeid
        fh = client.open(nodeid, os.O_RDWR).fh
        client.read(nodeid, fh, 0, 7)
        client.list(ROOT, plus=True)
        kill_worker(served)
        client.read(nodeid, fh, 0, 7)
        client.release(nodeid, fh)
        served.new_session()

    def counts():
        return {role.rsplit(" ", 1)[0]: kinds for role, kinds in served.daemon.fd_census().items()}

    live()
    live()
    before = counts()
    for _ in range(3):
        live()
    assert eventually(lambda: counts() == before), (before, counts())


def test_a_worker_that_dies_and_completes_nothing_is_not_replaced_for_ever(served):
    killed = set()
    served.expect_log("not replaced")
    while served.daemon.running:
        for pid in set(worker_pids(served)) - killed:
            killed.add(kill_worker(served) if pid not in killed else pid)
    assert served.daemon.wait() == 1
    assert len(killed) in (5, 6)  # the first may have completed a request, before it was killed
    assert served.daemon.log[-1].endswith("it is not replaced: it died 5 times without completing a request in between")


def test_a_worker_that_hangs_is_replaced(served):
    client = served.client
    client.getattr(ROOT)
    (pid,) = worker_pids(served)
    os.kill(pid, signal.SIGSTOP)
    client.timeout = 40.0
    assert client.getattr(ROOT).attr.nlink
    served.wait_for_new_log("has not answered for 10 s and is killed")
    served.wait_for_new_log(REPLACED)
    assert worker_pids(served) != [pid]


def test_a_worker_that_hangs_when_a_session_begins_is_replaced(serve):
    served = serve(Options(request_queues=2), queues=3)
    client = served.client
    client.queue = 2
    client.getattr(ROOT)
    first, second = worker_pids(served)
    os.kill(second, signal.SIGSTOP)
    client.queue = 1
    served.new_session()
    served.wait_for_new_log("has not acknowledged a new session and is killed")
    served.wait_for_new_log(REPLACED)
    client.queue = 2
    client.getattr(ROOT)
    assert first in worker_pids(served)
    assert second not in worker_pids(served)


def test_who_waits_for_a_lock_outlives_any_number_of_workers(served):
    """It is no request that workers die of: the worker was done with it until the broker answers."""
    client = served.client
    (served.share / "file").touch()
    nodeid = client.lookup(ROOT, b"file").nodeid
    holder, waiter = (Locker(client, nodeid, client.open(nodeid, os.O_RDWR).fh, owner) for owner in (1, 2))
    holder.lock(WRITE)
    pending = waiter.send(WRITE)
    for _ in range(3):
        client.getattr(ROOT)  # behind it in the queue, or, after a death, run after it
        kill_worker(served)
    client.getattr(ROOT)
    assert not pending.submission.done, pending.submission.reply
    holder.unlock()
    assert client.finish(pending) == b""
    assert served.unexpected_log() == []
