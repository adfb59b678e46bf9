"""Appends, which must not be made twice: a write to the end of a file does not land where it did the first time.

Before the call the ring's in-flight table is told how long the file is. A worker that finds such a note by one whose writer is
dead looks at what has become of the file: as long as before, it was not written to; longer, what was added must be what was to
be written, or the beginning of it. That is certain for one appender to a file; what another one added meanwhile looks like
neither, and is answered EIO rather than guessed at.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from functools import partial
from typing import Any

from vfsd.errors import ReplyErrno
from vfsd.sandbox import filecalls
from vfsd.wire import broker_messages as wire
from vfsd.wire.inflight import Append
from vfsd.worker.file_system import FileSystem, Given, take_donation
from vfsd.worker.io_pool import Job
from vfsd.worker.request import Request, advance


def note_append(request: Request, fh: int, fd: int) -> None:
    """An append of the request's data is about to be made."""
    chain = request.chain
    if chain.inflight is not None:
        chain.inflight.journal(chain.head, Append(fh, filecalls.fstat(fd).size, _length(request)))


def noted_append(request: Request) -> Append | None:
    """What a dead worker noted when it was about to make this append."""
    chain = request.chain
    return chain.inflight.journalled(chain.head) if chain.deaths and chain.inflight is not None else None


def find_out(fs: FileSystem, request: Request, fh: int, noted: Append) -> Generator[wire.Request | Job, Any, int]:
    """How much of a noted append is in the file. EIO if that cannot be told."""
    length = _length(request)
    if (noted.fh, noted.length) != (fh, length):
        raise _untold(fs, "the guest has changed it")
    # The guest may have the file open for writing only, and for I/O of whole blocks.
    given: Given = yield wire.Open(request.nodeid, os.O_RDONLY)
    readable_fh, traits, mount_key = given.fields
    with take_donation(given) as readable:
        try:  # on the pool: what reads from a disk or a server would hold up the ring thread, and all rings with it
            grown, there = yield Job(mount_key, partial(_added, readable.fileno(), noted), bool(traits & wire.TRAIT_SLOW))
        except OSError:
            yield wire.Release(request.nodeid, readable_fh)
            raise
    yield wire.Release(request.nodeid, readable_fh)
    if grown < 0 or there != b"".join(request.data)[: len(there)] or len(there) < min(grown, length):
        raise _untold(fs, "others have written to the file")
    return len(there)


def rest_of(request: Request, done: int) -> list[memoryview]:
    """The data that is not in the file yet."""
    return advance(request.data, done)


def _length(request: Request) -> int:
    return sum(len(view) for view in request.data)


def _added(fd: int, noted: Append) -> tuple[int, bytes]:
    """By how much the file has grown since, and what stands there, as far as the append would have reached."""
    grown = filecalls.fstat(fd).size - noted.size
    return grown, _read(fd, noted.size, min(grown, noted.length)) if grown > 0 else b""


def _read(fd: int, offset: int, length: int) -> bytes:
    """What stands there; shorter if the file ends."""
    buffer = bytearray(length)
    done = 0
    with memoryview(buffer) as view:
        while done < length and (count := os.preadv(fd, [view[done:]], offset + done)):
            done += count
    return bytes(buffer[:done])


def _untold(fs: FileSystem, why: str) -> ReplyErrno:
    fs.tally.undecided += 1
    fs.log.error(f"an append that a worker died of is answered EIO, whether it was made cannot be told: {why}")
    return ReplyErrno(errno.EIO)
