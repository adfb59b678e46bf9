"""Maps of a user namespace: which ids inside are which ids outside. Pure: text and numbers in, ranges out.

Who controls the bytes: the administrator (--uid-map, --gid-map) and the kernel (/proc/self/uid_map).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

MOST_IDS = 0xFFFFFFFF  # ids are 0 to 2^32 - 2; 2^32 - 1 is (uid_t)-1, which is nobody's
OVERFLOW_ID = 65534  # what the kernel shows for an id that is not mapped, and nobody's id on a host
_MOST_DIGITS = 10  # of an id
_GRAMMAR = "write :INSIDE:OUTSIDE:COUNT:, for instance :0:100000:65536:"


class IdRange(NamedTuple):
    """`size` ids from `inside` in the namespace are those from `outside` in its parent."""

    inside: int
    outside: int
    size: int


IdMap = tuple[IdRange, ...]


def decode_id_range(text: str) -> IdRange:
    """`:INSIDE:OUTSIDE:COUNT:`, with any character as delimiter that is no letter or digit. ValueError says what is wrong."""
    delimiter = text[:1]
    if not delimiter or delimiter.isalnum():
        raise ValueError(f"{text!r} does not begin with a delimiter, a character that is no letter or digit; {_GRAMMAR}")
    fields = text.split(delimiter)
    if len(fields) != 5 or fields[-1]:
        raise ValueError(f"{text!r} is not three numbers with {delimiter!r} before, between and behind them; {_GRAMMAR}")
    if not all(field.isascii() and field.isdigit() and len(field) <= _MOST_DIGITS for field in fields[1:4]):
        raise ValueError(f"{text!r} has something in it that is not a number; {_GRAMMAR}")
    inside, outside, count = (int(field) for field in fields[1:4])
    if count == 0:
        raise ValueError(f"{text!r} maps no id; give a count of at least 1")
    if count > MOST_IDS or max(inside, outside) > MOST_IDS - count:
        raise ValueError(f"{text!r} goes beyond {MOST_IDS - 1}, the highest id; give smaller numbers")
    return IdRange(inside, outside, count)


def find_overlap(id_map: IdMap) -> tuple[IdRange, IdRange] | None:
    """Two ranges that map an id twice, inside or outside: the kernel refuses such a map."""
    for side in (0, 1):
        for low, high in pairwise(sorted(id_map, key=lambda each: each[side])):
            if low[side] + low.size > high[side]:
                return low, high
    return None


def parse_id_map(text: str) -> IdMap:
    """The kernel's form, as in /proc/PID/uid_map."""
    return tuple(IdRange(*(int(word) for word in line.split())) for line in text.splitlines())


def is_mapped(id_map: IdMap, inside: int) -> bool:
    return any(first <= inside < first + size for first, _, size in id_map)


def choose_own_id(id_map: IdMap, now: int) -> int:
    """Who the broker is: root of the namespace where there is one, else who it is already, else the first that is mapped."""
    for candidate in (0, now):
        if is_mapped(id_map, candidate):
            return candidate
    return id_map[0].inside if id_map else now


def choose_powerless_id(id_map: IdMap, own: int) -> int | None:
    """For control and workers: nobody, else another id than the broker's; None where no other is mapped."""
    ends = [end for each in id_map for end in (each.inside + each.size - 1, each.inside)]
    return next((each for each in (OVERFLOW_ID, *ends) if each != own and is_mapped(id_map, each)), None)
