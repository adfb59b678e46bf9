"""A worker or control process that its guest has taken over: run by `arena.py` and `hostile_daemon.py`, as its own program.

It starts and confines itself by vfsd's own code, with the configuration that the supervisor gave it. Only what would then
serve is replaced: it does what it is ordered, with what a real one has. Orders are msgpack arrays, a verb and its arguments,
and come from a script on the command line (hexadecimal), or without one from the control socket, one packet each.

argv: CONFIG_FD ROLE [SCRIPT]. Everything is imported before the lock-down. In orders the names of its sockets stand for them:
"supervisor"; of a worker "control" and "broker"; of control "worker", once it was taken.
"""

import array
import ctypes
import errno
import os
import platform
import select
import signal
import socket
import sys

import msgpack

import vfsd.worker.__main__ as worker_start
import vfsd.worker.control as control_start

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.sendmsg.restype = ctypes.c_ssize_t
_PATIENCE_SECONDS = 30
_EPOLL = select.epoll()  # a worker waits by this, and cannot make one later
_FD_ROOM = socket.CMSG_SPACE(64 * array.array("i").itemsize)
_ORDER_BYTES = 1 << 20
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}[platform.machine()]


class _Buffer(ctypes.Structure):
    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def _rights(fds):
    data = array.array("i", fds).tobytes()
    header = (socket.CMSG_LEN(len(data))).to_bytes(8, sys.byteorder)
    header += socket.SOL_SOCKET.to_bytes(4, sys.byteorder) + socket.SCM_RIGHTS.to_bytes(4, sys.byteorder)
    return (header + data).ljust(socket.CMSG_SPACE(len(data)), b"\0")


def send(fd, packet, fds=()):
    """0, or the errno. By sendmsg(2) itself: Python makes no socket object of a received descriptor without calls that kill."""
    control = _rights(fds) if fds else None
    message = _Message(None, 0, ctypes.pointer(_Buffer(packet, len(packet))), 1, control, len(control or b""), 0)
    sent = _libc.sendmsg(fd, ctypes.byref(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    return ctypes.get_errno() if sent < 0 else 0


def flood(fd, packet, most, fds=()):
    """How many went out until the socket was full or the peer gone."""
    for number in range(most):
        if send(fd, packet, fds):
            return number
    return most


def receive(fd):
    """The next packet, b"" at the end of the socket; what it brings besides is dropped."""
    _EPOLL.register(fd, select.EPOLLIN)
    try:
        if not _EPOLL.poll(_PATIENCE_SECONDS):
            raise TimeoutError
        return os.read(fd, _ORDER_BYTES)
    except ConnectionResetError:
        return b""
    finally:
        _EPOLL.unregister(fd)


def syscall(number, *arguments):
    """[result, errno] of a raw system call; bytes are passed by address."""
    converted = [ctypes.c_char_p(each) if isinstance(each, bytes) else ctypes.c_long(each) for each in arguments]
    result = _libc.syscall(ctypes.c_long(number), *converted)
    return [result, ctypes.get_errno() if result == -1 else 0]


def clone(flags):
    """[pid, errno] of a child that ends at once."""
    result = syscall(_SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if result[0] == 0:
        os._exit(0)
    return result


VERBS = {
    "clone": clone,
    "close": os.close,
    "flood": flood,
    "ping": lambda: 0,
    "receive": receive,
    "send": send,
    "send_file": os.write,
    "syscall": syscall,
    "exit": os._exit,
}


class Puppet:
    """Stands where the worker's event loop or control's `Control` stands."""

    def __init__(self, script, sockets):
        self._script = script
        self._sockets = sockets
        self._numbers = {name: each.fileno() for name, each in sockets.items()}

    def run(self):
        for verb, *arguments in self._script:
            self._do(verb, arguments)
        if self._script:
            (_EPOLL if "broker" in self._sockets else select.poll()).poll()
        while True:
            self._obey(self._sockets["control"])

    def _obey(self, orders):
        """One order; a descriptor that comes with it is kept, and its number becomes the answer."""
        packet, ancillary, _, _ = orders.recvmsg(_ORDER_BYTES, _FD_ROOM)
        if not packet:
            os._exit(0)
        received = array.array("i")
        for _level, _kind, data in ancillary:
            received.frombytes(data)
        verb, *arguments = msgpack.unpackb(packet)
        answer = received.tolist() if received else self._do(verb, arguments)
        orders.send(msgpack.packb(answer))

    def _named(self, argument):
        if isinstance(argument, list):
            return [self._named(each) for each in argument]
        return self._numbers[argument] if isinstance(argument, str) else argument

    def _take(self, name):
        """Name the descriptor that the supervisor's next message brings."""
        _packet, fds, _flags, _address = socket.recv_fds(self._sockets["supervisor"], _ORDER_BYTES, 1)
        (self._numbers[name],) = fds

    def _do(self, verb, arguments):
        if verb == "take":
            return self._take(*arguments)
        try:
            return VERBS[verb](*[self._named(each) for each in arguments])
        except OSError as error:
            return -(error.errno or errno.EIO)


def main():
    role = sys.argv[2]
    script = msgpack.unpackb(bytes.fromhex(sys.argv[3])) if len(sys.argv) > 3 else []

    def worker_puppet(supervisor, control, broker, _fs, _pool, _log):
        return Puppet(script, {"supervisor": supervisor._socket, "control": control._socket, "broker": broker})

    def control_puppet(_config, supervisor, _log, _inflight):
        return Puppet(script, {"supervisor": supervisor._socket})

    if role == "worker":
        worker_start.EventLoop = worker_puppet
        worker_start.main()
    else:
        control_start.Control = control_puppet
        control_start.main()


if __name__ == "__main__":
    main()
