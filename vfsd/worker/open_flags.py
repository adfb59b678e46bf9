"""How the guest's open flags and its wishes about set-id bits become the broker's."""

from __future__ import annotations

import os

from vfsd.wire import fuse_abi as abi
from vfsd.worker.file_system import FileSystem
from vfsd.worker.request import Request

_UNKNOWN_ID = 0xFFFFFFFF  # a guest that may have id-mapped mounts tells the caller only where a file is made


def host_open_flags(fs: FileSystem, flags: int) -> int:
    """With the write-back cache the guest reads around what it writes, also in a file that was opened for writing only."""
    flags &= ~os.O_CLOEXEC
    if fs.agreed(abi.FUSE_WRITEBACK_CACHE) and flags & os.O_ACCMODE == os.O_WRONLY:
        return flags & ~os.O_ACCMODE | os.O_RDWR
    return flags


def kills_set_id(fs: FileSystem, request: Request, flagged: int) -> int:
    """1 if an operation takes a file's set-id bits away: by the request's own flag where killpriv-v2 was agreed on.

    Without it the guest's kernel does so by itself, except where it has no chance to (a truncating open that is one request, a
    copy): then whoever is known not to be root has no CAP_FSETID.
    """
    if fs.agreed(abi.FUSE_HANDLE_KILLPRIV_V2):
        return int(bool(flagged))
    return int(request.uid not in (0, _UNKNOWN_ID))


def kills_set_id_unsaid(fs: FileSystem, request: Request) -> int:
    """The same for an operation whose request has no flag for it (FALLOCATE, COPY_FILE_RANGE).

    With killpriv-v2 the guest's kernel leaves them to us all the same: who is unknown may not keep the bits.
    """
    return int(request.uid != 0) if fs.agreed(abi.FUSE_HANDLE_KILLPRIV_V2) else kills_set_id(fs, request, 0)
