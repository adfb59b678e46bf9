"""The operator's socket, the rules that the supervisor keeps, and that there is none of it unless it is asked for."""

import json
import os
import selectors
import socket
import stat
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from tests.support.broker import RecordingLog
from vfsd import fault_socket
from vfsd.cli import parse_options
from vfsd.errors import ChildBreach, ConfigError, WorkerBreach
from vfsd.fault_desk import FaultDesk
from vfsd.fault_socket import make_fault_socket
from vfsd.faults.counters import BROKER, place_of_worker
from vfsd.tools import fault, vfsdctl
from vfsd.wire import broker_messages, channel, fault_channel, fault_messages


class Hearing:
    """In place of a child: keeps what it is told."""

    def __init__(self, role):
        self.role = role
        self.told = []

    def send(self, message):
        self.told.append(message)
        return True


class Stage:
    def __init__(self, folder, *extra):
        self.path = folder / "vm.sock"
        self.log = RecordingLog()
        options = parse_options(["--shared-dir=/", f"--socket-path={self.path}", *extra])
        self.desk = FaultDesk(options, self.log)
        self.children = [Hearing("broker"), Hearing("control"), Hearing("worker 0"), Hearing("worker 3")]
        self.selector = selectors.DefaultSelector()
        self.desk.serve(self.selector, lambda: self.children)
        self._over = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while not self._over:
            for key, _events in self.selector.select(0.05):
                key.data()

    def hear(self, *places):
        """These places have heard of everything."""
        for place in places:
            self.desk._counters.hear(place, 2**40)

    def run(self, *argv):
        return vfsdctl.run(["fault", argv[0], str(self.path), *argv[1:]])

    def close(self):
        if self._over:
            return
        self._over = True
        self._thread.join()
        self.selector.close()
        self.desk.close()


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path, "--fault-rules=/dev/null")
    stage.hear(BROKER, 1, place_of_worker(0), place_of_worker(3))
    yield stage
    stage.close()


def test_rules_are_added_listed_and_removed_by_the_tool(stage, capsys):
    assert stage.run("add", "READ:error=EIO:when=3+2", "worker:kill:at=after-pop:when=100") == 0
    assert stage.run("add", "FSYNC:delay=50ms:path=/db/*") == 0
    assert stage.run("remove", "2") == 0
    assert stage.run("list") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["1 2", "3", "2"]
    assert out[3].startswith("seed ")
    assert [line.split() for line in out[4:]] == [
        ["NUMBER", "MATCHES", "HITS", "RULE"],
        ["1", "0", "0", "READ:error=EIO:when=3+2"],
        ["3", "0", "0", "FSYNC:delay=50ms:path=/db/*"],
    ]
    assert stage.run("clear") == 0
    assert stage.run("list", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rules"] == []
    assert any("removed after 0 matches, 0 hits" in line for line in stage.log.warnings)


def test_children_hear_of_what_concerns_them(stage):
    stage.run("add", "READ:error=EIO", "broker.fsync:error=EIO", "control:hang:at=now", "LOOKUP:hang:path=/x", "send_fds:truncate")
    stage.run("remove", "4")
    told = {child.role: [(type(message).__name__, message.number) for message in child.told] for child in stage.children}
    assert told["worker 0"] == told["worker 3"] == [("FaultRule", 1), ("FaultRule", 4), ("FaultRule", 5), ("FaultGone", 4)]
    assert told["broker"] == [("FaultRule", 2), ("FaultRule", 4), ("FaultGone", 4)]
    assert told["control"] == [("FaultRule", 3)]


def test_it_is_told_who_has_not_heard(stage, capsys, monkeypatch):
    monkeypatch.setattr(fault, "_HEAR_SECONDS", 0.05)
    stage.desk._counters.hear(place_of_worker(3), 0)
    assert stage.run("add", "READ:error=EIO") == 0
    assert "vfsdctl: worker 3 did not hear of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("add", "READ:hang", "READ:hnag"), "column 6"),
        (("remove", "7"), "there is no fault rule 7"),
        (("add", *["READ:hang"] * 65), "there may be 64 fault rules"),
    ],
)
def test_what_cannot_be_is_refused_as_a_whole(stage, capsys, argv, says):
    assert stage.run(*argv) == 1
    assert says in capsys.readouterr().err
    assert stage.run("list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rules"] == []


def test_slots_are_used_again(stage):
    for _ in range(3):
        assert stage.run("add", *["READ:hang"] * 64) == 0
        assert stage.run("clear") == 0


@pytest.mark.parametrize("request_", [b"{", b"[]", b"3", b"[" * 5000, b"\xff", b'{"do": "add", "rules": [3]}', b'{"do": "die"}'])
def test_nonsense_is_answered_and_changes_nothing(stage, request_):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(f"{stage.path}.faults/control")
        sock.send(request_)
        assert "error" in json.loads(sock.recv(1 << 16))
    assert stage.run("list") == 0


