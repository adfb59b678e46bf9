"""`--syslog`: the log's lines as datagrams to /dev/log, in the BSD format that every syslog daemon reads (RFC 3164).

Never blocks: a line that the daemon does not take is lost, as a line is that stderr does not take.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from vfsd.log import INFO, SEVERITIES, StderrLog, printable

DEV_LOG: Final = "/dev/log"
_DAEMON: Final = 3 << 3  # the facility


class SyslogLog(StderrLog):
    """Raises OSError when made, if nobody listens at `path`."""

    def __init__(self, level: int = INFO, path: str = DEV_LOG) -> None:
        super().__init__(level)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def line(self, level: int, role: str, text: str) -> None:
        if level > self.level:
            return
        said = f"{role}: {printable(text)}" if role else printable(text)
        packet = f"<{_DAEMON | SEVERITIES.get(level, 3)}>vfsd[{os.getpid()}]: {said}".encode()
        if not self._send(packet):
            self._reconnect()
            self._send(packet)

    def _send(self, packet: bytes) -> bool:
        try:
            self._socket.send(packet)
        except BlockingIOError:
            return True  # it is there, but does not take it now
        except OSError:
            return False
        return True

    def _reconnect(self) -> None:
        """A syslog daemon that was started again has a new socket at the same place."""
        try:
            self._socket.connect(self._path)
        except OSError:
            return
