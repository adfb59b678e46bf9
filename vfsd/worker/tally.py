"""What a worker counts of other workers' deaths, until the supervisor is told. Pure."""

from __future__ import annotations

from vfsd.wire.channel import Counted


class Tally:
    """The ring thread's alone."""

    __slots__ = ("refused", "replayed", "undecided")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.replayed = 0  # requests that a dead worker had not completed, run again
        self.refused = 0  # answered EIO instead
        self.undecided = 0  # appends of which nobody can tell whether they were made: answered EIO

    def __bool__(self) -> bool:
        return bool(self.replayed or self.refused or self.undecided)

    def message(self) -> Counted:
        return Counted(self.replayed, self.refused, self.undecided)
