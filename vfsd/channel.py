"""The I/O of one end of an internal channel: a SOCK_SEQPACKET socket, packets of vfsd.wire.channel, descriptors beside them.

Who controls the bytes: whoever holds the other end; a child is hostile. Nothing here blocks: a confined process waits in
poll, and the supervisor must never wait for a child. Imports errors, fds and wire.
"""

from __future__ import annotations

import array
import errno
import socket
from collections.abc import Sequence

from vfsd.errors import ChildBreach
from vfsd.fds import OwnedFd
from vfsd.wire.channel import MAX_PACKET, ChannelMessage, Table, decode_message, encode_message, max_fds

_INT_BYTES = array.array("i").itemsize
_FULL = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS})
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED})


class ChannelClosed(Exception):
    """The peer has closed its end."""


class Received:
    """One message and the descriptors that came with it: exactly `message.fd_count()`, each to be taken or closed."""

    __slots__ = ("fds", "message")

    def __init__(self, message: ChannelMessage, fds: list[OwnedFd]) -> None:
        self.message = message
        self.fds = fds


class Channel:
    """One end. `accepts` is the table of what the other end may say."""

    def __init__(self, sock: socket.socket, accepts: Table) -> None:
        self._socket = sock
        self._accepts = accepts
        # With no descriptors in the table there is no control buffer: the kernel then drops what a hostile peer attaches.
        self._ancillary_bytes = socket.CMSG_SPACE(max_fds(accepts) * _INT_BYTES) if max_fds(accepts) else 0

    @classmethod
    def from_fd(cls, fd: OwnedFd, accepts: Table) -> Channel:
        return cls(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd.detach()), accepts)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: ChannelMessage, fds: Sequence[OwnedFd] = ()) -> bool:
        """Whether it was sent: False when the peer does not read. The descriptors stay the caller's. Raises ChannelClosed."""
        if len(fds) != message.fd_count():
            raise ValueError(f"{type(message).__name__} takes {message.fd_count()} descriptors, not {len(fds)}")
        rights = array.array("i", [fd.fileno() for fd in fds])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
        try:
            self._socket.sendmsg([encode_message(message)], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno in _FULL:
                return False
            if error.errno in _GONE:
                raise ChannelClosed from error
            raise
        return True

    def receive(self) -> Received | None:
        """The next message, None when there is none now. Raises ChildBreach, or ChannelClosed at the end."""
        try:
            packet, fds, truncated = self._receive_packet()
        except BlockingIOError:
            return None
        try:
            if truncated:
                raise ChildBreach("a packet, or its descriptors, longer than any message")
            if not packet:
                raise ChannelClosed
            return Received(decode_message(packet, len(fds), self._accepts), fds)
        except (ChildBreach, ChannelClosed):
            close_all(fds)
            raise

    def _receive_packet(self) -> tuple[bytes, list[OwnedFd], bool]:
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            packet, ancillary, out_flags, _ = self._socket.recvmsg(MAX_PACKET, self._ancillary_bytes, flags)
        except ConnectionResetError:
            # The peer died with packets of ours unread. That error comes once, and before what it had sent itself.
            packet, ancillary, out_flags, _ = self._socket.recvmsg(MAX_PACKET, self._ancillary_bytes, flags)
        return packet, take_descriptors(ancillary), bool(out_flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def take_descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[OwnedFd]:
    """Every descriptor that recvmsg delivered, owned, so that none stays behind whatever is wrong with its message."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return [OwnedFd(fd) for fd in fds]


def close_all(fds: Sequence[OwnedFd]) -> None:
    for fd in fds:
        fd.close()
