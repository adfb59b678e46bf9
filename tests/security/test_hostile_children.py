"""The whole daemon, one of its workers or its control process hostile: supervisor and broker go on, or end with a clear reason.

What a child sends to the supervisor, and worker and control to each other, comes through one codec, which
unit/test_channel.py tries field by field; here is what becomes of the daemon.
"""

import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgpack
import pytest

from tests.support.frontend.daemon import Daemon, Options, vfsd
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import REPLACED, worker_pids
from tests.support.frontend.serving import start as start_serving
from vfsd.errors import ChildBreach
from vfsd.wire import channel as wire

WORKER, CONTROL = "vfsd.worker", "vfsd.worker.control"
TOP = Path(__file__).parents[2]
NEED_SOME = wire.encode_message(wire.NeedWorker(1))
TEXT = b"ended\x1b[2J\nby a child"


def start(folder: Path, module: str, *script: list[object]) -> Daemon:
    """A daemon whose child of this module plays the script. It may be over before it is ready."""
    (folder / "share").mkdir()
    (folder / "share" / "file").write_text("inside")
    (folder / "secret").write_text("outside")

    def command(share, socket, options):
        return [*hostile(module, *script)(share, socket, options), "--num-request-queues=3"]

    return Daemon(folder / "share", folder / "socket", command=command, wait=False)


def hostile(module: str, *script: list[object]) -> Callable[[object, object, object], list[str]]:
    """The command line of such a daemon, as Daemon takes it."""

    def command(share, socket, options):
        arguments = vfsd(share, socket, options)[3:]
        program = f"import sys; sys.path.insert(0, {str(TOP)!r}); from tests.security.hostile_daemon import main; main()"
        return [sys.executable, "-c", program, module, msgpack.packb(script).hex(), *arguments]

    return command


def check_outside(folder: Path) -> None:
    assert (folder / "secret").read_text() == "outside"
    assert sorted(os.listdir(folder)) == ["secret", "share"]
    assert os.listdir(folder / "share") == ["file"]


def message(made: wire.ChannelMessage) -> bytes:
    return wire.encode_message(made)


def forged(table: wire.Table) -> dict[str, bytes]:
    """Every message that is not of this table."""
    others = {
        **wire.SUPERVISOR_TO_CHILD,
        **wire.BROKER_TO_SUPERVISOR,
        **wire.CONTROL_TO_SUPERVISOR,
        **wire.CONTROL_TO_WORKER,
        **wire.WORKER_TO_CONTROL,
    }
    return {
        row.message.__name__: msgpack.packb([tag, *[0 if isinstance(bound, wire.Uint) else b"" for bound in row.bounds]])
        for tag, row in others.items()
        if tag not in table
    }


