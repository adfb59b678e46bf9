"""The vhost-user socket: who may connect, what is replaced, what is refused, what is removed."""

import fcntl
import grp
import os
import select
import signal
import socket
import stat
import threading

import pytest

from vfsd.children import death
from vfsd.config import DEFAULT_NOFILE
from vfsd.errors import ConfigError
from vfsd.limits import set_nofile
from vfsd.sockets import adopt_socket, make_listener


@pytest.fixture
def path(tmp_path):
    return os.fsencode(tmp_path / "vhost.sock")


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def listen_and_close(path, group=None):
    endpoint = make_listener(path, group)
    try:
        assert endpoint.listening
        with socket.socket(socket.AF_UNIX) as frontend:
            frontend.connect(path)
        return mode(path), os.stat(path).st_gid
    finally:
        endpoint.close()


def test_only_the_user_may_connect(path):
    umask = os.umask(0)
    try:
        assert listen_and_close(path)[0] == 0o700
        assert os.umask(0) == 0
    finally:
        os.umask(umask)
    assert os.listdir(os.path.dirname(path)) == []


def test_the_group_may_connect_where_one_is_named(path):
    group = grp.getgrgid(os.getgid())
    assert listen_and_close(path, group.gr_name) == (0o770, group.gr_gid)


def test_a_group_that_does_not_exist_is_an_error(path):
    with pytest.raises(ConfigError, match="--socket-group=no-such-group: there is no such group"):
        make_listener(path, "no-such-group")
    assert os.listdir(os.path.dirname(path)) == []


def test_the_pid_file_holds_our_pid_under_a_lock(path):
    endpoint = make_listener(path, None)
    with open(path + b".pid", "rb") as file:
        assert file.read() == b"%d\n" % os.getpid()
        assert mode(path + b".pid") == 0o600
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    endpoint.close()
    endpoint.close()
    assert os.listdir(os.path.dirname(path)) == []


def test_a_second_vfsd_at_the_same_path_is_an_error_and_disturbs_nothing(path):
    endpoint = make_listener(path, None)
    with pytest.raises(ConfigError, match="another vfsd serves this socket"):
        make_listener(path, None)
    assert sorted(os.listdir(os.path.dirname(path))) == [b"vhost.sock", b"vhost.sock.pid"]
    endpoint.close()


def test_what_a_killed_vfsd_left_is_replaced(path):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with open(path + b".pid", "wb") as file:
        file.write(b"999999999 and more")
    listen_and_close(path)


def test_a_file_that_is_not_a_socket_is_never_removed(path):
    with open(path, "wb") as file:
        file.write(b"precious")
    with pytest.raises(ConfigError, match="not a socket"):
        make_listener(path, None)
    with open(path, "rb") as file:
        assert file.read() == b"precious"
    assert not os.path.exists(path + b".pid")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"/run/" + b"x" * 103, "108 bytes, a socket path has at most 107"),
        (b"/no/such/directory/s", r"--socket-path=/no/such/directory/s: cannot write the pid file .*No such file or directory"),
    ],
)
def test_paths_that_cannot_be(path, text):
    with pytest.raises(ConfigError, match=text):
        make_listener(path, None)


def test_a_pid_file_that_is_a_symlink_is_not_followed(path, tmp_path):
    os.symlink(tmp_path / "elsewhere", path + b".pid")
    with pytest.raises(ConfigError, match="pid file"):
        make_listener(path, None)
    assert not os.path.exists(tmp_path / "elsewhere")


def test_a_listening_socket_is_adopted_and_stays(path):
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(path)
        theirs.listen()
        endpoint = adopt_socket(theirs.detach())
    assert endpoint.listening
    frontend = socket.socket(socket.AF_UNIX)
    connecting = threading.Thread(target=frontend.connect, args=(path,))
    connecting.start()
    select.select([endpoint.socket], [], [], 5)
    connection, _ = endpoint.socket.accept()
    with pytest.raises(BlockingIOError):
        endpoint.socket.accept()
    connecting.join()
    connection.close()
    frontend.close()
    endpoint.close()
    assert os.path.exists(path)


def test_a_connected_socket_is_adopted_as_such():
    ours, theirs = socket.socketpair()
    endpoint = adopt_socket(theirs.detach())
    assert not endpoint.listening
    assert not os.get_inheritable(endpoint.socket.fileno())
    endpoint.close()
    ours.close()


def test_other_descriptors_are_not_adopted():
    with pytest.raises(ConfigError, match="--fd=987654: Bad file descriptor"):
        adopt_socket(987654)
    read_end, write_end = os.pipe()
    with pytest.raises(ConfigError, match=r"not a socket|non-socket"):
        adopt_socket(read_end)
    os.close(read_end)
    os.close(write_end)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong, pytest.raises(ConfigError, match="not a Unix stream socket"):
        adopt_socket(wrong.detach())


class FakeLimits:
    """resource, with a hard limit that cannot be raised."""

    RLIMIT_NOFILE = 7

    def __init__(self, soft, hard):
        self.limits = (soft, hard)

    def getrlimit(self, _which):
        return self.limits

    def setrlimit(self, _which, limits):
        if limits[1] > self.limits[1]:
            raise ValueError("not allowed to raise maximum limit")
        self.limits = limits


@pytest.fixture
def limits(monkeypatch):
    fake = FakeLimits(1024, 20000)
    monkeypatch.setattr("vfsd.limits.resource", fake)
    monkeypatch.setattr("vfsd.limits._read_nr_open", lambda: 1048576)
    return fake


def test_the_default_limit_falls_back_to_the_hard_one_with_a_warning(limits):
    nofile = set_nofile(None)
    assert nofile.limit == 20000
    assert "cannot be raised to 1000000; the hard limit of 20000 is used" in nofile.warning
    assert limits.limits == (20000, 20000)


def test_the_default_limit_where_it_can_be_had(limits):
    limits.limits = (1024, 2_000_000)
    assert set_nofile(None) == (DEFAULT_NOFILE, "")


def test_zero_leaves_the_limit_alone(limits):
    assert set_nofile(0) == (1024, "")
    assert limits.limits == (1024, 20000)


def test_a_limit_that_was_asked_for_is_had_or_an_error(limits):
    assert set_nofile(5000).limit == 5000
    with pytest.raises(ConfigError, match=r"--rlimit-nofile=30000: the hard limit is 5000, .*LimitNOFILE"):
        set_nofile(30000)
    with pytest.raises(ConfigError, match="--rlimit-nofile=2000000: the system allows 1048576"):
        set_nofile(2_000_000)


def test_deaths_in_words():
    assert death(3) == "ended with exit status 3"
    assert death(-signal.SIGKILL) == "was killed by SIGKILL"
    assert death(-60) == "was killed by signal 60"
    assert "seccomp" in death(-signal.SIGSYS)
