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
        broker_extra=" ".join(broker_extra),
        seccomp_policy=None if options.seccomp_policy is None else path_in_ascii(os.fsencode(options.seccomp_policy)),
        allow_weak_policy=options.allow_weak_policy,
        faults=options.fault_rules is not None or options.fault_socket is not None,
    )


class Record:
    """Written once for each process: at most as many as there are queues, and three."""

    def __init__(self, options: Options, broker_extra: Sequence[str] = ()) -> None:
        self._memfd = OwnedFd(os.memfd_create(RECORD_NAME))
        self._options = asdict(in_force(options, broker_extra))
        self._reports: dict[int, dict[str, str | int | bool]] = {}

    def enter(self, pid: int, report: Report) -> None:
        self._reports[pid] = asdict(report)
        self._write()

    def leave(self, pid: int) -> None:
        """It died and is replaced; its number may soon be another's."""
        self._reports.pop(pid, None)
        self._write()

    def _write(self) -> None:
        text = json.dumps({"options": self._options, "processes": self._reports}).encode()
        os.pwrite(self._memfd.fileno(), text, 0)
        os.ftruncate(self._memfd.fileno(), len(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._memfd.close()


def read_record(text: bytes) -> tuple[InForce, dict[int, Report]]:
    """ValueError while it is being written, or if another version of vfsd wrote it."""
    found: dict[str, Any] = json.loads(text)
    try:
        return InForce(**found["options"]), {int(pid): Report(**values) for pid, values in found["processes"].items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record of this version: {error}") from error
