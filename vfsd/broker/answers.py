"""What a handler gets and gives."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from vfsd.fds import OwnedFd


class Call(NamedTuple):
    """Who asks, and in which session."""

    session: int
    worker: int


class Granted(enum.Enum):
    """What a donated descriptor belongs to: the grant is void if that has gone before the answer is queued."""

    FILE = enum.auto()
    NODE = enum.auto()


class Answer(NamedTuple):
    """The fields of a reply. `donation` is taken over by whoever sends the answer."""

    fields: list[Any]
    donation: OwnedFd | None = None
    granted: Granted = Granted.FILE
    granted_id: int = 0  # fh or nodeid


class WouldWait(Exception):
    """The handler cannot answer yet: run it again when a lock may have become free."""


NOTHING = Answer([])
