"""Forged messages of a confined, hostile worker: each costs it its link, and nobody else anything.

They are made from the protocol's own table: a message that is new there is forged without being named here.
"""

from typing import Any

import msgpack
import pytest

from tests.security.arena import Arena
from tests.support.messages import sample
from vfsd.wire import broker_messages as wire

_U64 = (1 << 64) - 1
# One value of each type that msgpack has. The table allows integers, bytes and lists.
OTHER_TYPES = {
    "nil": None, "true": True, "float": 1.0, "text": "text", "map": {}, "map-with-entries": {1: 2}, "extension": msgpack.ExtType(1, b"x"),
    "time": msgpack.Timestamp(1, 1), "integer": 1, "negative": -1, "bytes": b"bytes", "list": [], "list-in-list": [[[]]],
}  # fmt: skip


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    arena = Arena(tmp_path_factory.mktemp("arena"))
    yield arena
    arena.close()


def encode(*row: object, session: int = 0) -> bytes:
    return msgpack.packb([session, [list(row)]])


# --- fields -------------------------------------------------------------------------------------------------------------------


def bad_values(field: wire.Field) -> dict[str, Any]:
    """What is not of this field, by name: every other type, and the right one out of bounds."""
    match field:
        case wire.Uint(limit):
            right_types, bad = {"integer"}, {"too-large": limit + 1} if limit < _U64 else {}
        case wire.Int64():
            right_types, bad = {"integer", "negative"}, {"too-large": 1 << 63, "too-small": -(1 << 63)}
        case wire.Bin(least, most):
            right_types, bad = {"bytes"} if least <= 5 <= most else set(), {"too-long": bytes(most + 1)}
            bad |= {"too-short": bytes(least - 1)} if least else {}
        case wire.ListOf(item, least, most, step):
            good = item_of(item)
            right_types, bad = {"list"} if not least else set(), {"too-many": [good] * (most + step)}
            bad |= {"too-few": [good] * (least - step)} if least else {}
            bad |= {"out-of-step": [good] * (least + 1)} if step > 1 else {}
            bad |= {f"items-{name}": [good] * (max(least, step) - 1) + [value] for name, value in bad_values(item).items()}
    return {name: value for name, value in OTHER_TYPES.items() if name not in right_types} | bad


def item_of(field: wire.Uint | wire.Bin) -> Any:
    return 0 if isinstance(field, wire.Uint) else bytes(field.least)


def field_forgeries() -> Any:
    for spec in wire.REQUESTS:
        for position, field in enumerate(spec.fields):
            for name, value in bad_values(field).items():
                yield pytest.param(spec, position, value, id=f"{spec.message.__name__}.{spec.message._fields[position]}-{name}")


@pytest.mark.parametrize(("spec", "position", "value"), list(field_forgeries()))
def test_a_field_that_the_table_does_not_allow(arena, spec, position, value):
    fields = list(sample(spec.message))
    fields[position] = value
    refused(arena, encode(spec.tag, 1, *fields))


def shape_forgeries() -> Any:
    for spec in wire.REQUESTS:
        fields = list(sample(spec.message))
        name = spec.message.__name__
        yield pytest.param(encode(spec.tag, 1, *fields, 0), id=f"{name}-surplus")
        yield pytest.param(encode(spec.tag, 1, *fields)[:-1], id=f"{name}-cut-short")
        yield pytest.param(encode(spec.tag, 1, *fields) + b"\0", id=f"{name}-left-over")
        yield pytest.param(encode(spec.tag), id=f"{name}-without-id")
        if fields:
            yield pytest.param(encode(spec.tag, 1, *fields[:-1]), id=f"{name}-missing")
            yield pytest.param(encode(spec.tag, 1), id=f"{name}-without-fields")
        for kind, value in OTHER_TYPES.items():
            if kind != "integer":
                yield pytest.param(encode(spec.tag, value, *fields), id=f"{name}-id-{kind}")


@pytest.mark.parametrize("packet", list(shape_forgeries()))
def test_a_message_of_another_shape(arena, packet):
    refused(arena, packet)


def refused(arena: Arena, packet: bytes, fds: list[int] | None = None, text: str = "") -> None:
    with arena.unharmed():
        link = arena.new_link()
        assert link.send(packet, fds) == 0
        arena.expect_breach(link, text)
