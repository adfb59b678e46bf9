"""Locks as a guest kernel asks for them, for an owner of the test's choice; and what a program of the host does meanwhile."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.frontend.fuse_client import FuseClient
from tests.support.frontend.fuse_session import Pending
from vfsd.wire import fuse_abi as abi

READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
LAST = (1 << 63) - 1


class Found(NamedTuple):
    """What GETLK answers."""

    start: int
    end: int
    kind: int
    pid: int


class Locker:
    """One lock owner with one open file of the guest."""

    def __init__(self, client: FuseClient, nodeid: int, fh: int, owner: int) -> None:
        self.client = client
        self.nodeid = nodeid
        self.fh = fh
        self.owner = owner

    def _body(self, kind: int, start: int, end: int, *, flock: bool = False) -> bytes:
        return abi.fuse_lk_in.pack(self.fh, self.owner, start, end, kind, 1000, abi.FUSE_LK_FLOCK if flock else 0)

    def send(self, kind: int, start: int = 0, end: int = LAST, *, flock: bool = False, queue: int | None = None) -> Pending:
        """SETLKW."""
        return self.client.send(abi.FUSE_SETLKW, self.nodeid, self._body(kind, start, end, flock=flock), queue=queue)

    def lock(self, kind: int, start: int = 0, end: int = LAST, *, flock: bool = False) -> None:
        """SETLK."""
        self.client.request(abi.FUSE_SETLK, self.nodeid, self._body(kind, start, end, flock=flock))

    def unlock(self, start: int = 0, end: int = LAST, *, flock: bool = False) -> None:
        self.lock(UNLOCK, start, end, flock=flock)

    def test(self, kind: int, start: int = 0, end: int = LAST) -> Found:
        """GETLK."""
        reply = self.client.request(abi.FUSE_GETLK, self.nodeid, self._body(kind, start, end), abi.fuse_lk_out.size)
        return Found(*abi.fuse_lk_out.unpack(reply))

    def flush(self, *, queue: int | None = None) -> None:
        """As close(2) of one of the owner's descriptors."""
        self.client.request(abi.FUSE_FLUSH, self.nodeid, abi.fuse_flush_in.pack(self.fh, self.owner), queue=queue)

    def release(self) -> None:
        self.client.release(self.nodeid, self.fh)


_HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
{call}
print("held", flush=True)
sys.stdin.read()
"""
_CALLS = {
    "lockf": "fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)",  # POSIX, bytes 5 to 14
    "shared lockf": "fcntl.lockf(file, fcntl.LOCK_SH, 10, 5)",
    "flock": "fcntl.flock(file, fcntl.LOCK_EX)",
}


@contextmanager
def held_by_host(path: Path | bytes, how: str) -> Iterator[None]:
    """Another process of the host holds a lock on the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(call=_CALLS[how]), path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        assert process.stdin is not None
        process.stdin.close()


_TRY = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
try:
    {call}
except BlockingIOError:
    sys.exit(11)
"""


def host_can(path: Path | bytes, call: str) -> bool:
    """Whether another process of the host gets this lock now: a call with `file`."""
    done = subprocess.run([sys.executable, "-c", _TRY.format(call=call), path], check=False)
    assert done.returncode in (0, 11)
    return done.returncode == 0
