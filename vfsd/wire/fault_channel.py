"""Messages of the supervisor channel that exist only where fault injection was asked for. Pure codec.

No process without the option accepts one of them: their rows are in no table of vfsd.wire.channel. Who controls the bytes: as
there; the rules come from the supervisor, which is trusted; what a child may say is that it wants to be killed.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfsd.wire.channel import ChannelMessage, Octets, Row, Table, Uint, extended

MAX_EXPRESSION_BYTES = 2000
_U64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class FaultRule(ChannelMessage):
    """To a child: from now on this rule holds. `slot`: where it counts; `seed` decides by chance; `given_ns`: CLOCK_MONOTONIC.

    `change` counts what the operator changed: the child notes beside its counters that it has heard of it.
    """

    change: int
    number: int
    slot: int
    seed: int
    given_ns: int
    expression: bytes


@dataclass(frozen=True, slots=True)
class FaultGone(ChannelMessage):
    """To a child: that rule holds no more."""

    change: int
    number: int


@dataclass(frozen=True, slots=True)
class KillMe(ChannelMessage):
    """From a child: a rule says that it dies now; it waits for SIGKILL and does nothing more."""


_TO_CHILD = (
    Row(64, FaultRule, (Uint(_U64), Uint(_U64), Uint(2**16), Uint(_U64), Uint(_U64), Octets(MAX_EXPRESSION_BYTES))),
    Row(65, FaultGone, (Uint(_U64), Uint(_U64))),
)
_FROM_CHILD = (Row(66, KillMe),)
ROWS = (*_TO_CHILD, *_FROM_CHILD)


def to_child(table: Table) -> Table:
    return extended(table, *_TO_CHILD)


def from_child(table: Table) -> Table:
    return extended(table, *_FROM_CHILD)
