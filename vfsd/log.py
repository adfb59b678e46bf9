"""Log lines: how a child sends them to the supervisor, and how the supervisor writes them to stderr.

Who controls the bytes: a child may be hostile, so what it sends is bounded by the channel's codec, its rate is limited,
and every character that is not printable is escaped before it reaches a terminal or a log file. A confined child never
formats a traceback (that opens source files): it sends the error's type, module and line. Imports errors, channel and wire.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from vfsd.channel import Channel, ChannelClosed
from vfsd.wire.channel import Log, bounded

OFF: Final = 0
ERROR: Final = 1
WARNING: Final = 2
INFO: Final = 3
DEBUG: Final = 4
TRACE: Final = 5
LEVELS: Final = {"off": OFF, "error": ERROR, "warn": WARNING, "info": INFO, "debug": DEBUG, "trace": TRACE}
_NAMES: Final = {ERROR: "ERROR", WARNING: "WARN ", INFO: "INFO ", DEBUG: "DEBUG", TRACE: "TRACE"}
SEVERITIES: Final = {ERROR: 3, WARNING: 4, INFO: 6, DEBUG: 7, TRACE: 7}  # of syslog(3), and of the journal: sd-daemon(3)

STDERR: Final = 2
LINES_IN_A_BURST: Final = 2000  # what a child may say at once,
LINES_PER_SECOND: Final = 500  # and go on saying: a log on a disk must not be filled by a guest


class Logger:
    """The methods that both kinds of log have."""

    def __init__(self, level: int) -> None:
        self.level = level

    def _emit(self, level: int, text: str) -> None:
        raise NotImplementedError

    def log(self, level: int, text: str) -> None:
        if level <= self.level:
            self._emit(level, text)

    def error(self, text: str) -> None:
        self.log(ERROR, text)

    def warning(self, text: str) -> None:
        self.log(WARNING, text)

    def info(self, text: str) -> None:
        self.log(INFO, text)

    def debug(self, text: str) -> None:
        self.log(DEBUG, text)

    def bug(self, where: str, error: BaseException) -> None:
        """An exception that nobody foresaw, at the dispatch boundary that caught it."""
        self.log(ERROR, f"bug in {where}: {describe(error)}")


class ChildLog(Logger):
    """A child's log: sent over its supervisor channel, dropped and counted when that is full.

    Threads may share it: a packet is sent whole or not at all, and a miscounted loss does no harm.
    """

    def __init__(self, channel: Channel, level: int = INFO) -> None:
        super().__init__(level)
        self._channel = channel
        self.lost = 0

    def _emit(self, level: int, text: str) -> None:
        if self.lost and self._send(WARNING, f"{self.lost} log lines were lost: the supervisor's channel was full"):
            self.lost = 0
        if not self._send(level, text):
            self.lost += 1

    def _send(self, level: int, text: str) -> bool:
        try:
            return self._channel.send(Log(level, bounded(text)))
        except ChannelClosed:
            return False  # the supervisor is gone; the main loop learns of it by itself


class StderrLog(Logger):
    """The supervisor's log: one line per call, in env_logger's style, which readers of virtiofsd's logs know.

    A frontend may give us a non-blocking pipe as stderr (libvirt does); what does not fit is lost rather than waited for.
    For the journal, which adds the time and the program's name itself, a line begins with its priority instead.
    """

    def __init__(self, level: int = INFO, fd: int = STDERR, clock: Callable[[], float] = time.time, *, journal: bool = False) -> None:
        super().__init__(level)
        self._fd = fd
        self._clock = clock
        self._head = self._journal_head if journal else self._env_logger_head

    def _emit(self, level: int, text: str) -> None:
        self.line(level, "", text)

    def line(self, level: int, role: str, text: str) -> None:
        """One line; `role` names the child that said it."""
        if level > self.level:
            return
        try:
            os.write(self._fd, f"{self._head(level, role)}{printable(text)}\n".encode())
        except OSError:
            return  # nobody reads our log, which is no reason to stop serving files

    def _env_logger_head(self, level: int, role: str) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))
        target = f"vfsd::{role}" if role else "vfsd"
        return f"[{stamp} {_NAMES.get(level, 'ERROR')} {target}] "

    def _journal_head(self, level: int, role: str) -> str:
        return f"<{SEVERITIES.get(level, 3)}>" + (f"{role}: " if role else "")


class ChildLines:
    """What one child says, on its way to stderr: a token bucket, so that a taken-over child cannot fill a disk."""

    def __init__(self, log: StderrLog, role: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._role = role
        self._clock = clock
        self._tokens = float(LINES_IN_A_BURST)
        self._last = clock()
        self._suppressed = 0

    def rename(self, role: str) -> None:
        self._role = role

    def write(self, level: int, text: bytes) -> None:
        if level > self._log.level:
            return
        now = self._clock()
        self._tokens = min(LINES_IN_A_BURST, self._tokens + (now - self._last) * LINES_PER_SECOND)
        self._last = now
        if self._tokens < 1:
            self._suppressed += 1
            return
        self._tokens -= 1
        if self._suppressed:
            self._log.line(WARNING, self._role, f"{self._suppressed} lines suppressed: more than {LINES_PER_SECOND} a second")
            self._suppressed = 0
        self._log.line(max(level, ERROR), self._role, decode_text(text))


def decode_text(text: bytes) -> str:
    """A child's bytes as text; what is not UTF-8 becomes an escape."""
    return text.decode(errors="backslashreplace")


def printable(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", errors="backslashreplace").decode("ascii")


def describe(error: BaseException) -> str:
    """Type, module and line of an error, without opening a source file; its text too, which may hold guest bytes."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}" if trace is not None else "?"
    return f"{type(error).__name__} at {place}: {error}"[:500]
