"""Operations on open files. Data goes between file and guest memory in one system call, never through Python's bytes.

A call that may wait for a device runs on the pool: reads whose data is not in the page cache, and everything on a mount that
was slow a moment ago (files.Mount).

This process is nobody, so the kernel takes set-id bits away at each of its writes. Where the writer may keep them, the broker
is asked to put back what the file had before, and the guest is answered when they are there again.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from vfsd.errors import ReplyErrno
from vfsd.sandbox import filecalls
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.wire.inflight import Append
from vfsd.worker.appends import find_out, note_append, noted_append, rest_of
from vfsd.worker.file_system import FileSystem, Given, Outcome, Placed, Waiting, take_donation
from vfsd.worker.files import OpenFile
from vfsd.worker.io_pool import Job
from vfsd.worker.keepers import Group
from vfsd.worker.open_flags import host_open_flags, kills_set_id, kills_set_id_unsaid
from vfsd.worker.request import Request, advance, iov

_I64_MAX = (1 << 63) - 1
_MAX_TRANSFER_BYTES = 1 << 20
_INLINE_COPY_BYTES = 1 << 20  # a longer COPY_FILE_RANGE is not for the ring thread
_MAX_COPY_BYTES = 1 << 30  # one reply's worth: the guest asks again for the rest
_NO_NOWAIT = (errno.EOPNOTSUPP, errno.EINVAL)
_SET_ID_BITS = stat.S_ISUID | stat.S_ISGID


def open_(fs: FileSystem, request: Request) -> Waiting:
    flags, open_flags = abi.fuse_open_in.unpack_from(request.arguments(abi.fuse_open_in.size))
    kill = kills_set_id(fs, request, open_flags & abi.FUSE_OPEN_KILL_SUIDGID)
    given: Given = yield wire.Open(request.nodeid, host_open_flags(fs, flags), kill)
    return _opened(fs, request, given, fs.cache.open_flags)


def opendir(fs: FileSystem, request: Request) -> Waiting:
    request.arguments(abi.fuse_open_in.size)
    given: Given = yield wire.OpenDir(request.nodeid)
    return _opened(fs, request, given, fs.cache.opendir_flags)


def _opened(fs: FileSystem, request: Request, given: Given, open_flags: int) -> bytes:
    fh, traits, mount_key = given.fields
    fs.keep_open(request.nodeid, fh, traits, mount_key, take_donation(given))
    return abi.fuse_open_out.pack(fh, open_flags)


def release(fs: FileSystem, request: Request) -> Waiting:
    """Needs no answer of the broker: it cannot fail. But it must be on its way before the guest is told that it is done."""
    fh, _flags, _release_flags, _owner = abi.fuse_release_in.unpack_from(request.arguments(abi.fuse_release_in.size))
    if fs.files.get(request.nodeid, fh) is not None:
        fs.files.drop(fh)
    yield wire.Release(request.nodeid, fh)
    return b""


def read(fs: FileSystem, request: Request) -> Outcome | Waiting:
    fh, offset, size, *_rest = abi.fuse_read_in.unpack_from(request.arguments(abi.fuse_read_in.size))
    if size > _MAX_TRANSFER_BYTES or offset > _I64_MAX - size:
        raise ReplyErrno(errno.EINVAL)
    opened = fs.files.get(request.nodeid, fh)
    if opened is None:
        return _read_fetched(fs, request, fh, offset, size)
    done = _read_inline(opened, request.room(size), offset)
    return _read_pooled(opened, request, offset, size) if done is None else Placed(done)


def _read_fetched(fs: FileSystem, request: Request, fh: int, offset: int, size: int) -> Waiting:
    opened = yield from fs.fetch(request.nodeid, fh)
    return (yield from _read_pooled(opened, request, offset, size))


def _read_inline(opened: OpenFile, views: list[memoryview], offset: int) -> int | None:
    """Read what is there without waiting; None if the rest needs a call that may wait."""
    mount = opened.mount
    if mount.pooled() or not views:
        return None if views else 0
    if not mount.nowait_reads:
        started = time.monotonic()
        done = _read_all(opened.fd, views, offset)
        mount.took(started)
        return done
    try:
        done = os.preadv(opened.fd, iov(views), offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_NOWAIT:
            raise
        mount.nowait_reads = False
        return _read_inline(opened, views, offset)
    if done == sum(len(view) for view in views):
        return done
    # A short count is not the end of the file: the rest may not be in the page cache. It is the end if the file ends there;
    # of files whose size is 0 (procfs has such) only a waiting read can say.
    end = filecalls.fstat(opened.fd).size
    return done if 0 < end <= offset + done else None


def _read_all(fd: int, views: list[memoryview], offset: int) -> int:
    """Read until the views are full or the file ends."""
    done = 0
    while views:
        count = os.preadv(fd, iov(views), offset + done)
        if count == 0:
            break
        done += count
        views = advance(views, count)
    return done


def _read_pooled(opened: OpenFile, request: Request, offset: int, size: int) -> Waiting:
    done: int = yield from on_pool(opened, lambda: _read_all(opened.fd, request.room(size), offset))
    return Placed(done)


def on_pool(opened: OpenFile, work: Callable[[], Any]) -> Generator[wire.Request | Job, Any, Any]:
    """Run `work` on a pool thread, the open file's descriptor held meanwhile."""
    opened.pin()
    try:
        return (yield Job(opened.mount.key, work, opened.mount.slow))
    finally:
        opened.unpin()


