"""The limit of open files, as --rlimit-nofile asks for it; children inherit what is set here."""

from __future__ import annotations

import resource
from typing import NamedTuple

from vfsd.config import DEFAULT_NOFILE
from vfsd.errors import ConfigError

LEAST_NOFILE = 64  # what vfsd itself needs to start, and to say what is wrong
_NR_OPEN = "/proc/sys/fs/nr_open"


class Nofile(NamedTuple):
    """The limit in force, and what the user should know about it."""

    limit: int
    warning: str = ""


def set_nofile(asked: int | None) -> Nofile:
    """Set the limit. 0 leaves it alone; None is the default, which takes what it can get. Raises ConfigError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if asked == 0:
        return Nofile(soft)
    nr_open = _read_nr_open()
    if asked is not None and asked < LEAST_NOFILE:
        raise ConfigError(
            f"--rlimit-nofile={asked}: vfsd needs {LEAST_NOFILE} open files to start; ask for more, or 0 to leave the limit alone"
        )
    if asked is not None and nr_open is not None and asked > nr_open:
        raise ConfigError(f"--rlimit-nofile={asked}: the system allows {nr_open} ({_NR_OPEN}); ask for less, or raise that")
    wanted = min(DEFAULT_NOFILE, nr_open or DEFAULT_NOFILE) if asked is None else asked
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (ValueError, OSError) as error:  # CPython turns EPERM and EINVAL into ValueError
        if asked is not None:
            raise ConfigError(
                f"--rlimit-nofile={asked}: the hard limit is {hard}, and raising it takes CAP_SYS_RESOURCE; "
                f"ask for at most {hard}, or raise the limit of whatever starts vfsd (systemd: LimitNOFILE=)"
            ) from error
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return Nofile(
            hard,
            f"the limit of open files cannot be raised to {wanted}; the hard limit of {hard} is used instead (--rlimit-nofile={hard} says so)",
        )
    return Nofile(wanted)


def _read_nr_open() -> int | None:
    """None where /proc shows processes only (systemd: ProcSubset=pid): then setrlimit says what is too much."""
    try:
        with open(_NR_OPEN, encoding="ascii") as file:
            return int(file.read())
    except FileNotFoundError:
        return None
