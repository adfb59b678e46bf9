"""A user namespace for a vfsd that an ordinary user started: there it has the capabilities that its other namespaces take.

A map of one's own id alone is written directly, after which the groups of the process cannot change. Any other map takes
newuidmap or newgidmap, programs of the host that look into /etc/subuid and /etc/subgid; they must be started from outside
the namespace, so a helper process is forked before it is made. Who controls the bytes: the administrator. For entry points
only; runs while there is one thread.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, NoReturn

import prctl

from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd
from vfsd.sandbox import capabilities, syscalls
from vfsd.sandbox.id_maps import IdMap, IdRange, choose_own_id, parse_id_map

_LEAST_SUBORDINATE = 65536  # root, daemons and people have those below: nobody is to be told to give them away
Kind = Literal["uid", "gid"]

_USE_NONE = "change that, start vfsd as root, or use --sandbox=none"
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOST_REPORT_BYTES = 4096
_OK = b"ok"
# What an administrator may have switched off: the file, the value that forbids, and where it does, what to say.
_SWITCHES = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "the sysctl kernel.unprivileged_userns_clone is 0"),
    ("/proc/sys/user/max_user_namespaces", "0", "the sysctl user.max_user_namespaces is 0"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "AppArmor restricts them (the sysctl kernel.apparmor_restrict_unprivileged_userns is 1)",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Who this process can be: the ids mapped in its user namespace, and whether supplementary groups may be dropped there."""

    uid_map: IdMap
    gid_map: IdMap
    may_drop_groups: bool
    own_uid: int
    own_gid: int


def read_standing() -> Standing:
    uid_map, gid_map = (parse_id_map(_read(f"/proc/self/{kind}_map") or "") for kind in ("uid", "gid"))
    return Standing(
        uid_map=uid_map,
        gid_map=gid_map,
        may_drop_groups=(_read("/proc/self/setgroups") or "allow").strip() == "allow",
        own_uid=choose_own_id(uid_map, os.geteuid()),
        own_gid=choose_own_id(gid_map, os.getegid()),
    )


def enter_user_namespace(uid_map: IdMap, gid_map: IdMap) -> None:
    """Go into a new user namespace for good, with all capabilities in it, also over exec. ConfigError says what is missing.

    An empty map means: own id as it is, and no other. That needs nothing but the kernel.
    """
    uid_map = uid_map or (IdRange(os.geteuid(), os.geteuid(), 1),)
    gid_map = gid_map or (IdRange(os.getegid(), os.getegid(), 1),)
    uid_is_own, gid_is_own = _is_own(uid_map, os.geteuid()), _is_own(gid_map, os.getegid())
    commands = [] if uid_is_own else [_map_command("uid", uid_map)]
    commands += [] if gid_is_own else [_map_command("gid", gid_map)]
    with _outside_helper(commands) as run_commands:
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            if gid_is_own:
                _write("/proc/self/setgroups", "deny")  # before gid_map, or the kernel refuses that
                _write("/proc/self/gid_map", _kernel_form(gid_map))
            if uid_is_own:
                _write("/proc/self/uid_map", _kernel_form(uid_map))
        except OSError as error:
            raise _unavailable(error) from error
        run_commands()
    capabilities.keep_over_exec(capabilities.permitted())


def _is_own(id_map: IdMap, own: int) -> bool:
    """Whether the kernel lets us write it ourselves."""
    return len(id_map) == 1 and id_map[0].outside == own and id_map[0].size == 1


def _kernel_form(id_map: IdMap) -> str:
    return "".join(f"{each.inside} {each.outside} {each.size}\n" for each in id_map)


def _unavailable(error: OSError) -> ConfigError:
    reasons = [text for path, value, text in _SWITCHES if (_read(path) or "").strip() == value]
    if not reasons and error.errno == errno.ENOSPC:
        reasons = ["the limit of user namespaces (user.max_user_namespaces) is reached"]
    if not reasons and error.errno in (errno.EINVAL, errno.ENOSYS):
        reasons = ["this kernel has no user namespaces"]
    why = " and ".join(reasons) or "something on this host forbids them (a container's seccomp profile?)"
    code = errno.errorcode.get(error.errno or 0, "no errno")
    return ConfigError(
        f"--sandbox=namespace: an ordinary user needs a user namespace for it, which cannot be had: {error.strerror} ({code}): {why}; {_USE_NONE}"
    )


