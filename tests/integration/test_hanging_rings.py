"""GET_VRING_BASE while a request hangs in a worker: five seconds, then EIO; the worker is killed, the frontend gets its answer."""

import errno
import fcntl
import os
import re
import signal
from contextlib import closing

import pytest

from tests.support.frontend.checks import errno_of, eventually
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import REPLACED, worker_pids
from tests.support.frontend.sequences import QEMU_10
from tests.support.frontend.serving import start
from tests.support.frontend.vhost_user_client import BackendClosed
from tests.support.hanging_fs import HangingFs
from vfsd.wire import fuse_abi as abi

pytestmark = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse")
KILLED = r"worker 0 \(pid \d+\) does not let go \(queue 1: 2 requests hang in the host's file system for over 5 s\) and is killed"


@pytest.fixture
def mount(tmp_path):
    mountpoint = tmp_path / "share" / "mnt"
    mountpoint.mkdir(parents=True)
    with HangingFs(mountpoint, {b"file": b"of the mount"}, flush=False) as mount, closing(start(tmp_path)) as served:
        (mountpoint / "file").read_bytes()  # the kernel learns that there is no flush
        mount.served = served
        yield mount
        print(served.daemon.describe())


def open_file(mount):
    client = mount.served.client
    nodeid = client.walk(ROOT, b"mnt/file").nodeid
    return nodeid, client.open(nodeid).fh


def test_what_hangs_in_a_worker_is_eio_and_the_ring_stops_and_starts_again(mount):
    served = mount.served
    client, device = served.client, served.device
    nodeid, fh = open_file(mount)
    (served.share / "here").write_bytes(b"at home")
    home = client.lookup(ROOT, b"here").nodeid
    home_fh = client.open(home).fh
    (worker,) = worker_pids(served)
    mount.stop_reading()
    hanging = [client.send_read(nodeid, fh, 0, 12), client.send_read(nodeid, fh, 0, 12)]
    mount.wait_unread()
    QEMU_10.stop(device)
    device.rings[1].collect()
    assert [errno_of(lambda one=one: client.result(one)) for one in hanging] == [errno.EIO] * 2
    assert device.bases[1] == device.rings[1].used_idx
    served.wait_for_new_log(KILLED)
    served.wait_for_new_log(REPLACED)
    served.expect_log("a request is answered EIO: it hung")
    assert worker_pids(served) != [worker]
    mount.read_again()
    QEMU_10.cont(device)
    assert client.read(home, home_fh, 0, 10) == b"at home"
    assert client.read(nodeid, fh, 0, 12) == b"of the mount"
    assert served.unexpected_log() == []


def test_a_worker_that_cannot_even_be_killed_costs_the_connection(mount):
    served = mount.served
    nodeid, fh = open_file(mount)
    mount.freeze(abi.FUSE_READ)
    served.client.send_read(nodeid, fh, 0, 12)
    mount.wait_held(abi.FUSE_READ)
    served.device.client.sock.settimeout(60)
    with pytest.raises(BackendClosed):
        served.device.get_base(served.device.rings[1])
    served.daemon.wait_for_log("the frontend's connection was closed: worker 0 was killed, and does not die")
    mount.thaw()
    assert served.daemon.wait() == 1


def test_a_worker_that_does_not_answer_at_all_is_killed_too(serve):
    served = serve()
    client, device = served.client, served.device
    client.getattr(ROOT)
    (worker,) = worker_pids(served)
    os.kill(worker, signal.SIGSTOP)
    for ring in device.rings:
        assert device.get_base(ring) == ring.last_used
    served.wait_for_new_log(r"does not let go \(worker 0 did not answer RingStop in time\)")
    served.wait_for_new_log(REPLACED)
    QEMU_10.cont(device)
    assert client.getattr(ROOT).attr.nlink


def test_lock_waits_end_at_once(serve):
    """A ring that is to be stopped waits for nobody's lock."""
    served = serve()
    client, device = served.client, served.device
    entry, opened = client.create(ROOT, b"file")
    with open(served.share / "file", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        body = abi.fuse_lk_in.pack(opened.fh, 1, 0, (1 << 63) - 1, fcntl.F_WRLCK, 0, abi.FUSE_LK_FLOCK)
        pending = client.send(abi.FUSE_SETLKW, entry.nodeid, body)
        client.getattr(ROOT)
        QEMU_10.stop(device)
        device.rings[1].collect()
        assert eventually(lambda: pending.submission.done)
        assert errno_of(lambda: client.result(pending)) in (errno.EINTR, errno.EAGAIN)
    assert not [line for line in served.new_log() if re.search("killed|WARN", line)]
