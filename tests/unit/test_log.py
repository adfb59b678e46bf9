"""Log lines: bounded, escaped, limited in rate, and never waited for."""

import os
import socket

import pytest

from vfsd.channel import Channel
from vfsd.log import (
    DEBUG,
    ERROR,
    INFO,
    LINES_IN_A_BURST,
    LINES_PER_SECOND,
    OFF,
    WARNING,
    ChildLines,
    ChildLog,
    StderrLog,
    describe,
    printable,
)
from vfsd.wire.channel import SUPERVISOR_TO_CHILD, WORKER_TO_SUPERVISOR, Log


@pytest.fixture
def pipe():
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def read_all(fd):
    try:
        return os.read(fd, 1 << 20).decode()
    except BlockingIOError:
        return ""


def test_a_line_looks_like_env_loggers(pipe):
    log = StderrLog(INFO, pipe[1], clock=lambda: 1795363200.5)
    log.info("Waiting for vhost-user socket connection...")
    log.line(WARNING, "worker0", "odd")
    assert read_all(pipe[0]) == (
        "[2026-11-22T16:00:00Z INFO  vfsd] Waiting for vhost-user socket connection...\n[2026-11-22T16:00:00Z WARN  vfsd::worker0] odd\n"
    )


def test_a_line_for_the_journal_begins_with_its_priority(pipe):
    log = StderrLog(DEBUG, pipe[1], journal=True)
    for say in (log.error, log.warning, log.info, log.debug):
        say("a\n<0>forged")
    ChildLines(log, "worker0").write(WARNING, b"odd")
    said = "a\\n<0>forged"
    assert read_all(pipe[0]).splitlines() == [f"<3>{said}", f"<4>{said}", f"<6>{said}", f"<7>{said}", "<4>worker0: odd"]


@pytest.mark.parametrize(("level", "expected"), [(OFF, 0), (ERROR, 1), (WARNING, 2), (INFO, 3), (DEBUG, 4)])
def test_the_level_decides_what_is_shown(pipe, level, expected):
    log = StderrLog(level, pipe[1])
    for say in (log.error, log.warning, log.info, log.debug):
        say("x")
    assert read_all(pipe[0]).count("\n") == expected


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("plain ä text") == "plain ä text"
    assert printable("a\nb\x1b[31m\x00\u202e\udcff") == "a\\nb\\x1b[31m\\x00\\u202e\\udcff"


def test_a_childs_bytes_become_one_printable_line(pipe):
    ChildLines(StderrLog(INFO, pipe[1]), "broker").write(INFO, b"name \xff\n[2026 ERROR vfsd] forged")
    text = read_all(pipe[0])
    assert text.count("\n") == 1
    assert "INFO  vfsd::broker] name \\xff\\n[2026 ERROR vfsd] forged" in text


def test_a_child_cannot_flood_the_log(pipe):
    now = [0.0]
    read_end, write_end = pipe
    lines = ChildLines(StderrLog(INFO, write_end), "worker0", clock=lambda: now[0])
    shown = 0
    for _ in range(LINES_IN_A_BURST + 500):
        lines.write(ERROR, b"x")
        shown += read_all(read_end).count("\n")
    assert shown == LINES_IN_A_BURST
    now[0] = 1.0
    lines.write(ERROR, b"after")
    text = read_all(read_end)
    assert f"500 lines suppressed: more than {LINES_PER_SECOND} a second" in text
    assert "after" in text


def test_level_zero_from_a_child_cannot_hide_in_an_unknown_level(pipe):
    ChildLines(StderrLog(ERROR, pipe[1]), "worker0").write(0, b"x")
    assert "ERROR vfsd::worker0] x" in read_all(pipe[0])


def test_a_full_or_closed_stderr_is_not_waited_for(pipe):
    read_end, write_end = pipe
    log = StderrLog(INFO, write_end)
    for _ in range(2000):
        log.info("x" * 900)
    assert read_all(read_end)
    StderrLog(INFO, 10**6).info("nobody there")


def test_a_child_sends_bounded_records_and_counts_what_is_lost():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        log = ChildLog(Channel(here, SUPERVISOR_TO_CHILD), INFO)
        supervisor = Channel(there, WORKER_TO_SUPERVISOR)
        log.debug("not sent")
        log.info("y" * 5000)
        assert supervisor.receive().message == Log(INFO, b"y" * 1000)
        while not log.lost:
            log.info("z" * 1000)
        while supervisor.receive() is not None:
            pass
        log.error("room again")
        assert supervisor.receive().message == Log(WARNING, b"1 log lines were lost: the supervisor's channel was full")
        assert supervisor.receive().message == Log(ERROR, b"room again")
        assert log.lost == 0


def test_a_child_whose_supervisor_is_gone_goes_on():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here:
        there.close()
        log = ChildLog(Channel(here, SUPERVISOR_TO_CHILD), INFO)
        log.info("into the void")
        assert log.lost == 1


def test_an_error_is_described_without_its_traceback():
    try:
        raise KeyError("missing")
    except KeyError as error:
        text = describe(error)
    assert text.startswith("KeyError at ")
    assert "test_log:" in text
    assert describe(OSError("never raised")) == "OSError at ?: never raised"
    assert len(describe(ValueError("x" * 5000))) == 500
