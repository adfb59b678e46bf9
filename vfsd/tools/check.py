"""How one expectation is looked at: a `Check` has a sentence for people and a look at one process of a daemon.

The look gives what was seen, and whether it is as expected; None where the kernel does not let us see it. The checks are made
by the functions of `check_privileges`, `check_surroundings` and `check_processes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vfsd.tools.daemon import Daemon, Process

UNSEEN = "not visible to this user"


class Seen(NamedTuple):
    holds: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Subject:
    """One process of a daemon. `purposes`: of its descriptors, None if they may not be seen."""

    daemon: Daemon
    process: Process
    purposes: dict[int, str | None] | None


@dataclass(frozen=True, slots=True)
class Check:
    text: str
    look: Callable[[Subject], Seen]


def anything(text: str, show: Callable[[Subject], str]) -> Check:
    """What the starter decides: shown, not judged."""
    return Check(text, lambda subject: Seen(True, show(subject)))


def join(values: Iterable[object]) -> str:
    return " ".join(str(value) for value in sorted(values, key=lambda value: (not isinstance(value, int), value)))
