"""From bytes to a structure and back: how every fuzz target reads its input, and how its seeds are written.

`Provider` is of the kind of LLVM's FuzzedDataProvider, but reads from the front only, so that `Recipe` can write what it will
read: a seed is then a real structure, and a mutated byte changes one thing. An input that ends early reads as zeroes. One byte
chooses among few things; a number takes one byte where it is small or one of those at which limits lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypeVar

Item = TypeVar("Item")

_SMALL = 0xC0  # a number below it is its own byte
_RAW = 0xF0  # from here on: that many bytes of number follow
_WIDEST = 16


def _edges() -> list[int]:
    """48 numbers at which something may change."""
    powers = (8, 9, 12, 15, 16, 17, 20, 24, 30, 31, 32, 33, 40, 47, 62, 63)
    return [value for power in powers for value in ((1 << power) - 1, 1 << power, (1 << 64) - (1 << power))]


EDGES = _edges()


class Provider:
    """Reads an input from its beginning to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or as many as there are."""
        start = self._at
        self._at = min(len(self._data), start + count)
        return self._data[start : self._at]

    def byte(self) -> int:
        if self._at == len(self._data):
            return 0
        self._at += 1
        return self._data[self._at - 1]

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def one_in(self, times: int) -> bool:
        """Seldom true, and never at the end of the input."""
        return self.byte() % times == times - 1

    def pick(self, items: Sequence[Item]) -> Item:
        """One of at most 256 things."""
        return items[self.byte() % len(items)]

    def number(self, bits: int = 64) -> int:
        """An unsigned number of so many bits: small, at an edge, or any."""
        first = self.byte()
        if first < _SMALL:
            value = first
        elif first < _RAW:
            value = EDGES[first - _SMALL]
        else:
            value = int.from_bytes(self.take(first - _RAW + 1), "little")
        return value & ((1 << bits) - 1)

    def blob(self, most: int) -> bytes:
        """Some bytes, at most so many."""
        return self.take(min(self.number(16), most))

    def rest(self) -> bytes:
        return self.take(self.left)


class Recipe:
    """Writes an input: each method writes what the Provider's of that name reads."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __bytes__(self) -> bytes:
        return bytes(self._data)

    def raw(self, data: bytes) -> Self:
        self._data += data
        return self

    def byte(self, value: int) -> Self:
        return self.raw(bytes([value]))

    def flag(self, value: bool) -> Self:
        return self.byte(int(value))

    def one_in(self, times: int, value: bool = False) -> Self:
        return self.byte(times - 1 if value else 0)

    def pick(self, items: Sequence[Item], item: Item) -> Self:
        return self.byte(items.index(item))

    def number(self, value: int) -> Self:
        if value < _SMALL:
            return self.byte(value)
        if value in EDGES:
            return self.byte(_SMALL + EDGES.index(value))
        length = (value.bit_length() + 7) // 8
        if length > _WIDEST:
            raise ValueError(f"{value} has more than {_WIDEST} bytes")
        return self.byte(_RAW + length - 1).raw(value.to_bytes(length, "little"))

    def blob(self, data: bytes) -> Self:
        return self.number(len(data)).raw(data)