# --- newuidmap and newgidmap --------------------------------------------------------------------------------------------------


def _map_command(kind: Kind, id_map: IdMap) -> list[str]:
    program = f"new{kind}map"
    found = shutil.which(program) or shutil.which(program, path=_SYSTEM_PATH)
    if found is None:
        raise ConfigError(
            f"--{kind}-map: the program {program}, which sets more ids than one's own, was not found; install it (package uidmap or shadow-utils), or leave --{kind}-map out"
        )
    return [found, str(os.getpid()), *(str(number) for each in id_map for number in each)]


@contextmanager
def _outside_helper(commands: list[list[str]]) -> Iterator[_Runner]:
    """A process that stays outside and runs the commands when it is told to; gone with the block."""
    if not commands:
        yield _Runner(None, None)
        return
    go_read, go_write = (OwnedFd(fd) for fd in os.pipe())
    report_read, report_write = (OwnedFd(fd) for fd in os.pipe())
    pid = os.fork()
    if pid == 0:
        go_write.close()  # so that our parent's death is the end of the pipe
        _run_as_helper(go_read.fileno(), report_write.fileno(), commands)
    try:
        go_read.close()
        report_write.close()
        with go_write, report_read:
            yield _Runner(go_write, report_read)
    finally:
        os.waitpid(pid, 0)


@dataclass(frozen=True, slots=True)
class _Runner:
    go: OwnedFd | None
    report: OwnedFd | None

    def __call__(self) -> None:
        """Have the commands run. Raises ConfigError with what they said."""
        if self.go is None or self.report is None:
            return
        with suppress(OSError):  # then it says nothing, which is told below
            os.write(self.go.fileno(), b"x")
        said = os.read(self.report.fileno(), _MOST_REPORT_BYTES)
        if said != _OK:
            raise ConfigError(said.decode(errors="backslashreplace") or "--uid-map: the helper that runs newuidmap died; start vfsd again")


def _run_as_helper(go: int, report: int, commands: list[list[str]]) -> NoReturn:
    status = 1
    try:
        if os.read(go, 1):
            os.write(report, next(filter(None, map(_run_map_command, commands)), _OK.decode()).encode()[:_MOST_REPORT_BYTES])
            status = 0
    finally:
        os._exit(status)


def _run_map_command(command: list[str]) -> str | None:
    """None if all is well, else the line for the user."""
    kind: Kind = "uid" if command[0].endswith("newuidmap") else "gid"
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="backslashreplace", check=False)
    except OSError as error:
        return f"--{kind}-map: cannot start {command[0]}: {error.strerror}; see who may execute it"
    if ended.returncode == 0:
        return None
    said = " ".join(ended.stderr.split()) or f"exit status {ended.returncode}"
    return f"--{kind}-map: {command[0]} refuses the map: {said}; {_remedy(kind, command[2:])}"


def _remedy(kind: Kind, numbers: list[str]) -> str:
    if prctl.get_no_new_privs():
        return f"vfsd was started with no_new_privs, so that new{kind}map cannot get its privileges: start it without (systemd: NoNewPrivileges=no)"
    file = f"/etc/sub{kind}"
    name, own = _user_name(), os.geteuid() if kind == "uid" else os.getegid()
    triples = [IdRange(*(int(each) for each in numbers[at : at + 3])) for at in range(0, len(numbers), 3)]
    wanted = [each for each in triples if (each.outside, each.size) != (own, 1)]
    if any(each.outside < _LEAST_SUBORDINATE for each in wanted):
        return f"the second number of a map is the host's id, and {kind}s below {_LEAST_SUBORDINATE} are not for guests: your own is {own}"
    lines = ", ".join(f"{name}:{each.outside}:{each.size}" for each in wanted)
    if _has_entry(file, name):
        return f"map ids that {file} gives to {name}, or have root add there: {lines}"
    return f"{file} has no line for {name}: have root add {lines}"


def _has_entry(file: str, name: str) -> bool:
    return any(line.split(":")[0] in (name, str(os.getuid())) for line in (_read(file) or "").splitlines())


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()
    except OSError:
        return None


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    with OwnedFd(fd):
        os.write(fd, text.encode())
