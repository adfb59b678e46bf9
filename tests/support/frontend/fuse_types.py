"""What FUSE replies contain, decoded."""

from __future__ import annotations

from typing import NamedTuple

from vfsd.wire import fuse_abi as abi

NS = 1_000_000_000


class ProtocolViolation(AssertionError):
    """The daemon's reply is not one that the FUSE protocol allows."""


class Attr(NamedTuple):
    """struct fuse_attr; times in nanoseconds, blocks of 512 bytes."""

    ino: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int

    @classmethod
    def decode(cls, fields: tuple[int, ...]) -> Attr:
        ino, size, blocks, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags = fields
        # The seconds are signed in struct inode, but travel as unsigned.
        seconds = [value - (1 << 64) if value >> 63 else value for value in (atime, mtime, ctime)]
        times = [second * NS + nsec for second, nsec in zip(seconds, (atimensec, mtimensec, ctimensec), strict=True)]
        return cls(ino, size, blocks, times[0], times[1], times[2], mode, nlink, uid, gid, rdev, blksize, flags)


class Entry(NamedTuple):
    """struct fuse_entry_out; validities in seconds."""

    nodeid: int
    generation: int
    entry_valid: float
    attr_valid: float
    attr: Attr

    @classmethod
    def decode(cls, reply: bytes) -> Entry:
        nodeid, generation, entry_s, attr_s, entry_ns, attr_ns, *attr = abi.fuse_entry_out.unpack(reply)
        return cls(nodeid, generation, entry_s + entry_ns / NS, attr_s + attr_ns / NS, Attr.decode(tuple(attr)))


class Attributes(NamedTuple):
    """struct fuse_attr_out."""

    attr_valid: float
    attr: Attr

    @classmethod
    def decode(cls, reply: bytes) -> Attributes:
        seconds, nsec, *attr = abi.fuse_attr_out.unpack(reply)
        return cls(seconds + nsec / NS, Attr.decode(tuple(attr)))


class Opened(NamedTuple):
    """struct fuse_open_out."""

    fh: int
    open_flags: int


class Statfs(NamedTuple):
    """struct fuse_kstatfs."""

    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    bsize: int
    namelen: int
    frsize: int


class Dirent(NamedTuple):
    """One directory entry; `entry` only from READDIRPLUS."""

    ino: int
    off: int
    type: int
    name: bytes
    entry: Entry | None = None


class InitOut(NamedTuple):
    """struct fuse_init_out, flags and flags2 in one number."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int


def decode_dirents(data: bytes, *, plus: bool) -> list[Dirent]:
    """All entries of a READDIR or READDIRPLUS reply; they must fill it exactly."""
    entries = []
    head = abi.fuse_direntplus.size if plus else abi.fuse_dirent.size
    while data:
        if len(data) < head:
            raise ProtocolViolation(f"{len(data)} bytes after the last directory entry")
        ino, off, namelen, kind = abi.fuse_dirent.unpack_from(data, head - abi.fuse_dirent.size)
        size = abi.FUSE_REC_ALIGN(head + namelen)
        if not 0 < namelen <= 255 or len(data) < size or any(data[head + namelen : size]):
            raise ProtocolViolation(f"directory entry with a name of {namelen} bytes in {len(data)} bytes")
        entry = Entry.decode(data[: abi.fuse_entry_out.size]) if plus else None
        entries.append(Dirent(ino, off, kind, data[head : head + namelen], entry))
        data = data[size:]
    return entries
