"""A message of any kind, made from the protocol's own table: what is new there is tried without being named."""

from __future__ import annotations

from typing import Any

from vfsd.wire import broker_messages as wire


def sample(kind: type[Any], /, **known: Any) -> Any:
    """A message that the table allows: fields are taken from `known` by name, the others are as small as they may be."""
    spec = wire.SPEC_OF[kind]
    return kind(*(known.get(name, _least(field)) for name, field in zip(kind._fields, spec.fields, strict=True)))


def _least(field: wire.Field) -> Any:
    match field:
        case wire.Bin(least, _):
            return bytes(least)
        case wire.ListOf(item, least, _, _):
            return [_least(item)] * least
        case _:
            return 0
