"""The vhost-user connection as a stream of messages, each with the descriptors that belong to it.

Who controls the bytes: the frontend, which a guest may have taken over. Messages arrive in pieces, or several at once; the
kernel hands descriptors over with the first byte they were sent with, so header and payload are read separately and never
beyond the end of their message. Every received descriptor is owned at once and closed exactly once, whatever follows.
"""

from __future__ import annotations

import array
import socket

from vfsd.channel import close_all, take_descriptors
from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.wire.vhost_user import HEADER, MAX_REGIONS, Message, decode_header

MAX_FDS = MAX_REGIONS  # a memory table brings one per region, nothing else brings more than one
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class FrontendClosed(Exception):
    """The frontend has closed the connection; the text says what is worth knowing about it, or nothing."""


class FrontendStream:
    """Non-blocking: `receive` gives a message when one is complete."""

    def __init__(self, connection: OwnedFd) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=connection.detach())
        self._header = b""
        self._payload = b""
        self._fds: list[OwnedFd] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
        close_all(self._fds)
        self._fds = []

    def receive(self) -> tuple[Message, list[OwnedFd]] | None:
        """The next message; None while it is incomplete. Raises FrontendBreach or FrontendClosed."""
        while len(self._header) < HEADER.size:
            piece = self._read(HEADER.size - len(self._header))
            if piece is None:
                return None
            self._header += piece
        request, flags, size = decode_header(self._header)
        while len(self._payload) < size:
            piece = self._read(size - len(self._payload))
            if piece is None:
                return None
            self._payload += piece
        message, fds = Message(request, flags, self._payload), self._fds
        self._header, self._payload, self._fds = b"", b"", []
        return message, fds

    def send(self, reply: bytes, fd: OwnedFd | None = None) -> None:
        """Replies are small and asked for one by one: a frontend whose buffer is full does not read them. `fd` stays the caller's."""
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            if fd is None:
                sent = self._socket.send(reply, flags)
            else:
                sent = self._socket.sendmsg([reply], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd.fileno()]))], flags)
        except BlockingIOError:
            raise FrontendBreach("the frontend does not read its replies") from None
        except (BrokenPipeError, ConnectionResetError):
            raise FrontendClosed from None
        if sent != len(reply):
            raise FrontendBreach("the frontend does not read its replies")

    def _read(self, size: int) -> bytes | None:
        try:
            piece, ancillary, flags, _ = self._socket.recvmsg(size, _ANCILLARY_BYTES, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            raise FrontendClosed("connection reset") from None
        self._fds += take_descriptors(ancillary)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            # Those that did not fit are gone: what is left would be paired with the wrong regions. `close` closes them.
            raise FrontendBreach("more descriptors in one message than any message has, or than this process may hold")
        if not piece:
            raise FrontendClosed("in the middle of a message" if self._header else "")
        return piece
