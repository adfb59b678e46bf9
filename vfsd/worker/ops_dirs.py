"""READDIR and READDIRPLUS. The position is set before each read and nothing is kept between requests.

READDIRPLUS counts what fits before it asks the broker: an entry's size depends on its name alone. A name that cannot be
looked up is listed with nodeid 0, and so are `.` and `..`: the guest then asks by itself.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Generator
from typing import Any, NamedTuple

from vfsd.errors import ReplyErrno
from vfsd.sandbox import filecalls
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.wire.fuse_abi import FUSE_REC_ALIGN
from vfsd.worker.file_system import FileSystem, Given, Waiting
from vfsd.worker.files import OpenFile
from vfsd.worker.io_pool import Job
from vfsd.worker.ops_files import on_pool
from vfsd.worker.request import OUT_HEADER_BYTES, Request

_NAMES_AT_ONCE = 32  # looked up by one message: the broker takes other workers' requests between two
_MOST_BYTES = 64 * 1024  # one reply's worth of entries; the guest asks again
_DIRENT64 = struct.Struct("<QqHB")  # struct linux_dirent64: d_ino, d_off, d_reclen, d_type; d_name follows
_ROOT_NODEID = 1
_NO_ENTRY = bytes(abi.fuse_entry_out.size)
_DOTS = (b".", b"..")


class Entry(NamedTuple):
    ino: int
    next_offset: int
    kind: int
    name: bytes

    def encode(self) -> bytes:
        """A fuse_dirent with its name, padded."""
        head = abi.fuse_dirent.pack(self.ino, self.next_offset & 0xFFFFFFFFFFFFFFFF, len(self.name), self.kind)
        return (head + self.name).ljust(FUSE_REC_ALIGN(len(head) + len(self.name)), b"\0")


def decode_entries(raw: bytes) -> list[Entry]:
    """What getdents64(2) gave; from the host's kernel, so it is as the structure says."""
    entries = []
    position = 0
    while position < len(raw):
        ino, offset, length, kind = _DIRENT64.unpack_from(raw, position)
        name = raw[position + _DIRENT64.size : position + length]
        entries.append(Entry(ino, offset, kind, name[: name.index(b"\0")]))
        position += length
    return entries


def _fitting(entries: list[Entry], room: int, extra: int) -> list[Entry]:
    """The entries that fit in `room` bytes, each with `extra` bytes before its fuse_dirent."""
    for count, entry in enumerate(entries):
        room -= extra + FUSE_REC_ALIGN(abi.FUSE_NAME_OFFSET + len(entry.name))
        if room < 0:
            return entries[:count]
    return entries


def readdir(fs: FileSystem, request: Request) -> Waiting:
    entries = yield from _read_entries(fs, request, 0)
    return b"".join(entry.encode() for entry in entries)


def readdirplus(fs: FileSystem, request: Request) -> Waiting:
    entries = yield from _read_entries(fs, request, abi.fuse_entry_out.size)
    names = [entry.name for entry in entries if entry.name not in _DOTS]
    found: dict[bytes, bytes] = {}
    for start in range(0, len(names), _NAMES_AT_ONCE):
        batch = names[start : start + _NAMES_AT_ONCE]
        given: Given = yield wire.LookupMany(request.nodeid, batch)
        for name, (error, nodeid, attr) in zip(batch, given.fields, strict=True):
            if not error:
                found[name] = fs.encode_entry(nodeid, attr)
    return b"".join(found.get(entry.name, _NO_ENTRY) + entry.encode() for entry in entries)


def _read_entries(fs: FileSystem, request: Request, extra: int) -> Generator[wire.Request | Job, Any, list[Entry]]:
    """The entries from the request's offset on that fit in its reply."""
    fh, offset, size, *_rest = abi.fuse_read_in.unpack_from(request.arguments(abi.fuse_read_in.size))
    room = min(size, _MOST_BYTES, max(0, request.chain.writable_bytes - OUT_HEADER_BYTES))
    opened = yield from fs.fetch(request.nodeid, fh)
    if opened.mount.pooled() or opened.in_use:  # by a pool thread, which may hold its position for long
        raw: bytes = yield from on_pool(opened, lambda: _read_at(opened, offset, room))
    else:
        raw = _read_at(opened, offset, room)
    found = decode_entries(raw)
    entries = _fitting(found, room, extra)
    if found and not entries:
        raise ReplyErrno(errno.EINVAL)  # an empty reply would say that the directory ends here
    return _hide_above_root(entries) if request.nodeid == _ROOT_NODEID else entries


def _read_at(opened: OpenFile, offset: int, room: int) -> bytes:
    """A kernel's entry is at most as long as the guest's, so more than `room` bytes would not be used. EINVAL if none fits."""
    with opened.position_lock:
        os.lseek(opened.fd, _signed(offset), os.SEEK_SET)
        return filecalls.getdents64(opened.fd, room)


def _signed(offset: int) -> int:
    """Directory positions are cookies of 64 bits; lseek takes them signed."""
    return offset - (1 << 64) if offset >= 1 << 63 else offset


def _hide_above_root(entries: list[Entry]) -> list[Entry]:
    """There is nothing above the share: its `..` is itself."""
    own = next((entry.ino for entry in entries if entry.name == b"."), _ROOT_NODEID)
    return [entry._replace(ino=own) if entry.name == b".." else entry for entry in entries]
