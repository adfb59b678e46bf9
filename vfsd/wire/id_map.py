"""--translate-uid and --translate-gid: which id of the host stands for which of the guest.

The texts are the administrator's. The ids are the guest's or the host's: any 32-bit number. The broker translates who makes a
file, who a file is given to and what attributes say; a worker translates attributes that it reads by itself.

Grammar, one range each; G and H are the first ids, N how many. The two directions are independent of each other.
  map:G:H:N            both ways, one to one
  guest:G:H:N          from guest to host, one to one        squash-guest:G:H:N   all of them become the host's H
  host:H:G:N           from host to guest, one to one        squash-host:H:G:N    all of them become the guest's G
  forbid-guest:G:N     from guest to host: EPERM
What no range covers stays as it is. Imports nothing but errors; does no I/O.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from vfsd.errors import ConfigError, ReplyErrno

_IDS = 1 << 32
_MOST_DIGITS = 10  # of an id
_FIELDS = {"map": 3, "guest": 3, "squash-guest": 3, "host": 3, "squash-host": 3, "forbid-guest": 2}


class _Range(NamedTuple):
    """Ids from `first` to before `end`. `target`: what the first becomes, None if they are forbidden."""

    first: int
    end: int
    target: int | None
    squashes: bool
    text: str

    def translate(self, number: int) -> int:
        if self.target is None:
            raise ReplyErrno(errno.EPERM)
        return self.target if self.squashes else self.target + number - self.first


class _Direction:
    """Ranges that do not overlap, in order."""

    def __init__(self, option: str, ranges: list[_Range]) -> None:
        self._ranges = sorted(ranges, key=lambda each: each.first)
        self._firsts = [each.first for each in self._ranges]
        for before, after in zip(self._ranges, self._ranges[1:], strict=False):
            if after.first < before.end:
                raise ConfigError(f"{option}={after.text}: overlaps with {option}={before.text}; give each id one meaning")

    def translate(self, number: int) -> int:
        index = bisect_right(self._firsts, number) - 1
        if index >= 0 and number < self._ranges[index].end:
            return self._ranges[index].translate(number)
        return number


class IdMap:
    """One option's ranges. `to_host` raises ReplyErrno EPERM for what is forbidden."""

    def __init__(self, option: str, texts: Sequence[str]) -> None:
        to_host: list[_Range] = []
        to_guest: list[_Range] = []
        for text in texts:
            kind, *numbers = _decode(option, text)
            if kind in ("map", "guest", "squash-guest", "forbid-guest"):
                to_host.append(_range(option, text, numbers, squashes=kind == "squash-guest"))
            if kind in ("host", "squash-host"):
                to_guest.append(_range(option, text, numbers, squashes=kind == "squash-host"))
            if kind == "map":
                guest, host, count = numbers
                to_guest.append(_range(option, text, [host, guest, count], squashes=False))
        self.to_host = _Direction(option, to_host).translate
        self.to_guest = _Direction(option, to_guest).translate


class IdMaps(NamedTuple):
    """Where nothing is translated there is None instead of this."""

    uids: IdMap
    gids: IdMap

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        return self.uids.to_host(uid), self.gids.to_host(gid)

    def to_guest(self, uid: int, gid: int) -> tuple[int, int]:
        return self.uids.to_guest(uid), self.gids.to_guest(gid)


def make_id_maps(uid_texts: Sequence[str], gid_texts: Sequence[str]) -> IdMaps | None:
    """None if there are no texts. ConfigError names the option, the text and what is wrong with it."""
    if not uid_texts and not gid_texts:
        return None
    return IdMaps(IdMap("--translate-uid", uid_texts), IdMap("--translate-gid", gid_texts))


def _decode(option: str, text: str) -> tuple[str, *tuple[int, ...]]:
    kind, *fields = text.split(":")
    wanted = _FIELDS.get(kind)
    if wanted is None:
        raise ConfigError(f"{option}={text}: {kind!r} is no kind of translation; use one of {', '.join(_FIELDS)}")
    if len(fields) != wanted:
        raise ConfigError(f"{option}={text}: {kind} takes {wanted} numbers, separated by colons")
    if not all(field.isascii() and field.isdecimal() and len(field) <= _MOST_DIGITS for field in fields):
        raise ConfigError(f"{option}={text}: give decimal numbers of at most {_MOST_DIGITS} digits")
    return kind, *map(int, fields)


def _range(option: str, text: str, numbers: Sequence[int], *, squashes: bool) -> _Range:
    """numbers: first, target, count; or first, count of what is forbidden."""
    first, *target, count = numbers
    if not count:
        raise ConfigError(f"{option}={text}: the range is empty; give a count of 1 or more")
    ends = [first + count, *(each + (1 if squashes else count) for each in target)]
    if max(ends) >= _IDS:  # 2^32 - 1 is (uid_t) -1, which stands for no id: a range ends before it
        raise ConfigError(f"{option}={text}: the range goes beyond {_IDS - 2}, the highest id")
    return _Range(first, first + count, target[0] if target else None, squashes, text)
