"""Capability sets and securebits, through python-prctl where it can and raw calls where it cannot.

python-prctl knows the capabilities of the headers it was built with; a newer kernel may have more, and has ambient ones.
Every set is therefore read back from the kernel, and what is left over is removed by number. Capabilities are per thread:
all this runs while the process has only one.
"""

from __future__ import annotations

from collections.abc import Iterable

import prctl

from vfsd.sandbox import syscalls

# By number, linux/capability.h.
NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
_BITS_OF_A_SET = 64

# linux/securebits.h. A locked bit cannot be changed again, by anybody.
SECBIT_NOROOT, SECBIT_NOROOT_LOCKED = 1 << 0, 1 << 1
SECBIT_NO_SETUID_FIXUP, SECBIT_NO_SETUID_FIXUP_LOCKED = 1 << 2, 1 << 3
SECBIT_KEEP_CAPS_LOCKED = 1 << 5
SECBIT_NO_CAP_AMBIENT_RAISE, SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED = 1 << 6, 1 << 7

_NO_AMBIENT = SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED
_NO_ROOT = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_SETUID_FIXUP_LOCKED
# NO_SETUID_FIXUP locked but clear: a broker thread that becomes a guest's user must lose its effective capabilities by that.
BROKER_SECUREBITS = _NO_AMBIENT | _NO_ROOT
POWERLESS_SECUREBITS = _NO_AMBIENT | _NO_ROOT | SECBIT_NO_SETUID_FIXUP
# The supervisor's children inherit its bits over exec; they start as uid 0 and need their capabilities to confine themselves.
SUPERVISOR_SECUREBITS = _NO_AMBIENT


def mask_of(names: Iterable[str]) -> int:
    """Names without CAP_, as in NAMES; ValueError for another."""
    wanted = set(names)
    if unknown := sorted(wanted.difference(NAMES)):
        raise ValueError(f"unknown capability {unknown[0]}")
    return sum(1 << NAMES.index(name) for name in wanted)


def names_of(mask: int) -> tuple[str, ...]:
    """In the order of their numbers; a capability that has no name here is its number."""
    return tuple(NAMES[bit] if bit < len(NAMES) else str(bit) for bit in range(_BITS_OF_A_SET) if mask >> bit & 1)


Change = tuple[bool, str]


def decode_changes(text: str) -> tuple[Change, ...]:
    """`-mknod:+sys_admin` as (added, name without CAP_) in its order. ValueError for what is not understood."""
    changes = []
    for word in text.split(":"):
        sign, name = word[:1], word[1:].upper().removeprefix("CAP_")
        if sign not in ("+", "-"):
            raise ValueError(f"{word!r} begins with neither + nor -; write as in -mknod:-setfcap")
        if name not in NAMES:
            raise ValueError(f"{word!r} names no capability; write as in -mknod:-setfcap")
        changes.append((sign == "+", name))
    return tuple(changes)


def change(names: Iterable[str], changes: Iterable[Change]) -> tuple[str, ...]:
    """`names` and what was added to them, without what was taken."""
    changed = list(names)
    for added, name in changes:
        if name in changed:
            changed.remove(name)
        if added:
            changed.append(name)
    return tuple(changed)


def permitted() -> int:
    """The calling thread's permitted set."""
    return syscalls.capget()[1]


def may(name: str) -> bool:
    """Whether this thread could do what that capability allows (permitted, so it can be made effective)."""
    return bool(permitted() & mask_of((name,)))


def bounding() -> int:
    """The calling thread's bounding set; the kernel answers EINVAL from the first capability that it does not know."""
    mask = 0
    for bit in range(_BITS_OF_A_SET):
        try:
            mask |= syscalls.prctl(syscalls.PR_CAPBSET_READ, bit) << bit
        except OSError:
            break
    return mask


def keep_over_uid_change() -> None:
    """Without this, leaving uid 0 clears the permitted set, and with it SETPCAP, which the next steps need."""
    prctl.set_keepcaps(True)


def raise_effective(name: str) -> None:
    """Make a permitted capability effective (a uid change cleared the effective set)."""
    prctl.set_caps(([NAMES.index(name)], prctl.CAP_EFFECTIVE, True))


def limit_bounding(kept: int) -> None:
    """Drop everything else from the bounding set. Needs an effective SETPCAP."""
    known = set(prctl.ALL_CAPS)
    for bit in range(_BITS_OF_A_SET):
        if not bounding() & ~kept:
            return
        if kept >> bit & 1:
            continue
        if bit in known:
            prctl.capbset_drop(bit)
        else:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, bit)


def lock_securebits(bits: int) -> None:
    """Needs an effective SETPCAP. KEEP_CAPS itself is cleared. By number: python-prctl refuses the ambient bits."""
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, bits)


def securebits() -> int:
    """The calling thread's. /proc does not show them."""
    return syscalls.prctl(syscalls.PR_GET_SECUREBITS, 0)


def keep_over_exec(kept: int) -> None:
    """Hold exactly these, and let what this process executes have them too: without uid 0 exec would take them away.

    Ambient ones stay so when they may no longer be made so (SECBIT_NO_CAP_AMBIENT_RAISE), and only as long as they are kept.
    """
    syscalls.capset(kept, kept, kept)
    for bit in range(_BITS_OF_A_SET):
        if kept >> bit & 1 and not syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_IS_SET, bit):
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, bit)


def limit_to(kept: int) -> None:
    """Hold these, effective and permitted, and nothing else in any set but the bounding one.

    `kept` must be permitted. The order matters: what is not permitted can neither be effective nor be made so.
    """
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    known = [bit for bit in prctl.ALL_CAPS if kept >> bit & 1]
    prctl.cap_inheritable.limit()
    if known:
        prctl.set_caps((known, prctl.CAP_EFFECTIVE, True))
    prctl.cap_effective.limit(*known)
    prctl.cap_permitted.limit(*known)
    if syscalls.capget() != (kept, kept, 0):  # the kernel has capabilities that python-prctl does not know
        syscalls.capset(kept, kept, 0)