# Attacks that end vfsd, with what its last line says. Each is [module, script, pattern].
ENDS = {
    "worker: a message of control's": (WORKER, [["send", "supervisor", NEED_SOME]], "worker 0 broke the protocol of its supervisor channel: .*tag 19"),
    "worker: a message of the broker's": (
        WORKER, [["send", "supervisor", message(wire.Breach(0, b"x"))]], "worker 0 broke the protocol of its supervisor channel: .*tag 21"
    ),
    "worker: no message": (WORKER, [["send", "supervisor", b"\xc1"]], "worker 0 broke the protocol of its supervisor channel"),
    "worker: a long packet": (WORKER, [["send", "supervisor", bytes(5000)]], "worker 0 broke the protocol .*longer than any message"),
    "worker: descriptors": (
        WORKER, [["send", "supervisor", message(wire.Ready()), [0, 1, 2]]], "worker 0 broke the protocol .*longer than any message"
    ),
    "worker: a failure that is none": (WORKER, [["send", "supervisor", message(wire.Failed(TEXT))]], r"worker 0 cannot go on: ended\\x1b"),
    "worker: an answer without a question": (
        WORKER, [["send", "control", message(wire.Done(1, 1))]], "worker 0 answered what was not asked"
    ),
    "worker: an order to control": (
        WORKER, [["send", "control", message(wire.RingStop(1, 1))]], "worker 0 broke the protocol of its control socket: .*tag 39"
    ),
    "worker: descriptors to control": (
        WORKER, [["send", "control", message(wire.RingBroken(0, b"x")), [0]]], "worker 0 broke the protocol of its control socket"
    ),
    "worker: a breach of the broker's protocol": (
        WORKER, [["send", "broker", b"\xc1"]], r"worker 0 .* broke the broker's protocol \(not a msgpack packet .*\) and is killed"
    ),
    "worker: nothing at all in a packet to the broker": (
        WORKER, [["send", "broker", b""]], r"worker 0 .* broke the broker's protocol \(sent an empty packet\) and is killed"
    ),
    "worker: a system call it has not": (WORKER, [["syscall", 59, b"/bin/sh", 0, 0]], "worker 0 .* was killed by SIGSYS"),
    "control: worker 0 again": (CONTROL, [["send", "supervisor", message(wire.NeedWorker(0))]], "control asked for worker 0, which exists"),
    "control: a worker beyond the last": (CONTROL, [["send", "supervisor", message(wire.NeedWorker(3))]], "control asked for worker 3, which .*must not exist"),
    "control: a worker twice": (CONTROL, [["send", "supervisor", NEED_SOME]] * 2, "control asked for worker 1, which exists"),
    "control: a breach of somebody else's": (
        CONTROL, [["send", "supervisor", message(wire.Breach(0, b"x"))]], "control broke the protocol of its supervisor channel: .*tag 21"
    ),
    "control: the frontend's fault": (
        CONTROL, [["send", "supervisor", message(wire.FrontendGone(TEXT, clean=False))]], r"the frontend's connection was closed: ended\\x1b\[2J\\nby"
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ENDS)
def test_it_ends_with_a_reason_that_names_the_offender(tmp_path, attack):
    module, script, pattern = ENDS[attack]
    with start(tmp_path, module, *script) as daemon:
        daemon.wait_for_log(pattern)
        assert daemon.wait() == 1
        assert not any("\x1b" in line or "Traceback" in line for line in daemon.log)
    check_outside(tmp_path)


def test_a_worker_that_breaks_the_brokers_protocol_is_killed_and_others_are_served_on(tmp_path):
    """The second worker that is started, and only that one: its successor is as it should be."""
    (tmp_path / "secret").write_text("outside")
    with closing(
        start_serving(tmp_path, Options(request_queues=2), command=hostile("vfsd.worker#2", ["send", "broker", b"\xc1"]), queues=3)
    ) as served:
        served.expect_log("broke the broker")
        served.expect_log(REPLACED)
        assert served.daemon.wait_for_log(r"worker 1 .* broke the broker's protocol \(not a msgpack packet")
        assert served.daemon.wait_for_log(f"worker 1 .*{REPLACED}")
        client = served.client
        for client.queue in (1, 2):
            assert client.getattr(ROOT).attr.nlink
        assert len(worker_pids(served)) == 2
    assert sorted(os.listdir(tmp_path / "share")) == []
    assert (tmp_path / "secret").read_text() == "outside"


# What a worker does not survive, sent by control: before vfsd serves that is the end, later the worker is replaced.
FATAL_TO_WORKERS = {
    "control: a worker's answer to a worker": wire.Done(1, 1),
    "control: memory without a descriptor": wire.MemoryAdd(1, 0, 4096, 0, 0),
}


@pytest.mark.parametrize("attack", FATAL_TO_WORKERS)
def test_a_worker_that_control_kills_is_replaced(tmp_path, attack):
    script = [["take", "worker"], ["send", "worker", message(FATAL_TO_WORKERS[attack])]]
    with start(tmp_path, CONTROL, *script) as daemon:
        line = daemon.wait_for_log("worker 0 .*ended with exit status 1")
        if "takes its place" in line:
            assert daemon.stop() == 0
        else:
            assert daemon.wait() == 1
        assert not any("\x1b" in line or "Traceback" in line for line in daemon.log)
    check_outside(tmp_path)


def ring_start(**flags: bool) -> wire.RingStart:
    return wire.RingStart(
        1, 1, 128, 0, 0, 0, 0, event_idx=False, start_number=1, **({"has_kick": False, "has_call": False, "has_err": False} | flags)
    )


# Attacks that change nothing: vfsd still waits for a frontend, and ends when it is asked to.
HARMLESS = {
    "worker: a flood of log lines": (WORKER, [["flood", "supervisor", message(wire.Log(0, TEXT * 10)), 20000]] * 5),
    "worker: ready, ready": (WORKER, [["flood", "supervisor", message(wire.Ready()), 300]]),
    "worker: an empty packet, which looks like the end": (WORKER, [["send", "supervisor", b""]]),
    "worker: rings broken that are none": (WORKER, [["flood", "control", message(wire.RingBroken(255, TEXT)), 300]]),
    "control: a flood of log lines": (CONTROL, [["flood", "supervisor", message(wire.Log(0, TEXT * 10)), 20000]] * 5),
    "control: descriptors of wrong kinds for a worker": (
        CONTROL,
        [
            ["take", "worker"],
            ["send", "worker", message(wire.MemoryAdd(1, 0, 4096, 0, 0)), ["worker"]],
            ["send", "worker", message(wire.MemoryAdd(2, 0, 4096, 0, 0)), [0]],
            ["send", "worker", message(wire.MemoryAdd(3, (1 << 64) - 1, (1 << 64) - 1, 1, 1)), [2]],
            ["send", "worker", message(ring_start(has_kick=True)), [2, "supervisor"]],
            ["send", "worker", message(ring_start(has_kick=True, has_call=True, has_err=True)), [2, 0, "worker", 2]],
            ["send", "worker", message(wire.RingKick(4, 9, present=True)), [2]],
            ["send", "worker", message(wire.RingStop(5, 255))],
            ["send", "worker", message(wire.MemoryRemove(6, 0, 4096, 0))],
            ["send", "worker", message(wire.MemoryClear(7))],
        ],
    ),
    "control: a worker, whose socket it closes": (CONTROL, [["send", "supervisor", NEED_SOME], ["take", "worker"], ["take", "worker"]]),
}  # fmt: skip


@pytest.mark.parametrize("attack", HARMLESS)
def test_it_goes_on(tmp_path, attack):
    module, script = HARMLESS[attack]
    with start(tmp_path, module, *script) as daemon:
        daemon.wait_ready()
        assert daemon.running
        assert daemon.stop() == 0
        assert not any("\x1b" in line or "Traceback" in line for line in daemon.log)
    check_outside(tmp_path)


TABLES = {
    "worker to supervisor": wire.WORKER_TO_SUPERVISOR,
    "control to supervisor": wire.CONTROL_TO_SUPERVISOR,
    "worker to control": wire.WORKER_TO_CONTROL,
}


@pytest.mark.parametrize("way", TABLES)
def test_no_message_of_another_way_is_taken(way):
    for packet in forged(TABLES[way]).values():
        with pytest.raises(ChildBreach, match="not permitted here"):
            wire.decode_message(packet, 0, TABLES[way])
