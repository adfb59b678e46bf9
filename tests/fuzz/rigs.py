"""What targets with a broker in this process have in common: a rig for each configuration, on a share of its own, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from tests.fuzz.oracle import open_fd_count
from tests.fuzz.share import SmallShare, as_the_broker
from tests.support.broker import Bench


class Rig(Protocol):
    """`fds`: how many descriptors this process has while no input runs."""

    share: SmallShare
    bench: Bench
    fds: int

    def close(self) -> None: ...


AnyRig = TypeVar("AnyRig", bound=Rig)


class Rigs(list[AnyRig], Generic[AnyRig]):
    """`make` is given the share and the number of the configuration, and leaves the rig as an input is to find it."""

    def __init__(self, make: Callable[[SmallShare, int], AnyRig], configurations: int) -> None:
        super().__init__()
        self._make = make
        self._configurations = configurations

    def open(self, folder: Path) -> None:
        for number in range(self._configurations):
            share = SmallShare(folder / str(number))
            with as_the_broker():
                self.append(self._make(share, number))
        for rig in self:
            rig.fds = open_fd_count()

    def close(self) -> None:
        while self:
            rig = self.pop()
            rig.close()
            rig.share.close()


def check_nothing_is_left(rig: Rig) -> None:
    """Of an input, in the broker: no bug, no inode but the root, no open file, no lock, no descriptor."""
    bench = rig.bench
    assert bench.log.bugs == []
    assert bench.share.store.held == 1
    assert len(bench.share.files) == 0
    assert len(bench.server._locks.waits) == 0
    assert open_fd_count() == rig.fds, "a descriptor was lost"
    bench.log.lines.clear()
