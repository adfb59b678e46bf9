"""Where the operator's socket is, for who makes it and for who connects to it. Pure."""

from __future__ import annotations

MOST_REQUEST = 128 * 1024
MOST_REPLY = 256 * 1024
_DIRECTORY = b".faults"  # beside the vhost-user socket: mode 0700, so that nobody else gets as far as the socket
_NAME = b"control"


def directory_of(vhost_socket: bytes) -> bytes:
    return vhost_socket + _DIRECTORY


def default_path(vhost_socket: bytes) -> bytes:
    return directory_of(vhost_socket) + b"/" + _NAME
