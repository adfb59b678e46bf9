"""The vhost-user socket before anyone is connected: made here with its pid file, or inherited with --fd.

Who controls the bytes: nobody yet; names and numbers come from the command line. The pid file is locked for as long as
vfsd lives: that lock, not the file, says that the socket path is taken.
"""

from __future__ import annotations

import fcntl
import grp
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd

MAX_SOCKET_PATH = 107  # sun_path has 108 bytes, the last is NUL
_BACKLOG = 1  # one frontend at a time


class VhostSocket:
    """A socket that listens (non-blocking) or is connected already, and what must be removed from the file system at the end."""

    def __init__(self, sock: socket.socket, *, listening: bool, path: bytes | None = None, pid_file: PidFile | None = None) -> None:
        self.socket = sock
        self.listening = listening
        self._path = path
        self._pid_file = pid_file

    def close(self) -> None:
        """Close and remove; a socket that came with --fd leaves nothing behind because it made nothing."""
        self.socket.close()
        if self._path is not None:
            _unlink(self._path)
            self._path = None
        if self._pid_file is not None:
            self._pid_file.close()
            self._pid_file = None


class PidFile:
    """`PATH.pid`: our pid, under an exclusive lock; some starters (virtme-ng) wait for it, and kill what it names."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._fd = _lock(path)

    def write(self) -> None:
        os.ftruncate(self._fd.fileno(), 0)
        os.pwrite(self._fd.fileno(), b"%d\n" % os.getpid(), 0)

    def close(self) -> None:
        _unlink(self._path)  # before the lock goes: a successor must not find its own file removed
        self._fd.close()


def make_listener(path: bytes, group: str | None) -> VhostSocket:
    """A new socket at this path, mode 0700, or 0770 and of that group; a stale one is replaced. Raises ConfigError."""
    option = f"--socket-path={os.fsdecode(path)}"
    if len(path) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{option}: {len(path)} bytes, a socket path has at most {MAX_SOCKET_PATH}; choose a shorter one, or start in its directory"
        )
    gid = _group_id(group) if group is not None else None
    try:
        # The pid file too is nobody else's business, also when the group may connect.
        with _umask(0o077):
            pid_file = PidFile(path + b".pid")
    except OSError as error:
        raise ConfigError(
            f"{option}: cannot write the pid file {os.fsdecode(path)}.pid: {error.strerror}; choose a directory you may write to"
        ) from error
    try:
        sock = _bind(path, gid)
        pid_file.write()
    except OSError as error:
        pid_file.close()
        raise ConfigError(f"{option}: {error.strerror}; choose a path whose directory exists and may be written to") from error
    except BaseException:
        pid_file.close()
        raise
    return VhostSocket(sock, listening=True, path=path, pid_file=pid_file)


def _bind(path: bytes, gid: int | None) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _umask(0o077 if gid is None else 0o007):
            sock.bind(path)
        if gid is not None:
            _give_to_group(path, gid)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_private(path: bytes, kind: socket.SocketKind, backlog: int) -> socket.socket:
    """A listening, non-blocking socket of that kind, which only who starts vfsd may connect to; a stale one is replaced."""
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with _umask(0o177):
            sock.bind(path)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _give_to_group(path: bytes, gid: int) -> None:
    try:
        os.chown(path, -1, gid)
    except PermissionError as error:
        os.unlink(path)
        raise ConfigError(
            f"--socket-group={grp.getgrgid(gid).gr_name}: {error.strerror}; name a group that you are a member of, or start as root"
        ) from error


def adopt_socket(fd: int, option: str = "") -> VhostSocket:
    """An inherited socket: listening, as libvirt and others pass it, or connected, as the specification reads. `option` said so."""
    option = option or f"--fd={fd}"
    remedy = "pass a listening or connected Unix stream socket"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"{option}: {error.strerror}; {remedy}") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise ConfigError(f"{option}: is not a Unix stream socket; {remedy}")
    listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    if listening:
        sock.setblocking(False)
    elif not _is_connected(sock):
        sock.close()
        raise ConfigError(f"{option}: neither listens nor is connected; {remedy}")
    return VhostSocket(sock, listening=listening)


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def peer_name(fd: int) -> str:
    """Who connected, by what the kernel noted then; a process outside of our pid namespace has no number here."""
    credentials = socket.socket(fileno=os.dup(fd))
    with credentials:
        pid = struct.unpack("3i", credentials.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return f"process {pid}" if pid else "a process outside of this pid namespace"


def packet_pair(send_bytes: int | None = None) -> tuple[OwnedFd, OwnedFd]:
    """Two ends of a connection of packets."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        if send_bytes is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    return OwnedFd(ends[0].detach()), OwnedFd(ends[1].detach())


def _group_id(group: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"--socket-group={group}: there is no such group; create it, or name another one") from None


def _lock(path: bytes) -> OwnedFd:
    """Open and lock the pid file; the loop is for one that its owner removed between our open and our lock."""
    while True:
        fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(fd.fileno(), path):
                return fd
        except BlockingIOError as error:
            fd.close()
            raise ConfigError(
                f"--socket-path: {os.fsdecode(path)} is locked: another vfsd serves this socket; end it, or choose another path"
            ) from error
        except BaseException:
            fd.close()
            raise
        fd.close()


def _is_still(fd: int, path: bytes) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _remove_stale(path: bytes) -> None:
    """Remove what an earlier run left; never something that is not a socket."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--socket-path={os.fsdecode(path)}: what is there is not a socket; remove it, or choose another path")
    os.unlink(path)


def _unlink(path: bytes) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # somebody else removed it, or its directory: nothing is left to do


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
