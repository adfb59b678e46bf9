"""The supervisor with children that play a script instead of serving: what starts, what ends, what is logged last."""

import fcntl
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest

import vfsd.heartbeat
import vfsd.supervisor
import vfsd.vigil
from vfsd.children import Child
from vfsd.cli import parse_options
from vfsd.fds import OwnedFd
from vfsd.log import DEBUG, StderrLog
from vfsd.record import Report
from vfsd.roles import Roles
from vfsd.sandbox.lockdown import LockedDown
from vfsd.sandbox.user_namespace import read_standing
from vfsd.service_manager import ServiceManager, connect_notify_socket
from vfsd.sockets import adopt_socket, make_listener
from vfsd.supervisor import Supervisor
from vfsd.tools.daemon import _read_record
from vfsd.wire.inflight import TABLE_STRIDE_BYTES

PRELUDE = """
import os, select, signal, sys, time
from vfsd.channel import Channel
from vfsd.config import BrokerConfig, ControlConfig, WorkerConfig, read_config
from vfsd.fds import OwnedFd
from vfsd.wire.channel import *
KIND = {"vfsd.broker": BrokerConfig, "vfsd.worker.control": ControlConfig, "vfsd.worker": WorkerConfig}[sys.argv[2]]
config = read_config(KIND, int(sys.argv[1]))
channel = Channel.from_fd(OwnedFd(config.channel_fd), SUPERVISOR_TO_CHILD)
def say(message): channel.send(message)
def log(text): say(Log(3, text.encode()))
def hear():
    while True:
        select.select([channel], [], [])
        received = channel.receive()
        if isinstance(received.message, Stop):
            os._exit(0)
        if received.message.fd_count():
            global fd
            fd = received.fds[0]
        return received.message
def idle():
    while True:
        hear()
"""
READY = "say(Ready()); idle()"
HANDED_OVER = "say(Ready()); hear(); hear(); "  # AddWorker(0), Connection


class Stage:
    """Runs a Supervisor in this thread; `act` runs in another one as soon as the log shows a text."""

    def __init__(self, tmp_path, monkeypatch):
        self.path = os.fsencode(tmp_path / "vhost.sock")
        self.scripts = {"vfsd.broker": READY, "vfsd.worker.control": READY, "vfsd.worker": READY}
        self._log_fd = os.memfd_create("log")
        self.confined = []
        monkeypatch.setattr(vfsd.supervisor, "lock_down", self._lock_down)
        monkeypatch.setattr(Child, "_command", staticmethod(self._command))
        self._over = threading.Event()
        self.manager = ServiceManager()

    def _lock_down(self, confinement):
        self.confined.append(confinement)
        return LockedDown(securebits=0, landlock=0, dumpable=True)

    def _command(self, module, config_fd):
        return [sys.executable, "-I", "-c", PRELUDE + self.scripts[module], str(config_fd), module]

    def run(self, *argv, endpoint=None, act=None, when="Waiting for vhost-user socket connection"):
        options = parse_options(["--shared-dir=/tmp", "--socket-path=unused", "--sandbox=none", "--num-request-queues=2", *argv])
        log = StderrLog(DEBUG, self._log_fd)
        actor = threading.Thread(target=self._act, args=(act, when)) if act else None
        with OwnedFd(os.pidfd_open(os.getpid())) as pidfd, closing(endpoint or make_listener(self.path, None)) as endpoint:
            roles = Roles(
                options=options, filters=dict.fromkeys(("broker", "control", "worker", "supervisor"), b""), supervisor_pidfd=pidfd.fileno(), nofile=1024, privileged=False, standing=read_standing(),
            )  # fmt: skip
            if actor:
                actor.start()
            try:
                status = Supervisor(roles, endpoint, log, self.manager).run()
            finally:
                self._over.set()
                if actor:
                    actor.join()
        for pid in self.pids():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not os.path.exists(self.path)
        assert not os.path.exists(self.path + b".pid")
        return status

    def _act(self, act, when):
        self.wait_for(when)
        if not self._over.is_set():
            act()

    def wait_for(self, text, times=1):
        """Until the log shows it, or it is all over."""
        while self.log().count(text) < times and not self._over.is_set():
            time.sleep(0.01)

    def connect(self):
        frontend = socket.socket(socket.AF_UNIX)
        self.frontends = [*getattr(self, "frontends", []), frontend]
        frontend.connect(self.path)

    def pids(self):
        return [int(pid) for pid in re.findall(r"started: pid (\d+)", self.log())]

    def log(self):
        return os.pread(self._log_fd, 1 << 20, 0).decode()

    def last_line(self):
        return self.log().splitlines()[-1].split("] ", 1)[1]

    def close(self):
        os.close(self._log_fd)
        for frontend in getattr(self, "frontends", []):
            frontend.close()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    # A signal that a test sends when its supervisor has ended already, for a reason that the test then tells, is nobody's.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    stage = Stage(tmp_path, monkeypatch)
    yield stage
    stage.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_frontend_comes_and_goes(stage):
    stage.scripts["vfsd.worker.control"] = HANDED_OVER + "os.read(fd.fileno(), 1); say(FrontendGone(b'', True)); idle()"

    def act():
        stage.connect()
        stage.frontends[0].send(b"x")

    assert stage.run(act=act) == 0
    lines = [line.split("] ", 1)[1] for line in stage.log().splitlines()]
    assert lines[-3:] == [
        "Waiting for vhost-user socket connection...",
        "Client connected, servicing requests",
        "Client disconnected, shutting down",
    ]
    assert [each.role for each in stage.confined] == ["supervisor"]
    assert len(stage.pids()) == 3


