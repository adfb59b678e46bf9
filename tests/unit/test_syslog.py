"""Log lines to a syslog daemon."""

import os
import socket

import pytest

from vfsd.log import DEBUG, ERROR, INFO, WARNING
from vfsd.syslog import SyslogLog


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "log")


@pytest.fixture
def daemon(path):
    with listener(path) as daemon:
        yield daemon


@pytest.fixture
def log(daemon, path):
    log = SyslogLog(INFO, path)
    yield log
    log.close()


def listener(path):
    daemon = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    daemon.bind(path)
    daemon.setblocking(False)
    return daemon


@pytest.mark.parametrize(("level", "priority"), [(ERROR, 27), (WARNING, 28), (INFO, 30)])
def test_a_line_has_its_severity_and_our_pid(daemon, log, level, priority):
    log.log(level, "said")
    assert daemon.recv(1000) == b"<%d>vfsd[%d]: said" % (priority, os.getpid())


def test_what_a_child_says_has_its_name_and_is_escaped(daemon, log):
    log.line(WARNING, "worker 1", "a\nb\x1b")
    assert daemon.recv(1000).endswith(rb": worker 1: a\nb\x1b")


def test_what_is_below_the_level_is_not_said(daemon, log):
    log.log(DEBUG, "no")
    with pytest.raises(BlockingIOError):
        daemon.recv(1000)


def test_a_full_socket_loses_lines_and_does_not_block(daemon, log):
    for _ in range(2000):
        log.info("x" * 1000)
    daemon.recv(2000)
    log.info("again")


def test_a_daemon_that_was_started_again_gets_the_next_line(daemon, log, path):
    daemon.close()
    log.info("lost")
    os.unlink(path)
    log.info("lost too")
    with listener(path) as successor:
        log.info("here")
        assert successor.recv(1000).endswith(b": here")


def test_nobody_there_is_an_error(path):
    with pytest.raises(FileNotFoundError):
        SyslogLog(INFO, path)
