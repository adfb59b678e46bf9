"""vfsd as a service manager starts it, with systemd's own program that passes sockets, and a notify socket of the test's."""

import os
import re
import shlex
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.frontend.daemon import Daemon, Options, vfsd
from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.sequences import QEMU_10

WAIT_SECONDS = 30
WATCHDOG_SECONDS = 0.8


class Manager:
    """The manager's end of $NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(WAIT_SECONDS)
        self.socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self.environment = {"NOTIFY_SOCKET": address}

    def hear(self) -> list[str]:
        return self.socket.recv(4096).decode().splitlines()

    def hear_until(self, assignment: str) -> list[list[str]]:
        """All messages up to the one with that in it."""
        heard = [self.hear()]
        while assignment not in heard[-1]:
            heard.append(self.hear())
        return heard

    def silent_for(self, seconds: float) -> bool:
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(WAIT_SECONDS)
        return False


@pytest.fixture(params=["path", "abstract"])
def any_manager(request, tmp_path):
    manager = Manager(f"{'@' if request.param == 'abstract' else ''}{tmp_path}/notify")
    yield manager
    manager.socket.close()


@pytest.fixture
def manager(tmp_path):
    manager = Manager(f"{tmp_path}/notify")
    yield manager
    manager.socket.close()


def activated(share: Path, listen: Path, environment: dict[str, str], *more: str) -> list[str]:
    """The command line by which systemd-socket-activate listens there, and executes vfsd at the first connection."""
    command = vfsd(share, listen, Options(extra=more))
    at = command.index("--socket-path")
    variables = [f"--setenv={name}={value}" for name, value in environment.items()]
    return ["systemd-socket-activate", f"--listen={listen}", *variables, *command[:at], *command[at + 2 :]]


@pytest.fixture
def share(tmp_path):
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "file").write_text("contents")
    return tmp_path / "share"


@pytest.fixture
def start(tmp_path, share):
    """Start vfsd by a command line made of the share's and the socket's path."""
    daemons = []

    def start(command, **how):
        daemons.append(Daemon(share, tmp_path / "vfsd.sock", command=lambda share, path, _options: command(share, path), **how))
        return daemons[-1]

    yield start
    for daemon in daemons:
        print(daemon.describe())
        daemon.stop()


def read_a_file(path: Path) -> Device:
    device = Device(str(path)).attach(QEMU_10)
    client = FuseClient(device)
    client.init()
    assert client.read_file(client.lookup(ROOT, b"file").nodeid) == b"contents"
    return device


def descriptors(pid: int) -> set[str]:
    return {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}


@pytest.mark.parametrize("more", [(), ("--fd", "3")], ids=["implicit", "as systemd-vmspawn"])
def test_a_socket_that_is_passed_is_served(start, manager, more):
    daemon = start(lambda share, path: activated(share, path, manager.environment, *more), wait=False)
    daemon.wait_for_log("Listening on")
    device = read_a_file(daemon.socket)
    heard = manager.hear_until(f"STATUS=Serving {daemon.share} to process {os.getpid()}")
    assert heard[-2] == ["READY=1", f"STATUS=Waiting for a frontend, to serve {daemon.share}"]
    device.close()
    assert daemon.wait() == 0
    assert manager.hear() == ["STOPPING=1", "STATUS=Ending"]
    assert daemon.socket.exists(), "who made the socket removes it"


def test_readiness_is_told_at_either_kind_of_address_and_children_know_nothing_of_it(start, any_manager, share):
    daemon = start(lambda share, path: vfsd(share, path, Options()), env={**os.environ, **any_manager.environment})
    any_manager.hear_until("READY=1")
    supervisor, *children = daemon.pids()
    inode = os.stat(f"/proc/{supervisor}/fd/{notify_fd(supervisor, any_manager)}").st_ino
    assert len(children) >= 3
    for child in children:
        assert Path(f"/proc/{child}/environ").read_bytes() == b""
        assert f"socket:[{inode}]" not in descriptors(child)
    os.kill(daemon.pid, signal.SIGTERM)
    assert any_manager.hear_until("STOPPING=1") == [["STOPPING=1", "STATUS=Ending"]]


def notify_fd(pid: int, manager: Manager) -> str:
    """The process's only datagram socket."""
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    datagram = {f"socket:[{words[6]}]" for words in unix if words[4] == "0002"}
    found = [fd for fd in os.listdir(f"/proc/{pid}/fd") if os.readlink(f"/proc/{pid}/fd/{fd}") in datagram]
    assert len(found) == 1, f"{manager.environment}: {found}"
    return found[0]