def test_a_second_frontend_is_refused_and_not_left_waiting(stage):
    stage.scripts["vfsd.worker.control"] = HANDED_OVER + "log('got it'); os.read(fd.fileno(), 1); say(FrontendGone(b'', True)); idle()"
    refusals = []

    def second():
        stage.wait_for("got it")
        try:
            stage.connect()
        except ConnectionRefusedError as error:
            refusals.append(error)
        stage.frontends[0].send(b"x")

    def act():
        stage.connect()
        second()

    assert stage.run(act=act) == 0
    assert len(refusals) == 1


def test_a_breach_of_the_frontend_is_status_1_with_its_reason_last(stage):
    stage.scripts["vfsd.worker.control"] = HANDED_OVER + "say(FrontendGone(b'VHOST_USER_SET_OWNER: odd\\n', False)); idle()"
    assert stage.run(act=stage.connect) == 1
    assert stage.last_line() == "the frontend's connection was closed: VHOST_USER_SET_OWNER: odd\\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_everything_with_status_0(stage, number):
    assert stage.run(act=lambda: os.kill(os.getpid(), number)) == 0
    assert stage.last_line() == f"{number.name} received, shutting down"


def test_a_child_that_does_not_stop_is_killed_within_a_second(stage):
    stage.scripts["vfsd.broker"] = "signal.signal(signal.SIGTERM, signal.SIG_IGN); say(Ready()); time.sleep(60)"
    ends = []

    def act():
        ends.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    assert time.monotonic() - ends[0] < 1.0


def test_a_failed_start_says_why_and_is_status_1(stage):
    stage.scripts["vfsd.broker"] = "say(Failed(b'sandbox: cannot mount a procfs: EPERM; use --sandbox=chroot')); os._exit(1)"
    assert stage.run() == 1
    assert stage.last_line() == "broker could not start: sandbox: cannot mount a procfs: EPERM; use --sandbox=chroot"


def test_a_child_that_cannot_even_begin_leaves_its_last_words(stage):
    stage.scripts["vfsd.worker"] = "import no_such_module"
    assert stage.run() == 1
    assert "worker 0 (pid " in stage.last_line()
    assert stage.last_line().endswith("ended with exit status 1 before it was ready: ModuleNotFoundError: No module named 'no_such_module'")


