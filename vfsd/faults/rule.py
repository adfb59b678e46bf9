"""One fault rule, parsed: what it is about, what it does, and for which of the moments that it is about. Pure.

A rule's *matches* are the moments that all its selectors fit; they are numbered from 1, for each process for itself. Whether a
match is a *hit* follows from its number and the seed alone, so a run with the same requests in the same order has the same hits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class When:
    """Matches `first`, `first` + `step`, … up to and including `last` (0: without end); at most `times` hits (0: any number)."""

    first: int = 1
    last: int = 0
    step: int = 1
    times: int = 0

    def permits(self, number: int, hits: int) -> bool:
        if number < self.first or (self.last and number > self.last) or (self.times and hits >= self.times):
            return False
        return (number - self.first) % self.step == 0


@dataclass(frozen=True, slots=True)
class Action:
    """`name` is one of the catalogue's; what the others mean is up to it. Times are in nanoseconds."""

    name: str
    number: int = 0  # the errno; the bytes of `short`, -1 for a half; the place of `corrupt`, -1 for any
    least_ns: int = 0
    most_ns: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """`kind` is a key of catalogue.SELECTORS; `subjects` are the operations, the system call, or the one target itself."""

    text: str
    kind: str
    role: str  # of a system call or a point
    subjects: frozenset[str]
    action: Action
    when: When = field(default_factory=When)
    probability: float = 1.0
    seed: int | None = None
    window_ns: tuple[int, int] | None = None  # since the rule was given
    path: bytes | None = None
    nodeid: int | None = None
    uid: int | None = None
    queue: int | None = None
    point: str | None = None
    message: str | None = None

    def fits(self, *, nodeid: int = 0, uid: int = 0, queue: int = -1, message: str = "") -> bool:
        """Whether the selectors that need nothing but numbers fit."""
        return (
            self.queue in (None, queue)
            and self.nodeid in (None, nodeid)
            and self.uid in (None, uid)
            and self.message in (None, message)
        )  # fmt: skip

    def fits_path(self, path: bytes) -> bool:
        """A path in the share, from its root, `/`. `*` stands for slashes too."""
        return self.path is None or fnmatchcase(path.decode("latin-1"), self.path.decode("latin-1"))

    def in_window(self, age_ns: int) -> bool:
        return self.window_ns is None or self.window_ns[0] <= age_ns < self.window_ns[1]

    def hits(self, number: int, hits: int, seed: int) -> bool:
        """Whether the `number`-th match is one, `hits` having been before it."""
        return self.when.permits(number, hits) and (self.probability >= 1.0 or chance(seed, number) < self.probability)

    def delay_ns(self, number: int, seed: int) -> int:
        """How long the delay of that match is."""
        action = self.action
        return action.least_ns + int((action.most_ns - action.least_ns) * chance(seed ^ _MASK, number))


def chance(seed: int, number: int) -> float:
    """A number from 0 up to but not including 1 that looks random, the same whenever it is asked for (splitmix64)."""
    value = (seed + number * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return (value ^ value >> 31) / 2**64


def own_seed(seed: int, *parts: int) -> int:
    """A seed made of a seed and numbers, so that two rules, or two processes with one rule, do not fail at the same moments."""
    for part in parts:
        seed = int(chance(seed, part + 1) * 2**64)
    return seed
