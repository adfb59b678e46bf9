"""Which INIT flags are asked of the guest, by the options vfsd was started with.

Who controls the bytes: the options are the user's; `offered` is the guest's.
"""

from __future__ import annotations

from typing import NamedTuple

from vfsd.config import Features, Wish
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi

# Taken whenever the guest offers them.
_ALWAYS = (
    abi.FUSE_ASYNC_READ
    | abi.FUSE_BIG_WRITES
    | abi.FUSE_HAS_IOCTL_DIR
    | abi.FUSE_AUTO_INVAL_DATA
    | abi.FUSE_ASYNC_DIO
    | abi.FUSE_PARALLEL_DIROPS
    | abi.FUSE_MAX_PAGES
    | abi.FUSE_SUBMOUNTS
    | abi.FUSE_INIT_EXT
    | abi.FUSE_CREATE_SUPP_GROUP
    # Locks are asked for even if they are refused: a guest that does not ask grants them by itself, shared with nobody.
    | abi.FUSE_POSIX_LOCKS
    | abi.FUSE_FLOCK_LOCKS
)
_READDIRPLUS = abi.FUSE_DO_READDIRPLUS | abi.FUSE_READDIRPLUS_AUTO
_POSIX_ACL = abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK | abi.FUSE_SETXATTR_EXT


class Agreement(NamedTuple):
    """`flags`: taken. `refusal`: why this guest cannot be served, for the log; empty if it can."""

    flags: int
    refusal: str = ""


def agree(offered: int, features: Features, *, readdirplus: bool) -> Agreement:
    wanted = _ALWAYS
    for flags, asked in (
        (_READDIRPLUS, readdirplus and features.readdirplus),
        (abi.FUSE_WRITEBACK_CACHE, features.writeback),
        (abi.FUSE_DIRECT_IO_ALLOW_MMAP, features.allow_mmap),
        (abi.FUSE_HANDLE_KILLPRIV_V2, features.killpriv_v2),
        # A guest that may have id-mapped mounts tells no more who opens, allocates or copies. With killpriv-v2 set-id bits could
        # not be right then; without, they are where the guest's kernel truncates by a SETATTR of its own.
        (abi.FUSE_ALLOW_IDMAP, not features.killpriv_v2),
        (abi.FUSE_ATOMIC_O_TRUNC, features.killpriv_v2 or not offered & abi.FUSE_ALLOW_IDMAP),
    ):
        wanted |= flags if asked else 0
    for option, flags, wish in (
        ("--posix-acl", _POSIX_ACL, features.posix_acl),
        ("--security-label", abi.FUSE_SECURITY_CTX, features.security_label),
    ):
        if _all_or_nothing(offered, flags, wish):
            wanted |= flags
        elif wish == "on":
            return Agreement(0, f"{option}: the guest's kernel cannot do it; use {option}=auto to serve such guests without")
    return Agreement(offered & wanted)


def _all_or_nothing(offered: int, flags: int, wish: Wish) -> bool:
    return wish != "off" and offered & flags == flags


def session_flags(agreed: int) -> int:
    """As SessionStart carries them: what the broker must know of them, and all of them for the other workers."""
    flags = agreed << wire.SESSION_OWN_FLAGS_SHIFT
    if agreed & abi.FUSE_POSIX_ACL:
        flags |= wire.SESSION_POSIX_ACL
    if agreed & abi.FUSE_CREATE_SUPP_GROUP:
        flags |= wire.SESSION_SUPP_GROUPS
    return flags
