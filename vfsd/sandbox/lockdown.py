"""The last steps of every role's start, in the one order that works, after its namespaces and root (`namespaces`).

limits (core dumps, open files) → uid, gid, groups → bounding set, securebits, capabilities → not dumpable, death signal, is the supervisor alive? →
no_new_privs → Landlock → the role's threads → the other limits → seccomp, as the last act.

Why in this order: a uid change clears the death signal; capabilities, no_new_privs and Landlock are of a thread and reach
only threads started later; Landlock needs no_new_privs; the filter forbids all of the steps before it, and TSYNC puts it
on the threads as well. Nothing here reads what a peer controls. For entry points only.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import prctl

from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd
from vfsd.sandbox import capabilities, landlock
from vfsd.sandbox.role_names import RoleName
from vfsd.sandbox.seccomp_load import load_filter
from vfsd.sandbox.steps import step

_START_AS_ROOT = "start vfsd as root, or as an ordinary user with --sandbox=none"
_SECUREBITS = {
    "broker": capabilities.BROKER_SECUREBITS,
    "control": capabilities.POWERLESS_SECUREBITS,
    "worker": capabilities.POWERLESS_SECUREBITS,
    "supervisor": capabilities.SUPERVISOR_SECUREBITS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What one process is confined to. Plain values, so that it travels in a configuration.

    `capabilities`: names without CAP_ that it keeps, as far as it holds them. `uid`, `gid`, `nofile`: None leaves as it is.
    `may_drop_groups`: false in a user namespace where setgroups(2) is denied for good; the groups are then those of the user.
    `seccomp_filter`: BPF of `Policy.compile`; empty for none. `landlock`: deny all, where the kernel has Landlock.
    """

    role: RoleName
    sandbox: Literal["namespace", "chroot", "none"]
    seccomp_filter: bytes
    uid: int | None
    gid: int | None
    capabilities: tuple[str, ...]
    landlock: bool
    nofile: int | None
    supervisor_pidfd: int | None
    may_drop_groups: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedDown:
    """What of its confinement only the process itself can find out: /proc shows none of it. `landlock`: its version, 0 for none."""

    securebits: int
    landlock: int
    dumpable: bool


def lock_down(confinement: Confinement, *, start_threads: Callable[[], None] | None = None) -> LockedDown:
    """Confine this process for good. Raises ConfigError that names the step; the process must then end.

    `start_threads` starts all threads that the process will ever have. `supervisor_pidfd` is closed.
    """
    if threading.active_count() != 1:
        raise RuntimeError("lock_down with threads running: they would keep their privileges")
    _set_limits(confinement)
    _change_ids(confinement)
    _drop_capabilities(confinement)
    _bind_to_supervisor(confinement)
    with step("set no_new_privs", "use a kernel that has it (Linux 3.5)"):
        prctl.set_no_new_privs(True)
    landlock_version = 0
    if confinement.landlock:
        with step("apply Landlock", "check what else restricts vfsd on this host (a container's seccomp profile?)"):
            landlock_version = landlock.deny_all()
    if start_threads is not None:
        start_threads()
    if confinement.role != "supervisor":
        _allow_nothing_more()
    result = LockedDown(securebits=capabilities.securebits(), landlock=landlock_version, dumpable=bool(prctl.get_dumpable()))
    if confinement.seccomp_filter:
        with step("load the seccomp filter", "use a kernel with CONFIG_SECCOMP_FILTER, or --seccomp=none"):
            load_filter(confinement.seccomp_filter)
    return result


def _set_limits(confinement: Confinement) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold guest memory, and be written where we cannot see
    limit = confinement.nofile
    if limit is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    except (ValueError, OSError) as error:  # CPython says EPERM and EINVAL by ValueError
        raise ConfigError(f"sandbox: cannot set the limit of open files to {limit}: {error}; use --rlimit-nofile={hard} or less") from error


