"""What no policy may let a role do, whatever it says: the list that a policy is measured against, the one vfsd comes with included.

A policy says what a role may do and why; this says what would break the design if a role could do it. `find_weaknesses` compares
the two exactly, over all arguments (see `seccomp_sets`). Pure. Calls are listed by name, also those that the libseccomp at hand
is too old to know: such a policy is refused for that alone, but the next libseccomp knows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vfsd.sandbox.seccomp_conditions import parse_conditions
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES, RolePolicy
from vfsd.sandbox.seccomp_sets import Arguments, Cube, allowed_arguments, cubes_of, find_uncovered, intersection

_POWERLESS = ("control", "worker")
_CONFINED = ("broker", *_POWERLESS)
_BROKER = ("broker",)


@dataclass(frozen=True, slots=True)
class Forbidden:
    """One call that roles must not be able to make: with arguments for which all of `when` and not all of `unless` holds."""

    syscall: str
    roles: tuple[str, ...]
    reason: str
    when: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES

    def arguments(self) -> str:
        """In words, with a space in front; empty: any."""
        if self.when:
            return f" with {' and '.join(self.when)}"
        return f" unless {' and '.join(self.unless)}" if self.unless else ""


@dataclass(frozen=True, slots=True)
class Weakness:
    """A policy lets a role make a forbidden call, for instance with `example`."""

    role: str
    forbidden: Forbidden
    example: Arguments
    rules: tuple[str, ...]  # where they stand and why; none: the role's default permits it

    def __str__(self) -> str:
        called = f"{self.forbidden.syscall}({', '.join(f'{value:#x}' for value in self.example)})"
        by = "; ".join(self.rules) or "no rule denies it"
        return f"role {self.role} may call {self.forbidden.syscall}{self.forbidden.arguments()}, which {self.forbidden.reason}; e.g. {called} [{by}]"


def _each(roles: tuple[str, ...], reason: str, names: str, *, when: tuple[str, ...] = (), unless: tuple[str, ...] = ()) -> list[Forbidden]:
    return [Forbidden(name, roles, reason, when, unless) for name in names.split()]


# What a confined role must not have either: calls that this list does not know yet.
_UNLISTED = Forbidden("anything", _CONFINED, "no rule names: its default must be kill")

# Reasons complete the sentence "a role may call X, which ...".
FORBIDDEN: tuple[Forbidden, ...] = (
    # The kernel itself. These even the supervisor has no use for, nor anything that it starts.
    *_each(ROLES, "loads programs into the kernel", "bpf"),
    *_each(ROLES, "replaces the kernel", "kexec_load kexec_file_load"),
    *_each(ROLES, "loads or unloads kernel code", "init_module finit_module delete_module"),
    *_each(ROLES, "takes over other processes", "ptrace"),
    *_each(ROLES, "reads, writes or compares other processes", "process_vm_readv process_vm_writev process_madvise kcmp"),
    *_each(ROLES, "takes other processes' descriptors", "pidfd_getfd"),
    *_each(ROLES, "makes system calls that seccomp cannot see", "io_uring_setup io_uring_enter io_uring_register"),
    *_each(ROLES, "stops the kernel in the middle of its accesses: a tool of exploits", "userfaultfd"),
    *_each(ROLES, "is a large attack surface", "perf_event_open"),
    *_each(ROLES, "watches and decides about the host's files", "fanotify_init"),
    *_each(ROLES, "uses the kernel's keyrings", "add_key request_key keyctl"),
    *_each(ROLES, "administers the host", "swapon swapoff reboot acct quotactl quotactl_fd vhangup"),
    *_each(ROLES, "sets the host's clock", "settimeofday clock_settime clock_adjtime adjtimex"),
    Forbidden("iopl", ROLES, "opens hardware ports", architectures=("x86_64",)),
    Forbidden("ioperm", ROLES, "opens hardware ports", architectures=("x86_64",)),
    Forbidden("modify_ldt", ROLES, "makes segments: a tool of exploits", architectures=("x86_64",)),
    *_each(ROLES, "can switch address space layout randomisation off", "personality"),
    # Programs, processes and threads: all that a confined role needs exist before its filter.
    *_each(_CONFINED, "starts programs", "execve execveat uselib"),
    *_each(_CONFINED, "makes processes or threads, which would need no more than they have", "clone clone3 fork vfork"),
    *_each(
        _CONFINED,
        "reaches other processes",
        "pidfd_open pidfd_send_signal process_mrelease kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo",
    ),
    *_each(_CONFINED, "changes limits, of other processes too", "prlimit64 setrlimit"),
    *_each(_CONFINED, "changes what confines the process", "prctl arch_prctl seccomp"),
    *_each(_CONFINED, "enters or makes namespaces", "setns unshare"),
    *_each(
        _CONFINED,
        "changes what is mounted where",
        "mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick open_tree open_tree_attr move_mount mount_setattr",
    ),
    # The network: a confined role talks on sockets that it was given.
    *_each(_CONFINED, "makes or names sockets", "socket socketpair connect bind listen accept accept4"),
    *_each(_CONFINED, "sends to an address of the sender's choice", "sendto", when=("arg4 != NULL",)),
    *_each(_CONFINED, "sends without looking at its flags, many at once", "sendmmsg"),
    # Memory: nothing becomes executable after the filter.
    *_each(_CONFINED, "makes memory executable", "mmap mprotect", when=("arg2 has PROT_EXEC",)),
    *_each(_CONFINED, "can make memory executable", "pkey_mprotect shmat remap_file_pages"),
    *_each(_CONFINED, "makes files that can be executed", "memfd_create memfd_secret"),
    # Paths. Not even the broker resolves one but below a descriptor that it holds.
    *_each(
        _CONFINED,
        "takes a path from the root or the working directory",
        "open creat stat lstat access chmod chown lchown readlink mkdir rmdir unlink rename link symlink mknod truncate utime utimes statfs openat2",
    ),
    *_each(
        _POWERLESS,
        "takes a path, and a worker or control must reach nothing by name",
        "openat statx newfstatat readlinkat mkdirat mknodat unlinkat renameat renameat2 linkat symlinkat fchmodat fchmodat2 fchownat futimesat utimensat "
        "faccessat faccessat2 getxattr lgetxattr setxattr lsetxattr listxattr llistxattr removexattr lremovexattr "
        "getxattrat setxattrat listxattrat removexattrat file_getattr file_setattr chdir fchdir "
        "inotify_init inotify_init1 inotify_add_watch fanotify_mark",
    ),
    *_each(_POWERLESS, "turns file handles into files, those outside the share included", "open_by_handle_at name_to_handle_at"),
    *_each(
        _BROKER,
        "takes a path from the working directory (AT_FDCWD), as any negative descriptor may",
        "openat statx newfstatat readlinkat mkdirat mknodat unlinkat renameat renameat2 linkat fchmodat fchmodat2 fchownat futimesat utimensat "
        "faccessat faccessat2 getxattrat setxattrat listxattrat removexattrat file_getattr file_setattr open_by_handle_at name_to_handle_at",
        unless=("arg0 & 0x80000000 == 0",),
    ),
    *_each(_BROKER, "takes a path from the working directory (AT_FDCWD)", "renameat renameat2 linkat", unless=("arg2 & 0x80000000 == 0",)),
    *_each(_BROKER, "takes a path from the working directory (AT_FDCWD)", "symlinkat", unless=("arg1 & 0x80000000 == 0",)),
    *_each(_BROKER, "changes which directory is the working directory or the root of names", "chdir fchdir"),
    # Descriptors. What is donated is shared: flags and owners belong to all that hold it.
    Forbidden("fcntl", _CONFINED, "changes an open file for all that hold it", ("arg1 & 0xffffffff == F_SETFL",)),
    *(
        Forbidden("fcntl", _CONFINED, "makes an open file send signals, or hold up others", (f"arg1 & 0xffffffff == {command}",))
        for command in ("F_SETOWN", "F_SETOWN_EX", "F_SETSIG", "F_SETLEASE", "F_NOTIFY")
    ),
    *_each(_POWERLESS, "asks devices and file systems for what has no name", "ioctl"),
    *_each(_BROKER, "types into a terminal", "ioctl", when=("arg1 & 0xffffffff == TIOCSTI",)),
    *_each(_BROKER, "types into a terminal", "ioctl", when=("arg1 & 0xffffffff == TIOCLINUX",)),
    # Identity. The broker's threads become the guest's user for one call, by their effective ids, and nobody else ever does.
    *_each(_CONFINED, "changes identity for good", "setuid setgid setreuid setregid setfsuid setfsgid"),
    *_each(_POWERLESS, "changes identity", "setresuid setresgid setgroups capset umask"),
    *_each(
        _BROKER,
        "changes the real or the saved id: identity, for good",
        "setresuid setresgid",
        unless=("arg0 & 0xffffffff == UNCHANGED_ID", "arg2 & 0xffffffff == UNCHANGED_ID"),
    ),
)


def find_weaknesses(role: RolePolicy, architecture: str) -> Iterator[Weakness]:
    """What the role can do on that machine and must not."""
    if role.name in _CONFINED and role.default != "kill":
        yield Weakness(role.name, _UNLISTED, (0,) * 6, ())
    for forbidden in FORBIDDEN:
        if role.name not in forbidden.roles or architecture not in forbidden.architectures:
            continue
        if (example := find_permitted(role, forbidden, architecture)) is not None:
            rules = [rule for rule in role.rules_for(architecture) if rule.action == "allow" and rule.matches(forbidden.syscall, example)]
            yield Weakness(role.name, forbidden, example, tuple(f'{rule.where}, "{rule.reason}"' for rule in rules))


def find_permitted(role: RolePolicy, forbidden: Forbidden, architecture: str) -> Arguments | None:
    """Arguments with which the role can make the forbidden call."""
    allowed = allowed_arguments(role, forbidden.syscall, architecture)
    denied = [*allowed.outside, *(_cubes(forbidden.syscall, forbidden.unless, architecture) if forbidden.unless else [])]
    where = _cubes(forbidden.syscall, forbidden.when, architecture)
    both = [part for cube in allowed.inside for other in where if (part := intersection(cube, other)) is not None]
    found = find_uncovered(both, denied)
    return None if found is None else found.example()


def _cubes(syscall: str, conditions: tuple[str, ...], architecture: str) -> list[Cube]:
    return cubes_of(parse_conditions(conditions, syscall, architecture, denies=True))
