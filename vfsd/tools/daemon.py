"""A vfsd that runs, as /proc shows it: its processes with their roles, its options, and what its supervisor keeps of them.

Who controls the bytes: the kernel and the supervisor. Which process is what is told by the supervisor's record where we may
read it, else by command lines; a process that is taken over can change its own, and then there are two of a kind.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from vfsd.cli_compat import modernize
from vfsd.config import MAX_REQUEST_QUEUES
from vfsd.errors import ConfigError
from vfsd.record import MOST_RECORD_BYTES, RECORD_NAME, Counts, InForce, Report, path_in_ascii, read_record
from vfsd.sandbox.capabilities import change, decode_changes
from vfsd.sandbox.census import ProcessCensus, take_census
from vfsd.sandbox.fd_census import read_fds
from vfsd.sandbox.id_maps import IdMap, parse_id_map
from vfsd.sandbox.role_names import ROLES, RoleName
from vfsd.tools.sockets import Sockets, sockets_of

SeenRole = RoleName | Literal["unknown"]

_MODULES: dict[str, SeenRole] = {
    "vfsd.broker": "broker", "vfsd.worker.control": "control", "vfsd.worker": "worker",
    "vfsd.broker.faulty": "broker", "vfsd.worker.faulty.control": "control", "vfsd.worker.faulty": "worker",
}  # fmt: skip
_PARENT_FIELD, _START_TIME_FIELD = 1, 19  # of /proc/PID/stat behind the name in parentheses


_Record = tuple[InForce, dict[int, Report], Counts]


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a daemon. `name`: the role, of workers with their number where it is known."""

    pid: int
    role: SeenRole
    name: str
    report: Report | None  # None: not visible to us, or not given yet


@dataclass(frozen=True, slots=True)
class Process:
    """A member as it is now."""

    role: SeenRole
    name: str
    census: ProcessCensus
    report: Report | None

    @property
    def pid(self) -> int:
        return self.census.pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """`processes`: the supervisor first, then its descendants as they were started."""

    options: InForce
    processes: tuple[Process, ...]
    sockets: Sockets
    uptime_seconds: float
    uid_map: IdMap  # of its user namespace, outside: as we see it
    counts: Counts | None  # None: the supervisor's record could not be read

    @property
    def recorded(self) -> bool:
        return self.counts is not None

    @property
    def supervisor(self) -> Process:
        return self.processes[0]


def find_supervisor(name: str) -> int:
    """By its pid, by its socket's path, or by that of its pid file. ConfigError if there is none."""
    return int(name) if name.isascii() and name.isdecimal() and not os.path.exists(name) else supervisor_of_socket(name)


def supervisor_of_socket(name: str) -> int:
    """By the file that it keeps beside its socket; nobody is connected to."""
    path = name if name.endswith(".pid") else f"{name}.pid"
    try:
        with open(path, "rb") as file:
            text = file.read(32).strip()
    except OSError as error:
        mend = "run this as root" if isinstance(error, PermissionError) else "give the pid of a vfsd, or the path of its socket"
        raise ConfigError(f"{name}: cannot read {path}: {error.strerror}; {mend}") from error
    if not text.isdigit():
        raise ConfigError(f"{name}: {path} has no pid in it; give the pid of a vfsd, or the path of its socket")
    return int(text)


def supervisor_of(pid: int) -> int:
    """Of any process of a daemon: itself, or its parent. ConfigError if it is none's."""
    with _while_it_runs(pid):
        if _is_supervisor(pid):
            return pid
        parent = int(_stat(pid)[_PARENT_FIELD])
        if parent > 0 and _is_supervisor(parent):
            return parent
    raise ConfigError(f"{pid}: is no process of a vfsd; give the pid of one, or the socket's path")


def members(supervisor: int) -> list[Member]:
    """The supervisor first, then its descendants as they were started. ConfigError if that is no supervisor of a vfsd."""
    with _while_it_runs(supervisor):
        return _members(supervisor, _read_record(supervisor))


def examine(supervisor: int) -> Daemon:
    """Raises ConfigError if that is no supervisor of a vfsd."""
    with _while_it_runs(supervisor):
        record = _read_record(supervisor)
        found = _members(supervisor, record)
        processes = tuple(Process(each.role, each.name, take_census(each.pid, list_root=False), each.report) for each in found)
        return Daemon(
            options=record[0] if record else _options(processes[0].census),
            processes=processes,
            sockets=sockets_of(process.census for process in processes),
            uptime_seconds=_uptime(supervisor),
            uid_map=_uid_map(supervisor),
            counts=record[2] if record else None,
        )


