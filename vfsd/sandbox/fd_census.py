"""Which descriptors a process has open, and what the kernel says of each; which socket is connected to which.

Who controls the bytes: the kernel; the name of a file may have been chosen by a guest, so it is escaped. Only links and
`fdinfo` are read, never the files themselves: one may lie on a file system that hangs.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vfsd.sandbox.network_of import in_network_of

# linux/netlink.h, sock_diag.h, unix_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2
_TCP_LISTEN = 10
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_REQUEST = struct.Struct("=BBHIIIII")  # unix_diag_req
_MESSAGE = struct.Struct("=BBBBIII")  # unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE_BYTES = 1 << 16
_RECEIVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fd:
    """One open descriptor. What only some kinds have is None or empty with the others."""

    number: int
    target: str  # what its link shows, escaped
    flags: int = 0  # O_*
    mount: int | None = None
    inode: int | None = None  # before Linux 5.14 of sockets and pipes only
    eventfd: int | None = None  # the same eventfd has the same number in all processes
    process: int | None = None  # of a pidfd, as we see it; -1: dead, or not in our pid namespace
    watched: tuple[int, ...] = ()  # the descriptors that an epoll waits for
    protocol: str | None = None  # of a socket: "UNIX", "UNIX-STREAM", "TCP", …


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """`kind`: SOCK_*. `peer`: the inode of the other end, None if there is none any more."""

    kind: int
    listens: bool
    peer: int | None


def read_fds(pid: int) -> dict[int, Fd] | None:
    """By number; None if we may not see them. One that is closed while we look may be missing."""
    try:
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        found = [_read_fd(pid, number) for number in numbers]
    except PermissionError:
        return None
    return {fd.number: fd for fd in found if fd is not None}


def _read_fd(pid: int, number: int) -> Fd | None:
    try:
        target = ascii(os.readlink(f"/proc/{pid}/fd/{number}"))[1:-1]
        with open(f"/proc/{pid}/fdinfo/{number}", "rb") as file:
            lines = file.read().decode(errors="backslashreplace").splitlines()
    except FileNotFoundError:
        return None
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines if not line.startswith("tfd:"))}
    return Fd(
        number=number,
        target=target,
        flags=int(fields["flags"][0], 8),
        mount=_number(fields, "mnt_id"),
        inode=_number(fields, "ino") or _inode_of(target),
        eventfd=_number(fields, "eventfd-id"),
        process=_number(fields, "Pid"),
        watched=tuple(sorted(int(line.split()[1]) for line in lines if line.startswith("tfd:"))),
        protocol=_protocol(pid, number) if target.startswith("socket:") else None,
    )


def _number(fields: dict[str, list[str]], name: str) -> int | None:
    return int(fields[name][0]) if fields.get(name) else None


def _inode_of(target: str) -> int | None:
    """Of `socket:[123]`."""
    number = target.partition(":[")[2].removesuffix("]")
    return int(number) if number.isdecimal() else None


def _protocol(pid: int, number: int) -> str | None:
    """What the kernel calls it, as an attribute of every socket, whichever its network namespace."""
    try:
        return os.getxattr(f"/proc/{pid}/fd/{number}", "system.sockprotoname").rstrip(b"\0").decode()
    except OSError:
        return None


def unix_sockets(network_of: int | None = None) -> dict[int, UnixSocket] | None:
    """All Unix sockets of our network namespace, or of that process's, by inode, as `ss -x` has them.

    None if this kernel does not tell. Of another namespace: PermissionError if we may not go there, FileNotFoundError if there
    is no such process any more.
    """
    if network_of is None:
        return _list_unix_sockets()
    with in_network_of(network_of):
        return _list_unix_sockets()


def _list_unix_sockets() -> dict[int, UnixSocket] | None:
    found: dict[int, UnixSocket] = {}
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_RECEIVE_SECONDS)
            request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_PEER, 0, 0)
            length = _HEADER.size + len(request)
            netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + request)
            for payload in _messages(netlink):
                _, kind, state, _, inode, _, _ = _MESSAGE.unpack_from(payload)
                found[inode] = UnixSocket(kind, state == _TCP_LISTEN, _peer(payload))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
            return None
        raise
    return found


def _messages(netlink: socket.socket) -> Iterator[bytes]:
    """The payloads up to the end of the dump. OSError if the kernel answers with one."""
    while True:
        packet = netlink.recv(_RECEIVE_BYTES)
        offset = 0
        while _HEADER.size <= len(packet) - offset:
            length, kind, _, _, _ = _HEADER.unpack_from(packet, offset)
            payload = packet[offset + _HEADER.size : offset + length]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", payload)[0]
                raise OSError(code, os.strerror(code))
            yield payload
            offset += _aligned(length)


def _peer(payload: bytes) -> int | None:
    offset = _MESSAGE.size
    while _ATTRIBUTE.size <= len(payload) - offset:
        length, kind = _ATTRIBUTE.unpack_from(payload, offset)
        if kind == _UNIX_DIAG_PEER:
            peer: int = struct.unpack_from("=I", payload, offset + _ATTRIBUTE.size)[0]
            return peer or None
        offset += _aligned(max(length, _ATTRIBUTE.size))
    return None


def _aligned(length: int) -> int:
    return (length + 3) & ~3
