"""Load a compiled seccomp filter. Apart from `seccomp`, because confined roles never load libseccomp, which that imports."""

from __future__ import annotations

import errno
import os

from vfsd.sandbox import syscalls

INSTRUCTION_BYTES = 8  # struct sock_filter
BPF_MAXINSNS = 4096


def load_filter(program: bytes) -> None:
    """Put the filter on all threads of this process, for ever. Raises OSError; needs no_new_privs or CAP_SYS_ADMIN."""
    instructions, rest = divmod(len(program), INSTRUCTION_BYTES)
    if rest or not 0 < instructions <= BPF_MAXINSNS:
        raise OSError(errno.EINVAL, f"not a BPF program: {len(program)} bytes")
    stray_thread = syscalls.seccomp_load(program, instructions)
    if stray_thread:
        raise OSError(errno.ESRCH, f"thread {stray_thread} has a filter of its own: {os.strerror(errno.ESRCH)}")
