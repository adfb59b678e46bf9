"""The texts of --translate-uid and --translate-gid, of --uid-map and --gid-map, and the kernel's form of a user namespace's map.

Oracle: a text is a range or an error that names it; which id becomes which agrees with a second reading of the grammar, taken
range by range; ranges that overlap are found; the kernel's form is read back as it was written.
"""

from __future__ import annotations

import errno
from itertools import combinations

from tests.fuzz.provider import Provider, Recipe
from vfsd.errors import ConfigError, ReplyErrno
from vfsd.sandbox import id_maps
from vfsd.wire.id_map import IdMap, make_id_maps

_KINDS = {"map": 3, "guest": 3, "host": 3, "squash-guest": 3, "squash-host": 3, "forbid-guest": 2}
_NAMES = (*_KINDS, "forbid-host", "", "map ")
_IDS = 1 << 32


def one_input(data: bytes) -> None:
    provider = Provider(data)
    texts = [_translation(provider) for _ in range(provider.byte() % 6)]
    ids = [0, 1, 65534, _IDS - 2, _IDS - 1, *(provider.number(32) for _ in range(4))]
    _check_translation(texts, ids)
    _check_namespace_map([_range(provider) for _ in range(provider.byte() % 6)])


def _numbers(provider: Provider, count: int) -> list[str]:
    """Mostly numbers."""
    return [provider.blob(8).decode(errors="surrogateescape") if provider.one_in(12) else str(provider.number(36)) for _ in range(count)]


def _translation(provider: Provider) -> str:
    if provider.one_in(8):
        return provider.blob(60).decode(errors="surrogateescape")
    kind = provider.pick(_NAMES)
    count = provider.byte() % 5 if provider.one_in(8) else _KINDS.get(kind, 3)
    return ":".join([kind, *_numbers(provider, count)])


def _range(provider: Provider) -> str:
    if provider.one_in(8):
        return provider.blob(60).decode(errors="surrogateescape")
    delimiter = provider.pick((":", ",", "/", "-", "1", "a", "\u00b2"))
    return delimiter + delimiter.join(_numbers(provider, 3)) + delimiter


def _check_translation(texts: list[str], ids: list[int]) -> None:
    try:
        found = IdMap("--translate-uid", texts)
    except ConfigError as error:
        assert str(error).startswith("--translate-uid=")
        return
    for number in ids:
        assert _to_host(found, number) == _expected(texts, number, ("map", "guest", "squash-guest", "forbid-guest"), to_host=True)
        assert found.to_guest(number) == _expected(texts, number, ("map", "host", "squash-host"), to_host=False)
    assert _to_host(found, _IDS - 1) == found.to_guest(_IDS - 1) == _IDS - 1, "(uid_t) -1 stands for no id"
    assert (make_id_maps(texts, []) is None) == (not texts)


def _to_host(found: IdMap, number: int) -> int:
    try:
        return found.to_host(number)
    except ReplyErrno as error:
        assert error.errno == errno.EPERM
        return -1


def _expected(texts: list[str], number: int, kinds: tuple[str, ...], *, to_host: bool) -> int:
    for text in texts:
        kind, *fields = text.split(":")
        first, *target, count = map(int, fields)
        if kind == "map" and not to_host:
            first, target = target[0], [first]
        if kind in kinds and 0 <= number - first < count:
            if kind == "forbid-guest":
                return -1
            return target[0] + (0 if kind.startswith("squash") else number - first)
    return number


def _check_namespace_map(texts: list[str]) -> None:
    ranges = []
    for text in texts:
        try:
            ranges.append(id_maps.decode_id_range(text))
        except ValueError as error:
            assert repr(text) in str(error)
    overlap = any(
        one[side] < other[side] + other.size and other[side] < one[side] + one.size
        for one, other in combinations(ranges, 2)
        for side in (0, 1)
    )
    id_map = tuple(ranges)
    assert (id_maps.find_overlap(id_map) is not None) == overlap
    assert id_maps.parse_id_map("".join(f"{inside:>10} {outside:>10} {size:>10}\n" for inside, outside, size in id_map)) == id_map
    own = id_maps.choose_own_id(id_map, 1000)
    assert not id_map or id_maps.is_mapped(id_map, own)
    powerless = id_maps.choose_powerless_id(id_map, own)
    assert powerless is None or (powerless != own and id_maps.is_mapped(id_map, powerless))


def _seed(translations: list[str], ranges: list[str]) -> bytes:
    recipe = Recipe().byte(len(translations))
    for text in translations:
        recipe.one_in(8, True).blob(text.encode(errors="surrogateescape"))
    for _ in range(4):
        recipe.number(100000)
    recipe.byte(len(ranges))
    for text in ranges:
        recipe.one_in(8, True).blob(text.encode(errors="surrogateescape"))
    return bytes(recipe)


def seeds() -> dict[str, bytes]:
    return {
        "both-ways": _seed(["map:0:100000:65536"], [":0:100000:65536:"]),
        "one-way-each": _seed(
            ["guest:0:5:10", "host:7:9:3", "squash-host:100:1:1000", "forbid-guest:1000:5"], [":0:1000:1:", ":1:100000:65535:"]
        ),
        "squash-all": _seed(["squash-guest:0:65534:4294967295"], ["/0/0/4294967295/"]),
        "overlap": _seed(["map:0:10:10", "guest:5:100:1"], [":0:0:5:", ":4:100:1:"]),
        "beyond-the-last-id": _seed(["map:4294967295:0:1"], [":4294967295:0:1:"]),
        "digits-of-another-script": _seed(["map:\u0663:1:1"], [":\u0663:1:1:"]),
        "no-numbers": _seed(["map:a:b:c", "map"], [":::::", "abc"]),
    }
