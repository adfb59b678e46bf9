"""The socket by which the operator changes fault rules: made here, mode 0600, where nobody but the operator can come near.

Who controls the bytes: whoever connects is root or who started vfsd, by SO_PEERCRED; a guest has no way to a socket of the host's,
and a frontend that may connect to the vhost-user socket none to this one. One packet (SOCK_SEQPACKET) is one request, JSON, and
is answered by one. Nothing here waits. Imports errors and sockets.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import stat
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from vfsd.errors import ConfigError
from vfsd.faults.socket_path import MOST_REQUEST, default_path, directory_of
from vfsd.sockets import MAX_SOCKET_PATH, bind_private

_BACKLOG = 8
_MOST_CONNECTIONS = 8

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class FaultSocket:
    """Listens. `made_directory`: one that goes with it."""

    def __init__(self, sock: socket.socket, path: bytes, made_directory: bytes | None) -> None:
        self.path = path
        self._socket = sock
        self._made_directory = made_directory
        self._connections: set[socket.socket] = set()

    def serve(self, selector: selectors.BaseSelector, answer: Answer) -> None:
        """Have every request answered by `answer`, which raises ConfigError for what it refuses."""
        selector.register(self._socket.fileno(), selectors.EVENT_READ, partial(self._accept, selector, answer))

    def _accept(self, selector: selectors.BaseSelector, answer: Answer) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if _peer_uid(connection) not in (0, os.geteuid()) or len(self._connections) >= _MOST_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._connections.add(connection)
        selector.register(connection.fileno(), selectors.EVENT_READ, partial(self._hear, selector, answer, connection))

    def _hear(self, selector: selectors.BaseSelector, answer: Answer, connection: socket.socket) -> None:
        try:
            request = connection.recv(MOST_REQUEST)
            if request:
                connection.send(json.dumps(_answered(request, answer)).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            pass  # who asked has gone, or does not read
        selector.unregister(connection.fileno())
        self._connections.remove(connection)
        connection.close()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._socket.close()
        _remove(os.unlink, self.path)
        if self._made_directory is not None:
            _remove(os.rmdir, self._made_directory)


def _answered(request: bytes, answer: Answer) -> dict[str, Any]:
    try:
        asked = json.loads(request)
        if type(asked) is not dict:
            raise ConfigError("a request is a JSON object")
        return answer(asked)
    except (ConfigError, ValueError, RecursionError) as error:
        return {"error": str(error)}


def _peer_uid(connection: socket.socket) -> int:
    uid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return uid


def make_fault_socket(path: bytes | None, vhost_socket: bytes | None) -> FaultSocket | None:
    """At this path, or in a directory beside the vhost-user socket; None if there is neither. Raises ConfigError."""
    made = None
    if path is None:
        if vhost_socket is None:
            return None
        made, path = _make_directory(directory_of(vhost_socket)), default_path(vhost_socket)
    option = f"--fault-socket={os.fsdecode(path)}"
    if len(path) > MAX_SOCKET_PATH:
        raise ConfigError(f"{option}: {len(path)} bytes, a socket path has at most {MAX_SOCKET_PATH}; name a shorter one")
    try:
        _check_directory(os.path.dirname(path) or b".", option)
        sock = bind_private(path, socket.SOCK_SEQPACKET, _BACKLOG)
    except OSError as error:
        raise ConfigError(f"{option}: {error.strerror}; name a path whose directory exists and is yours") from error
    return FaultSocket(sock, path, made)


def _make_directory(path: bytes) -> bytes:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass  # of an earlier run, or not: it is looked at
    except OSError as error:
        raise ConfigError(f"{os.fsdecode(path)}: cannot be made: {error.strerror}; name another place by --fault-socket") from error
    return path


def _check_directory(path: bytes, option: str) -> None:
    """ConfigError if anybody else could put something else in the socket's place."""
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise ConfigError(f"{option}: others may write to {os.fsdecode(path)}; name a path in a directory that only you can change")


def _remove(remove: Callable[[bytes], None], path: bytes) -> None:
    try:
        remove(path)
    except OSError:
        return  # somebody else removed it, or put something there
