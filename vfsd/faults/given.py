"""What a child is told of faults at its start, as bytes in its configuration: where it counts, and the rules of that moment. Pure.

Who controls the bytes: the supervisor, which is trusted.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import msgpack


class GivenRule(NamedTuple):
    """As fault_channel.FaultRule."""

    number: int
    slot: int
    seed: int
    given_ns: int
    expression: str


class Given(NamedTuple):
    """`counters_fd`: the memory of the counters, inherited. `place`: this process's in it."""

    counters_fd: int
    place: int
    rules: tuple[GivenRule, ...]


def pack_given(given: Given) -> bytes:
    return cast("bytes", msgpack.packb(given))


def unpack_given(packed: bytes) -> Given:
    counters_fd, place, rules = msgpack.unpackb(packed, use_list=False)
    return Given(counters_fd, place, tuple(GivenRule(*rule) for rule in rules))
