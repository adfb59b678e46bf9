"""Lets User-Mode Linux 6.1 use the Rust and the C virtiofsd, which both refuse it for small reasons.

UML pads SET_MEM_TABLE to the size of two regions, which the Rust daemon takes for a malformed message; and it reads the
virtio-fs tag from the daemon (VHOST_USER_GET_CONFIG), which the C daemon does not implement, since QEMU knows the tag
from its command line. This thread stands between the two: it passes every message and descriptor on, trims the one message,
and answers the other. Requests of the guest go through shared memory and eventfds and never come by here, so it costs a
measurement nothing. Both ends are test fixtures: no defence against either.
"""

import array
import os
import select
import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_HEADER = struct.Struct("<III")  # request, flags, size of the payload
_CONFIG_REQUEST = struct.Struct("<III")  # offset, size, flags
_VERSION_AND_REPLY = 0x1 | 0x4

_SET_MEM_TABLE = 5
_GET_PROTOCOL_FEATURES = 15
_SET_PROTOCOL_FEATURES = 16
_GET_CONFIG = 24
_PROTOCOL_F_CONFIG = 1 << 9
_MEMORY_REGION_BYTES = 32

_Message = tuple[bytes, bytes, list[int]]


class UmlProxy:
    """Listens on one socket, connects to the daemon's for the one frontend that comes, and ends with either."""

    def __init__(self, listen_at: str, daemon_at: str, answer_with_tag: str | None = None) -> None:
        self._config = None if answer_with_tag is None else struct.pack("<36sI", answer_with_tag.encode(), 1)
        self._daemon_at = daemon_at
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(listen_at)
        self._listener.listen(1)
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vhost-user proxy")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join(10)
        self._listener.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _serve(self) -> None:
        if self._stop_read in select.select([self._listener, self._stop_read], [], [])[0]:
            return
        frontend, _ = self._listener.accept()
        with frontend, socket.socket(socket.AF_UNIX) as daemon, suppress(ConnectionError):
            daemon.connect(self._daemon_at)
            while True:
                ready = select.select([frontend, daemon, self._stop_read], [], [])[0]
                if self._stop_read in ready:
                    return
                if frontend in ready:
                    self._from_frontend(frontend, daemon)
                if daemon in ready:
                    self._from_daemon(frontend, daemon)

    def _from_frontend(self, frontend: socket.socket, daemon: socket.socket) -> None:
        header, payload, fds = _receive(frontend)
        request, flags, _ = _HEADER.unpack(header)
        if request == _SET_MEM_TABLE:
            payload = payload[: 8 + struct.unpack_from("<I", payload)[0] * _MEMORY_REGION_BYTES]
            header = _HEADER.pack(request, flags, len(payload))
        if self._config is not None and request == _GET_CONFIG:
            offset, size, config_flags = _CONFIG_REQUEST.unpack_from(payload)
            data = self._config[offset : offset + size].ljust(size, b"\0")
            body = _CONFIG_REQUEST.pack(offset, size, config_flags) + data
            frontend.sendall(_HEADER.pack(_GET_CONFIG, _VERSION_AND_REPLY, len(body)) + body)
            return
        if self._config is not None and request == _SET_PROTOCOL_FEATURES:
            payload = struct.pack("<Q", struct.unpack("<Q", payload)[0] & ~_PROTOCOL_F_CONFIG)
        _send(daemon, (header, payload, fds))

    def _from_daemon(self, frontend: socket.socket, daemon: socket.socket) -> None:
        header, payload, fds = _receive(daemon)
        if self._config is not None and _HEADER.unpack(header)[0] == _GET_PROTOCOL_FEATURES:
            payload = struct.pack("<Q", struct.unpack("<Q", payload)[0] | _PROTOCOL_F_CONFIG)
        _send(frontend, (header, payload, fds))


def _receive(sock: socket.socket) -> _Message:
    header, ancillary, _, _ = sock.recvmsg(_HEADER.size, socket.CMSG_SPACE(16 * 4), socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC)
    if len(header) < _HEADER.size:
        raise ConnectionError("the peer closed the connection")
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data)
    size = _HEADER.unpack(header)[2]
    return header, sock.recv(size, socket.MSG_WAITALL) if size else b"", list(fds)


def _send(sock: socket.socket, message: _Message) -> None:
    header, payload, fds = message
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([header, payload], ancillary)
    for fd in fds:
        os.close(fd)
