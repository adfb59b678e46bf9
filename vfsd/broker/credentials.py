"""Making files as the guest's user: this thread's uid and gid change for one system call, and back.

Raw system calls change one thread; os.setresuid would change all. The thread keeps CAP_DAC_OVERRIDE while it is the user:
the guest's kernel has already decided by the user's groups, which the host does not know, that the call is permitted. It
does not keep CAP_FSETID: a file made in a set-group-id directory by a stranger to that group must lose its set-group-id bit
(CVE-2022-0358).

A thread that cannot become itself again would serve the next request as somebody else: the broker ends instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from vfsd.broker.id_squash import IdSquash
from vfsd.sandbox import filecalls

CAP_DAC_OVERRIDE = 1 << 1
EXIT_CREDENTIALS_LOST = 70
_NOBODY_AT_ALL = 0xFFFFFFFF  # (uid_t)-1, which setresuid(2) takes for "leave it": the file would be root's


class Caller(NamedTuple):
    """Who makes a file. `umask` 0: the guest has applied its own; `groups`: supplementary ones."""

    uid: int
    gid: int
    umask: int = 0
    groups: Sequence[int] = ()


class Making(Protocol):
    """A message that makes a file."""

    @property
    def umask(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def groups(self) -> Sequence[int]: ...


def caller_of(message: Making) -> Caller:
    return Caller(message.uid, message.gid, message.umask, message.groups)


class Credentials:
    """`permitted`: the broker's own permitted set, restored after each switch; None where ids cannot be set at all.

    `own`: uid and gid that the broker has otherwise. `squash`: decides who a caller is whose ids cannot be set.
    """

    def __init__(self, permitted: int | None, own: tuple[int, int] = (0, 0), squash: IdSquash | None = None) -> None:
        self._permitted = permitted
        self._own_uid, self._own_gid = own
        self._squash = squash

    @contextmanager
    def of_caller(self, caller: Caller) -> Iterator[None]:
        """Be the caller on this thread inside the block. OSError if the host refuses the ids."""
        uid, gid, umask, _groups = caller
        if _NOBODY_AT_ALL in (uid, gid):
            raise OSError(errno.EINVAL, "not a uid or gid")
        if self._squash is not None:
            uid, gid = self._squash.settable(uid, gid)
        if self._permitted is None or (uid == 0 == self._own_uid and gid == self._own_gid):
            with _umask(umask):
                yield
            return
        self._become(uid, gid, self._permitted)
        try:
            with _umask(umask):
                yield
        finally:
            self._return(uid, self._permitted)

    def _become(self, uid: int, gid: int, permitted: int) -> None:
        filecalls.set_thread_gid(gid)
        if uid == 0:
            return
        try:
            filecalls.set_thread_uid(uid)  # clears the effective set, if we were uid 0
            filecalls.set_thread_effective_capabilities(permitted & CAP_DAC_OVERRIDE, permitted)
        except OSError:
            self._return(uid, permitted)
            raise

    def _return(self, uid: int, permitted: int) -> None:
        try:
            if uid != 0:
                filecalls.set_thread_uid(self._own_uid)
                filecalls.set_thread_effective_capabilities(permitted, permitted)
            filecalls.set_thread_gid(self._own_gid)
        except OSError:
            os._exit(EXIT_CREDENTIALS_LOST)


@contextmanager
def _umask(umask: int) -> Iterator[None]:
    """The thread's umask inside the block: the host's default ACLs decide whether it applies."""
    if not umask:
        yield
        return
    os.umask(umask)
    try:
        yield
    finally:
        os.umask(0)
