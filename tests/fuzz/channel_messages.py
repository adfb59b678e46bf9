"""The channels between supervisor, control and workers: what a taken-over child may say.

Oracle: a packet is one of the table's messages, which encodes to a packet that means the same, or it is a ChildBreach; its
descriptors are owned or closed; what is logged of it is one printable line.
"""

from __future__ import annotations

import os
import socket
from array import array
from dataclasses import fields

import msgpack

from tests.fuzz.oracle import open_fd_count
from tests.fuzz.provider import Provider, Recipe
from vfsd.channel import Channel, close_all
from vfsd.errors import ChildBreach
from vfsd.log import decode_text, printable
from vfsd.wire import channel as wire

TABLES = (
    wire.BROKER_TO_SUPERVISOR, wire.CONTROL_TO_SUPERVISOR, wire.WORKER_TO_SUPERVISOR, wire.CONTROL_TO_WORKER,
    wire.WORKER_TO_CONTROL, wire.SUPERVISOR_TO_CHILD,
)  # fmt: skip
_WAYS = ("fields", "values", "bytes")
_VALUES = ("number", "bytes", "flag", "negative", "text", "list", "none", "float", "map")
_MOST_FDS = 5


def one_input(data: bytes) -> None:
    provider = Provider(data)
    table = provider.pick(TABLES)
    fd_count = provider.byte() % (_MOST_FDS + 1)
    packet = _packet(provider, table)
    before = open_fd_count()
    _decode(packet, fd_count, table)
    _receive(packet, fd_count, table)
    assert open_fd_count() == before, "a descriptor was lost"


def _packet(provider: Provider, table: wire.Table) -> bytes:
    way = provider.pick(_WAYS)
    if way == "bytes":
        return provider.rest()
    row = provider.pick(list(table.values()))
    if way == "fields":  # the right types, mostly in bounds
        values = [_fitting(provider, bound) for bound in row.bounds]
    else:
        values = [_value(provider) for _ in range(provider.byte() % 14)]
    packet: bytes = msgpack.packb([row.tag, *values])
    return packet + provider.take(4)


def _fitting(provider: Provider, bound: wire.Uint | wire.Octets | wire.Flag) -> object:
    match bound:
        case wire.Uint():
            return provider.number()
        case wire.Octets():
            return provider.blob(1200)
    return provider.flag()


def _value(provider: Provider, depth: int = 0) -> object:
    match provider.pick(_VALUES):
        case "number":
            return provider.number()
        case "bytes":
            return provider.blob(64)
        case "flag":
            return provider.flag()
        case "negative":
            return -provider.number(63)
        case "text":
            return provider.blob(8).decode(errors="replace")
        case "list" if depth < 3:
            return [_value(provider, depth + 1) for _ in range(provider.byte() % 4)]
        case "map":
            return {provider.byte(): provider.byte()}
        case "float":
            return provider.number(16) / 3
    return None


def _decode(packet: bytes, fd_count: int, table: wire.Table) -> None:
    try:
        message = wire.decode_message(packet, fd_count, table)
    except ChildBreach:
        return
    again = wire.decode_message(wire.encode_message(message), fd_count, table)
    assert again == message
    for field in fields(message):
        value = getattr(message, field.name)
        assert type(value).__name__ == field.type, field
        if isinstance(value, bytes):
            assert printable(decode_text(value)).isprintable()


def _receive(packet: bytes, fd_count: int, table: wire.Table) -> None:
    """The same over a socket, with real descriptors."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, table)
    with theirs:
        theirs.sendmsg(
            [packet or b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [theirs.fileno()] * fd_count))] if fd_count else []
        )
        try:
            received = channel.receive()
        except ChildBreach:
            received = None
        if received is not None:
            assert len(received.fds) == received.message.fd_count()
            for fd in received.fds:
                assert not os.get_inheritable(fd.fileno())
            close_all(received.fds)
    channel.close()


def seeds() -> dict[str, bytes]:
    found = {}
    for number, table in enumerate(TABLES):
        for position, row in enumerate(table.values()):
            recipe = Recipe().byte(number).byte(row.max_fds).pick(_WAYS, "fields").byte(position)
            for bound in row.bounds:
                match bound:
                    case wire.Uint(limit):
                        recipe.number(min(limit, 7))
                    case wire.Octets():
                        recipe.blob(b"a line\nof text \xff")
                    case _:
                        recipe.flag(True)
            found[f"{row.message.__name__.lower()}-{number}"] = bytes(recipe)
    # The first is Done, but True stands where 1 should.
    found["true-is-not-one"] = bytes(Recipe().byte(4).byte(0).pick(_WAYS, "bytes").raw(b"\x93\x30\xc3\x01"))
    found["more-than-one-value"] = bytes(Recipe().byte(4).byte(0).pick(_WAYS, "bytes").raw(b"\x93\x30\x01\x01\x01"))
    found["a-list-that-says-it-is-long"] = bytes(Recipe().byte(4).byte(0).pick(_WAYS, "bytes").raw(b"\xdd\xff\xff\xff\xff"))
    found["nested-too-deeply"] = bytes(Recipe().byte(4).byte(0).pick(_WAYS, "bytes").raw(b"\x91" * 3000))
    found["a-map-with-a-list-as-key"] = bytes(Recipe().byte(4).byte(0).pick(_WAYS, "bytes").raw(b"\x81\x90\x90"))
    return found
