"""INIT, DESTROY and what has no reply: FORGET, BATCH_FORGET, INTERRUPT."""

from __future__ import annotations

import errno
from itertools import chain

from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.file_system import NO_REPLY, FileSystem, Outcome, Waiting
from vfsd.worker.init_flags import agree, session_flags
from vfsd.worker.request import Request

_LEAST_MINOR = 27
_MAX_WRITE_BYTES = 1 << 20
_MAX_PAGES = _MAX_WRITE_BYTES // 4096
_MAX_BACKGROUND = 65535  # the Rust daemon's: the guest's own limits hold
_CONGESTION_THRESHOLD = _MAX_BACKGROUND // 4 * 3
_LOW_32 = (1 << 32) - 1


def init(fs: FileSystem, request: Request) -> Waiting:
    """Agree on version and flags. A guest of a higher major is told ours, and tries again with it."""
    major, minor, max_readahead, low_flags, high_flags = _init_arguments(request)
    if major > abi.FUSE_KERNEL_VERSION:
        return abi.fuse_init_out.pack(abi.FUSE_KERNEL_VERSION, abi.FUSE_KERNEL_MINOR_VERSION, *(0,) * 9)
    if major < abi.FUSE_KERNEL_VERSION or minor < _LEAST_MINOR:
        fs.log.error(f"the guest speaks FUSE {major}.{minor}; vfsd needs {abi.FUSE_KERNEL_VERSION}.{_LEAST_MINOR} or newer")
        raise ReplyErrno(errno.EPROTO)
    offered = low_flags | (high_flags << 32 if low_flags & abi.FUSE_INIT_EXT else 0)
    agreed, refusal = agree(offered, fs.features, readdirplus=fs.cache.readdirplus)
    if refusal:
        fs.log.error(refusal)
        raise ReplyErrno(errno.EPROTO)
    yield wire.SessionStart(session_flags(agreed))
    fs.log.debug(f"session {fs.broker.session}: FUSE {major}.{minor}, flags {agreed:#x}")
    return abi.fuse_init_out.pack(
        abi.FUSE_KERNEL_VERSION, min(minor, abi.FUSE_KERNEL_MINOR_VERSION), max_readahead, agreed & _LOW_32,
        _MAX_BACKGROUND, _CONGESTION_THRESHOLD, _MAX_WRITE_BYTES, 1, _MAX_PAGES, 0, agreed >> 32,
    )  # fmt: skip


def _init_arguments(request: Request) -> tuple[int, ...]:
    """(major, minor, max_readahead, flags, flags2); a guest before 7.36 sends no flags2."""
    body = request.arguments(abi.FUSE_COMPAT_INIT_IN_SIZE)
    return abi.fuse_init_in.unpack(body.ljust(abi.fuse_init_in.size, b"\0")[: abi.fuse_init_in.size])


def destroy(_fs: FileSystem, _request: Request) -> Waiting:
    yield wire.SessionEnd()
    return b""


def forget(_fs: FileSystem, request: Request) -> Waiting:
    """Waits only until it is on its way to the broker: what is completed is not run again when this worker dies."""
    if len(request.body) >= abi.fuse_forget_in.size:
        yield wire.Forget([request.nodeid, *abi.fuse_forget_in.unpack_from(request.body)])
    return NO_REPLY


def batch_forget(_fs: FileSystem, request: Request) -> Waiting:
    """As many as there really are, whatever the count says."""
    body = request.body
    if len(body) >= abi.fuse_batch_forget_in.size:
        (count,) = abi.fuse_batch_forget_in.unpack_from(body)
        entries = body[abi.fuse_batch_forget_in.size :]
        whole = min(count, len(entries) // abi.fuse_forget_one.size)
        if whole:
            pairs = abi.fuse_forget_one.iter_unpack(entries[: whole * abi.fuse_forget_one.size])
            yield wire.Forget(list(chain.from_iterable(pairs)))
    return NO_REPLY


def interrupt(_fs: FileSystem, _request: Request) -> Outcome:
    """Linux sends none over virtio-fs. What the host kernel holds could not be stopped anyway."""
    return NO_REPLY