def write(fs: FileSystem, request: Request) -> Outcome | Waiting:
    fh, offset, size, write_flags, _owner, flags = abi.fuse_write_in.unpack_from(request.body)
    if size != sum(len(view) for view in request.data):
        raise ReplyErrno(errno.EIO)
    if size > _MAX_TRANSFER_BYTES or offset > _I64_MAX - size:
        raise ReplyErrno(errno.EINVAL)
    keeps = not write_flags & abi.FUSE_WRITE_KILL_SUIDGID
    again = request.chain.deaths > 0

    from_cache = write_flags & abi.FUSE_WRITE_CACHE

    def work(fd: int) -> Written:
        if from_cache:
            return _written(fd, keeps, lambda: _write_back(fd, request.data, offset), again)
        return _written(fd, keeps, lambda: _write_all(fd, request.data, offset, 0), again)

    if flags & os.O_APPEND and not from_cache:
        noted = noted_append(request)
        if noted is not None:
            return _append_again(fs, request, fh, noted, keeps)
        work = partial(_append, request, fh, keeps)
    opened = fs.files.get(request.nodeid, fh)
    if opened is None or opened.mount.pooled():
        return _write_pooled(fs, request, fh, work)
    started = time.monotonic()
    written = work(opened.fd)
    opened.mount.took(started)
    if fs.features.capability_remapped or (keeps and (written.set_id_bits or fs.keepers.seen(request.nodeid))):
        return _write_restored(fs, request, fh, written)
    return abi.fuse_write_out.pack(written.length())


def _append(request: Request, fh: int, keeps: bool, fd: int) -> Written:
    note_append(request, fh, fd)
    return _written(fd, keeps, lambda: _write_all(fd, request.data, 0, os.RWF_APPEND), request.chain.deaths > 0)


def _append_again(fs: FileSystem, request: Request, fh: int, noted: Append, keeps: bool) -> Waiting:
    """An append that a dead worker was about to make, or made."""
    done = yield from find_out(fs, request, fh, noted)
    if not done:
        return (yield from _write_pooled(fs, request, fh, partial(_append, request, fh, keeps)))
    rest = rest_of(request, done)

    def work(fd: int) -> Written:
        written = _written(fd, keeps, lambda: _write_all(fd, rest, noted.size + done, 0), True)
        return written._replace(done=done + written.done, error=0)  # an error comes again with the guest's next write

    return (yield from _write_pooled(fs, request, fh, work))


