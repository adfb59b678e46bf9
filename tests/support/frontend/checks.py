"""Assertions and waits that many tests share."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tests.support.frontend.fuse_types import Attr

NOT_FOUND = frozenset({errno.EBADF, errno.ENOENT, errno.ESTALE})  # how a request for a nodeid that is not alive may be answered
MALFORMED = frozenset({errno.EINVAL, errno.EIO})  # how a request that no kernel sends may be answered

T = TypeVar("T")


@contextmanager
def raises(*errnos: int) -> Iterator[None]:
    """The block fails with one of these errnos."""
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            expected = " or ".join(errno.errorcode[number] for number in errnos)
            raise AssertionError(f"{errno.errorcode.get(error.errno or 0, error.errno)} instead of {expected}") from error
    else:
        raise AssertionError(f"nothing failed, expected {' or '.join(errno.errorcode[number] for number in errnos)}")


@contextmanager
def permits(*errnos: int) -> Iterator[None]:
    """The block succeeds, or fails with one of these errnos."""
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            raise


def errno_of(operation: Callable[[], object]) -> int:
    """What it fails with, 0 if it succeeds."""
    try:
        operation()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def kernel_dev(st_rdev: int) -> int:
    """A device number as the kernel encodes it in 32 bits (new_encode_dev), which is what FUSE carries."""
    major, minor = os.major(st_rdev), os.minor(st_rdev)
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def assert_same(attr: Attr, path: bytes | os.PathLike[str]) -> None:
    """What FUSE says of an inode is what the host's lstat() says, now."""
    host = os.lstat(path)
    expected = Attr(
        ino=host.st_ino,
        size=host.st_size,
        blocks=host.st_blocks,
        atime_ns=host.st_atime_ns,
        mtime_ns=host.st_mtime_ns,
        ctime_ns=host.st_ctime_ns,
        mode=host.st_mode,
        nlink=host.st_nlink,
        uid=host.st_uid,
        gid=host.st_gid,
        rdev=kernel_dev(host.st_rdev),
        blksize=host.st_blksize,
        flags=attr.flags,
    )
    assert attr == expected


def eventually(probe: Callable[[], T], timeout: float = 5.0) -> T:
    """The first true value of probe(), or its last false one when the time is over."""
    deadline = time.monotonic() + timeout
    while not (value := probe()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def eventually_stable(probe: Callable[[], T], quiet: float = 0.3) -> T:
    """A value of probe() that has not changed for some time."""
    value, since = probe(), time.monotonic()
    while time.monotonic() - since < quiet:
        time.sleep(0.05)
        if (now := probe()) != value:
            value, since = now, time.monotonic()
    return value
