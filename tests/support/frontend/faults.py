"""Fault rules of a served daemon, as an operator changes them."""

from __future__ import annotations

import os
from typing import NamedTuple

from tests.support.frontend.serving import Served
from vfsd.tools.fault import ask, wait_until_heard

SPOKEN = r"fault \d+ |fault injection is on"  # what the log says of faults


class Counted(NamedTuple):
    matches: int
    hits: int


def _change(served: Served, **asked: object) -> dict[str, list[int]]:
    served.expect_log(SPOKEN)
    path = os.fsencode(served.daemon.socket)
    answer = ask(path, asked)
    assert wait_until_heard(path) == []
    return answer


def add_fault(served: Served, rule: str) -> int:
    """Its number. It holds when this returns, and what it says to happen now has begun."""
    (number,) = _change(served, do="add", rules=[rule])["added"]
    return number


def clear_faults(served: Served) -> None:
    _change(served, do="clear")


def counted(served: Served, number: int) -> Counted:
    rules = ask(os.fsencode(served.daemon.socket), {"do": "list"})["rules"]
    return next(Counted(rule["matches"], rule["hits"]) for rule in rules if rule["number"] == number)
