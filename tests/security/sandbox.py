"""Start processes that confine themselves (`confined.py`) and see what became of them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyseccomp

from vfsd.sandbox.census import ProcessCensus, take_census

TOP = Path(__file__).parents[2]
NOBODY = 65534
BROKER_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "SETUID", "SETGID", "MKNOD", "SETFCAP")
SUPERVISOR_CAPABILITIES = ("SYS_ADMIN", "SYS_CHROOT", "SETPCAP", "SETUID", "SETGID", "KILL")
DEADLINE_SECONDS = 60
EACH_SECONDS = 0.5  # of hundreds of attempts: a fork, on a machine with much else to do


@dataclass
class Spec:
    """One confined process: how it confines itself, and what it tries then."""

    role: str = "worker"
    sandbox: str = "namespace"
    enter: str | None = "empty"  # "empty", "share" or None
    share: str = "/"
    readonly: bool = False
    lock: bool = True
    uid: int | None = NOBODY
    capabilities: Sequence[str] = ()
    landlock: bool = True
    nofile: int | None = None
    threads: int = 2
    settle: bool = True
    filter_fd: int | None = None
    supervisor_pidfd: int | None = None
    start_uid: int | None = None  # the uid that starts the program
    user_namespace: bool = False  # it enters one of its own id alone
    lacking: Sequence[str] = ()  # capabilities that the program is started without
    count_fds: bool = False
    attempt: str = "evaluate"
    calls: Sequence[Sequence[Any]] = ()
    expression: str = "None"
    ends: int = 0  # its exit status
    fds: Sequence[int] = ()
    hold_fd: int | None = None
    child: "Spec | None" = None

    def json(self) -> str:
        return json.dumps(asdict(self))


def worker(**changes: Any) -> Spec:
    return Spec(**{"role": "worker", "enter": "empty", **changes})


def control(**changes: Any) -> Spec:
    return Spec(**{"role": "control", "enter": "empty", "threads": 0, **changes})  # it has one


def broker(share: str, **changes: Any) -> Spec:
    own = {"enter": "share", "share": share, "uid": None, "capabilities": BROKER_CAPABILITIES, "landlock": False, "settle": False}
    return Spec(**{"role": "broker", **own, **changes})


def supervisor(**changes: Any) -> Spec:
    own = {"enter": None, "uid": None, "capabilities": SUPERVISOR_CAPABILITIES, "landlock": False, "settle": False, "threads": 0}
    return Spec(**{"role": "supervisor", **own, **changes})


@dataclass(frozen=True)
class Outcome:
    """How a confined process ended: killed by a signal, or with what it found."""

    signal: int | None
    value: Any = None
    errno: int | None = None
    status: int | None = None
    config_error: str | None = None
    memory_error: bool = False
    stderr: str = field(default="", compare=False)

    @property
    def killed_by_filter(self) -> bool:
        return self.signal == signal.SIGSYS


def number_of(name: str) -> int:
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    assert number >= 0, name
    return number


def call(name: str, *arguments: int | str) -> list[Any]:
    return [number_of(name), *arguments]


@dataclass
class Sandbox:
    """Makes confined processes; `filters` maps a role to a descriptor with its compiled filter."""

    filters: dict[str, int]

    def _with_filter(self, spec: Spec, *, filtered: bool) -> Spec:
        spec.filter_fd = self.filters[spec.role] if filtered else None
        if spec.child is not None:
            self._with_filter(spec.child, filtered=filtered)
        return spec

    def _start(self, spec: Spec, result_fd: int) -> subprocess.Popen[str]:
        fds = {result_fd, *self.filters.values(), *spec.fds}
        fds |= {fd for fd in (spec.supervisor_pidfd, spec.hold_fd, spec.child and spec.child.hold_fd) if fd is not None}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.security.confined", spec.json(), str(result_fd)],
            cwd=TOP,
            pass_fds=sorted(fds),
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, spec: Spec, *, filtered: bool = True, deadline_seconds: float = DEADLINE_SECONDS) -> Outcome:
        """To its end; TimeoutExpired if it has none."""
        self._with_filter(spec, filtered=filtered)
        read_fd, write_fd = os.pipe()
        with open(read_fd, "rb") as results:
            process = self._start(spec, write_fd)
            os.close(write_fd)
            try:
                _, stderr = process.communicate(timeout=deadline_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
            said = results.read()
        if process.returncode < 0:
            return Outcome(signal=-process.returncode, stderr=stderr)
        assert process.returncode == spec.ends, stderr
        return Outcome(signal=None, stderr=stderr, **json.loads(said or b"{}"))

    def attempt(self, spec: Spec, *calls: list[Any], filtered: bool = True) -> Outcome:
        """Confine, then make these system calls."""
        spec.attempt, spec.calls = "syscall", calls
        return self.run(spec, filtered=filtered)

    def attempt_each(self, spec: Spec, attempts: Sequence[Sequence[list[Any]]]) -> list[Outcome]:
        """Confine without the filter, then make each attempt in a child that has it: thousands take seconds.

        `status`: what a child that ended by itself ended with; its `value` is what its last call returned.
        """
        spec.attempt, spec.threads, spec.settle = "each", 0, False
        with open(os.memfd_create("attempts"), "r+b", buffering=0) as batch:
            batch.write(json.dumps(attempts).encode())
            spec.fds = (batch.fileno(), self.filters[spec.role], *spec.fds)
            outcome = self.run(spec, filtered=False, deadline_seconds=DEADLINE_SECONDS + len(attempts) * EACH_SECONDS)
            assert outcome.value is not None, outcome
            batch.seek(0)
            found = json.loads(batch.read(outcome.value))
        return [Outcome(signal=ended_by, status=status, value=value, errno=error) for ended_by, status, value, error in found]

    def evaluate(self, spec: Spec, expression: str, *, filtered: bool = True) -> Any:
        """Confine, then the value of a Python expression; the test fails if it could not be told."""
        spec.attempt, spec.expression = "evaluate", expression
        outcome = self.run(spec, filtered=filtered)
        assert outcome.signal is None, (outcome.signal, outcome.stderr)
        assert outcome.config_error is None, outcome.config_error
        assert outcome.errno is None, os.strerror(outcome.errno or 0)
        return outcome.value

    @contextmanager
    def holding(self, spec: Spec, *, filtered: bool = True) -> Iterator[ProcessCensus]:
        """The census of a process that is confined and waits; it ends with the block."""
        self._with_filter(spec, filtered=filtered)
        hold_read, hold_write = os.pipe()
        read_fd, write_fd = os.pipe()
        spec.attempt, spec.hold_fd = "hold", hold_read
        with open(read_fd, "rb", buffering=0) as results, open(hold_write, "wb", buffering=0):
            process = self._start(spec, write_fd)
            os.close(write_fd)
            os.close(hold_read)
            said = results.read(1 << 16)
            try:
                assert said == b"confined", (said, process.poll())
                yield take_census(process.pid)
            finally:
                process.kill()
                process.communicate(timeout=DEADLINE_SECONDS)