def test_a_child_that_is_never_ready_is_named(stage, monkeypatch):
    monkeypatch.setattr(vfsd.supervisor, "START_SECONDS", 0.5)
    stage.scripts["vfsd.worker"] = "idle()"
    stage.scripts["vfsd.broker"] = "say(Ready()); idle()"
    assert stage.run() == 1
    assert "not ready after" in stage.last_line()
    assert "worker 0" in stage.last_line()


def test_the_last_line_names_the_child_that_was_killed_not_those_that_lost_it(stage):
    stage.scripts["vfsd.broker"] = (
        "say(Ready()); hear(); time.sleep(0.2); fd.close(); time.sleep(0.02); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    stage.scripts["vfsd.worker"] = "say(Ready()); os.read(config.broker_fd, 1); os._exit(0)"
    assert stage.run(act=lambda: None) == 1
    assert "broker (pid " in stage.last_line()
    assert stage.last_line().endswith("was killed by SIGSEGV")


def test_a_death_by_seccomp_is_explained(stage):
    stage.scripts["vfsd.broker"] = "say(Ready()); time.sleep(0.3); os.kill(os.getpid(), signal.SIGSYS)"
    assert stage.run(act=lambda: None) == 1
    assert stage.last_line().endswith(
        "was killed by SIGSYS (system call unknown): it made a system call that its seccomp filter does not allow"
    )


def test_what_a_child_says_of_its_lock_down_counts_once(stage):
    """Later it may be somebody else who speaks."""
    stage.scripts["vfsd.worker"] = "say(Ready(235, 7, False)); say(Ready(0, 0, True)); log('said all'); idle()"
    found = []

    def act():
        stage.wait_for("said all")
        _, reports, _ = _read_record(os.getpid())
        found.extend(report for report in reports.values() if report.role == "worker 0")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    assert found == [Report(role="worker 0", securebits=235, landlock=7, dumpable=False)]


# A worker that begins as a spare one: it is introduced by what broker and control write into its sockets.
MAYBE_SPARE = """
say(Ready())
if config.index is None:
    log("a spare is ready")
os.read(config.broker_fd, 1); log("a worker serves"); os.read(config.broker_fd, 1); os.kill(os.getpid(), signal.SIGKILL)
"""
# A broker that lets a worker serve, and die when the test says so.
SERVING = """
say(Ready())
while True:
    hear(); os.write(fd.fileno(), b"s"); workers = [*globals().get("workers", []), fd]
    if len(workers) == 1:
        while not os.path.exists({signal!r}):
            time.sleep(0.01)
        os.write(fd.fileno(), b"k")
"""


def test_a_spare_worker_takes_the_place_of_a_dead_one_and_another_spare_is_made(stage, tmp_path):
    stage.scripts["vfsd.worker"] = MAYBE_SPARE
    stage.scripts["vfsd.broker"] = SERVING.format(signal=str(tmp_path / "kill"))

    def act():
        stage.wait_for("a spare is ready")
        (tmp_path / "kill").touch()
        stage.wait_for("a worker serves", times=2)
        stage.wait_for("a spare is ready", times=2)
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run("--spare-workers=1", act=act) == 0
    log = stage.log()
    assert log.count("worker 0 started") == 1
    assert log.count("worker spare started") == 2
    assert "vfsd::worker0] a worker serves" in log


def test_a_spare_worker_that_dies_is_no_harm_and_not_made_again_and_again(stage):
    stage.scripts["vfsd.worker"] = "say(Ready())\nif config.index is None:\n    os.kill(os.getpid(), signal.SIGSEGV)\nidle()"

    def act():
        stage.wait_for("was killed by SIGSEGV")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run("--spare-workers=1", act=act) == 0
    assert stage.log().count("worker spare started") == 1


def mortal(folder, ends):
    """A worker's script: it dies in these ways, one after another, each time after it has served; then it lives."""
    return f"""
number = len(os.listdir({str(folder)!r}))
os.close(os.open({str(folder)!r} + "/%d" % number, os.O_CREAT | os.O_WRONLY))
say(Ready())
for end in {ends!r}[number : number + 1]:
    hear_ends = os.read(config.control_fd, 1)
    eval(end)
log(f"worker of life {{number}} serves")
idle()
"""


@pytest.fixture
def lives(tmp_path):
    folder = tmp_path / "lives"
    folder.mkdir()
    return folder


# Control, by which each worker hears that it may die: the first one when a frontend has come.
LETTING_GO = """
say(Ready()); log(f'control: {hear()}'); worker = fd; hear(); os.write(worker.fileno(), b"x")
while True:
    log(f'control: {hear()}'); os.write(fd.fileno(), b"x")
"""
# The rest of a worker's life: it says when it has answered a few times.
ANSWERING = """
for count in range(1 << 30):
    if isinstance(hear(), Ping):
        say(Alive())
    if count == 5:
        log("answered often")
"""
KILL, TRAP, CRASH = "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGSYS)", "os._exit(1)"


def test_a_worker_that_dies_is_replaced_and_introduced_again(stage, lives):
    stage.scripts["vfsd.worker"] = mortal(lives, [KILL, CRASH])
    stage.scripts["vfsd.worker.control"] = LETTING_GO
    stage.scripts["vfsd.broker"] = "say(Ready())\nwhile True:\n    log(f'broker: {hear()}')"

    def act():
        stage.connect()
        stage.wait_for("worker of life 2 serves")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    log = stage.log()
    assert log.count("another one takes its place") == 2
    assert "was killed by SIGKILL; another one takes its place" in log
    assert "ended with exit status 1; another one takes its place" in log
    for who in ("control", "broker"):
        assert log.count(f"{who}: AddWorker(index=0)") == 3


def test_a_worker_that_dies_again_and_again_is_given_up_with_the_reason_last(stage, lives):
    stage.scripts["vfsd.worker"] = mortal(lives, [KILL] * 9)
    stage.scripts["vfsd.worker.control"] = LETTING_GO
    assert stage.run(act=stage.connect) == 1
    assert stage.last_line().endswith("was killed by SIGKILL; it is not replaced: it died 5 times without completing a request in between")
    assert len(list(lives.iterdir())) == 5


def test_a_worker_that_has_completed_requests_in_between_is_replaced_for_ever(stage, lives):
    stage.scripts["vfsd.worker"] = mortal(lives, ["say(Completed()), " + KILL] * 7)
    stage.scripts["vfsd.worker.control"] = LETTING_GO

    def act():
        stage.connect()
        stage.wait_for("worker of life 7 serves")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0


def test_deaths_that_look_like_attacks_are_given_up_sooner(stage, lives):
    stage.scripts["vfsd.worker"] = mortal(lives, ["say(Completed()), " + TRAP] * 9)
    stage.scripts["vfsd.worker.control"] = LETTING_GO
    assert stage.run(act=stage.connect) == 1
    assert stage.last_line().endswith("does not allow; it is not replaced: 3 workers died so within a minute")


@pytest.fixture
def impatient(monkeypatch):
    """Workers are asked all the time."""
    for module in (vfsd.vigil, vfsd.heartbeat):
        monkeypatch.setattr(module, "ASK_SECONDS", 0.05)
        monkeypatch.setattr(module, "LATE_SECONDS", 0.5)
    monkeypatch.setattr(vfsd.vigil, "TICK_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_hangs_is_killed_and_replaced(stage, lives):
    stage.scripts["vfsd.worker"] = mortal(lives, ["time.sleep(60)"]).replace("idle()", ANSWERING)
    stage.scripts["vfsd.worker.control"] = LETTING_GO

    def act():
        stage.connect()
        stage.wait_for("answered often")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    log = stage.log()
    assert log.count("has not answered for 0 s and is killed") == 1  # "0": the test's half second
    assert log.count("was killed by SIGKILL; another one takes its place") == 1


@pytest.mark.usefixtures("impatient")
def test_a_successor_that_never_gets_ready_is_killed_and_replaced(stage, lives, monkeypatch):
    stage.scripts["vfsd.worker"] = (
        mortal(lives, [KILL]).replace("say(Ready())", "time.sleep(60) if number == 1 else say(Ready())").replace("idle()", ANSWERING)
    )
    stage.scripts["vfsd.worker.control"] = LETTING_GO

    def act():
        monkeypatch.setattr(vfsd.supervisor, "START_SECONDS", 1.5)
        stage.connect()
        stage.wait_for("answered often")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    log = stage.log()
    assert "is not ready after 2 s and is killed" in log
    assert "was killed by SIGKILL before it was ready; another one takes its place" in log


def test_a_worker_that_ends_because_the_broker_did_is_not_replaced(stage):
    stage.scripts["vfsd.broker"] = "say(Ready()); hear(); time.sleep(0.2); fd.close(); time.sleep(0.02); os._exit(1)"
    stage.scripts["vfsd.worker"] = "say(Ready()); os.read(config.broker_fd, 1); os._exit(0)"
    assert stage.run(act=lambda: None) == 1
    assert "broker (pid " in stage.last_line()
    assert "takes its place" not in stage.log()


def test_a_child_that_breaks_the_channels_protocol_ends_everything(stage):
    stage.scripts["vfsd.worker"] = "say(Ready()); say(NeedWorker(1)); idle()"
    assert stage.run(act=lambda: None) == 1
    assert stage.last_line().startswith("worker 0 broke the protocol of its supervisor channel: message tag 19")


def test_a_worker_that_breaks_the_brokers_protocol_is_killed_and_replaced(stage, tmp_path):
    now = tmp_path / "now"
    stage.scripts["vfsd.broker"] = f"""
say(Ready())
while not os.path.exists({str(now)!r}):
    time.sleep(0.01)
say(Breach(0, b"unknown tag")); idle()
"""

    def act():
        now.touch()
        stage.wait_for("takes its place")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    assert re.search(r"worker 0 \(pid \d+\) broke the broker's protocol \(unknown tag\) and is killed", stage.log())


def test_further_workers_are_started_when_control_asks_and_introduced(stage):
    stage.scripts["vfsd.worker.control"] = (
        "say(Ready()); hear(); hear(); say(NeedWorker(1)); m = hear(); os.write(fd.fileno(), b'c'); log(f'control: {m}'); idle()"
    )
    stage.scripts["vfsd.broker"] = "say(Ready()); hear(); m = hear(); os.write(fd.fileno(), b'b'); log(f'broker: {m}'); idle()"
    stage.scripts["vfsd.worker"] = (
        "say(Ready())\n"
        "if config.index == 1:\n"
        "    log(f'worker {config.index} hears {os.read(config.control_fd, 1)} and {os.read(config.broker_fd, 1)}')\n"
        "idle()"
    )

    def act():
        stage.connect()
        stage.wait_for("hears")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    for text in ("control: AddWorker(index=1)", "broker: AddWorker(index=1)", "vfsd::worker1] worker 1 hears b'c' and b'b'"):
        assert text in stage.log()


def test_control_is_given_memory_for_in_flight_tables_that_cannot_shrink(stage):
    stage.scripts["vfsd.worker.control"] = """
import fcntl
say(Ready()); hear(); hear(); say(NeedInflight()); hear()
log(f"{os.fstat(fd.fileno()).st_size} bytes, seals {fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)}")
idle()
"""
    found = []

    def act():
        stage.connect()
        stage.wait_for("seals")
        found.append(re.search(r"(\d+) bytes, seals (\d+)", stage.log()).groups())
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    assert found == [(str(3 * TABLE_STRIDE_BYTES), str(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL))]


@pytest.mark.parametrize("asks", ["say(NeedInflight())", "hear(); say(NeedInflight()); hear(); say(NeedInflight())"])
def test_control_is_given_such_memory_once_for_each_frontend(stage, asks):
    stage.scripts["vfsd.worker.control"] = f"say(Ready()); hear(); {asks}; idle()"
    assert stage.run(act=stage.connect) == 1
    assert stage.last_line() == "control asked for in-flight tables without a frontend, or twice for the same one"


def test_a_worker_is_killed_and_replaced_when_control_says_that_it_does_not_let_go(stage):
    stage.scripts["vfsd.worker.control"] = (
        "say(Ready()); hear(); hear(); say(KillWorker(7, b'none')); say(KillWorker(0, b'it hangs')); hear(); log('a successor'); idle()"
    )

    def act():
        stage.connect()
        stage.wait_for("a successor")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(act=act) == 0
    assert "does not let go (it hangs) and is killed" in stage.log()
    assert "was killed by SIGKILL; another one takes its place" in stage.log()


KEEP = "--keep-listening"


def test_with_keep_listening_frontends_come_and_go(stage):
    stage.scripts["vfsd.worker.control"] = """
say(Ready()); hear()
for number in range(3):
    hear(); os.read(fd.fileno(), 1); say(FrontendGone(b"odd", number != 1)); log(f"frontend {number} is gone")
idle()
"""

    def act():
        for number in range(3):
            stage.connect()
            stage.frontends[number].send(b"x")
            stage.wait_for(f"frontend {number} is gone")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(KEEP, act=act) == 0
    log = stage.log()
    assert log.count("Client connected") == 3
    assert log.count("Client disconnected (odd)") == 2
    assert log.count("the frontend's connection was closed: odd") == 1


def test_with_keep_listening_control_is_replaced_when_its_workers_have_ended(stage, lives):
    """A worker that does not end by itself is killed."""
    stage.scripts["vfsd.worker.control"] = mortal(lives, []).replace("idle()", "hear(); hear(); os.kill(os.getpid(), signal.SIGSEGV)")
    stage.scripts["vfsd.worker"] = "say(Ready()); os.read(config.control_fd, 1); time.sleep(0.1); log('worker leaves'); os._exit(0)"

    def act():
        stage.connect()
        stage.wait_for("worker leaves")
        stage.wait_for("Waiting for vhost-user socket connection", times=2)
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(KEEP, act=act) == 0
    log = stage.log()
    assert log.count("was killed by SIGSEGV; the frontend is disconnected") == 1
    assert log.count("Waiting for vhost-user socket connection") == 2
    assert len(stage.pids()) == 5


def test_a_worker_that_does_not_let_go_of_a_dead_controls_memory_is_killed(stage, lives, monkeypatch):
    monkeypatch.setattr(vfsd.supervisor, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(vfsd.vigil, "TICK_SECONDS", 0.05)
    stage.scripts["vfsd.worker.control"] = mortal(lives, []).replace("idle()", "hear(); hear(); os.kill(os.getpid(), signal.SIGKILL)")

    def act():
        stage.connect()
        stage.wait_for("worker of life 1 serves")
        os.kill(os.getpid(), signal.SIGTERM)

    assert stage.run(KEEP, act=act) == 0
    assert "worker 0" in next(line for line in stage.log().splitlines() if "does not let go of the frontend's memory and is killed" in line)


@pytest.mark.parametrize("asked", ["NeedWorker(0)", "NeedWorker(2)", "NeedWorker(1)); say(NeedWorker(1)"])
def test_workers_are_bounded_and_started_once(stage, asked):
    stage.scripts["vfsd.worker.control"] = f"say(Ready()); hear(); hear(); say({asked}); idle()"
    assert stage.run(act=stage.connect) == 1
    assert "which exists or must not exist" in stage.last_line()
    assert len(stage.pids()) <= 4


def test_a_connected_socket_is_handed_over_at_once(stage):
    stage.scripts["vfsd.worker.control"] = HANDED_OVER + "os.read(fd.fileno(), 1); say(FrontendGone(b'', True)); idle()"
    ours, theirs = socket.socketpair()
    with ours:
        ours.send(b"x")
        assert stage.run(endpoint=adopt_socket(theirs.detach())) == 0
    assert "Waiting" not in stage.log()


def test_children_have_no_environment_no_terminal_and_nothing_else_open(stage, monkeypatch):
    monkeypatch.setenv("VFSD_TEST_SECRET", "x")
    stage.scripts["vfsd.worker"] = """
mine = {0, 1, 2, config.channel_fd, config.control_fd, config.broker_fd, config.supervisor_pidfd}
opened = {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}") or int(name) in mine}
log(f"secret {'VFSD_TEST_SECRET' in os.environ}, session leader {os.getsid(0) == os.getpid()}, more {opened - mine}, less {mine - opened}")
say(Ready()); idle()
"""
    assert stage.run(act=lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    assert "secret False, session leader True, more set(), less set()" in stage.log()


def test_options_reach_the_children(stage):
    stage.scripts["vfsd.worker"] = "log(f'{config.cache} {config.index}'); say(Ready()); idle()"
    stage.scripts["vfsd.broker"] = "log(f'{config.shared_dir} {config.inode_file_handles} {config.readonly}'); say(Ready()); idle()"
    stage.run("--cache=never", "--readonly", "--inode-file-handles=never", act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert "never 0" in stage.log()
    assert "b'/tmp' never True" in stage.log()


def test_capabilities_follow_the_options():
    options = parse_options(["--shared-dir=/tmp", "--fd=9"])
    roles = Roles(options=options, filters=dict.fromkeys(("broker", "control", "worker", "supervisor"), b""), supervisor_pidfd=3, nofile=10**6, privileged=True, standing=read_standing())  # fmt: skip
    assert "DAC_READ_SEARCH" in roles.broker(4).confinement.capabilities
    never = replace(roles, options=replace(options, inode_file_handles="never"))
    assert "DAC_READ_SEARCH" not in never.broker(4).confinement.capabilities
    for confined in (roles.control(4).confinement, roles.worker(0, 4, 5, 6).confinement):
        assert (confined.capabilities, confined.uid, confined.gid, confined.landlock) == ((), 65534, 65534, True)
        assert confined.nofile < 10**6
    assert replace(roles, privileged=False).worker(0, 4, 5, 6).confinement.uid is None
    assert replace(roles, privileged=False).broker(4).confinement.capabilities == ()


def test_how_long_a_start_may_take_is_for_a_service_manager_to_say(stage, tmp_path, monkeypatch):
    """It is told who is still starting, and kept up to date until the end."""
    monkeypatch.setattr(vfsd.supervisor, "START_SECONDS", 0.0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.fspath(tmp_path / "notify"))
        stage.manager = ServiceManager(connect_notify_socket(sock.getsockname()))
        assert stage.run(act=lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
        stage.manager.close()
        heard = [sock.recv(4096).decode().splitlines() for _ in range(4)]
    assert all(re.fullmatch(r"STATUS=Starting: (broker|control|worker 0)(, (broker|control|worker 0))?", text) for [text] in heard[:2])
    assert heard[2:] == [["READY=1", "STATUS=Waiting for a frontend, to serve /tmp"], ["STOPPING=1", "STATUS=Ending"]]


def test_a_start_that_hangs_ends_also_where_a_service_manager_would_wait(stage, tmp_path, monkeypatch):
    """Which may have been told to wait for ever; ours is the longer limit of the two that vfsd has."""
    assert vfsd.supervisor.LONGEST_START_SECONDS > vfsd.supervisor.START_SECONDS
    monkeypatch.setattr(vfsd.supervisor, "LONGEST_START_SECONDS", 0.5)
    stage.scripts["vfsd.worker"] = "idle()"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.fspath(tmp_path / "notify"))
        stage.manager = ServiceManager(connect_notify_socket(sock.getsockname()))
        assert stage.run() == 1
        stage.manager.close()
    assert re.fullmatch(r"not ready after \d+ s: .*\bworker 0", stage.last_line())
