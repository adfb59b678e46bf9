"""The seeds of FUSE targets: requests in the order in which a guest's kernel, or a hostile guest, sends them."""

from __future__ import annotations

import os
from typing import Any

from tests.fuzz.fuse_grammar import ALL_INIT_FLAGS, LONG, MODES, NAMES, OFFSETS, OPCODES, OPEN_FLAGS, ROOMS, SHAPES, SIZES
from tests.fuzz.provider import Recipe
from vfsd.sandbox import filecalls
from vfsd.wire import fuse_abi as abi


def write_request(
    recipe: Recipe, opcode: int, *fields: int, node: int = 0, names: tuple[bytes, ...] = (), data: bytes | None = None, room: int = 4096
) -> Recipe:
    """One request as `Guest.make` reads it, nothing wrong with it. `node`: which of the known ones; fields as written for each kind."""
    shape = SHAPES[opcode]
    recipe.one_in(64).pick(OPCODES, opcode).one_in(16).byte(node)
    for name in names:
        recipe.one_in(12).pick(NAMES, name)
    if shape.data:
        recipe.byte(0 if data is None else 3)
        if data is not None:
            if data is LONG:
                recipe.one_in(32, True)
            else:
                recipe.one_in(32).blob(data)
    given = iter(fields)
    for kind in shape.fields.split():
        _write_field(recipe, kind, next(given, 0))
    return recipe.one_in(12).one_in(24).one_in(12).pick(ROOMS, room)


def _write_field(recipe: Recipe, kind: str, value: int) -> None:
    if kind in ("u64", "u32", "nsec", "id", "valid"):
        recipe.number(value)
    elif kind in ("count", "owner", "lock"):
        recipe.byte(value)
    elif kind in ("fh", "length", "umask", "major", "minor", "lock_end"):
        recipe.one_in(24)
    else:
        tables = {"offset": OFFSETS, "size": SIZES, "size64": SIZES, "mode": MODES, "open": OPEN_FLAGS}
        recipe.one_in(24).byte(tables[kind].index(value) if kind in tables else value)