def _allow_nothing_more() -> None:
    """No further thread, locked memory, message queue or real-time priority: the filters deny these too, `--seccomp=log` does not.

    After the threads were started; a broker that is root of the host is not bound by the first (capabilities(7), SYS_RESOURCE).
    """
    for limit in (
        resource.RLIMIT_NPROC,
        resource.RLIMIT_MEMLOCK,
        resource.RLIMIT_MSGQUEUE,
        resource.RLIMIT_RTPRIO,
        resource.RLIMIT_NICE,
    ):
        resource.setrlimit(limit, (0, 0))


def _change_ids(confinement: Confinement) -> None:
    """Groups first, uid last: it is what the others need. Whoever may drop supplementary groups does."""
    if confinement.uid is not None and capabilities.permitted():
        with step("keep capabilities over the change of uid", _START_AS_ROOT):
            capabilities.keep_over_uid_change()
    if confinement.may_drop_groups and (confinement.gid is not None or capabilities.may("SETGID")):
        with step("drop supplementary groups", f"it needs CAP_SETGID; {_START_AS_ROOT}"):
            os.setgroups([])
    if confinement.gid is not None:
        with step(f"become group {confinement.gid}", f"it needs CAP_SETGID; {_START_AS_ROOT}"):
            os.setresgid(confinement.gid, confinement.gid, confinement.gid)
    if confinement.uid is not None:
        with step(f"become user {confinement.uid}", f"it needs CAP_SETUID; {_START_AS_ROOT}"):
            os.setresuid(confinement.uid, confinement.uid, confinement.uid)


def _drop_capabilities(confinement: Confinement) -> None:
    kept = capabilities.mask_of(confinement.capabilities) & capabilities.permitted()
    # Only what its children need may stay in the supervisor's bounding set; the other roles start nothing.
    bounding = kept if confinement.role == "supervisor" else 0
    if _can_limit_bounding(confinement):
        with step("empty the capability bounding set", f"it needs CAP_SETPCAP; {_START_AS_ROOT}"):
            capabilities.raise_effective("SETPCAP")
            capabilities.limit_bounding(bounding)
        with step("lock the securebits", f"it needs CAP_SETPCAP; {_START_AS_ROOT}"):
            capabilities.lock_securebits(_SECUREBITS[confinement.role])
    with step("drop capabilities", _START_AS_ROOT):
        if confinement.role == "supervisor" and os.geteuid() != 0:
            capabilities.keep_over_exec(kept)
        else:
            capabilities.limit_to(kept)


def _can_limit_bounding(confinement: Confinement) -> bool:
    """Without SETPCAP the bounding set stays, and is worth nothing to a process that has no_new_privs and nothing permitted.

    So that is an error only where the user asked for a sandbox that needs privileges anyway.
    """
    if capabilities.may("SETPCAP"):
        return True
    if confinement.sandbox == "none" or not capabilities.bounding():
        return False
    raise ConfigError(f"sandbox: cannot empty the capability bounding set: CAP_SETPCAP is missing (EPERM); {_START_AS_ROOT}")


def _bind_to_supervisor(confinement: Confinement) -> None:
    """Die with the supervisor, and show nobody our memory. After the uid change, which would undo both."""
    with step("become not dumpable", "check what restricts prctl(2) on this host (a container's seccomp profile?)"):
        prctl.set_dumpable(False)
    if confinement.supervisor_pidfd is None:
        return
    with step("ask for SIGKILL at the supervisor's death", "check what restricts prctl(2) on this host (a container's seccomp profile?)"):
        prctl.set_pdeathsig(signal.SIGKILL)
    # It may have died before that line: then no signal comes any more.
    with OwnedFd(confinement.supervisor_pidfd) as pidfd:  # of no use afterwards
        poller = select.poll()
        poller.register(pidfd.fileno(), select.POLLIN)
        died = bool(poller.poll(0))
    if died:
        raise ConfigError("sandbox: the supervisor died while this process was starting; start vfsd again")
