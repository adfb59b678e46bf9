"""What the supervisor keeps for who examines a running vfsd: its options, which process is what, and what only that one knew.

A memfd of the supervisor, found by its name among the descriptors in /proc; so root may read it, and nothing of it lies in the
file system. Who controls the bytes: the supervisor; a child's part is what it said at its lock-down, before it heard anybody.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from vfsd.config import HandleMode, Options, SandboxMode, SeccompMode
from vfsd.fds import OwnedFd

RECORD_NAME = "vfsd-record"
MOST_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """The options that decide what is to be seen of a running vfsd. Paths: escaped as in /proc, the share's without symlinks."""

    shared_dir: str
    socket_path: str | None
    sandbox: SandboxMode
    seccomp: SeccompMode
    inode_file_handles: HandleMode
    readonly: bool
    request_queues: int
    spare_workers: int = 0
    broker_extra: str = ""  # capabilities that --modcaps gave to the broker
    seccomp_policy: str | None = None  # None: the one that vfsd comes with
    allow_weak_policy: bool = False
    faults: bool = False  # whether faults may be injected


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a process said of itself at its lock-down; `landlock`: the version of its interface, 0 for none."""

    role: str
    securebits: int
    landlock: int
    dumpable: bool


@dataclass(slots=True, kw_only=True)
class Counts:
    """What was survived since the start."""

    worker_deaths: int = 0  # of those that were replaced
    control_deaths: int = 0
    replayed: int = 0  # requests that a dead worker had not completed, run again
    refused: int = 0  # answered EIO: two workers had died of them, or they hung
    undecided: int = 0  # appends answered EIO: whether they were made cannot be told


def path_in_ascii(path: bytes) -> str:
    return ascii(os.fsdecode(path))[1:-1]


def in_force(options: Options, broker_extra: Sequence[str] = ()) -> InForce:
    return InForce(
        shared_dir=path_in_ascii(options.shared_dir),
        socket_path=None if options.socket_path is None else path_in_ascii(options.socket_path),
        sandbox=options.sandbox,
        seccomp=options.seccomp,
        inode_file_handles=options.inode_file_handles,
        readonly=options.readonly,
        request_queues=options.request_queues,
        spare_workers=options.spare_workers,
        broker_extra=" ".join(broker_extra),
        seccomp_policy=None if options.seccomp_policy is None else path_in_ascii(os.fsencode(options.seccomp_policy)),
        allow_weak_policy=options.allow_weak_policy,
        faults=options.fault_rules is not None or options.fault_socket is not None,
    )


class Record:
    """Written when a process comes or goes, and when something was counted."""

    def __init__(self, options: Options, broker_extra: Sequence[str] = ()) -> None:
        self._memfd = OwnedFd(os.memfd_create(RECORD_NAME))
        self._options = asdict(in_force(options, broker_extra))
        self._reports: dict[int, dict[str, str | int | bool]] = {}
        self._counts = Counts()
        self._uncounted = False  # something is yet to be written

    def enter(self, pid: int, report: Report) -> None:
        self._reports[pid] = asdict(report)
        self._write()

    def rename(self, pid: int, role: str) -> None:
        """It has another duty from now on."""
        if pid in self._reports:
            self._reports[pid]["role"] = role
            self._write()

    def leave(self, pid: int) -> None:
        """It died and is replaced; its number may soon be another's."""
        self._reports.pop(pid, None)
        self._write()

    def count(self, **more: int) -> None:
        """So many more of these; `write_counts` makes them known."""
        for name, number in more.items():
            setattr(self._counts, name, getattr(self._counts, name) + number)
        self._uncounted = True

    def write_counts(self) -> None:
        if self._uncounted:
            self._write()

    def _write(self) -> None:
        self._uncounted = False
        text = json.dumps({"options": self._options, "processes": self._reports, "counts": asdict(self._counts)}).encode()
        os.pwrite(self._memfd.fileno(), text, 0)
        os.ftruncate(self._memfd.fileno(), len(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memfd.close()


def read_record(text: bytes) -> tuple[InForce, dict[int, Report], Counts]:
    """ValueError while it is being written, or if another version of vfsd wrote it."""
    found: dict[str, Any] = json.loads(text)
    try:
        reports = {int(pid): Report(**values) for pid, values in found["processes"].items()}
        return InForce(**found["options"]), reports, Counts(**found["counts"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record of this version: {error}") from error
