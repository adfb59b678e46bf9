"""Processes that die, hang or dawdle at named points of their life, and frontends that go away: what the guest sees."""

import os
import signal
import time

import pytest

from tests.support.frontend.daemon import Options
from tests.support.frontend.faults import SPOKEN, add_fault, counted
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import REPLACED, worker_pids
from tests.support.frontend.serving import start
from vfsd.faults.catalogue import points_of
from vfsd.tools.fault import ask

APPEND = os.O_WRONLY | os.O_APPEND


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One for all whose vfsd lives on."""
    folder = tmp_path_factory.mktemp("faults")
    served = start(folder, Options(extra=("--fault-rules", "/dev/null")))
    yield served
    served.close()


@pytest.fixture
def served(daemon):
    daemon.log_mark = len(daemon.daemon.log)
    daemon.expected_log[:] = [SPOKEN, REPLACED]
    yield daemon
    assert daemon.unexpected_log() == []


@pytest.fixture
def mortal(serve):
    """For rules that end it."""
    served = serve(Options(extra=("--fault-rules", "/dev/null")))
    served.expect_log("was killed|broker|frontend")
    return served


@pytest.mark.fault("worker:kill:*")
@pytest.mark.parametrize("point", points_of("worker"))
def test_a_worker_that_dies_there_is_a_pause(served, point):
    client, name = served.client, point.encode()
    entry, opened = client.create(ROOT, name, 0o644, APPEND)
    number = add_fault(served, f"worker:kill:at={point}:times=1")
    client.mkdir(ROOT, name + b"-made")
    assert client.write(entry.nodeid, opened.fh, 0, b"once", open_flags=APPEND) == 4
    client.unlink(ROOT, name)
    assert counted(served, number).hits == 1
    add_fault(served, f"worker:kill:at={point}:times=1")
    assert client.write(entry.nodeid, opened.fh, 0, b" and once", open_flags=APPEND) == 9
    fresh = client.open(entry.nodeid, os.O_RDONLY).fh
    assert client.read(entry.nodeid, fh=fresh, offset=0, size=100) == b"once and once"


@pytest.mark.fault("worker:hang")
def test_a_worker_that_hangs_there_is_replaced(served):
    client = served.client
    client.getattr(ROOT)
    before = worker_pids(served)
    served.expect_log("has not answered")
    add_fault(served, "worker:hang:at=after-pop:times=1")
    client.timeout = 40.0
    client.mkdir(ROOT, b"after-all")
    assert worker_pids(served) != before


@pytest.mark.fault("worker:delay")
@pytest.mark.fault("broker:delay")
def test_delays_add_up(served):
    add_fault(served, "worker:delay=100ms:at=before-ask:times=1")
    add_fault(served, "broker:delay=100ms:at=after-request:message=MkDir:times=1")
    began = time.monotonic()
    served.client.mkdir(ROOT, b"late")
    assert time.monotonic() - began >= 0.2


@pytest.mark.fault("send_fds:truncate")
def test_a_worker_that_loses_descriptors_on_the_way_is_a_pause(served):
    client = served.client
    client.write_file(ROOT, b"precious", b"data")
    nodeid = client.lookup(ROOT, b"precious").nodeid
    served.expect_log("out of descriptors")
    number = add_fault(served, "send_fds:truncate:times=1")
    assert client.read(nodeid, client.open(nodeid).fh, 0, 4) == b"data"
    assert counted(served, number).hits == 1


@pytest.mark.fault("broker:hang")
def test_a_request_at_which_the_broker_hangs_holds_up_no_other(mortal):
    client = mortal.client
    add_fault(mortal, "broker:hang:at=before-request:message=MkDir:times=1")
    hung = client.send(9, ROOT, (0o755).to_bytes(8, "little") + b"hung\0", 128)
    client.mkdir(ROOT, b"made")
    assert not hung.submission.done
    mortal.daemon.process.send_signal(signal.SIGTERM)
    assert mortal.daemon.wait() == 0


@pytest.mark.fault("broker:kill:*")
@pytest.mark.parametrize(("point", "made"), [("before-request", False), ("after-request", True), ("now", False)])
def test_the_death_of_the_broker_is_the_end(mortal, point, made):
    if point == "now":
        end(mortal, "broker:kill:at=now")
    else:
        add_fault(mortal, f"broker:kill:at={point}:message=MkDir")
        mortal.client.send(9, ROOT, (0o755).to_bytes(8, "little") + b"made\0", 128)
    assert mortal.daemon.wait() == 1
    assert "broker" in mortal.daemon.log[-1]
    assert "was killed by SIGKILL" in mortal.daemon.log[-1]
    assert (mortal.share / "made").exists() == made


@pytest.mark.fault("control:kill:*")
@pytest.mark.parametrize("point", points_of("control"))
def test_the_death_of_control_is_the_end(mortal, point):
    if point == "now":
        end(mortal, "control:kill:at=now")
    else:
        add_fault(mortal, f"control:kill:at={point}:message=GET_VRING_BASE")
        with pytest.raises(ConnectionError):
            mortal.device.get_base(mortal.device.rings[0])
    assert mortal.daemon.wait() == 1
    assert "was killed by SIGKILL" in mortal.daemon.log[-1]


@pytest.mark.fault("frontend:close:*")
@pytest.mark.parametrize("point", ["before-message", "before-reply", "now"])
def test_a_frontend_that_is_lost_is_the_end_of_an_ordinary_run(mortal, point):
    if point == "now":
        end(mortal, "frontend:close:at=now")
    else:
        add_fault(mortal, f"frontend:close:at={point}:message=GET_VRING_BASE")
        with pytest.raises(ConnectionError):
            mortal.device.get_base(mortal.device.rings[0])
    assert mortal.daemon.wait() == 0


@pytest.mark.fault("control:hang")
@pytest.mark.fault("control:delay")
def test_a_frontend_waits_for_control(unattached, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text('rules = ["control:delay=300ms:at=before-reply:times=1", "control:hang:at=before-message:when=2"]')
    _daemon, device = unattached(Options(extra=("--fault-rules", str(rules))))
    began = time.monotonic()
    device.get_features()
    assert time.monotonic() - began >= 0.3
    device.client.sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        device.get_features()


def end(served, rule):
    """Add a rule that ends vfsd before it can say that it was heard of."""
    ask(os.fsencode(served.daemon.socket), {"do": "add", "rules": [rule]})