def sequences(before_each: bytes = b"") -> dict[str, bytes]:
    """Requests as a guest's kernel sends them; `before_each`: what a target reads before each of them."""

    def write(recipe: Recipe, opcode: int, *fields: int, **more: Any) -> None:
        write_request(recipe.raw(before_each), opcode, *fields, **more)

    lookup = abi.FUSE_LOOKUP
    found: dict[str, Recipe] = {}
    found["read-a-file"] = recipe = Recipe()
    write(recipe, lookup, names=(b"file",))
    write(recipe, abi.FUSE_OPEN, os.O_RDWR, node=1)
    write(recipe, abi.FUSE_READ, 0, 0, 4096)
    write(recipe, abi.FUSE_FLUSH)
    write(recipe, abi.FUSE_RELEASE)
    write(recipe, abi.FUSE_FORGET, 1, node=1)
    found["write-a-new-file"] = recipe = Recipe()
    write(recipe, abi.FUSE_CREATE, os.O_RDWR, 0o100644, names=(b"new",))
    write(recipe, abi.FUSE_WRITE, 0, 0, data=b"what is written")
    write(recipe, abi.FUSE_FSYNC)
    write(recipe, abi.FUSE_FALLOCATE, 0, 0, 4096, 0)
    write(recipe, abi.FUSE_LSEEK, 0, 0, 3)
    write(recipe, abi.FUSE_COPY_FILE_RANGE, 0, 0, 1, 0, 4096, 16)
    write(recipe, abi.FUSE_RELEASE)
    found["list-a-directory"] = recipe = Recipe()
    write(recipe, abi.FUSE_OPENDIR)
    write(recipe, abi.FUSE_READDIR, 0, 0, 4096)
    write(recipe, abi.FUSE_READDIRPLUS, 0, 0, 4096, room=65536)
    write(recipe, abi.FUSE_FSYNCDIR)
    write(recipe, abi.FUSE_RELEASEDIR)
    found["names-that-lead-out"] = recipe = Recipe()
    for name in (b"..", b".", b"../canary", b"/etc/passwd", b"", b"n" * 256):
        write(recipe, lookup, names=(name,))
        write(recipe, abi.FUSE_UNLINK, names=(name,))
        write(recipe, abi.FUSE_MKDIR, 0o040755, names=(name,))
    found["a-link-that-leads-out"] = recipe = Recipe()
    write(recipe, lookup, names=(b"link",))
    write(recipe, abi.FUSE_READLINK, node=1)
    write(recipe, abi.FUSE_OPEN, os.O_RDWR, node=1)
    write(recipe, abi.FUSE_SETATTR, 8, node=1)
    found["files-of-every-kind"] = recipe = Recipe()
    for mode in (0o010600, 0o020666, 0o060666, 0o140777, 0o040755):
        write(recipe, abi.FUSE_MKNOD, mode, names=(b"new",))
        write(recipe, abi.FUSE_OPEN, os.O_RDWR, node=1)
        write(recipe, abi.FUSE_UNLINK, names=(b"new",))
    found["names-that-change"] = recipe = Recipe()
    write(recipe, abi.FUSE_RENAME, 0, names=(b"file", b"new"))
    write(recipe, abi.FUSE_RENAME2, 0, 1, names=(b"new", b"new2"))
    write(recipe, abi.FUSE_RENAME2, 0, 2, names=(b"new2", b"dir"))
    write(recipe, abi.FUSE_SYMLINK, names=(b"new", b"../canary"))
    write(recipe, lookup, names=(b"fifo",))
    write(recipe, abi.FUSE_LINK, 0, names=(b"new",))
    write(recipe, abi.FUSE_RMDIR, names=(b"dir",))
    found["attributes"] = recipe = Recipe()
    write(recipe, lookup, names=(b"file",))
    write(recipe, abi.FUSE_SETATTR, 0x1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o106755, node=1)
    write(recipe, abi.FUSE_SETATTR, 0x3B0, node=1)
    write(recipe, abi.FUSE_GETATTR, node=1)
    write(recipe, abi.FUSE_STATX, node=1)
    write(recipe, abi.FUSE_ACCESS, 4, node=1)
    write(recipe, abi.FUSE_STATFS)
    write(recipe, abi.FUSE_SYNCFS)
    found["extended-attributes"] = recipe = Recipe()
    write(recipe, lookup, names=(b"file",))
    for name in (b"user.a", b"security.capability", b"system.posix_acl_access", b"trusted.overlay.opaque"):
        write(recipe, abi.FUSE_SETXATTR, node=1, names=(name,), data=b"value")
        write(recipe, abi.FUSE_GETXATTR, 4096, node=1, names=(name,))
    write(recipe, abi.FUSE_LISTXATTR, 4096, node=1)
    write(recipe, abi.FUSE_REMOVEXATTR, node=1, names=(b"user.a",))
    write(recipe, abi.FUSE_GETXATTR, 4096, node=1, names=(b"n" * 256,))
    write(recipe, abi.FUSE_SETXATTR, node=1, names=(b"user.a",), data=LONG)
    found["who-makes-a-file-and-its-label"] = recipe = Recipe()
    groups = abi.fuse_ext_header.pack(16, abi.FUSE_EXT_GROUPS) + b"\1\0\0\0\0\0\0\0"
    label = abi.fuse_secctx.pack(5) + b"security.selinux\0label"
    contexts = (abi.fuse_ext_header.pack(8 + len(label), 1) + label).ljust(abi.FUSE_REC_ALIGN(8 + len(label)), b"\0")
    for extensions in (groups, contexts, contexts + groups, contexts[:-8], abi.fuse_ext_header.pack(0, 0), abi.fuse_ext_header.pack(8, 0)):
        write(recipe, abi.FUSE_MKDIR, 0o040755, names=(b"new",), data=extensions)
        write(recipe, abi.FUSE_CREATE, os.O_RDWR, 0o100644, names=(b"new2",), data=extensions)
    found["locks"] = recipe = Recipe()
    write(recipe, abi.FUSE_CREATE, os.O_RDWR, 0o100644, names=(b"new",))
    write(recipe, abi.FUSE_SETLK, 0, 0, 0, 0, 1)
    write(recipe, abi.FUSE_GETLK, 0, 1, 0, 0, 1)
    write(recipe, abi.FUSE_SETLKW, 0, 1, 0, 0, 1)
    write(recipe, abi.FUSE_SETLK, 0, 0, 0, 0, 2)
    write(recipe, abi.FUSE_SETLK, 0, 0, 0, 0, 1, 0, 1)
    write(recipe, abi.FUSE_RELEASE)
    found["inode-flags"] = recipe = Recipe()
    write(recipe, abi.FUSE_CREATE, os.O_RDWR, 0o100644, names=(b"new",))
    for command in range(len(filecalls.IOCTL_BYTES)):
        write(recipe, abi.FUSE_IOCTL, 0, 0, command, 0, 0, 4096, data=bytes(28))
    found["a-session-in-a-session"] = recipe = Recipe()
    write(recipe, lookup, names=(b"file",))
    write(recipe, abi.FUSE_INIT, 7, 38, 0, ALL_INIT_FLAGS, 0)
    write(recipe, abi.FUSE_DESTROY)
    write(recipe, abi.FUSE_GETATTR)
    write(recipe, abi.FUSE_BATCH_FORGET, 2, data=abi.fuse_forget_one.pack(2, 1) * 2)
    write(recipe, abi.FUSE_INTERRUPT, 7)
    return {name: bytes(recipe) for name, recipe in found.items()}
