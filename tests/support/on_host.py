"""What the host's own kernel does for a user: a system call in a child process that has become that user."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path


def as_user(uid: int, gid: int, call: Callable[[], object], *, inside: Path, groups: Sequence[int] = ()) -> int:
    """The errno `call` fails with, 0 if it does not. It runs in the directory `inside`, which the user need not reach."""
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.chdir(inside)
            os.umask(0)
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            call()
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended)