def _write_pooled(fs: FileSystem, request: Request, fh: int, work: Callable[[int], Written]) -> Waiting:
    with fs.keepers.joined(request.nodeid) as group:
        opened = yield from fs.fetch(request.nodeid, fh)
        written: Written = yield from on_pool(opened, lambda: work(opened.fd))
        return abi.fuse_write_out.pack((yield from _restored(fs, group, request.nodeid, fh, written)))


def _write_restored(fs: FileSystem, request: Request, fh: int, written: Written) -> Waiting:
    with fs.keepers.joined(request.nodeid) as group:
        return abi.fuse_write_out.pack((yield from _restored(fs, group, request.nodeid, fh, written)))


class Written(NamedTuple):
    """What a call wrote. `error`: the errno it failed with; `set_id_bits`: those that the file had before, if it is to keep them."""

    done: int
    error: int
    keeps: bool
    set_id_bits: int

    def length(self) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return self.done


def _written(fd: int, keeps: bool, call: Callable[[], int], again: bool) -> Written:
    """Make a call that writes to `fd`. Also one that fails takes the bits away; so has, perhaps, a dead worker's (`again`)."""
    bits = 0
    if keeps:
        bits = _SET_ID_BITS if again else filecalls.mode_of(fd) & _SET_ID_BITS
    try:
        return Written(call(), 0, keeps, bits)
    except OSError as error:
        return Written(0, error.errno or errno.EIO, keeps, bits)


def _restored(fs: FileSystem, group: Group, nodeid: int, fh: int, written: Written) -> Generator[wire.Request | Job, Any, int]:
    """How much was written, once the file's privileges are as they must be. The data is there also if they cannot be made so."""
    group.bits |= written.set_id_bits
    bits = group.bits if written.keeps else 0
    if bits or fs.features.capability_remapped:
        with suppress(ReplyErrno):
            yield wire.AfterWrite(nodeid, fh, bits)
    return written.length()


def _write_all(fd: int, views: list[memoryview], offset: int, rwf: int) -> int:
    """Write until the views are empty, or a call writes less than it was given: the guest asks for the rest, and is told why.

    Were the rest tried here, an error of writing back, which the kernel tells a description once (O_SYNC), would be lost.
    """
    done = 0
    while views:
        batch = iov(views)
        try:
            count = os.pwritev(fd, batch, offset + done, rwf)
        except OSError:
            if done:
                break  # a full disk is as full when the guest asks again
            raise
        done += count
        if count < sum(map(len, batch)):
            break
        views = advance(views, count)
    return done


def _write_back(fd: int, views: list[memoryview], offset: int) -> int:
    """Write all of it, or fail: of its page cache the guest's kernel takes any count for all.

    What a short count left out would be gone, and no fsync(2) of the guest's would say so.
    """
    done = 0
    while views:
        count = os.pwritev(fd, iov(views), offset + done)
        if not count:
            raise OSError(errno.EIO, "a write that writes nothing")
        done += count
        views = advance(views, count)
    return done


def flush(fs: FileSystem, request: Request) -> Outcome | Waiting:
    """The broker's if the file system has a flush method, or if the owner may have locks on the file; otherwise nothing to do."""
    fh, owner = abi.fuse_flush_in.unpack_from(request.arguments(abi.fuse_flush_in.size))
    opened = fs.files.get(request.nodeid, fh)
    if opened is None or opened.traits & wire.TRAIT_FLUSH or fs.locks_in_use:
        return _ask_nothing(wire.Flush(request.nodeid, fh, owner))
    return b""


def _ask_nothing(question: wire.Request) -> Waiting:
    yield question
    return b""


