"""What the guest may cache, and for how long: the Rust daemon's four modes, timeouts and open flags."""

from __future__ import annotations

from typing import NamedTuple

from vfsd.wire.fuse_abi import FOPEN_CACHE_DIR, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE

_DAY_SECONDS = 86400


class CachePolicy(NamedTuple):
    """`timeout_seconds` holds for entries and attributes alike."""

    timeout_seconds: int
    open_flags: int
    opendir_flags: int
    readdirplus: bool


CACHE_POLICIES = {
    "auto": CachePolicy(1, 0, 0, readdirplus=True),
    "always": CachePolicy(_DAY_SECONDS, FOPEN_KEEP_CACHE, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR, readdirplus=True),
    "metadata": CachePolicy(_DAY_SECONDS, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR, readdirplus=True),
    "never": CachePolicy(0, FOPEN_DIRECT_IO, 0, readdirplus=False),
}
