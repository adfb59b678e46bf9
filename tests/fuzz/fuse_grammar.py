"""FUSE requests of a hostile guest: a right header and arguments of the right shape, some fields of which are what they should not be.

`Guest` remembers what replies taught it (nodeids, fhs), so that requests reach what exists, and checks what every reply must be.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from tests.fuzz.provider import Provider
from tests.support.frontend.fuse_types import decode_dirents
from vfsd.sandbox import filecalls
from vfsd.wire import fuse_abi as abi

NAMES = (
    b"file", b"dir", b"inner", b"link", b"fifo", b"new", b"new2", b".", b"..", b"", b"a/b", b"../canary", b"/etc/passwd", b"n" * 255,
    b"n" * 256, b"\xff\xfe", b"user.a", b"security.capability", b"system.posix_acl_access", b"trusted.overlay.opaque",
)  # fmt: skip
OPEN_FLAGS = (
    os.O_RDWR, os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_CREAT, os.O_CREAT | os.O_EXCL,
    os.O_RDWR | os.O_DIRECT, os.O_PATH, os.O_TMPFILE, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_RDWR | os.O_SYNC, 3,
)  # fmt: skip
MODES = (0o100644, 0o040755, 0o644, 0o010600, 0o020666, 0o060666, 0o140777, 0o106755, 0o177777, 0, 0o120777)
OFFSETS = (0, 0, 1, 10, 4096, 65536)
SIZES = (0, 1, 16, 4096, 65536)
ROOMS = (4096, 4096, 4096, 65536, 16, 0, 15, 17, 40, 128, 144)
CONTENT = bytes(range(256)) * 16
LONG = CONTENT * 17  # longer than any extended attribute
ALL_INIT_FLAGS = 0xFFFFFFFF & ~abi.FUSE_INIT_RESERVED


class Shape(NamedTuple):
    """Fixed arguments (a layout and the kind of each field), then names, then data."""

    layout: Struct | None = None
    fields: str = ""
    names: int = 0
    data: bool = False


SHAPES: dict[int, Shape] = {
    abi.FUSE_LOOKUP: Shape(names=1),
    abi.FUSE_FORGET: Shape(abi.fuse_forget_in, "count"),
    abi.FUSE_GETATTR: Shape(abi.fuse_getattr_in, "flag fh"),
    abi.FUSE_SETATTR: Shape(abi.fuse_setattr_in, "valid fh size64 u64 u64 u64 u64 nsec nsec nsec mode id id"),
    abi.FUSE_READLINK: Shape(),
    abi.FUSE_SYMLINK: Shape(names=2, data=True),
    abi.FUSE_MKNOD: Shape(abi.fuse_mknod_in, "mode u32 umask", names=1, data=True),
    abi.FUSE_MKDIR: Shape(abi.fuse_mkdir_in, "mode umask", names=1, data=True),
    abi.FUSE_UNLINK: Shape(names=1),
    abi.FUSE_RMDIR: Shape(names=1),
    abi.FUSE_RENAME: Shape(abi.fuse_rename_in, "node", names=2),
    abi.FUSE_RENAME2: Shape(abi.fuse_rename2_in, "node flag", names=2),
    abi.FUSE_LINK: Shape(abi.fuse_link_in, "node", names=1),
    abi.FUSE_OPEN: Shape(abi.fuse_open_in, "open flag"),
    abi.FUSE_OPENDIR: Shape(abi.fuse_open_in, "open flag"),
    abi.FUSE_CREATE: Shape(abi.fuse_create_in, "open mode umask flag", names=1, data=True),
    abi.FUSE_TMPFILE: Shape(abi.fuse_create_in, "open mode umask flag", names=1, data=True),
    abi.FUSE_READ: Shape(abi.fuse_read_in, "fh offset size flag u64 open"),
    abi.FUSE_READDIR: Shape(abi.fuse_read_in, "fh cookie size flag u64 open"),
    abi.FUSE_READDIRPLUS: Shape(abi.fuse_read_in, "fh cookie size flag u64 open"),
    abi.FUSE_WRITE: Shape(abi.fuse_write_in, "fh offset length flag u64 open", data=True),
    abi.FUSE_STATFS: Shape(),
    abi.FUSE_RELEASE: Shape(abi.fuse_release_in, "fh open flag owner"),
    abi.FUSE_RELEASEDIR: Shape(abi.fuse_release_in, "fh open flag owner"),
    abi.FUSE_FLUSH: Shape(abi.fuse_flush_in, "fh owner"),
    abi.FUSE_FSYNC: Shape(abi.fuse_fsync_in, "fh flag"),
    abi.FUSE_FSYNCDIR: Shape(abi.fuse_fsync_in, "fh flag"),
    abi.FUSE_SETXATTR: Shape(abi.fuse_setxattr_in, "length flag flag", names=1, data=True),
    abi.FUSE_GETXATTR: Shape(abi.fuse_getxattr_in, "size", names=1),
    abi.FUSE_LISTXATTR: Shape(abi.fuse_getxattr_in, "size"),
    abi.FUSE_REMOVEXATTR: Shape(names=1),
    abi.FUSE_GETLK: Shape(abi.fuse_lk_in, "fh owner offset lock_end lock u32 flag"),
    abi.FUSE_SETLK: Shape(abi.fuse_lk_in, "fh owner offset lock_end lock u32 flag"),
    abi.FUSE_SETLKW: Shape(abi.fuse_lk_in, "fh owner offset lock_end lock u32 flag"),
    abi.FUSE_ACCESS: Shape(abi.fuse_access_in, "flag"),
    abi.FUSE_INTERRUPT: Shape(abi.fuse_interrupt_in, "u64"),
    abi.FUSE_IOCTL: Shape(abi.fuse_ioctl_in, "fh flag command u64 length size", data=True),
    abi.FUSE_BATCH_FORGET: Shape(abi.fuse_batch_forget_in, "flag", data=True),
    abi.FUSE_FALLOCATE: Shape(abi.fuse_fallocate_in, "fh offset size64 flag"),
    abi.FUSE_LSEEK: Shape(abi.fuse_lseek_in, "fh offset flag"),
    abi.FUSE_COPY_FILE_RANGE: Shape(abi.fuse_copy_file_range_in, "fh offset node fh offset size64 u64"),
    abi.FUSE_COPY_FILE_RANGE_64: Shape(abi.fuse_copy_file_range_in, "fh offset node fh offset size64 u64"),
    abi.FUSE_STATX: Shape(abi.fuse_statx_in, "flag fh u32 u32"),
    abi.FUSE_SYNCFS: Shape(abi.fuse_syncfs_in),
    abi.FUSE_INIT: Shape(abi.fuse_init_in, "major minor u32 u32 u32"),
    abi.FUSE_DESTROY: Shape(),
    abi.FUSE_BMAP: Shape(),
    abi.FUSE_POLL: Shape(),
    abi.FUSE_SETUPMAPPING: Shape(),
    4096: Shape(),
}
OPCODES = tuple(SHAPES)
_ENTRIES = frozenset({abi.FUSE_LOOKUP, abi.FUSE_SYMLINK, abi.FUSE_MKNOD, abi.FUSE_MKDIR, abi.FUSE_LINK})
_CREATIONS = frozenset({abi.FUSE_CREATE, abi.FUSE_TMPFILE})
_OPENS = frozenset({abi.FUSE_OPEN, abi.FUSE_OPENDIR})
# What a reply without an error holds, in bytes; what is not here holds nothing, or is looked at by `check`.
_REPLY_BYTES = {
    **dict.fromkeys(_ENTRIES, 128),
    **dict.fromkeys(_CREATIONS, 144),
    **dict.fromkeys(_OPENS, 16),
    abi.FUSE_GETATTR: 104, abi.FUSE_SETATTR: 104, abi.FUSE_WRITE: 8, abi.FUSE_STATFS: 80, abi.FUSE_LSEEK: 8, abi.FUSE_STATX: 288,
    abi.FUSE_GETLK: 24, abi.FUSE_COPY_FILE_RANGE: 8, abi.FUSE_COPY_FILE_RANGE_64: 8, abi.FUSE_INIT: 64,
}  # fmt: skip
_SIZED = frozenset(
    {abi.FUSE_READ, abi.FUSE_READDIR, abi.FUSE_READDIRPLUS, abi.FUSE_GETXATTR, abi.FUSE_LISTXATTR, abi.FUSE_IOCTL, abi.FUSE_READLINK}
)
_HEADER_BYTES = abi.fuse_in_header.size
_MOST_ERRNO = 511  # the guest's kernel takes no higher one


class Made(NamedTuple):
    """One request, and how much room its reply has."""

    opcode: int
    nodeid: int
    body: bytes
    room: int
    length: int  # what its header says; -1: the truth
    uid: int
    gid: int
    whole: bool  # nothing was cut off or put behind


class Guest:
    """A guest of one session."""

    def __init__(self) -> None:
        self.nodeids = [1]
        self.opened: list[tuple[int, int]] = []  # nodeid and fh

    def make(self, provider: Provider) -> Made:
        opcode = provider.number(32) if provider.one_in(64) else provider.pick(OPCODES)
        shape = SHAPES.get(opcode, Shape())
        nodeid, fh = self._target(provider, shape)
        names = b"".join(self._name(provider) + b"\0" for _ in range(shape.names))
        data = _data(provider) if shape.data else b""
        fields = _Fields(self, provider, fh, len(data))
        values = [fields.make(kind) for kind in shape.fields.split()]
        body = (shape.layout.pack(*values) if shape.layout else b"") + names + data
        whole = True
        if provider.one_in(12):
            whole = False
            body = body[: provider.number(16)] + provider.blob(64)
        length = provider.number(32) if provider.one_in(24) else -1
        uid, gid = (provider.number(32), provider.number(32)) if provider.one_in(12) else (0, 0)
        return Made(opcode, nodeid, body, provider.pick(ROOMS), length, uid, gid, whole and length < 0)

    def _target(self, provider: Provider, shape: Shape) -> tuple[int, int]:
        """The nodeid and the fh of a request."""
        if provider.one_in(16):
            return provider.number(), provider.number()
        if "fh" in shape.fields.split() and self.opened:
            return provider.pick(self.opened[-16:])
        return provider.pick(self.nodeids[-16:]), 0

    def _name(self, provider: Provider) -> bytes:
        return provider.blob(300).replace(b"\0", b"") if provider.one_in(12) else provider.pick(NAMES)

    def check(self, made: Made, error: int, reply: bytes) -> None:
        """What is true of every reply, and what it teaches."""
        assert 0 <= error <= _MOST_ERRNO, error
        if made.length >= 0 and not _HEADER_BYTES <= made.length <= _HEADER_BYTES + len(made.body):
            assert error == errno.EINVAL, error
        if error:
            assert reply == b""
            return
        opcode = made.opcode
        if opcode in _SIZED:
            self._check_sized(made, reply)
        else:
            assert len(reply) == _REPLY_BYTES.get(opcode, 0), (opcode, len(reply))
        if opcode in _ENTRIES or opcode in _CREATIONS:
            nodeid = abi.fuse_entry_out.unpack_from(reply)[0]
            self.nodeids.append(nodeid)
            if opcode in _CREATIONS:
                self.opened.append((nodeid, abi.fuse_open_out.unpack_from(reply, 128)[0]))
        elif opcode in _OPENS:
            self.opened.append((made.nodeid, abi.fuse_open_out.unpack(reply)[0]))
        elif opcode == abi.FUSE_WRITE:
            assert int.from_bytes(reply[:4], "little") <= len(made.body)
        elif opcode in (abi.FUSE_INIT, abi.FUSE_DESTROY):
            self.__init__()  # type: ignore[misc]  # all that was known is gone

    def _check_sized(self, made: Made, reply: bytes) -> None:
        assert len(reply) <= made.room - 16
        if made.opcode in (abi.FUSE_READDIR, abi.FUSE_READDIRPLUS):
            for entry in decode_dirents(reply, plus=made.opcode == abi.FUSE_READDIRPLUS):
                assert b"/" not in entry.name
                assert entry.name
                if entry.entry is not None and entry.entry.nodeid:
                    self.nodeids.append(entry.entry.nodeid)


class _Fields:
    """The fields of one request, each made by its kind."""

    def __init__(self, guest: Guest, provider: Provider, fh: int, data_bytes: int) -> None:
        self._guest = guest
        self._provider = provider
        self._fh = fh
        self._data_bytes = data_bytes
        p = provider
        self._kinds: dict[str, Callable[[], int]] = {
            "u64": p.number,
            "u32": lambda: p.number(32),
            "nsec": lambda: p.number(30),
            "id": lambda: p.number(32),
            "count": lambda: p.byte() % 3,
            "flag": lambda: p.number(32) if p.one_in(24) else p.byte() % 5,
            "valid": lambda: p.number(12),
            "fh": lambda: p.number() if p.one_in(24) else self._next_fh(),
            "node": lambda: p.number() if p.one_in(24) else p.pick(guest.nodeids[-16:]),
            "owner": lambda: p.byte() % 3,
            "offset": lambda: p.number() if p.one_in(12) else p.pick(OFFSETS),
            "cookie": lambda: p.number() if p.one_in(6) else p.byte() % 6,
            "size": lambda: p.number(32) if p.one_in(12) else p.pick(SIZES),
            "size64": lambda: p.number() if p.one_in(12) else p.pick(SIZES),
            "length": lambda: p.number(32) if p.one_in(12) else self._data_bytes,
            "mode": lambda: p.number(32) if p.one_in(12) else p.pick(MODES),
            "umask": lambda: p.number(32) if p.one_in(12) else 0o22,
            "open": lambda: p.number(32) if p.one_in(12) else p.pick(OPEN_FLAGS),
            "lock": lambda: p.byte() % 4,
            "lock_end": lambda: p.number() if p.one_in(6) else (1 << 63) - 1,
            "command": lambda: p.number(32) if p.one_in(6) else p.pick(sorted(filecalls.IOCTL_BYTES)),
            "major": lambda: p.number(32) if p.one_in(12) else 7,
            "minor": lambda: p.number(32) if p.one_in(6) else 38,
        }

    def make(self, kind: str) -> int:
        return self._kinds[kind]()

    def _next_fh(self) -> int:
        """The request's own; a second one of the same request (a copy's target) is any."""
        fh, self._fh = self._fh, self._guest.opened[-1][1] if self._guest.opened else 0
        return fh


def _data(provider: Provider) -> bytes:
    """File content, an extension, or whatever."""
    match provider.byte() % 4:
        case 0:
            return b""
        case 1:
            return CONTENT[: provider.number(12)]
        case 2:
            return b"".join(_extension(provider) for _ in range(1 + provider.byte() % 3))
    return LONG if provider.one_in(32) else provider.blob(200)


def _extension(provider: Provider) -> bytes:
    """A list of groups, or a security context."""
    kind = provider.pick((abi.FUSE_EXT_GROUPS, abi.FUSE_EXT_GROUPS, 1, 0, 31, 33))
    if kind == abi.FUSE_EXT_GROUPS:
        groups = provider.byte() % 4
        count = provider.number(32) if provider.one_in(12) else groups
        body = count.to_bytes(4, "little") + bytes(4 * groups)
    else:
        label = provider.blob(40)
        size = provider.number(32) if provider.one_in(12) else len(label)
        body = abi.fuse_secctx.pack(size) + provider.pick(NAMES) + b"\0" + label
    size = provider.number(32) if provider.one_in(6) else abi.fuse_ext_header.size + len(body)
    return (abi.fuse_ext_header.pack(size, kind) + body).ljust(abi.FUSE_REC_ALIGN(abi.fuse_ext_header.size + len(body)), b"\0")