def fsync(_fs: FileSystem, request: Request) -> Waiting:
    """The broker's: an error of writing back is reported once per open file, to a process that survives."""
    fh, flags = abi.fuse_fsync_in.unpack_from(request.arguments(abi.fuse_fsync_in.size))
    yield wire.FSync(request.nodeid, fh, flags & abi.FUSE_FSYNC_FDATASYNC)
    return b""


def fallocate(fs: FileSystem, request: Request) -> Waiting:
    fh, offset, length, mode = abi.fuse_fallocate_in.unpack_from(request.arguments(abi.fuse_fallocate_in.size))
    if length > _I64_MAX or offset > _I64_MAX - length:
        raise ReplyErrno(errno.EFBIG)
    yield wire.FAllocate(request.nodeid, fh, mode, offset, length, kills_set_id_unsaid(fs, request))
    return b""


def copy_file_range(fs: FileSystem, request: Request) -> Waiting:
    return abi.fuse_write_out.pack((yield from _copy(fs, request)))


def copy_file_range_64(fs: FileSystem, request: Request) -> Waiting:
    """The same with room for a longer answer."""
    return abi.fuse_copy_file_range_out.pack((yield from _copy(fs, request)))


def _copy(fs: FileSystem, request: Request) -> Generator[wire.Request | Job, Any, int]:
    arguments = abi.fuse_copy_file_range_in.unpack_from(request.arguments(abi.fuse_copy_file_range_in.size))
    fh_in, offset_in, nodeid_out, fh_out, offset_out, length, flags = arguments
    length = min(length, _MAX_COPY_BYTES)
    keeps = not kills_set_id_unsaid(fs, request)
    if flags or offset_in > _I64_MAX - length or offset_out > _I64_MAX - length:
        raise ReplyErrno(errno.EINVAL)
    source = yield from fs.fetch(request.nodeid, fh_in)
    source.pin()
    with fs.keepers.joined(nodeid_out) as group:
        try:
            target = yield from fs.fetch(nodeid_out, fh_out)
            written: Written = yield from _copy_between(
                source, target, keeps, length, offset_in, offset_out, again=request.chain.deaths > 0
            )
        finally:
            source.unpin()
        return (yield from _restored(fs, group, nodeid_out, fh_out, written))


def _copy_between(
    source: OpenFile, target: OpenFile, keeps: bool, length: int, offset_in: int, offset_out: int, *, again: bool
) -> Generator[wire.Request | Job, Any, Written]:
    def copy() -> Written:
        return _written(target.fd, keeps, lambda: os.copy_file_range(source.fd, target.fd, length, offset_in, offset_out), again)

    if length <= _INLINE_COPY_BYTES and not source.mount.pooled() and not target.mount.pooled():
        return copy()
    target.pin()
    try:
        # Two mounts are as a third one: if either hangs, that is not on the other's account.
        key = target.mount.key if source.mount is target.mount else (source.mount.key, target.mount.key)
        written: Written = yield Job(key, copy, source.mount.slow or target.mount.slow)
    finally:
        target.unpin()
    return written


def ioctl(_fs: FileSystem, request: Request) -> Waiting:
    """The broker's list says which commands pass. Linux sends them with the argument in and out (restricted ioctls)."""
    fh, flags, command, _arg, in_size, out_size = abi.fuse_ioctl_in.unpack_from(request.arguments(abi.fuse_ioctl_in.size))
    argument = request.body[abi.fuse_ioctl_in.size :]
    if flags & ~abi.FUSE_IOCTL_DIR:
        raise ReplyErrno(errno.ENOTTY)  # unrestricted or of a 32-bit program: layouts that are not these
    if in_size != len(argument) or in_size > wire.MAX_IOCTL_BYTES:
        raise ReplyErrno(errno.EINVAL if in_size != len(argument) else errno.ENOTTY)
    given: Given = yield wire.Ioctl(request.nodeid, fh, command, argument)
    data: bytes = given.fields[0]
    return abi.fuse_ioctl_out.pack(0, 0, 0, 0) + data[:out_size]
