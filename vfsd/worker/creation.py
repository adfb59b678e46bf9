"""Who makes a file, and with which security label: what stands around the name in MKNOD, MKDIR, SYMLINK, CREATE and TMPFILE.

**Trust.** All of it is the guest's. Extensions follow the names without padding, each with its length before it; lengths are
checked against what is there, and anything that does not add up is EINVAL.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.file_system import FileSystem
from vfsd.worker.request import Request

_MODE_BITS = 0o177777
_UMASK_BITS = 0o777
_COUNT = struct.Struct("<I")


class Label(NamedTuple):
    """An extended attribute to be set on the new file; empty if there is none."""

    name: bytes = b""
    value: bytes = b""


class Maker(NamedTuple):
    """`umask`: what the host must apply; 0 where the guest's kernel has done it."""

    uid: int
    gid: int
    umask: int
    groups: list[int]


class Extensions(NamedTuple):
    groups: list[int]
    label: Label


def decode_extensions(data: bytes) -> Extensions:
    """What follows the names: at most one security context and one list of groups."""
    groups: list[int] = []
    label = Label()
    while data:
        if len(data) < abi.fuse_ext_header.size:
            raise ReplyErrno(errno.EINVAL)
        size, kind = abi.fuse_ext_header.unpack_from(data)
        if not abi.fuse_ext_header.size <= size <= len(data):
            raise ReplyErrno(errno.EINVAL)
        body, data = data[abi.fuse_ext_header.size : size], data[abi.FUSE_REC_ALIGN(size) :]
        if kind <= abi.FUSE_MAX_NR_SECCTX:
            label = _decode_contexts(body, kind)
        elif kind == abi.FUSE_EXT_GROUPS:
            groups = _decode_groups(body)
        else:
            raise ReplyErrno(errno.EINVAL)
    return Extensions(groups, label)


def _decode_contexts(body: bytes, count: int) -> Label:
    """A struct fuse_secctx, name and value; Linux sends none or one (fs/fuse/dir.c, get_security_context)."""
    if count == 0:
        return Label()
    if count > 1 or len(body) < abi.fuse_secctx.size:
        raise ReplyErrno(errno.EINVAL)
    (size,) = abi.fuse_secctx.unpack_from(body)
    name, end, rest = body[abi.fuse_secctx.size :].partition(b"\0")
    if not end or not name or not size or size > len(rest):
        raise ReplyErrno(errno.EINVAL)
    if len(name) > wire.MAX_NAME_BYTES or size > wire.MAX_LABEL_BYTES:
        raise ReplyErrno(errno.E2BIG)
    return Label(name, rest[:size])


def _decode_groups(body: bytes) -> list[int]:
    """A struct fuse_supp_groups."""
    if len(body) < _COUNT.size:
        raise ReplyErrno(errno.EINVAL)
    (count,) = _COUNT.unpack_from(body)
    if count > wire.MAX_GROUPS or count * _COUNT.size > len(body) - _COUNT.size:
        raise ReplyErrno(errno.EINVAL)
    return list(struct.unpack_from(f"<{count}I", body, _COUNT.size))


class Creation(NamedTuple):
    """A decoded request: what all five have in common."""

    names: list[bytes]
    mode: int
    maker: Maker
    label: Label


def decode_creation(fs: FileSystem, request: Request, start: int, names: int, *, mode: int, umask: int) -> Creation:
    """`start`: the bytes of the request's fixed arguments; `names`: how many NUL-ended names follow them."""
    found, rest = request.names_and_rest(start, names)
    extended = fs.agreed(abi.FUSE_SECURITY_CTX) or fs.agreed(abi.FUSE_CREATE_SUPP_GROUP)
    groups, label = decode_extensions(rest) if extended else Extensions([], Label())
    umask &= _UMASK_BITS
    if not fs.agreed(abi.FUSE_DONT_MASK):
        mode, umask = mode & ~umask, 0
    return Creation(found, mode & _MODE_BITS, Maker(request.uid, request.gid, umask, groups), label)