@contextmanager
def _while_it_runs(pid: int) -> Iterator[None]:
    if not os.path.exists(f"/proc/{pid}"):
        raise ConfigError(f"{pid}: there is no such process; give the pid of a vfsd, or the path of its socket")
    try:
        yield
    except (FileNotFoundError, ProcessLookupError):
        raise ConfigError(f"{pid}: it, or one of its processes, does not run any more; look again") from None


def _members(supervisor: int, record: _Record | None) -> list[Member]:
    reports = record[1] if record else {}
    if not _is_supervisor(supervisor, reports):
        raise ConfigError(
            f"{supervisor}: is not the supervisor of a vfsd (no child of it is a broker); give that one's pid, or the socket's path"
        )
    first = reports.get(supervisor)
    return [
        Member(supervisor, "supervisor", "supervisor" if first is None else first.role, first),
        *(_member(pid, reports) for pid in _descendants(supervisor)),
    ]


def _is_supervisor(pid: int, reports: dict[int, Report] | None = None) -> bool:
    """Whether one of its children is a broker."""
    if reports is None:
        record = _read_record(pid)
        reports = record[1] if record else {}
    return any(_member(child, reports).role == "broker" for child in _children(pid))


def _member(pid: int, reports: dict[int, Report]) -> Member:
    """Of a process that is no supervisor."""
    report = reports.get(pid)
    role: SeenRole
    if report is not None:
        role = next((role for role in ROLES if role == report.role.partition(" ")[0]), "unknown")
        return Member(pid, role, report.role, report)
    # One that the supervisor does not know, or that is not ready yet, is unknown; where we may not read what it knows, it is believed.
    role = "unknown" if reports else role_of_command(_command(pid))
    return Member(pid, role, role, None)


def role_of_command(words: Sequence[str]) -> SeenRole:
    """By the module that the interpreter was told to run: so a child of vfsd's says what it is, until it is taken over."""
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return _MODULES.get(module, "unknown")


def _command(pid: int) -> list[str]:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().decode(errors="surrogateescape").split("\0")[:-1]


def _descendants(pid: int) -> list[int]:
    """Children, and whatever they might have started, each before its own."""
    found = [pid]
    for each in found:
        found += _children(each)
    return found[1:]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/task/{tid}/children", "rb") as file:
                found += [int(word) for word in file.read().split()]
    return found


def _read_record(supervisor: int) -> _Record | None:
    """None where it may not be read, or the process is no supervisor."""
    wanted = f"/memfd:{RECORD_NAME} (deleted)"
    number = next((fd.number for fd in (read_fds(supervisor) or {}).values() if fd.target == wanted), None)
    if number is None:
        return None
    try:
        with open(f"/proc/{supervisor}/fd/{number}", "rb") as file:
            return read_record(file.read(MOST_RECORD_BYTES))
    except ValueError as error:
        raise ConfigError(
            f"{supervisor}: its supervisor's record cannot be read ({error}); is it starting, or of another version?"
        ) from error


def _options(census: ProcessCensus) -> InForce:
    """From the supervisor's command line, where the record may not be read: only who may not read it needs this."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--shared-dir", default="?")
    parser.add_argument("--socket-path", "--socket")
    parser.add_argument("--sandbox", default="namespace")
    parser.add_argument("--seccomp", default="kill")
    parser.add_argument("--inode-file-handles", default="prefer")
    parser.add_argument("--readonly", action="store_true")
    parser.add_argument("--num-request-queues", dest="request_queues", type=int, default=MAX_REQUEST_QUEUES)
    parser.add_argument("--spare-workers", type=int, default=0)
    parser.add_argument("--seccomp-policy")
    parser.add_argument("--allow-weak-policy", action="store_true")
    parser.add_argument("--modcaps", type=decode_changes, default=(), dest="broker_extra")
    try:
        found, _ = parser.parse_known_args(modernize(census.command[1:]))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{census.pid}: its command line is not one of this version of vfsd: {error}") from error
    for name in ("shared_dir", "socket_path", "seccomp_policy"):
        path = getattr(found, name)
        setattr(found, name, path and path_in_ascii(os.fsencode(path)))
    found.broker_extra = " ".join(change((), found.broker_extra))
    return InForce(**vars(found))


def _uptime(pid: int) -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(pid)[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[bytes]:
    """What stands behind the name in parentheses."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _uid_map(pid: int) -> IdMap:
    with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
        return parse_id_map(file.read())
