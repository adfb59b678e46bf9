"""A vfsd that runs, as /proc shows it: its processes with their roles, its options, and what its supervisor keeps of them.

Who controls the bytes: the kernel and the supervisor. Which process is what is told by the supervisor's record where we may
read it, else by command lines; a process that is taken over can change its own, and then there are two of a kind.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from vfsd.cli_compat import modernize
from vfsd.config import MAX_REQUEST_QUEUES
from vfsd.errors import ConfigError
from vfsd.record import MOST_RECORD_BYTES, RECORD_NAME, InForce, Report, path_in_ascii, read_record
from vfsd.sandbox.capabilities import change, decode_changes
from vfsd.sandbox.census import ProcessCensus, take_census
from vfsd.sandbox.fd_census import UnixSocket, unix_sockets
from vfsd.sandbox.id_maps import IdMap, parse_id_map
from vfsd.sandbox.role_names import ROLES, RoleName

SeenRole = RoleName | Literal["unknown"]

_MODULES: dict[str, SeenRole] = {"vfsd.broker": "broker", "vfsd.worker.control": "control", "vfsd.worker": "worker"}
_START_TIME_FIELD = 19  # of /proc/PID/stat behind the name in parentheses


@dataclass(frozen=True, slots=True)
class Process:
    role: SeenRole
    name: str  # the role, of workers with their number where it is known
    census: ProcessCensus
    report: Report | None  # None: not visible to us, or not given yet

    @property
    def pid(self) -> int:
        return self.census.pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """`processes`: the supervisor first, then its descendants as they were started."""

    options: InForce
    processes: tuple[Process, ...]
    sockets: dict[int, UnixSocket] | None
    uptime_seconds: float
    uid_map: IdMap  # of its user namespace, outside: as we see it
    recorded: bool  # whether the supervisor's record could be read

    @property
    def supervisor(self) -> Process:
        return self.processes[0]


def find_supervisor(name: str) -> int:
    """By its pid, by its socket's path, or by that of its pid file. ConfigError if there is none."""
    if name.isascii() and name.isdecimal() and not os.path.exists(name):
        return int(name)
    path = name if name.endswith(".pid") else f"{name}.pid"
    try:
        with open(path, "rb") as file:
            text = file.read(32).strip()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path}: {error.strerror}; give the pid of a vfsd, or the path of its socket") from error
    if not text.isdigit():
        raise ConfigError(f"{name}: {path} has no pid in it; give the pid of a vfsd, or the path of its socket")
    return int(text)


def examine(supervisor: int) -> Daemon:
    """Raises ConfigError if that is no supervisor of a vfsd."""
    try:
        return _examine(supervisor)
    except (FileNotFoundError, ProcessLookupError):
        raise ConfigError(f"{supervisor}: it, or one of its processes, does not run any more; look again") from None


def _examine(pid: int) -> Daemon:
    try:
        census = take_census(pid, list_root=False)
    except (FileNotFoundError, ProcessLookupError):
        raise ConfigError(f"{pid}: there is no such process; give the pid of a vfsd, or the path of its socket") from None
    record = _read_record(census)
    reports = record[1] if record else {}
    censuses = [census, *(take_census(each, list_root=False) for each in _descendants(pid))]
    processes = [_process(each, reports, is_supervisor=each is census) for each in censuses]
    if not any(each.role == "broker" and each.census.parent == pid for each in processes):
        raise ConfigError(f"{pid}: is not the supervisor of a vfsd (no child of it is a broker); give that one's pid, or the socket's path")
    return Daemon(
        options=record[0] if record else _options(census),
        processes=tuple(processes),
        sockets=unix_sockets(),
        uptime_seconds=_uptime(pid),
        uid_map=_uid_map(pid),
        recorded=record is not None,
    )


def _descendants(pid: int) -> list[int]:
    """Children, and whatever they might have started, each before its own."""
    found = [pid]
    for each in found:
        for tid in os.listdir(f"/proc/{each}/task"):
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{each}/task/{tid}/children", "rb") as file:
                found += [int(word) for word in file.read().split()]
    return found[1:]


def _process(census: ProcessCensus, reports: dict[int, Report], *, is_supervisor: bool) -> Process:
    report = reports.get(census.pid)
    if is_supervisor:
        role: SeenRole = "supervisor"
    elif report is not None:
        role = next((role for role in ROLES if role == report.role.partition(" ")[0]), "unknown")
    elif reports:
        role = "unknown"  # the supervisor does not know it, or it is not ready yet
    else:
        role = _role_of_command(census.command)
    return Process(role, role if report is None else report.role, census, report)


def _role_of_command(command: tuple[str, ...]) -> SeenRole:
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    return _MODULES.get(module, "unknown")


def _read_record(census: ProcessCensus) -> tuple[InForce, dict[int, Report]] | None:
    """None where it may not be read, or the process is no supervisor."""
    wanted = f"/memfd:{RECORD_NAME} (deleted)"
    number = next((fd.number for fd in (census.fds or {}).values() if fd.target == wanted), None)
    if number is None:
        return None
    try:
        with open(f"/proc/{census.pid}/fd/{number}", "rb") as file:
            return read_record(file.read(MOST_RECORD_BYTES))
    except ValueError as error:
        raise ConfigError(
            f"{census.pid}: its supervisor's record cannot be read ({error}); is it starting, or of another version?"
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
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")


def _uid_map(pid: int) -> IdMap:
    with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
        return parse_id_map(file.read())
