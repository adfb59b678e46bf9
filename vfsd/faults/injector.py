"""The rules that hold in one process, and which of them are hit at a moment. Decides, counts and says so; what a hit does is up
to who asks.

Threads may ask at once. Imports only the rules: log and clock are given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from vfsd.faults.counters import Counters
from vfsd.faults.rule import Rule, own_seed

LINES_IN_A_BURST = 20  # of one rule in one process; then one a second, which says how many hits it stands for
_SECOND_NS = 10**9


class Log(Protocol):
    def warning(self, text: str) -> None: ...


class Armed:
    """A rule that holds here."""

    def __init__(self, number: int, slot: int, rule: Rule, seed: int, given_ns: int) -> None:
        self.number = number
        self.slot = slot
        self.rule = rule
        self.seed = seed
        self.given_ns = given_ns
        self.lines = 0
        self.silent = 0
        self.spoke_ns = 0


class Hit(NamedTuple):
    """One rule at one moment."""

    rule: Rule
    seed: int
    number: int  # of the match

    @property
    def delay_seconds(self) -> float:
        return self.rule.delay_ns(self.number, self.seed) / 1e9


class Injector:
    """`place`: where it counts (counters.py)."""

    def __init__(self, place: int, counters: Counters, log: Log, now_ns: Callable[[], int]) -> None:
        self._place = place
        self._counters = counters
        self._log = log
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._by_subject: dict[str, list[Armed]] = {}

    def put(self, armed: Armed) -> None:
        armed.seed = own_seed(armed.seed, armed.number, self._place)
        for subject in armed.rule.subjects:
            # A new list: another thread may be going through the old one.
            self._by_subject[subject] = [*self._by_subject.get(subject, []), armed]

    def drop(self, number: int) -> None:
        for subject, rules in list(self._by_subject.items()):
            self._by_subject[subject] = [armed for armed in rules if armed.number != number]

    def about(self, subject: str, point: str | None = None, **facts: Any) -> list[Armed]:
        """The rules whose selectors fit, as far as they are numbers; a path is yet to be looked at. Counts nothing."""
        rules = self._by_subject.get(subject)
        return [armed for armed in rules if armed.rule.point == point and armed.rule.fits(**facts)] if rules else []

    def hits(self, rules: Iterable[Armed], what: str) -> list[Hit]:
        """Count a match of each of these; those that are hit. `what`: the moment in words, for the log."""
        return [hit for armed in rules if (hit := self._hit(armed, what)) is not None]

    def _hit(self, armed: Armed, what: str) -> Hit | None:
        now = self._now_ns()
        if not armed.rule.in_window(now - armed.given_ns):
            return None
        with self._lock:
            number, before = self._counters.matched(armed.slot, self._place)
            if not armed.rule.hits(number, before, armed.seed):
                return None
            hits = self._counters.hit(armed.slot, self._place)
            self._say(armed, f"match {number}, hit {hits}: {what}", now)
        return Hit(armed.rule, armed.seed, number)

    def _say(self, armed: Armed, text: str, now: int) -> None:
        if armed.lines >= LINES_IN_A_BURST and now - armed.spoke_ns < _SECOND_NS:
            armed.silent += 1
            return
        left_out = f" ({armed.silent} hits before it are not shown)" if armed.silent else ""
        armed.lines, armed.silent, armed.spoke_ns = armed.lines + 1, 0, now
        self._log.warning(f"fault {armed.number} {armed.rule.text}: {text}{left_out}")
