"""What must be seen of each process of a running vfsd, as one table: `vfsdctl status --security`, the tests and docs/census.md use it.

Written down here once more, not taken from the code that confines: what does one thing and what expects it must be able to differ.
A row is of the default, started by root. A variant replaces it where its condition holds; one that is `weaker` is less than the
default, and says so. Roles that a row does not name have nothing expected of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from vfsd.sandbox.role_names import ROLES, RoleName
from vfsd.tools import check_privileges as privileges
from vfsd.tools import check_processes as processes
from vfsd.tools import check_surroundings as surroundings
from vfsd.tools.check import Check, Subject, anything
from vfsd.tools.daemon import Daemon, SeenRole
from vfsd.tools.fd_purposes import purposes

State = Literal["met", "weaker", "not visible", "NOT MET"]


@dataclass(frozen=True, slots=True)
class Condition:
    name: str
    holds: Callable[[Daemon], bool]
    weaker: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    condition: Condition
    checks: Mapping[SeenRole, Check]


@dataclass(frozen=True, slots=True)
class Expectation:
    """`shown_by`: where the kernel, or who else, shows it."""

    what: str
    shown_by: str
    checks: Mapping[SeenRole, Check]
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    expectation: Expectation
    expected: str
    state: State
    seen: str
    condition: Condition | None  # of the variant that applies


def _started_by_root(daemon: Daemon) -> bool:
    return daemon.supervisor.census.leader.uids[1] == 0


CHROOT = Condition("--sandbox=chroot", lambda daemon: daemon.options.sandbox == "chroot", weaker=True)
NO_SANDBOX = Condition("--sandbox=none", lambda daemon: daemon.options.sandbox == "none", weaker=True)
NO_SECCOMP = Condition("--seccomp=none", lambda daemon: daemon.options.seccomp == "none", weaker=True)
SECCOMP_LOG = Condition("--seccomp=log", lambda daemon: daemon.options.seccomp == "log", weaker=True)
SECCOMP_TRAP = Condition("--seccomp=trap", lambda daemon: daemon.options.seccomp == "trap", weaker=True)
OTHER_POLICY = Condition(
    "--seccomp-policy", lambda daemon: daemon.options.seccomp_policy is not None and not daemon.options.allow_weak_policy
)
WEAK_POLICY = Condition("--allow-weak-policy", lambda daemon: daemon.options.allow_weak_policy, weaker=True)
FAULTS = Condition("--fault-rules, --fault-socket", lambda daemon: daemon.options.faults, weaker=True)
NO_HANDLES = Condition("--inode-file-handles=never", lambda daemon: daemon.options.inode_file_handles == "never")
MORE_CAPABILITIES = Condition("--modcaps=+…", lambda daemon: bool(daemon.options.broker_extra), weaker=True)
USER = Condition("an ordinary user", lambda daemon: not _started_by_root(daemon) and daemon.options.sandbox == "namespace")
POWERLESS_USER = Condition(
    "an ordinary user, --sandbox=none", lambda daemon: not _started_by_root(daemon) and daemon.options.sandbox == "none", weaker=True
)

SUPERVISOR = ("KILL", "SETGID", "SETUID", "SETPCAP", "SYS_CHROOT", "SYS_ADMIN")
BROKER = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID", "MKNOD", "SETFCAP")
HELD = ("permitted", "effective")
PASSED_ON = ("inheritable", "ambient")
# linux/securebits.h: 1 NOROOT, 4 NO_SETUID_FIXUP, 16 KEEP_CAPS, 64 NO_CAP_AMBIENT_RAISE; each one's lock is the next bit.
SUPERVISOR_BITS, BROKER_BITS, POWERLESS_BITS = 64 + 128, 1 + 2 + 8 + 32 + 64 + 128, 1 + 2 + 4 + 8 + 32 + 64 + 128
NO_MORE = {"core file size": 0, "processes": 0, "locked memory": 0, "msgqueue size": 0, "realtime priority": 0, "nice priority": 0}


def _each(check: Check, *roles: RoleName) -> dict[SeenRole, Check]:
    return dict.fromkeys(roles, check)


def _same_for_all(check: Check) -> dict[SeenRole, Check]:
    return _each(check, *ROLES)


def _by_root_link(subject: Subject, root: str) -> bool:
    return root == subject.daemon.options.shared_dir


EXPECTATIONS: tuple[Expectation, ...] = (
    Expectation(
        "children", "/proc/PID/task/TID/children",
        {
            "supervisor": processes.children("one broker, one control, at most as many workers as request queues, and spare ones; no other process"),
            **_each(processes.child_of_supervisor("none; the supervisor's child"), "broker", "control", "worker"),
        },
    ),
    Expectation(
        "threads", "/proc/PID/task",
        {"supervisor": processes.threads(1), "broker": processes.threads(22), "control": processes.threads(1), "worker": processes.threads(5)},
    ),
    Expectation(
        "uids and gids", "Uid, Gid in task/TID/status",
        {
            "supervisor": anything("those of who started vfsd", privileges.show_ids),
            "broker": privileges.real_ids("the supervisor's; a thread that makes a file has those of its owner for that moment", privileges.starter_ids),
            **_each(privileges.every_id("nobody (65534)", privileges.nobody), "control", "worker"),
        },
        (
            Variant(
                USER,
                {
                    "broker": privileges.real_ids("the supervisor's, or of the root of the user namespace", privileges.starter_or_namespace_root),
                    **_each(
                        privileges.every_id("mapped ones that are not the user's own; those if no other is mapped", privileges.powerless_in_user_namespace),
                        "control", "worker",
                    ),
                },
            ),
            Variant(POWERLESS_USER, _each(privileges.every_id("the user's", privileges.starter_ids), "broker", "control", "worker")),
        ),
    ),
    Expectation(
        "supplementary groups", "Groups in task/TID/status",
        _same_for_all(privileges.groups("none", lambda _subject: set())),
        (
            Variant(USER, _same_for_all(privileges.groups("none; the user's where only one's own gid is mapped", privileges.starter_groups))),
            Variant(POWERLESS_USER, _same_for_all(privileges.groups("the user's", privileges.starter_groups))),
        ),
    ),
    Expectation(
        "capabilities", "CapPrm, CapEff in task/TID/status",
        {
            "supervisor": privileges.capabilities(HELD, SUPERVISOR),
            "broker": privileges.capabilities(HELD, (*BROKER, "DAC_READ_SEARCH")),
            **_each(privileges.capabilities(HELD), "control", "worker"),
        },
        (
            Variant(POWERLESS_USER, _same_for_all(privileges.capabilities(HELD))),
            Variant(MORE_CAPABILITIES, {"broker": privileges.chosen_capabilities(HELD, BROKER, "DAC_READ_SEARCH")}),
            Variant(NO_HANDLES, {"broker": privileges.capabilities(HELD, BROKER)}),
        ),
    ),
    Expectation(
        "capabilities to pass on", "CapInh, CapAmb in task/TID/status",
        _same_for_all(privileges.capabilities(PASSED_ON)),
        (Variant(USER, {"supervisor": privileges.capabilities(PASSED_ON, SUPERVISOR)}),),
    ),
    Expectation(
        "capability bounding set", "CapBnd in task/TID/status",
        {
            "supervisor": privileges.capabilities(("bounding",), SUPERVISOR),
            **_each(privileges.capabilities(("bounding",)), "broker", "control", "worker"),
        },
        (
            Variant(
                POWERLESS_USER,
                _same_for_all(anything("as it was: useless, with no_new_privs and nothing permitted", lambda _subject: "as it was")),
            ),
        ),
    ),
    Expectation(
        "securebits", "the process, at its lock-down",
        {
            "supervisor": privileges.securebits(SUPERVISOR_BITS),
            "broker": privileges.securebits(BROKER_BITS),
            **_each(privileges.securebits(POWERLESS_BITS), "control", "worker"),
        },
        (Variant(POWERLESS_USER, _same_for_all(privileges.securebits(0))),),
    ),
    Expectation(
        "no_new_privs", "NoNewPrivs in task/TID/status",
        _same_for_all(privileges.every_thread("set in all threads", lambda thread: thread.no_new_privs)),
    ),
    Expectation(
        "seccomp", "Seccomp, Seccomp_filters in task/TID/status",
        {
            **_each(privileges.filters("its own filter, in all threads", 1), "supervisor", "broker"),
            **_each(privileges.filters("its own filter and the supervisor's, in all threads", 2), "control", "worker"),
        },
        (Variant(NO_SECCOMP, _same_for_all(privileges.no_filters("none of vfsd's"))),),
    ),
    Expectation(
        "what seccomp does", "the option --seccomp; the kernel does not show it",
        _same_for_all(privileges.filter_action("kill", "kills the process")),
        (
            Variant(NO_SECCOMP, _same_for_all(privileges.filter_action("none", "nothing"))),
            Variant(SECCOMP_LOG, _same_for_all(privileges.filter_action("log", "lets it pass, and logs it"))),
            Variant(SECCOMP_TRAP, _same_for_all(privileges.filter_action("trap", "denies it by SIGSYS, which the process could catch"))),
        ),
    ),
    Expectation(
        "seccomp policy", "the option --seccomp-policy; the kernel does not show it",
        _same_for_all(privileges.policy("the one that vfsd comes with", shipped=True)),
        (
            Variant(NO_SECCOMP, _same_for_all(anything("none", lambda _subject: "none"))),
            Variant(OTHER_POLICY, _same_for_all(privileges.policy("another, that allows nothing forbidden: read that one", shipped=False))),
            Variant(WEAK_POLICY, _same_for_all(privileges.policy("another, that allows what no policy should", shipped=False))),
        ),
    ),
    Expectation(
        "fault injection", "/proc/PID/cmdline",
        _each(processes.faults("none", injected=False), "broker", "control", "worker"),
        (Variant(FAULTS, _each(processes.faults("by the operator's rules", injected=True), "broker", "control", "worker")),),
    ),
    Expectation(
        "Landlock", "the process, at its lock-down",
        _each(privileges.landlock("denies all that this kernel's can deny"), "control", "worker"),
    ),
    Expectation(
        "namespaces", "task/TID/ns",
        {
            "supervisor": anything("those of who started vfsd; for an ordinary user a user namespace of its own", surroundings.show_namespaces),
            **_each(surroundings.own_namespaces("mnt pid net ipc uts: unlike any other process's"), "broker", "control", "worker"),
        },
        tuple(
            Variant(condition, _each(anything("those of who started vfsd", surroundings.show_namespaces), "broker", "control", "worker"))
            for condition in (CHROOT, NO_SANDBOX)
        ),
    ),
    Expectation(
        "root directory", "/proc/PID/mountinfo, task/TID/root",
        {
            "broker": surroundings.mounts(
                "the share and the mounts in it, nosuid nodev nosymfollow (with --readonly: ro)", surroundings.lacks_of_share, alone=False
            ),
            **_each(surroundings.mounts("an empty tmpfs without room for a file, ro noexec; no other mount", surroundings.lacks_of_nothing, alone=True), "control", "worker"),
        },
        (
            Variant(
                CHROOT,
                {
                    "broker": surroundings.root_link("the share", _by_root_link),
                    **_each(surroundings.root_link("an empty directory that is deleted", lambda _, root: root.endswith(" (deleted)")), "control", "worker"),
                },
            ),
            Variant(NO_SANDBOX, _each(surroundings.root_link("the host's", lambda _, root: root == "/"), "broker", "control", "worker")),
        ),
    ),
    Expectation(
        "working directory", "task/TID/cwd",
        {
            "broker": surroundings.working_directory("/; of its pool's threads its own /proc/self/fd", lambda _: {"/"}, others="/fd"),
            **_each(surroundings.working_directory("/", lambda _: {"/"}), "control", "worker"),
        },
        (
            Variant(
                CHROOT,
                {
                    "broker": surroundings.working_directory("the share; of its pool's threads its own /proc/self/fd", lambda subject: {subject.daemon.options.shared_dir}, others="/fd"),
                    **_each(surroundings.root_link("its root", lambda _, root: root.endswith(" (deleted)")), "control", "worker"),
                },
            ),
        ),
    ),
    Expectation(
        "memory", "owner of /proc/PID/mem; where that is root's anyway the process, at its lock-down",
        _same_for_all(surroundings.hidden_memory("not dumpable: closed to other processes")),
    ),
    Expectation(
        "limits", "/proc/PID/limits",
        {
            "supervisor": surroundings.limits({"core file size": 0}),
            "broker": surroundings.limits(NO_MORE),
            "control": surroundings.limits(NO_MORE, 2048),
            "worker": surroundings.limits(NO_MORE, 65536),
        },
    ),
    Expectation(
        "environment", "/proc/PID/environ",
        {
            "supervisor": anything("that of who started vfsd", surroundings.show_environment),
            **_each(surroundings.no_environment("empty"), "broker", "control", "worker"),
        },
    ),
    Expectation(
        "descriptors", "/proc/PID/fd and fdinfo, sock_diag(7)",
        _same_for_all(processes.known_descriptors("each has a known purpose")),
    ),
)  # fmt: skip


def judge(daemon: Daemon) -> Iterator[tuple[Subject, list[Finding]]]:
    """Each process, with what is to be said of it."""
    known = purposes(daemon)
    for process in daemon.processes:
        subject = Subject(daemon, process, known.get(process.pid))
        yield subject, [_finding(subject, each) for each in EXPECTATIONS if process.role in each.checks] or [_unknown()]


def _finding(subject: Subject, expectation: Expectation) -> Finding:
    role = subject.process.role
    variants = (each for each in expectation.variants if role in each.checks and each.condition.holds(subject.daemon))
    variant = next(variants, None)
    check = (variant or expectation).checks[role]
    condition = variant.condition if variant is not None else None
    holds, seen = check.look(subject)
    state: State = "not visible" if holds is None else "NOT MET" if not holds else "met"
    if state == "met" and condition is not None and condition.weaker:
        state = "weaker"
    return Finding(expectation, check.text, state, seen, condition)


def _unknown() -> Finding:
    row = Expectation("role", "the supervisor's record, else the command line", {})
    return Finding(row, "one of vfsd's roles", "NOT MET", "unknown to the supervisor, or not ready yet", None)
