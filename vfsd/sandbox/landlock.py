"""Landlock, the second lock on the file system: a confined process may open, make, remove, connect to nothing.

It holds where seccomp would fail: a descriptor of a directory, or /proc/self/fd, gives no file. It does not stop stat(2)
and readlink(2), which is why the seccomp filter lets control and workers make no system call that takes a path.
Files already open stay usable. The ruleset has no rule: every right that it handles is denied.
"""

from __future__ import annotations

import errno
import os
import struct

from vfsd.sandbox import syscalls

# struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped. One row per version that added rights:
# (version, number of LANDLOCK_ACCESS_FS_* bits, of LANDLOCK_ACCESS_NET_* bits, of LANDLOCK_SCOPE_* bits, fields known to it).
# A newer kernel handles what the last row names; an attribute longer than a kernel knows is E2BIG.
_RIGHTS_OF_VERSION = (
    (1, 13, 0, 0, 1),  # EXECUTE ... MAKE_SYM
    (2, 14, 0, 0, 1),  # REFER
    (3, 15, 0, 0, 1),  # TRUNCATE
    (4, 15, 2, 0, 2),  # BIND_TCP, CONNECT_TCP
    (5, 16, 2, 0, 2),  # IOCTL_DEV
    (6, 16, 2, 2, 3),  # ABSTRACT_UNIX_SOCKET, SIGNAL
)


def abi_version() -> int:
    """Landlock's interface version, 0 where the kernel has no Landlock or has it switched off."""
    try:
        return syscalls.landlock_abi()
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def deny_all() -> int:
    """Deny this thread, and those it starts later, all that this kernel's Landlock can deny; needs no_new_privs.

    Returns the interface version used; 0 means that the kernel has no Landlock and nothing was done.
    """
    version = abi_version()
    if version == 0:
        return 0
    ruleset = syscalls.landlock_create_ruleset(_ruleset_attribute(version))
    try:
        syscalls.landlock_restrict_self(ruleset)
    finally:
        os.close(ruleset)
    return version


def _ruleset_attribute(version: int) -> bytes:
    _, *bits, fields = [row for row in _RIGHTS_OF_VERSION if row[0] <= version][-1]
    masks = [(1 << count) - 1 for count in bits]
    return struct.pack(f"={fields}Q", *masks[:fields])