def test_the_socket_is_the_starters_alone_and_leaves_nothing_behind(stage, tmp_path):
    folder = tmp_path / "vm.sock.faults"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "control").stat().st_mode) == 0o600
    stage.close()
    assert list(tmp_path.iterdir()) == []


def test_others_are_not_answered(stage, capsys, monkeypatch):
    monkeypatch.setattr(fault_socket, "_peer_uid", lambda _connection: 65533)
    assert stage.run("list") == 1
    assert "answers root and who started it, and nobody else" in capsys.readouterr().err


def test_the_kernel_says_who_is_there(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(tmp_path / "s"))
            with listener.accept()[0] as accepted:
                assert fault_socket._peer_uid(accepted) == os.geteuid()


def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write to"):
        make_fault_socket(os.fsencode(shared / "s"), None)
    (tmp_path / "vm.sock.faults").mkdir()
    (tmp_path / "vm.sock.faults").chmod(0o770)
    with pytest.raises(ConfigError, match="others may write to"):
        make_fault_socket(None, os.fsencode(tmp_path / "vm.sock"))


def test_what_is_in_the_way_of_the_socket_is_kept_unless_it_is_a_dead_one(tmp_path):
    path = os.fsencode(tmp_path / "s")
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        make_fault_socket(path, None)
    (tmp_path / "s").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    with closing(make_fault_socket(path, None)):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    assert make_fault_socket(None, None) is None
    with pytest.raises(ConfigError, match="at most 107"):
        make_fault_socket(b"/" + b"x" * 200, None)
    with pytest.raises(ConfigError, match="No such file"):
        make_fault_socket(b"/nowhere/s", None)


@pytest.mark.parametrize(("text", "says"), [("rules = [3]", "rule 1"), ("rules = [", "docs/faults.md"), (None, "No such file")])
def test_a_file_that_cannot_be_is_refused_by_its_name(tmp_path, text, says):
    if text is not None:
        (tmp_path / "rules").write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        Stage(tmp_path, f"--fault-rules={tmp_path / 'rules'}")
    assert f"--fault-rules={tmp_path / 'rules'}: " in str(refused.value)
    assert not (tmp_path / "vm.sock.faults").exists()


def test_the_seed_is_told(tmp_path):
    (tmp_path / "rules").write_text('seed = 42\nrules = ["READ:hang"]')
    stage = Stage(tmp_path, f"--fault-rules={tmp_path / 'rules'}")
    stage.close()
    (line,) = stage.log.warnings
    assert line.startswith("fault injection is on: 1 rules, seed 42; rules may be changed by ")


def test_the_tool_says_when_there_is_nobody(tmp_path, capsys):
    assert vfsdctl.run(["fault", "list", str(tmp_path / "none")]) == 1
    assert "is vfsd running, with --fault-rules or --fault-socket" in capsys.readouterr().err


# --- off ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["supervisor", "worker.__main__", "worker.control", "broker.__main__"])
def test_without_the_option_no_process_has_any_of_it(module):
    script = f"import sys, vfsd.{module}; print([name for name in sys.modules if 'fault' in name and not name.startswith('vfsd.wire.')])"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() in ("[]", "['faulthandler']")


def test_without_the_option_nobody_accepts_its_messages():
    tables = ["SUPERVISOR_TO_CHILD", "BROKER_TO_SUPERVISOR", "CONTROL_TO_SUPERVISOR", "WORKER_TO_SUPERVISOR"]
    rule = fault_channel.FaultRule(1, 1, 0, 0, 0, b"READ:hang")
    fault_channel.to_child({})
    fault_channel.from_child({})
    for packet in (channel.encode_message(rule), channel.encode_message(fault_channel.KillMe())):
        for table in tables:
            with pytest.raises(ChildBreach, match="not permitted here"):
                channel.decode_message(packet, 0, getattr(channel, table))
    packet = broker_messages.join_requests(0, [b"\x94\xcc\xc8\x01\x01\xc4\x00"])  # MatchPath(1, b""), request 1
    with pytest.raises(WorkerBreach, match="unknown tag 200"):
        broker_messages.decode_requests(packet)


def test_with_it_they_are_accepted_from_the_right_side_only():
    children, supervisors = fault_channel.to_child(channel.SUPERVISOR_TO_CHILD), fault_channel.from_child(channel.WORKER_TO_SUPERVISOR)
    rule = fault_channel.FaultRule(1, 2, 3, 2**64 - 1, 5, b"READ:hang")
    assert channel.decode_message(channel.encode_message(rule), 0, children) == rule
    with pytest.raises(ChildBreach):
        channel.decode_message(channel.encode_message(rule), 0, supervisors)
    with pytest.raises(ChildBreach):
        channel.decode_message(channel.encode_message(fault_channel.KillMe()), 0, children)
    assert fault_messages.unpack_numbers(fault_messages.pack_numbers([1, 2**63, 7])) == {1, 2**63, 7}
