"""What the supervisor keeps for who examines a running vfsd: which process is what, and what only that process could know.

A memfd of the supervisor, found by its name among the descriptors in /proc; so root may read it, and nothing of it lies in the
file system. Who controls the bytes: the supervisor; a child's part is what it said at its lock-down, before it heard anybody.
"""

from __future__ import annotations

import json
import os
from types import TracebackType
from typing import Self

from vfsd.fds import OwnedFd

RECORD_NAME = "vfsd-record"


class Record:
    """Written once for each process: at most as many as there are queues, and three."""

    def __init__(self) -> None:
        self._memfd = OwnedFd(os.memfd_create(RECORD_NAME))
        self._entries: dict[int, dict[str, str | int | bool]] = {}

    def enter(self, pid: int, role: str, securebits: int, landlock: int, *, dumpable: bool) -> None:
        self._entries[pid] = {"role": role, "securebits": securebits, "landlock": landlock, "dumpable": dumpable}
        text = json.dumps(self._entries).encode()  # only ever longer, so there is nothing to cut off
        os.pwrite(self._memfd.fileno(), text, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memfd.close()
