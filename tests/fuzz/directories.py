"""Directory entries between two kernels: what getdents64(2) gives, cut to a reply's room, written as FUSE's entries.

The records are the host kernel's, so they are as the structure says; names and numbers in them are anything. Oracle: no entry is
lost, invented or changed, the reply fills no more than its room, and the guest's reading of it gives the same entries.
"""

from __future__ import annotations

import struct

from tests.fuzz.provider import Provider, Recipe
from tests.support.frontend.fuse_types import decode_dirents
from vfsd.wire import fuse_abi as abi
from vfsd.wire.attr import decode_rdev, encode_rdev
from vfsd.worker import ops_dirs
from vfsd.worker.ops_dirs import Entry, decode_entries

_DIRENT64 = struct.Struct("<QqHB")


def one_input(data: bytes) -> None:
    provider = Provider(data)
    room, extra = provider.number(16), provider.pick((0, abi.fuse_entry_out.size))
    entries = [_entry(provider) for _ in range(provider.byte())]
    raw = b"".join(_record(provider, entry) for entry in entries)
    assert decode_entries(raw) == entries
    fitting = ops_dirs._fitting(entries, room, extra)
    assert fitting == entries[: len(fitting)]
    reply = b"".join(bytes(extra) + entry.encode() for entry in fitting)
    assert len(reply) <= room
    if len(fitting) < len(entries):
        assert len(reply) + extra + len(entries[len(fitting)].encode()) > room
    read = decode_dirents(reply, plus=bool(extra))
    assert [(each.ino, each.off, each.type, each.name) for each in read] == [
        (each.ino, each.next_offset % (1 << 64), each.kind, each.name) for each in fitting
    ]
    hidden = ops_dirs._hide_above_root(entries)
    assert [each._replace(ino=0) for each in hidden] == [each._replace(ino=0) for each in entries]
    rdev = provider.number(32)
    assert encode_rdev(*decode_rdev(rdev)) == rdev


def _entry(provider: Provider) -> Entry:
    name = (
        provider.pick((b".", b"..", b"file", b"n" * 255, b"\xff\xfe", b""))
        or provider.blob(255).replace(b"\0", b"").replace(b"/", b"")
        or b"x"
    )
    offset = provider.number()
    return Entry(provider.number(), offset - (1 << 64) * (offset >> 63), provider.byte() % 16, name)


def _record(provider: Provider, entry: Entry) -> bytes:
    """As the kernel lays it out: what pads a name is not always zero."""
    length = (_DIRENT64.size + len(entry.name) + 1 + 7) & ~7
    head = _DIRENT64.pack(entry.ino, entry.next_offset, length, entry.kind) + entry.name + b"\0"
    return head.ljust(length, bytes([provider.byte()]))


def seeds() -> dict[str, bytes]:
    def entries(room: int, count: int) -> bytes:
        recipe = Recipe().number(room).byte(1).byte(count)
        for number in range(count):
            recipe.byte(number % 5).number(number + 1).number(number + 100).byte(8)
        return bytes(recipe.raw(bytes(count)))

    return {"none": entries(4096, 0), "five": entries(4096, 5), "more-than-fit": entries(300, 40), "not-even-one-fits": entries(16, 3)}
