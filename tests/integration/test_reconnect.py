"""--keep-listening: a frontend goes and comes again, by itself or because control died; what the guest has open stays until its next INIT."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from tests.support.frontend.checks import NOT_FOUND, eventually, eventually_stable, raises
from tests.support.frontend.daemon import READY, Options
from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.mortality import pids_of
from tests.support.frontend.sequences import CLOUD_HYPERVISOR, CLOUD_HYPERVISOR_WITHOUT_INFLIGHT, QEMU_10
from vfsd.wire import fuse_abi as abi

KEEP = Options(extra=("--keep-listening",))
CONTROL_DIED = "control .*was killed by SIGKILL; the frontend is disconnected"


class KeepsTables(type(CLOUD_HYPERVISOR)):
    """Starts with the tables that the device has, whatever they are."""

    def start(self, device):
        self._start(device)


@pytest.fixture(params=[CLOUD_HYPERVISOR, CLOUD_HYPERVISOR_WITHOUT_INFLIGHT], ids=["inflight", "plain"])
def frontend(request):
    return request.param


@pytest.fixture
def served(serve, frontend):
    return serve(KEEP, frontend=frontend)


def wait_until_it_listens(served, times):
    """Again, so many times in all."""
    assert eventually(lambda: sum(READY in line for line in served.daemon.log) == times, 30.0), served.daemon.describe()


def kill_control(served):
    served.expect_log(CONTROL_DIED)
    (pid,) = pids_of(served.daemon, b"vfsd.worker.control")
    os.kill(pid, signal.SIGKILL)


def lose_connection(served, how, times):
    if how == "control dies":
        kill_control(served)
    else:
        served.device.disconnect()
    wait_until_it_listens(served, times)


@pytest.mark.parametrize("how", ["the frontend closes", "control dies"])
def test_a_frontend_that_comes_again_finds_its_inodes_and_open_files(served, frontend, how):
    client = served.client
    entry, opened = client.create(ROOT, b"file")
    client.write(entry.nodeid, opened.fh, 0, b"before")
    client.unlink(ROOT, b"file")
    for number in range(2, 4):
        lose_connection(served, how, number)
        frontend.reconnect(served.device, str(served.daemon.socket))
        assert client.read(entry.nodeid, opened.fh, 0, 10) == b"before"
        assert client.getattr(entry.nodeid).attr.nlink == 0
    assert served.unexpected_log() == []
    served.device.close()
    assert served.daemon.stop() == 0


@pytest.mark.parametrize("how", ["the frontend closes", "control dies"])
def test_a_frontend_that_comes_again_with_a_new_init_finds_a_clean_slate(served, frontend, how):
    client = served.client
    entry, opened = client.create(ROOT, b"file")
    lose_connection(served, how, 2)
    frontend.reconnect(served.device, str(served.daemon.socket))
    client.init()
    with raises(*NOT_FOUND):
        client.getattr(entry.nodeid)
    with raises(*NOT_FOUND):
        client.read(entry.nodeid, opened.fh, 0, 10)
    assert client.lookup(ROOT, b"file").nodeid != entry.nodeid


def test_another_machine_with_other_memory_may_come(serve):
    served = serve(KEEP, frontend=CLOUD_HYPERVISOR)
    served.client.write_file(ROOT, b"file", b"of the first")
    served.device.close()
    wait_until_it_listens(served, 2)
    with Device(str(served.daemon.socket), ring_size=64, ram=(1 << 22, 1 << 24)) as device:
        device.attach(QEMU_10)
        client = FuseClient(device)
        client.init()
        assert client.read_file(client.lookup(ROOT, b"file").nodeid) == b"of the first"
    assert served.unexpected_log() == []


def test_nothing_is_left_behind_by_fifty_connections(served, frontend):
    client = served.client
    (served.share / "file").write_bytes(b"content")

    def counts():
        return {role.rsplit(" ", 1)[0]: kinds for role, kinds in served.daemon.fd_census().items()}

    def live(number):
        nodeid = client.lookup(ROOT, b"file").nodeid
        fh = client.open(nodeid).fh
        assert client.read(nodeid, fh, 0, 10) == b"content"
        served.device.disconnect()
        wait_until_it_listens(served, number + 1)
        frontend.reconnect(served.device, str(served.daemon.socket))
        assert client.read(nodeid, fh, 0, 10) == b"content"
        client.release(nodeid, fh)
        client.forget(nodeid)
        client.init()

    for number in range(1, 3):
        live(number)
    before = eventually_stable(counts)
    for number in range(3, 51):
        live(number)
    assert eventually(lambda: counts() == before), (before, counts())


def test_what_was_taken_is_completed_when_the_frontend_goes(served, frontend):
    """The guest runs on: what is done for it is shown to it, though nobody is connected."""
    client = served.client
    (served.share / "file").write_bytes(bytes(1 << 20))
    nodeid = client.lookup(ROOT, b"file").nodeid
    fh = client.open(nodeid).fh
    reads = [client.send_read(nodeid, fh, 0, 65536, kick=False) for _ in range(30)]
    served.device.rings[1].kick()
    served.device.disconnect()
    wait_until_it_listens(served, 2)
    base = served.device.rings[1].used_idx
    frontend.reconnect(served.device, str(served.daemon.socket))
    if frontend is CLOUD_HYPERVISOR:  # what was not taken is served now: the tables say from where
        client.finish_all(reads)
        assert {client.result(read) for read in reads} == {bytes(65536)}
    else:
        assert base <= served.device.rings[1].avail_idx
        assert client.read(nodeid, fh, 0, 10) == bytes(10)


def test_with_inflight_tables_requests_are_done_once_though_control_and_worker_die_together(serve):
    served = serve(KEEP, frontend=CLOUD_HYPERVISOR)
    client = served.client
    served.expect_log("was killed by SIGKILL")
    for number in range(4):
        pending = [
            client.send(abi.FUSE_MKDIR, ROOT, abi.fuse_mkdir_in.pack(0o755, 0) + b"%d-%d\0" % (number, each), 200, kick=False)
            for each in range(40)
        ]
        served.device.rings[1].kick()
        (control,), (worker,) = pids_of(served.daemon, b"vfsd.worker.control"), pids_of(served.daemon, b"vfsd.worker")
        for pid in (worker, control) if number % 2 else (control, worker):
            os.kill(pid, signal.SIGKILL)
        wait_until_it_listens(served, number + 2)
        CLOUD_HYPERVISOR.reconnect(served.device, str(served.daemon.socket))
        client.finish_all(pending)
        for one in pending:
            client.result(one)  # EEXIST would be a directory that was made twice
    assert len(os.listdir(served.share)) == 160


def test_a_frontend_that_connects_too_early_waits(serve):
    served = serve(KEEP, frontend=CLOUD_HYPERVISOR)
    with Device(str(served.daemon.socket), ram=(1 << 22,)) as second:
        attached = threading.Thread(target=second.attach, args=(CLOUD_HYPERVISOR,))
        attached.start()
        assert served.client.getattr(ROOT).attr.nlink
        served.device.close()
        attached.join(30)
        assert not attached.is_alive()
        assert FuseClient(second).getattr(ROOT).attr.nlink, "the session of the first goes on"


def test_a_breach_costs_the_connection_only(serve):
    served = serve(KEEP, frontend=CLOUD_HYPERVISOR)
    served.expect_log("the frontend's connection was closed: vhost-user request 99")
    served.device.client.tell(99)
    wait_until_it_listens(served, 2)
    assert served.device.client.is_closed()
    CLOUD_HYPERVISOR.reconnect(served.device, str(served.daemon.socket))
    assert served.client.getattr(ROOT).attr.nlink


def test_control_is_not_replaced_for_ever(serve):
    served = serve(KEEP, init=False)
    served.expect_log("was killed by SIGKILL")
    served.expect_log("not replaced")
    for number in range(2, 6):
        kill_control(served)
        wait_until_it_listens(served, number)
    kill_control(served)
    assert served.daemon.wait() == 1
    assert served.daemon.log[-1].endswith("it is not replaced: it died 5 times without completing a request in between")


def test_without_the_option_controls_death_is_the_end(serve):
    served = serve()
    served.expect_log("control .*was killed by SIGKILL")
    (pid,) = pids_of(served.daemon, b"vfsd.worker.control")
    os.kill(pid, signal.SIGKILL)
    assert served.daemon.wait() == 1
    assert served.daemon.log[-1].endswith("was killed by SIGKILL")


def test_a_connected_socket_cannot_be_kept(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [sys.executable, "-m", "vfsd", f"--shared-dir={tmp_path}", f"--fd={theirs.fileno()}", "--keep-listening"]
        done = subprocess.run(argv, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "--keep-listening: the socket of --fd" in done.stderr.splitlines()[-1]


# --- in-flight tables of the frontend's ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda device: (device.inflight[0], 4096, *device.inflight[2:]), "which is none that was given out"),
        (lambda device: (1, 0, *device.inflight[2:]), "1 bytes for the in-flight tables of 2 queues"),
        (lambda device: (*device.inflight[:2], 9, 128), "in-flight tables of 9 queues"),
        (lambda device: (1 << 63, 1, 2, 128), "of a file"),
    ],
)
def test_tables_that_were_not_given_out_are_refused(unattached, spoil, said):
    daemon, device = unattached(KEEP)
    CLOUD_HYPERVISOR.realize(device)
    device.get_inflight()
    device.inflight = spoil(device)
    device.set_inflight()
    daemon.wait_for_log(said)
    assert device.client.is_closed()


@pytest.mark.parametrize("how", ["not a memfd", "not sealed", "too short"])
def test_a_file_that_can_shrink_or_is_too_short_is_refused(unattached, tmp_path, how):
    daemon, device = unattached(KEEP)
    CLOUD_HYPERVISOR.realize(device)
    device.get_inflight()
    device.forget_inflight()
    if how == "not a memfd":
        device.inflight_fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    else:
        device.inflight_fd = os.memfd_create("tables", os.MFD_ALLOW_SEALING)
        os.ftruncate(device.inflight_fd, 4096 if how == "too short" else device.inflight[0])
        if how == "too short":
            fcntl.fcntl(device.inflight_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises((ConnectionError, RuntimeError)):
        KeepsTables().start(device)
    daemon.wait_for_log(
        {"not a memfd": "is no memfd", "not sealed": "not sealed against shrinking", "too short": "in a file that is too short"}[how]
    )
    assert daemon.running
