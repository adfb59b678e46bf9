"""The attribute record that travels from the broker to a worker, and what SETATTR may ask to change.

Its layout is that of the kernel's `struct fuse_attr` (88 bytes), so that a worker hands it on to the guest unchanged and
the broker needs no FUSE codec. The broker writes it from statx(2); a worker writes it from fstat(2) of a descriptor it holds.
"""

from __future__ import annotations

from struct import Struct

# ino, size, blocks; atime, mtime, ctime (s); atime, mtime, ctime (ns); mode, nlink, uid, gid, rdev, blksize, flags
ATTR = Struct("<QQQqqqIIIIIIIIII")
ATTR_BYTES = ATTR.size

# The kernel's `struct fuse_statx`: mask, blksize, attributes, nlink, uid, gid, mode, ino, size, blocks, attributes_mask;
# atime, btime, ctime, mtime (s, ns each); rdev major, minor, dev major, minor. Room that it keeps for later is zero.
STATX = Struct("<IIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII112x")
STATX_BYTES = STATX.size

ATTR_SUBMOUNT = 1  # flags: another file system begins here; the guest gives it a device number of its own

# What SETATTR changes; the numbers are FUSE's FATTR_*.
SET_MODE = 1 << 0
SET_UID = 1 << 1
SET_GID = 1 << 2
SET_SIZE = 1 << 3
SET_ATIME = 1 << 4
SET_MTIME = 1 << 5
SET_ATIME_NOW = 1 << 7
SET_MTIME_NOW = 1 << 8
SET_ALL = SET_MODE | SET_UID | SET_GID | SET_SIZE | SET_ATIME | SET_MTIME | SET_ATIME_NOW | SET_MTIME_NOW


def encode_rdev(major: int, minor: int) -> int:
    """A device number as FUSE carries it: 32 bits, Linux's new_encode_dev()."""
    return ((minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)) & 0xFFFFFFFF


def decode_rdev(rdev: int) -> tuple[int, int]:
    """(major, minor) of a device number that came in FUSE's 32 bits."""
    return (rdev >> 8) & 0xFFF, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00)
