"""What a service manager passes and is told: sd_listen_fds(3), sd_notify(3), with real sockets and a clock of our own."""

import os
import socket
import stat
from contextlib import suppress

import pytest

from vfsd.cli import parse_options
from vfsd.errors import ConfigError
from vfsd.service_manager import FIRST_LISTEN_FD, Given, ServiceManager, connect_notify_socket, take_given

OURS = str(os.getpid())
SHARE = "--shared-dir=/tmp"


@pytest.fixture
def manager_socket(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.fspath(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


@pytest.fixture
def manager(manager_socket):
    """Of a service that must show life every 40 s: four times in that."""
    now = [100.0]
    manager = ServiceManager(connect_notify_socket(manager_socket.getsockname()), 40.0, clock=lambda: now[0])
    manager.now = now
    yield manager
    manager.close()


def heard(sock):
    messages = []
    while True:
        try:
            messages.append(sock.recv(4096).decode().splitlines())
        except BlockingIOError:
            return messages


# --- the socket that is passed --------------------------------------------------------------------------------------------------


def test_the_variables_are_taken_out_of_the_environment():
    environ = {
        "LISTEN_FDS": "1", "LISTEN_PID": OURS, "LISTEN_FDNAMES": "vfsd", "LISTEN_PIDFDID": "7", "NOTIFY_SOCKET": "@x",
        "WATCHDOG_USEC": "1", "WATCHDOG_PID": OURS, "JOURNAL_STREAM": "8:1", "HOME": "/root",
    }  # fmt: skip
    given = take_given(environ)
    assert environ == {"HOME": "/root"}
    assert given == Given("1", OURS, "@x", "1", OURS, "8:1")
    assert take_given(environ) == Given()


def test_one_socket_for_us_is_descriptor_3():
    options = parse_options([SHARE], Given(listen_fds="1", listen_pid=OURS))
    assert (options.fd, options.fd_from, options.socket_path) == (FIRST_LISTEN_FD, "LISTEN_FDS=1", None)


def test_a_number_on_the_command_line_counts_alone():
    """systemd-vmspawn has systemd-socket-activate pass the socket, and names it too."""
    for given in (Given("1", OURS), Given("2", OURS), Given("1", "1")):
        options = parse_options([SHARE, "--fd", "3"], given)
        assert (options.fd, options.fd_from) == (3, "")


@pytest.mark.parametrize(
    ("fds", "pid", "argv", "complaint"),
    [
        ("2", "ours", [], "LISTEN_FDS=2: vfsd serves exactly one socket"),
        ("0", "ours", [], "LISTEN_FDS=0: vfsd serves exactly one socket"),
        ("x", "ours", [], "LISTEN_FDS=x: vfsd serves exactly one socket"),
        ("1", "1", [], "LISTEN_PID=1: the socket was passed to another process, vfsd is"),
        ("1", "", [], "LISTEN_PID=: the socket was passed to another process"),
        (
            "1",
            "ours",
            ["--socket-path=/tmp/x"],
            "--socket-path: not allowed with a socket that the service manager passes (LISTEN_FDS)",
        ),
        ("1", "ours", ["--socket-group=kvm"], "--socket-group: not allowed with LISTEN_FDS=1"),
        ("", "", [], "--socket-path --socket --fd is required, or a socket from a service manager (LISTEN_FDS)"),
    ],
)
def test_what_cannot_be_is_said_at_the_command_line(fds, pid, argv, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_options([SHARE, *argv], Given(fds, pid.replace("ours", OURS)))
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_socket_passed_to_an_ancestor_is_no_conflict():
    assert parse_options([SHARE, "--socket-path=/tmp/x"], Given("1", "1")).fd is None


def test_a_socket_passed_to_another_is_not_adopted():
    with pytest.raises(ConfigError, match="executed directly"):
        Given("1", "1").listen_fd()


# --- what the manager is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["path", "abstract"])
def test_both_kinds_of_address_are_connected(address, tmp_path):
    name = os.fspath(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name if address == "path" else b"\0" + name.encode())
        with connect_notify_socket(name if address == "path" else f"@{name}") as fd:
            assert not os.get_inheritable(fd.fileno())
            os.write(fd.fileno(), b"x")
        assert sock.recv(10) == b"x"


def test_other_addresses_are_refused_and_none_is_none(tmp_path):
    assert connect_notify_socket("") is None
    for address in ("vsock:2:1234", "relative"):
        with pytest.raises(ValueError, match="neither a path nor an abstract name"):
            connect_notify_socket(address)
    with pytest.raises(FileNotFoundError):
        connect_notify_socket(os.fspath(tmp_path / "absent"))


def test_readiness_status_and_end_are_told_in_order(manager, manager_socket):
    manager.status("early")
    manager.ready("Waiting", list)
    manager.status("Serving\nREADY=0")
    manager.stopping("Ending")
    manager.healthy()  # an answer that was still on its way
    assert heard(manager_socket) == [
        ["STATUS=early"],
        ["READY=1", "STATUS=Waiting"],
        ["STATUS=Serving\\nREADY=0"],
        ["STOPPING=1", "STATUS=Ending"],
    ]


def test_a_heartbeat_needs_an_answer_each_time(manager, manager_socket):
    asked = []
    manager.tick()
    assert (manager.seconds(), asked) == (None, []), "nothing is due before readiness"
    manager.ready("Waiting", lambda: asked.append(manager.now[0]))
    heard(manager_socket)
    for manager.now[0] in (100.0, 105.0, 109.9, 110.0, 119.0, 125.0):
        manager.tick()
    assert asked == [100.0, 110.0, 125.0]
    assert manager.seconds() == 10.0
    assert heard(manager_socket) == [], "asked is not answered"
    manager.healthy()
    assert heard(manager_socket) == [["WATCHDOG=1"]]


def test_what_a_full_queue_does_not_take_is_told_later(manager, manager_socket):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                other.sendto(b"x", manager_socket.getsockname())
        manager.status("old")
        manager.ready("new", list)
        assert manager.seconds() < 1, "it is tried again soon"
        heard(manager_socket)
        manager.tick()
    assert heard(manager_socket) == [["STATUS=new", "READY=1"]]


def test_a_manager_that_is_gone_is_no_reason_to_stop(manager, manager_socket):
    manager_socket.close()
    manager.ready("Waiting", list)
    manager.status("Serving")
    manager.tick()


def test_without_a_manager_nothing_is_told_and_nothing_due():
    manager = ServiceManager(None, 40.0)
    manager.ready("Waiting", list)
    manager.tick()
    manager.healthy()
    assert manager.seconds() is None


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", "ours", 30.0),
        ("30000000", "", 30.0),
        ("30000000", "1", None),
        ("", "ours", None),
        ("0", "ours", None),
        ("x", "ours", None),
        ("1" * 5000, "", None),
    ],
)
def test_heartbeats_are_for_who_is_asked(usec, pid, seconds):
    assert Given(watchdog_usec=usec, watchdog_pid=pid.replace("ours", OURS)).watchdog_seconds() == seconds


def test_the_journal_is_known_by_device_and_inode():
    read_end, write_end = os.pipe()
    about = os.fstat(write_end)
    assert stat.S_ISFIFO(about.st_mode)
    assert Given(journal_stream=f"{about.st_dev}:{about.st_ino}").is_journal(write_end)
    assert not Given(journal_stream=f"{about.st_dev}:{about.st_ino + 1}").is_journal(write_end), "stderr was redirected since"
    assert not Given().is_journal(write_end)
    os.close(read_end)
    os.close(write_end)
    assert not Given(journal_stream="8:1").is_journal(write_end)
