"""The broker's death is the end: whatever was under way, nobody is told that it was done if it was not."""

import os
import signal
import time
from contextlib import closing

import pytest

from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import REPLACED, kill_worker, pids_of
from tests.support.frontend.ring import DeviceGone
from tests.support.frontend.serving import start
from tests.support.hanging_fs import HangingFs
from vfsd.wire import fuse_abi as abi

MANY = 60


def making(client, count=MANY):
    """Requests to make directories, sent and not waited for."""
    names = [b"d%d" % number for number in range(count)]
    sent = [(name, client.send(abi.FUSE_MKDIR, ROOT, abi.fuse_mkdir_in.pack(0o755, 0) + name + b"\0", 200, kick=False)) for name in names]
    client.device.rings[client.queue].kick()
    return sent


def wait_for_some(client, sent, count):
    while sum(pending.submission.done for _name, pending in sent) < count:
        client.device.rings[client.queue].wait_any(20.0)


def idle(_client):
    return []


def just_asked(client):
    return making(client)


def half_done(client):
    sent = making(client)
    wait_for_some(client, sent, MANY // 2)
    return sent


def no_worker(client):
    return making(client)


@pytest.mark.parametrize("moment", [idle, just_asked, half_done, no_worker])
def test_all_ends_at_once_and_what_was_said_to_be_done_is_done(serve, moment):
    served = serve(Options(request_queues=2), queues=3)
    client = served.client
    client.getattr(ROOT)
    sent = moment(client)
    (broker,) = pids_of(served.daemon, b"vfsd.broker")
    if moment is no_worker:
        kill_worker(served)
    killed_at = time.monotonic()
    os.kill(broker, signal.SIGKILL)
    assert served.daemon.wait() == 1
    assert time.monotonic() - killed_at < 3.0  # a second, on a machine that does nothing else
    assert served.daemon.log[-1].endswith(f"broker (pid {broker}) was killed by SIGKILL")
    assert served.device.client.is_closed()
    client.device.rings[1].collect()
    for name, pending in sent:
        if pending.submission.done:
            client.result(pending)
            assert name.decode() in os.listdir(served.share)
    served.expect_log("broker .*was killed by SIGKILL")
    served.expect_log(REPLACED)
    assert served.unexpected_log() == []


@pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse")
def test_it_ends_though_a_thread_of_the_broker_hangs(tmp_path):
    mountpoint = tmp_path / "share" / "mnt"
    mountpoint.mkdir(parents=True)
    with HangingFs(mountpoint, {b"file": b"x"}) as mount, closing(start(tmp_path)) as served:
        client = served.client
        nodeid = client.walk(ROOT, b"mnt/file").nodeid
        mount.freeze(abi.FUSE_SETATTR)
        pending = client.send(abi.FUSE_SETATTR, nodeid, abi.fuse_setattr_in.pack(abi.FATTR_MODE, *[0] * 9, 0o600, 0, 0), 200)
        mount.wait_held(abi.FUSE_SETATTR)
        (broker,) = pids_of(served.daemon, b"vfsd.broker")
        os.kill(broker, signal.SIGKILL)
        with pytest.raises(DeviceGone):
            client.finish(pending)
        assert served.daemon.wait() == 1
        served.daemon.wait_for_log("broker .* was killed, and cannot end: it waits in a call of the host's kernel")


def test_keeping_to_listen_does_not_outlive_the_broker(serve):
    served = serve(Options(extra=("--keep-listening",)))
    (broker,) = pids_of(served.daemon, b"vfsd.broker")
    os.kill(broker, signal.SIGKILL)
    assert served.daemon.wait() == 1
    assert not served.daemon.socket.exists()
