"""A FUSE file system of the tests' own, mounted for real, that can be told to leave requests unanswered.

To its users it is then as dead as an NFS server that is switched off: their system calls do not return. `thaw` answers what
was held, `disconnect` ends the connection, which fails what hangs with ENOTCONN; so does the end of the test's process. Speaks as
much FUSE as one flat directory of small files needs. Served by a thread here: the test must not touch a frozen mount itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from vfsd.wire import fuse_abi as abi

PATIENCE_SECONDS = 20.0
_MNT_FORCE, _MNT_DETACH = 1, 2
_LONGEST_REQUEST = 1 << 18
_FLAGS = abi.FUSE_EXPORT_SUPPORT | abi.FUSE_BIG_WRITES | abi.FUSE_PARALLEL_DIROPS | abi.FUSE_ASYNC_READ
_WITHOUT_REPLY = (abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET, abi.FUSE_INTERRUPT)

_libc = ctypes.CDLL(None, use_errno=True)


class Request(NamedTuple):
    opcode: int
    unique: int
    nodeid: int
    body: bytes


class _File:
    def __init__(self, name: bytes, data: bytes) -> None:
        self.name = name
        self.data = bytearray(data)


class HangingFs:
    """Mounted at once. Use as a context manager, or call close()."""

    def __init__(self, mountpoint: Path, files: Mapping[bytes, bytes], *, flush: bool = True) -> None:
        """Without `flush` a process that has a file open can end though nobody answers."""
        self.mountpoint = mountpoint
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._connected = True
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._files = {nodeid: _File(name, data) for nodeid, (name, data) in enumerate(files.items(), abi.FUSE_ROOT_ID + 1)}
        self._news = threading.Condition()
        self._frozen: Callable[[int], bool] = lambda _opcode: False
        self._held: list[Request] = []
        self.seen: Counter[int] = Counter()
        self._handlers = {
            abi.FUSE_INIT: self._init,
            abi.FUSE_LOOKUP: self._lookup,
            abi.FUSE_GETATTR: lambda request: abi.fuse_attr_out.pack(0, 0, *self._attr(request.nodeid)),
            abi.FUSE_SETATTR: self._setattr,
            abi.FUSE_OPEN: lambda _request: abi.fuse_open_out.pack(0, abi.FOPEN_DIRECT_IO),
            abi.FUSE_OPENDIR: lambda _request: abi.fuse_open_out.pack(0, 0),
            abi.FUSE_READ: self._read,
            abi.FUSE_WRITE: self._write,
            abi.FUSE_CREATE: self._create,
            abi.FUSE_READDIR: self._readdir,
            abi.FUSE_STATFS: lambda _request: abi.fuse_statfs_out.pack(1000, 500, 500, 1000, 500, 4096, 255, 4096),
        } | dict.fromkeys((abi.FUSE_FLUSH, abi.FUSE_FSYNC, abi.FUSE_RELEASE, abi.FUSE_RELEASEDIR, abi.FUSE_DESTROY), lambda _request: b"")
        if not flush:
            del self._handlers[abi.FUSE_FLUSH]
        self._thread = threading.Thread(target=self._serve, name="hanging-fs", daemon=True)
        self._mount()
        self._thread.start()  # not before: what is not mounted cannot be read

    def _mount(self) -> None:
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if _libc.mount(b"hanging", os.fsencode(self.mountpoint), b"fuse", 0, options) != 0:
            number = ctypes.get_errno()
            os.close(self._fd)
            os.close(self._stop_fd)
            raise OSError(number, f"mounting FUSE: {os.strerror(number)}")

    # --- what tests do -------------------------------------------------------------------------------------------------

    def freeze(self, *opcodes: int) -> None:
        """From now on these are held (all, if none is named) and not answered."""
        self._frozen = (lambda opcode: opcode in opcodes) if opcodes else (lambda opcode: opcode not in _WITHOUT_REPLY)

    def held(self, opcode: int) -> int:
        """How many of these hang now."""
        with self._news:
            return sum(request.opcode == opcode for request in self._held)

    def wait_held(self, opcode: int, count: int = 1) -> None:
        """Until so many of these hang."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._news:
            while sum(request.opcode == opcode for request in self._held) < count:
                if not self._news.wait(deadline - time.monotonic()):
                    raise AssertionError(f"not {count} of opcode {opcode} came, but opcodes {[request.opcode for request in self._held]}")

    def thaw(self) -> None:
        """Answer what is held, and all that comes."""
        with self._news:
            self._frozen = lambda _opcode: False
            held, self._held = self._held, []
        for request in held:
            self._answer(request)

    def stop_reading(self) -> None:
        """From now on requests are not even taken: who waits for one of these can be killed, as with a dead NFS server."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(PATIENCE_SECONDS)
        os.eventfd_read(self._stop_fd)

    def wait_unread(self) -> None:
        """Until a request is there that nobody takes."""
        if not select.select([self._fd], [], [], PATIENCE_SECONDS)[0]:
            raise AssertionError("no request came")

    def read_again(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="hanging-fs", daemon=True)
        self._thread.start()

    def data(self, name: bytes) -> bytes:
        return next(bytes(file.data) for file in self._files.values() if file.name == name)

    def disconnect(self) -> None:
        """End the connection: what hangs, and all that comes, fails. Doing so twice is harmless."""
        if self._connected:
            self._connected = False
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join(PATIENCE_SECONDS)
            os.close(self._fd)  # the last descriptor of the connection: the kernel aborts it
            os.close(self._stop_fd)

    def close(self) -> None:
        """Disconnect and unmount. Once: another file system may be mounted there afterwards."""
        self.disconnect()
        _libc.umount2(os.fsencode(self.mountpoint), _MNT_FORCE | _MNT_DETACH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- the server ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while True:
            if self._stop_fd in dict(poll.poll()):
                return
            try:
                message = os.read(self._fd, _LONGEST_REQUEST)
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):  # unmounted
                    return
                if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):  # ENOENT: its caller was killed
                    continue
                raise
            length, opcode, unique, nodeid, *_who = abi.fuse_in_header.unpack_from(message)
            self._take(Request(opcode, unique, nodeid, message[abi.fuse_in_header.size : length]))

    def _take(self, request: Request) -> None:
        with self._news:
            self.seen[request.opcode] += 1
            hold = self._frozen(request.opcode)
            if hold:
                self._held.append(request)
            self._news.notify_all()
        if not hold and request.opcode not in _WITHOUT_REPLY:
            self._answer(request)

    def _answer(self, request: Request) -> None:
        number, body = 0, b""
        try:
            handler = self._handlers.get(request.opcode)
            if handler is None:
                raise OSError(errno.ENOSYS, "not needed by the tests")
            body = handler(request)
        except OSError as error:
            number = error.errno or errno.EIO
        header = abi.fuse_out_header.pack(abi.fuse_out_header.size + len(body), -number, request.unique)
        try:
            os.write(self._fd, header + body)
        except OSError as error:
            if error.errno != errno.ENOENT:  # interrupted meanwhile: nobody waits for it
                raise

    def _init(self, request: Request) -> bytes:
        _major, _minor, readahead, flags, *_rest = abi.fuse_init_in.unpack_from(request.body.ljust(abi.fuse_init_in.size, b"\0"))
        return abi.fuse_init_out.pack(7, abi.FUSE_KERNEL_MINOR_VERSION, readahead, flags & _FLAGS, 64, 48, 1 << 16, 1, 0, 0, 0)

    def _attr(self, nodeid: int) -> tuple[int, ...]:
        if nodeid == abi.FUSE_ROOT_ID:
            return (1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)
        return (nodeid, len(self._files[nodeid].data), 8, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o666, 1, 0, 0, 0, 4096, 0)

    def _entry(self, nodeid: int) -> bytes:
        """Nothing may be cached: each use of a name or attribute comes here."""
        return abi.fuse_entry_out.pack(nodeid, 0, 0, 0, 0, 0, *self._attr(nodeid))

    def _lookup(self, request: Request) -> bytes:
        name = request.body.rstrip(b"\0")
        if name == b".":  # of a file handle
            return self._entry(request.nodeid)
        for nodeid, file in self._files.items():
            if file.name == name:
                return self._entry(nodeid)
        raise FileNotFoundError(errno.ENOENT, "no such file")

    def _setattr(self, request: Request) -> bytes:
        valid, _fh, size, *_rest = abi.fuse_setattr_in.unpack_from(request.body)
        if valid & abi.FATTR_SIZE:
            data = self._files[request.nodeid].data
            data[size:] = bytes(max(0, size - len(data)))
        return abi.fuse_attr_out.pack(0, 0, *self._attr(request.nodeid))

    def _read(self, request: Request) -> bytes:
        _fh, offset, size, *_rest = abi.fuse_read_in.unpack_from(request.body)
        return bytes(self._files[request.nodeid].data[offset : offset + size])

    def _write(self, request: Request) -> bytes:
        _fh, offset, size, *_rest = abi.fuse_write_in.unpack_from(request.body)
        data = self._files[request.nodeid].data
        data.extend(bytes(max(0, offset - len(data))))
        data[offset : offset + size] = request.body[abi.fuse_write_in.size :]
        return abi.fuse_write_out.pack(size)

    def _create(self, request: Request) -> bytes:
        nodeid = max(self._files, default=abi.FUSE_ROOT_ID) + 1
        self._files[nodeid] = _File(request.body[abi.fuse_create_in.size :].rstrip(b"\0"), b"")
        return self._entry(nodeid) + abi.fuse_open_out.pack(0, abi.FOPEN_DIRECT_IO)

    def _readdir(self, request: Request) -> bytes:
        _fh, offset, size, *_rest = abi.fuse_read_in.unpack_from(request.body)
        entries = [(abi.FUSE_ROOT_ID, b"."), (abi.FUSE_ROOT_ID, b".."), *((nodeid, file.name) for nodeid, file in self._files.items())]
        found = bytearray()
        for number, (nodeid, name) in enumerate(entries[offset:], offset + 1):
            kind = stat.S_IFDIR if nodeid == abi.FUSE_ROOT_ID else stat.S_IFREG
            entry = abi.fuse_dirent.pack(nodeid, number, len(name), kind >> 12) + name
            entry = entry.ljust(abi.FUSE_REC_ALIGN(len(entry)), b"\0")
            if len(found) + len(entry) > size:
                break
            found += entry
        return bytes(found)
