"""What passes between vfsd and a service manager that started it (systemd): a socket, readiness, a status line, heartbeats.

The protocols are those of sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3), which need no library: environment
variables, an inherited descriptor, and datagrams of `NAME=value` lines. Who controls the bytes: who starts vfsd. For the
supervisor alone: children get an empty environment, and the socket to the manager is closed when they are executed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd
from vfsd.log import printable

FIRST_LISTEN_FD = 3  # SD_LISTEN_FDS_START
RETRY_SECONDS = 0.1  # until the manager, whose queue is full, is told again
_MOST_DIGITS = 20  # of 2^64
_BEATS = 4  # in the time after which the manager gives up: one may be late, and one lost
_VARIABLES = (
    "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Given:
    """What the environment said at the start, as it stood there; empty where it said nothing."""

    listen_fds: str = ""
    listen_pid: str = ""
    notify_socket: str = ""
    watchdog_usec: str = ""
    watchdog_pid: str = ""
    journal_stream: str = ""

    def has_socket(self) -> bool:
        """Whether a socket was passed to this very process; variables that an ancestor forgot to remove are not for us."""
        return bool(self.listen_fds) and _number(self.listen_pid) == os.getpid()

    def listen_fd(self) -> int | None:
        """The descriptor passed, None if there is no word of any. Raises ConfigError where it cannot be one for vfsd."""
        if not self.listen_fds:
            return None
        if not self.has_socket():
            raise ConfigError(
                f"LISTEN_PID={self.listen_pid}: the socket was passed to another process, vfsd is {os.getpid()}; "
                "have vfsd executed directly, not by a program that stays between"
            )
        if self.listen_fds != "1":
            raise ConfigError(f"LISTEN_FDS={self.listen_fds}: vfsd serves exactly one socket; have one passed, and start one vfsd for each")
        return FIRST_LISTEN_FD

    def choose_fd(self, fd: int | None, socket_path: bytes | None) -> tuple[int | None, str]:
        """The inherited socket's number, from --fd or from here, and what else than --fd said so. Raises ConfigError.

        With --fd that counts alone: systemd-vmspawn gives it, and passes the same socket.
        """
        if fd is not None:
            return fd, ""
        if socket_path is not None:
            if self.has_socket():
                raise ConfigError(
                    "argument --socket-path: not allowed with a socket that the service manager passes (LISTEN_FDS); leave one out"
                )
            return None, ""
        passed = self.listen_fd()
        if passed is None:
            raise ConfigError(
                "one of the arguments --socket-path --socket --fd is required, or a socket from a service manager (LISTEN_FDS)"
            )
        return passed, f"LISTEN_FDS={self.listen_fds}"

    def watchdog_seconds(self) -> float | None:
        """After how long without a heartbeat the manager gives us up; None if it does not wait for any from us."""
        usec = _number(self.watchdog_usec)
        if not usec or (self.watchdog_pid and _number(self.watchdog_pid) != os.getpid()):
            return None
        return usec / 1e6

    def is_journal(self, fd: int) -> bool:
        """Whether the journal reads what is written there (systemd.exec(5), JOURNAL_STREAM)."""
        try:
            about = os.fstat(fd)
        except OSError:
            return False
        return self.journal_stream == f"{about.st_dev}:{about.st_ino}"


NOTHING_GIVEN = Given()


def take_given(environ: MutableMapping[str, str]) -> Given:
    """Read the variables and remove them: whatever is started from here on is not who they are for."""
    taken = {name: environ.pop(name, "") for name in _VARIABLES}
    return Given(
        listen_fds=taken["LISTEN_FDS"],
        listen_pid=taken["LISTEN_PID"],
        notify_socket=taken["NOTIFY_SOCKET"],
        watchdog_usec=taken["WATCHDOG_USEC"],
        watchdog_pid=taken["WATCHDOG_PID"],
        journal_stream=taken["JOURNAL_STREAM"],
    )


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None


def connect_notify_socket(address: str) -> OwnedFd | None:
    """The socket at $NOTIFY_SOCKET, a path or @name, before lock-down and namespaces; None for "". Raises OSError or ValueError."""
    if not address:
        return None
    if address[0] not in "/@":
        raise ValueError("neither a path nor an abstract name")
    # One of a pair, and reconnected: a service that was passed its listening socket needs no socket(2) at all then, and can
    # be denied every address family (RestrictAddressFamilies=none).
    sock, unused = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    unused.close()
    with sock:
        sock.connect(os.fsencode(address).replace(b"@", b"\0", 1) if address[0] == "@" else address)
        return OwnedFd(sock.detach())


class ServiceManager:
    """Tells the manager how vfsd does, and that it lives: as often as it asked, and only while `ask_health` brings answers.

    Nothing here waits: what the manager's queue does not take is kept, newest value of each name, and sent with the next tick.
    """

    def __init__(
        self, notify: OwnedFd | None = None, watchdog_seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM, 0, fileno=notify.detach()) if notify is not None else None
        self._beat_seconds = watchdog_seconds / _BEATS if watchdog_seconds and self._socket is not None else None
        self._clock = clock
        self._unsent: dict[str, str] = {}
        self._next_beat: float | None = None
        self._ask_health: Callable[[], object] = lambda: None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def told(self) -> bool:
        """Whether somebody hears: then how long a start may take is the manager's to say."""
        return self._socket is not None

    def ready(self, status: str, ask_health: Callable[[], object]) -> None:
        """From now on heartbeats are due: `ask_health` asks for one sign of life, which comes back as `healthy()`."""
        self._ask_health = ask_health
        if self._beat_seconds is not None:
            self._next_beat = self._clock()
        self._say(READY="1", STATUS=status)

    def status(self, text: str) -> None:
        self._say(STATUS=text)

    def stopping(self, text: str) -> None:
        self._next_beat = None
        self._say(STOPPING="1", STATUS=text)

    def healthy(self) -> None:
        if self._next_beat is not None:
            self._say(WATCHDOG="1")

    def tick(self) -> None:
        """Once in every turn of the supervisor's loop."""
        if self._next_beat is not None and self._beat_seconds is not None and (now := self._clock()) >= self._next_beat:
            self._next_beat = now + self._beat_seconds
            self._ask_health()
        self._send()

    def seconds(self) -> float | None:
        """How long the loop may sleep before the next tick; None: as long as it likes."""
        if self._unsent:
            return RETRY_SECONDS
        return None if self._next_beat is None else max(0.0, self._next_beat - self._clock())

    def _say(self, **assignments: str) -> None:
        if self._socket is not None:
            self._unsent.update(assignments)
            self._send()

    def _send(self) -> None:
        if not self._unsent or self._socket is None:
            return
        text = "".join(f"{name}={printable(value)}\n" for name, value in self._unsent.items())
        try:
            self._socket.send(os.fsencode(text), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self.close()  # the manager is gone: nobody is left to be told
        self._unsent.clear()
