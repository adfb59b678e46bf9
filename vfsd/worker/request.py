"""One FUSE request in a descriptor chain, and where its reply goes.

**Trust.** Every byte belongs to the guest and may change while we look: the header and the arguments are copied once, and
only the copy is looked at. File data is not copied: it goes from and to the guest's pages by the iovecs made here. How the
driver splits a request over descriptors is its own affair.
"""

from __future__ import annotations

import errno
from itertools import islice

from vfsd.errors import ReplyErrno
from vfsd.wire.fuse_abi import FUSE_WRITE, fuse_in_header, fuse_out_header, fuse_write_in
from vfsd.worker.virtqueue import Chain

IN_HEADER_BYTES = fuse_in_header.size
OUT_HEADER_BYTES = fuse_out_header.size
_WRITE_HEAD_BYTES = IN_HEADER_BYTES + fuse_write_in.size
# Far above the longest arguments Linux sends (64 KiB of xattr value, 4 KiB of names), far below what would hurt us.
MAX_ARGUMENT_BYTES = 128 * 1024
IOV_MAX = 1024


class Request:
    """`body` is what follows the header, copied; of a WRITE its fixed part, the data staying in `data`."""

    __slots__ = ("body", "chain", "data", "gid", "nodeid", "opcode", "uid", "unique")

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.unique = 0
        self.opcode = 0
        self.body = b""
        self.data: list[memoryview] = []
        self.uid = self.gid = self.nodeid = 0

    @property
    def buffer_bytes(self) -> int:
        """The guest memory it holds."""
        return self.chain.readable_bytes + self.chain.writable_bytes

    @property
    def has_header(self) -> bool:
        return self.chain.readable_bytes >= IN_HEADER_BYTES

    def decode(self) -> None:
        """Copy header and arguments. ReplyErrno EINVAL if lengths do not fit; the caller has asked `has_header`."""
        views = self.chain.readable
        head = _copy(views, min(self.chain.readable_bytes, _WRITE_HEAD_BYTES))
        length, self.opcode, self.unique, self.nodeid, self.uid, self.gid, _pid, _extensions = fuse_in_header.unpack_from(head)
        if not IN_HEADER_BYTES <= length <= self.chain.readable_bytes:
            raise ReplyErrno(errno.EINVAL)
        if self.opcode == FUSE_WRITE:
            if length < _WRITE_HEAD_BYTES:
                raise ReplyErrno(errno.EINVAL)
            self.body = head[IN_HEADER_BYTES:]
            self.data = _between(views, _WRITE_HEAD_BYTES, length - _WRITE_HEAD_BYTES)
            return
        if length > MAX_ARGUMENT_BYTES:
            raise ReplyErrno(errno.EINVAL)
        self.body = (head if length <= len(head) else _copy(views, length))[IN_HEADER_BYTES:length]

    def arguments(self, layout_bytes: int) -> bytes:
        """The body, if it is at least so long; ReplyErrno EINVAL otherwise."""
        if len(self.body) < layout_bytes:
            raise ReplyErrno(errno.EINVAL)
        return self.body

    def names(self, start: int, count: int) -> list[bytes]:
        """`count` NUL-ended names from `start` of the body on; ReplyErrno EINVAL if there are not so many."""
        return self.names_and_rest(start, count)[0]

    def names_and_rest(self, start: int, count: int) -> tuple[list[bytes], bytes]:
        """As `names`, and what follows them."""
        parts = self.body[start:].split(b"\0", count)
        if len(parts) <= count:
            raise ReplyErrno(errno.EINVAL)
        return parts[:count], parts[count]

    def name(self, start: int = 0) -> bytes:
        return self.names(start, 1)[0]

    def room(self, most: int) -> list[memoryview]:
        """The guest's memory behind the reply's header, at most `most` bytes of it, as iovecs."""
        return _between(self.chain.writable, OUT_HEADER_BYTES, min(most, max(0, self.chain.writable_bytes - OUT_HEADER_BYTES)))

    def reply(self, error: int, body: bytes = b"", placed: int = 0) -> int:
        """Write the reply; returns how many bytes the chain's writable part now holds.

        `placed` bytes of data already stand behind the header's place. A reply that does not fit becomes E2BIG.
        """
        writable = self.chain.writable_bytes
        if writable < OUT_HEADER_BYTES:
            return 0
        if len(body) + placed > writable - OUT_HEADER_BYTES:
            error, body, placed = errno.E2BIG, b"", 0
        length = OUT_HEADER_BYTES + len(body) + placed
        _store(self.chain.writable, fuse_out_header.pack(length, -error, self.unique) + body)
        return length


def _copy(views: list[memoryview], length: int) -> bytes:
    """The first `length` bytes; the caller has checked that there are so many."""
    first = views[0]
    if len(first) >= length:
        return bytes(first[:length])
    parts = []
    for view in views:
        part = bytes(view[:length])
        parts.append(part)
        length -= len(part)
        if length == 0:
            break
    return b"".join(parts)


def _store(views: list[memoryview], data: bytes) -> None:
    """Write into the first bytes of `views`, which have room for it."""
    first = views[0]
    if len(first) >= len(data):
        first[: len(data)] = data
        return
    position = 0
    for view in views:
        part = data[position : position + len(view)]
        view[: len(part)] = part
        position += len(part)
        if position == len(data):
            return


def _between(views: list[memoryview], skip: int, length: int) -> list[memoryview]:
    """`length` bytes behind the first `skip`, as views; fewer if there are not so many."""
    found = []
    for view in views:
        if length <= 0:
            break
        size = len(view)
        if skip >= size:
            skip -= size
            continue
        part = view[skip : skip + length] if skip or length < size else view
        skip = 0
        length -= len(part)
        found.append(part)
    return found


def advance(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `views` after `done` bytes of them."""
    return _between(views, done, sum(len(view) for view in views) - done) if done else views


def iov(views: list[memoryview]) -> list[memoryview]:
    """As many views as one system call takes."""
    return views if len(views) <= IOV_MAX else list(islice(views, IOV_MAX))
