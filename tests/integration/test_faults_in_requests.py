"""Faults of single requests, as a frontend sees them: errors, delays, hangs, short ones, and what becomes of their completions."""

import errno
import os
import time

import pytest

from tests.support.frontend.checks import eventually
from tests.support.frontend.daemon import Options
from tests.support.frontend.faults import SPOKEN, add_fault, clear_faults, counted
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import kill_worker
from tests.support.frontend.ring import RingError, RingTimeout
from tests.support.frontend.serving import start
from tests.support.frontend.vhost_user_client import BackendRefused


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One for all tests here: each clears its rules."""
    folder = tmp_path_factory.mktemp("faults")
    rules = folder / "rules.toml"
    rules.write_text("seed = 42\n")
    served = start(folder, Options(request_queues=2, extra=("--fault-rules", str(rules))), queues=3)
    yield served
    served.close()


@pytest.fixture
def served(daemon):
    daemon.log_mark = len(daemon.daemon.log)
    daemon.expected_log[:] = [SPOKEN, "a request fails with E"]
    daemon.client.queue = 1
    yield daemon
    clear_faults(daemon)
    daemon.new_session()
    assert daemon.unexpected_log() == []


@pytest.fixture
def opened(served):
    """(client, nodeid, fh) of a file of 1000 bytes."""
    (served.share / "file").write_bytes(b"0123456789" * 100)
    nodeid = served.client.lookup(ROOT, b"file").nodeid
    return served.client, nodeid, served.client.open(nodeid, os.O_RDWR).fh


def errno_of(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.fault("operation:error")
@pytest.mark.parametrize(
    ("when", "failing"), [("when=3+2", {3, 5, 7}), ("when=2", {2}), ("every=3", {3, 6}), ("after=5:times=1", {6}), ("nth=1", {1})]
)
def test_the_requests_fail_that_the_rule_counts(served, opened, when, failing):
    client, nodeid, fh = opened
    number = add_fault(served, f"READ:error=ENOSPC:{when}")
    seen = [errno_of(client.read, nodeid, fh, 0, 10) for _ in range(7)]
    assert seen == [errno.ENOSPC if count in failing else 0 for count in range(1, 8)]
    assert counted(served, number) == (7, len(failing))


@pytest.mark.fault("operation:error")
def test_a_request_that_fails_has_not_been_done(served):
    add_fault(served, "MKDIR,CREATE:error=EDQUOT")
    assert errno_of(served.client.mkdir, ROOT, b"directory") == errno.EDQUOT
    assert errno_of(served.client.create, ROOT, b"created", 0o644, os.O_RDWR) == errno.EDQUOT
    assert not (served.share / "directory").exists()
    assert not (served.share / "created").exists()


def test_chance_decides_about_as_often_as_it_is_told(served, opened):
    client, nodeid, fh = opened
    number = add_fault(served, "READ:error=EIO:prob=0.3")
    failed = [errno_of(client.read, nodeid, fh, 0, 10) for _ in range(100)].count(errno.EIO)
    assert counted(served, number) == (100, failed)
    assert 10 <= failed <= 55


def test_only_what_is_selected_fails(served, opened):
    client, nodeid, fh = opened
    add_fault(served, f"READ:error=EIO:nodeid={nodeid}:uid=1000:queue=2")
    client.queue = 2
    with client.acting_as(1000, 1000):
        assert errno_of(client.read, nodeid, fh, 0, 10) == errno.EIO
    assert errno_of(client.read, nodeid, fh, 0, 10) == 0
    client.queue = 1
    with client.acting_as(1000, 1000):
        assert errno_of(client.read, nodeid, fh, 0, 10) == 0


def test_a_path_is_the_one_that_the_file_has_now(served):
    client = served.client
    (served.share / "db").mkdir()
    (served.share / "db" / "table").write_bytes(b"rows")
    directory = client.lookup(ROOT, b"db").nodeid
    nodeid = client.lookup(directory, b"table").nodeid
    fh = client.open(nodeid, os.O_RDWR).fh
    number = add_fault(served, "READ,FSYNC,LOOKUP,UNLINK:error=EIO:path=/db/*")
    assert errno_of(client.read, nodeid, fh, 0, 4) == errno.EIO
    assert errno_of(client.fsync, nodeid, fh) == errno.EIO
    assert errno_of(client.lookup, directory, b"other") == errno.EIO
    assert errno_of(client.unlink, directory, b"table") == errno.EIO
    assert errno_of(client.lookup, ROOT, b"db") == 0
    client.rename(directory, b"table", ROOT, b"moved")
    assert client.read(nodeid, fh, 0, 4) == b"rows"
    assert counted(served, number) == (4, 4)


@pytest.mark.parametrize(("sandbox", "handles"), [("chroot", "never"), ("none", "mandatory")])
def test_a_path_begins_at_the_share_in_every_sandbox(serve, sandbox, handles):
    served = serve(Options(sandbox=sandbox, handles=handles, extra=("--fault-rules", "/dev/null")))
    client = served.client
    add_fault(served, "GETATTR,MKDIR:error=EIO:path=/made*")
    (served.share / "made").write_bytes(b"")
    (served.share / "other").write_bytes(b"")
    assert errno_of(client.getattr, client.lookup(ROOT, b"made").nodeid) == errno.EIO
    assert errno_of(client.getattr, client.lookup(ROOT, b"other").nodeid) == 0
    assert errno_of(client.mkdir, ROOT, b"made-too") == errno.EIO
    add_fault(served, "STATFS:error=EIO:path=/")
    assert errno_of(client.statfs, ROOT) == errno.EIO


@pytest.mark.fault("operation:delay")
def test_a_delay_holds_up_its_own_request_only(served, opened):
    client, nodeid, fh = opened
    add_fault(served, "READ:delay=400ms:times=1")
    began = time.monotonic()
    late = client.send_read(nodeid, fh, 0, 10)
    client.getattr(ROOT)
    assert not late.submission.done
    assert client.finish(late) == b"0123456789"
    assert time.monotonic() - began >= 0.4


@pytest.mark.fault("operation:delay")
@pytest.mark.fault("operation:hang")
def test_what_is_held_up_is_interrupted_when_its_queue_is_stopped(served, opened):
    client, nodeid, fh = opened
    add_fault(served, "READ:hang:times=1")
    add_fault(served, "FSYNC:delay=1min:times=1")
    pending = [client.send_read(nodeid, fh, 0, 10), client.send(20, nodeid, fh.to_bytes(8, "little") + bytes(8))]
    client.getattr(ROOT)
    ring = served.device.rings[1]
    served.device.get_base(ring)
    ring.collect()
    for one in pending:
        with pytest.raises(InterruptedError):
            client.result(one)
    served.device.set_base(ring)
    served.device.set_kick(ring)
    served.device.enable(ring)


@pytest.mark.fault("operation:short")
def test_a_short_read_and_a_short_write(served, opened):
    client, nodeid, fh = opened
    add_fault(served, "READ:short=4")
    add_fault(served, "WRITE:short")
    assert client.read(nodeid, fh, 0, 10) == b"0123"
    assert client.write(nodeid, fh, 0, b"abcdefgh") == 4
    assert (served.share / "file").read_bytes()[:10] == b"abcd456789"


@pytest.mark.fault("operation:drop")
def test_a_lost_completion_comes_when_the_queue_is_stopped(served):
    client = served.client
    add_fault(served, "MKDIR:drop")
    pending = client.send(9, ROOT, (0o755).to_bytes(8, "little") + b"made\0", 128)
    assert eventually((served.share / "made").exists)
    client.getattr(ROOT)
    with pytest.raises(RingTimeout):
        pending.submission.ring.wait([pending.submission], 0.3)
    ring = served.device.rings[1]
    served.device.get_base(ring)
    ring.collect()
    assert len(client.result(pending)) == 128
    served.device.set_base(ring)
    served.device.set_kick(ring)
    served.device.enable(ring)


@pytest.mark.fault("operation:corrupt")
def test_one_byte_of_an_answer_is_another(served, opened):
    client, nodeid, fh = opened
    add_fault(served, "READ:corrupt:when=2")
    add_fault(served, "READ:corrupt=18:when=3")
    right = b"0123456789" * 10
    seen = [client.read(nodeid, fh, 0, 100) for _ in range(4)]
    changed = [[place for place in range(100) if one[place] != right[place]] for one in seen]
    assert [len(places) for places in changed] == [0, 1, 1, 0]
    assert changed[2] == [18 - 16]
    assert (served.share / "file").read_bytes() == b"0123456789" * 100


@pytest.mark.fault("operation:duplicate")
def test_a_completion_comes_twice(serve):
    served = serve(Options(extra=("--fault-rules", "/dev/null")))
    served.client.getattr(ROOT)
    add_fault(served, "GETATTR:duplicate:times=1")
    with pytest.raises(RingError, match="was completed but is not in flight"):
        served.client.getattr(ROOT)
    kill_worker(served)  # whose successor must not be led astray by the entry too many
    assert served.client.getattr(ROOT).attr.nlink


@pytest.mark.fault("broker.call:error")
def test_a_system_call_of_the_broker_fails(served):
    client = served.client
    (served.share / "known").write_bytes(b"")
    nodeid = client.lookup(ROOT, b"known").nodeid
    add_fault(served, "broker.openat:error=ENFILE:times=1")
    assert errno_of(client.lookup, ROOT, b"known") == errno.ENFILE
    add_fault(served, "broker.fsync:error=EIO")
    fh = client.open(nodeid, os.O_RDWR).fh
    assert errno_of(client.fsync, nodeid, fh) == errno.EIO
    add_fault(served, "broker.open_by_handle:error=ESTALE")
    assert errno_of(client.open, nodeid) == errno.ESTALE
    add_fault(served, "broker.mkdirat:error=ENOMEM")
    assert errno_of(client.mkdir, ROOT, b"no") == errno.ENOMEM


@pytest.mark.fault("broker.call:delay")
def test_a_slow_call_of_the_broker_holds_up_nobody_else(served, opened):
    client, nodeid, fh = opened
    add_fault(served, "broker.fsync:delay=400ms")
    began = time.monotonic()
    late = client.send(20, nodeid, fh.to_bytes(8, "little") + bytes(8))
    client.lookup(ROOT, b"file")
    assert not late.submission.done
    client.finish(late)
    assert time.monotonic() - began >= 0.4


@pytest.mark.fault("worker.call:error")
def test_a_system_call_of_a_worker_fails(served, opened):
    client, nodeid, fh = opened
    add_fault(served, "worker.pwritev2:error=ENOSPC:times=1")
    add_fault(served, "worker.preadv2:error=EIO:times=1")
    add_fault(served, "worker.getdents64:error=EIO:times=1")
    assert errno_of(client.write, nodeid, fh, 0, b"x") == errno.ENOSPC
    assert errno_of(client.read, nodeid, fh, 0, 10) == errno.EIO
    assert errno_of(client.list, ROOT) == errno.EIO
    assert client.write(nodeid, fh, 0, b"x") == 1


@pytest.mark.fault("worker.call:error")
def test_memory_that_a_worker_cannot_map_is_refused(serve):
    served = serve(Options(extra=("--fault-rules", "/dev/null")))
    served.client.getattr(ROOT)
    add_fault(served, "worker.mmap:error=ENOMEM:times=1")
    served.expect_log("SET_MEM_TABLE")
    with pytest.raises(BackendRefused, match="SET_MEM_TABLE"):
        served.device.set_mem_table(need=True)


@pytest.mark.fault("worker.call:delay")
def test_a_slow_call_of_a_worker_takes_its_time(served, opened):
    client, nodeid, fh = opened
    add_fault(served, "worker.preadv2:delay=100ms..200ms:times=1")
    began = time.monotonic()
    client.read(nodeid, fh, 0, 10)
    assert time.monotonic() - began >= 0.1


@pytest.mark.fault("kick:lose")
def test_a_lost_kick_leaves_a_request_until_the_next(served):
    client = served.client
    client.getattr(ROOT)
    number = add_fault(served, "kick:lose:queue=1:times=1")
    pending = client.send(3, ROOT, bytes(16), 104)
    ring = served.device.rings[1]
    with pytest.raises(RingTimeout):
        ring.wait([pending.submission], 0.3)
    assert counted(served, number).hits == 1
    ring.force_kick()
    client.finish(pending)


@pytest.mark.fault("call:lose")
def test_a_lost_call_leaves_a_completion_unnoticed(served):
    client = served.client
    client.getattr(ROOT)
    add_fault(served, "call:lose:queue=1:times=1")
    pending = client.send(3, ROOT, bytes(16), 104)
    ring = served.device.rings[1]
    assert eventually(lambda: ring.used_idx != ring.last_used)
    assert ring.drain_calls() == 0
    ring.collect()
    client.result(pending)


@pytest.mark.fault("send_fds:error")
def test_descriptors_that_cannot_be_sent_come_later(served):
    client = served.client
    (served.share / "file").write_bytes(b"x")
    nodeid = client.lookup(ROOT, b"file").nodeid
    number = add_fault(served, "send_fds:error=ETOOMANYREFS:times=1")
    assert client.read(nodeid, client.open(nodeid).fh, 0, 1) == b"x"
    assert counted(served, number).hits == 1
