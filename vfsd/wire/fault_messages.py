"""The one broker message that exists only where fault injection was asked for: does a request's path fit a rule? Pure.

A worker knows no paths, and learns none by this: it hears which rules fit.
"""

from __future__ import annotations

from typing import NamedTuple

from vfsd.wire.broker_messages import NAME, U64, Bin, Spec

MAX_RULES = 64
_RULE_BYTES = 8


class MatchPath(NamedTuple):
    """Which rules' paths does this inode fit, or what has this name in it? An empty name: the inode itself."""

    nodeid: int
    name: bytes


# The rules' numbers, packed by pack_numbers.
SPEC = Spec(200, MatchPath, (U64, NAME), (Bin(0, MAX_RULES * _RULE_BYTES),), 0, in_session=True, resembles="readlinkat(/proc/self/fd)")


def pack_numbers(numbers: list[int]) -> bytes:
    return b"".join(number.to_bytes(_RULE_BYTES, "little") for number in numbers)


def unpack_numbers(packed: bytes) -> set[int]:
    return {int.from_bytes(packed[at : at + _RULE_BYTES], "little") for at in range(0, len(packed), _RULE_BYTES)}
