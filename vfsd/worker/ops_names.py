"""Operations on names: the broker resolves, makes and removes them; here requests and replies are translated."""

from __future__ import annotations

import errno

from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.creation import decode_creation
from vfsd.worker.file_system import FileSystem, Given, Waiting, check_name, take_donation
from vfsd.worker.open_flags import host_open_flags, kills_set_id
from vfsd.worker.request import Request


def lookup(fs: FileSystem, request: Request) -> Waiting:
    return (yield from _entry_reply(fs, wire.Lookup(request.nodeid, check_name(request.name()))))


def _entry_reply(fs: FileSystem, question: wire.Request) -> Waiting:
    given: Given = yield question
    return fs.encode_entry(*given.fields)


def mknod(fs: FileSystem, request: Request) -> Waiting:
    mode, rdev, umask = abi.fuse_mknod_in.unpack_from(request.arguments(abi.fuse_mknod_in.size))
    made = decode_creation(fs, request, abi.fuse_mknod_in.size, 1, mode=mode, umask=umask)
    name = check_name(made.names[0])
    return (yield from _entry_reply(fs, wire.MkNod(request.nodeid, name, made.mode, rdev, *made.maker, *made.label)))


def mkdir(fs: FileSystem, request: Request) -> Waiting:
    mode, umask = abi.fuse_mkdir_in.unpack_from(request.arguments(abi.fuse_mkdir_in.size))
    made = decode_creation(fs, request, abi.fuse_mkdir_in.size, 1, mode=mode, umask=umask)
    name = check_name(made.names[0])
    return (yield from _entry_reply(fs, wire.MkDir(request.nodeid, name, made.mode, *made.maker, *made.label)))


def symlink(fs: FileSystem, request: Request) -> Waiting:
    made = decode_creation(fs, request, 0, 2, mode=0, umask=0)
    name, target = made.names
    if len(target) > wire.MAX_TARGET_BYTES:
        raise ReplyErrno(errno.ENAMETOOLONG)
    return (yield from _entry_reply(fs, wire.SymLink(request.nodeid, check_name(name), target, *made.maker, *made.label)))


def link(fs: FileSystem, request: Request) -> Waiting:
    (source,) = abi.fuse_link_in.unpack_from(request.arguments(abi.fuse_link_in.size))
    name = check_name(request.name(abi.fuse_link_in.size))
    return (yield from _entry_reply(fs, wire.Link(source, request.nodeid, name)))


def unlink(_fs: FileSystem, request: Request) -> Waiting:
    yield wire.Unlink(request.nodeid, check_name(request.name()))
    return b""


def rmdir(_fs: FileSystem, request: Request) -> Waiting:
    yield wire.RmDir(request.nodeid, check_name(request.name()))
    return b""


def rename(_fs: FileSystem, request: Request) -> Waiting:
    (new_parent,) = abi.fuse_rename_in.unpack_from(request.arguments(abi.fuse_rename_in.size))
    return (yield from _rename(request, abi.fuse_rename_in.size, new_parent, 0))


def rename2(_fs: FileSystem, request: Request) -> Waiting:
    new_parent, flags = abi.fuse_rename2_in.unpack_from(request.arguments(abi.fuse_rename2_in.size))
    return (yield from _rename(request, abi.fuse_rename2_in.size, new_parent, flags))


def _rename(request: Request, start: int, new_parent: int, flags: int) -> Waiting:
    old, new = request.names(start, 2)
    yield wire.Rename(request.nodeid, check_name(old), new_parent, check_name(new), flags, request.uid, request.gid)
    return b""


def create(fs: FileSystem, request: Request) -> Waiting:
    flags, mode, umask, open_flags = abi.fuse_create_in.unpack_from(request.arguments(abi.fuse_create_in.size))
    made = decode_creation(fs, request, abi.fuse_create_in.size, 1, mode=mode, umask=umask)
    flags = host_open_flags(fs, flags)
    kill = kills_set_id(fs, request, open_flags & abi.FUSE_OPEN_KILL_SUIDGID)
    given: Given = yield wire.Create(request.nodeid, check_name(made.names[0]), flags, made.mode, *made.maker, *made.label, kill)
    return _created(fs, given)


def tmpfile(fs: FileSystem, request: Request) -> Waiting:
    """The name that comes with it is the directory's own: the file has none."""
    flags, mode, umask, _open_flags = abi.fuse_create_in.unpack_from(request.arguments(abi.fuse_create_in.size))
    made = decode_creation(fs, request, abi.fuse_create_in.size, 1, mode=mode, umask=umask)
    given: Given = yield wire.TmpFile(request.nodeid, host_open_flags(fs, flags), made.mode, *made.maker, *made.label)
    return _created(fs, given)


def _created(fs: FileSystem, given: Given) -> bytes:
    nodeid, attr, fh, traits, mount_key = given.fields
    fs.keep_open(nodeid, fh, traits, mount_key, take_donation(given))
    return fs.encode_entry(nodeid, attr) + abi.fuse_open_out.pack(fh, fs.cache.open_flags)