def test_heartbeats_come_while_the_broker_answers_and_stop_while_it_does_not(start, manager):
    environment = {**os.environ, **manager.environment, "WATCHDOG_USEC": f"{WATCHDOG_SECONDS * 1e6:.0f}"}
    daemon = start(lambda share, path: vfsd(share, path, Options()), env=environment)
    for _ in range(3):
        manager.hear_until("WATCHDOG=1")
    broker = next(pid for pid in daemon.pids() if b"vfsd.broker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(broker, signal.SIGSTOP)
    while not manager.silent_for(2 * WATCHDOG_SECONDS):  # what it had answered before
        pass
    os.kill(broker, signal.SIGCONT)
    manager.hear_until("WATCHDOG=1")


def test_why_it_ends_is_told(start, manager):
    daemon = start(lambda share, path: vfsd(share, path, Options()), env={**os.environ, **manager.environment})
    manager.hear_until("READY=1")
    os.kill(daemon.pids()[2], signal.SIGKILL)  # control: a worker would be replaced
    assert daemon.wait() == 1
    stopping, status = manager.hear_until("STOPPING=1")[-1]
    assert (stopping, "was killed by SIGKILL" in status) == ("STOPPING=1", True)


def test_a_manager_that_cannot_be_told_is_a_warning(start, share):
    daemon = start(lambda share, path: vfsd(share, path, Options()), env={**os.environ, "NOTIFY_SOCKET": f"{share}/absent"})
    daemon.wait_for_log("WARN  vfsd] NOTIFY_SOCKET=.*/absent: the service manager cannot be told of readiness: .*No such file")


def test_lines_for_the_journal_have_a_priority_and_no_time(start):
    """The journal is the pipe that stderr is, as far as the variable says so."""

    def command(share: Path, path: Path) -> list[str]:
        line = shlex.join(vfsd(share, path, Options()))
        return ["sh", "-c", f"JOURNAL_STREAM=$(stat --dereference --format=%d:%i /proc/self/fd/2) exec {line}"]

    daemon = start(command)
    daemon.stop()
    assert daemon.log[-2:] == ["<6>Waiting for vhost-user socket connection...", "<6>SIGTERM received, shutting down"]
    assert all(re.match(r"<[46]>[^\[<]", line) for line in daemon.log)


@pytest.mark.parametrize(("family", "kind"), [(socket.AF_UNIX, socket.SOCK_DGRAM), (socket.AF_INET, socket.SOCK_STREAM)])
def test_a_socket_of_a_wrong_kind_is_named(share, tmp_path, family, kind):
    """Passed by a shell: systemd-socket-activate would wait for somebody to connect first."""
    command = vfsd(share, tmp_path / "unused", Options())
    at = command.index("--socket-path")
    line = shlex.join([*command[:at], *command[at + 2 :]])
    with socket.socket(family, kind) as wrong:
        done = subprocess.run(
            ["bash", "-c", f"exec 3<&{wrong.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec {line}"],
            pass_fds=[wrong.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    complaint = "LISTEN_FDS=1: is not a Unix stream socket; pass a listening or connected Unix stream socket"
    assert complaint in done.stderr.splitlines()[-1]
