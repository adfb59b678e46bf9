"""Making files as the guest's user: this thread's uid, gid and groups change for one system call, and back.

Raw system calls change one thread; os.setresuid would change all. The thread does not keep CAP_FSETID while it is the user:
a file made in a set-group-id directory by a stranger to that group must lose its set-group-id bit (CVE-2022-0358).

Whether it keeps CAP_DAC_OVERRIDE depends on what the host knows. A guest that tells no groups (before FUSE 7.38) has itself
decided by them that the call is permitted: the host could only refuse wrongly. One that tells them (CREATE_SUPP_GROUP) leaves
the host able to decide, so the host decides. But Linux tells only the group that owns the directory; where the guest goes by
ACLs too, another of the user's groups may have been what permitted the call, so there the guest is believed again. The
guest's root may do what root may also where it is another user on the host.

A thread that cannot become itself again would serve the next request as somebody else: the broker ends instead.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

from vfsd.broker.id_squash import IdSquash
from vfsd.sandbox import filecalls
from vfsd.wire.broker_messages import SESSION_POSIX_ACL, SESSION_SUPP_GROUPS
from vfsd.wire.id_map import IdMaps

CAP_DAC_OVERRIDE = 1 << 1
CAP_FSETID = 1 << 4
CAP_MKNOD = 1 << 27
_OF_ROOT = CAP_DAC_OVERRIDE | CAP_FSETID | CAP_MKNOD  # what can matter where a file is made
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

    `own`: uid and gid that the broker has otherwise. `squash`: decides who a caller is whose ids cannot be set. `ids`: what
    the guest's ids are on the host, if they are translated.
    """

    def __init__(
        self, permitted: int | None, own: tuple[int, int] = (0, 0), squash: IdSquash | None = None, ids: IdMaps | None = None
    ) -> None:
        self._permitted = permitted
        self._own_uid, self._own_gid = own
        self._squash = squash
        self._ids = ids
        self._kept = CAP_DAC_OVERRIDE

    def begin_session(self, flags: int) -> None:
        """`flags`: SESSION_*; see the module on CAP_DAC_OVERRIDE."""
        host_decides = flags & (SESSION_SUPP_GROUPS | SESSION_POSIX_ACL) == SESSION_SUPP_GROUPS
        self._kept = 0 if host_decides else CAP_DAC_OVERRIDE

    def of_caller(self, caller: Caller) -> AbstractContextManager[None]:
        """Be the caller on this thread inside the block. OSError if the host refuses the ids, ReplyErrno if the user forbade them."""
        is_root = caller.uid == 0
        return self._being(caller, _OF_ROOT if is_root else self._kept, is_root=is_root)

    def of_owner(self, uid: int, gid: int) -> AbstractContextManager[None]:
        """As `of_caller`, for what is made by the way (a whiteout): with all capabilities, as the guest's kernel has permitted the rest."""
        return self._being(Caller(uid, gid), self._permitted or 0, is_root=True)

    @contextmanager
    def _being(self, caller: Caller, kept: int, *, is_root: bool) -> Iterator[None]:
        """`kept`: capabilities. Whether all are kept is decided by who asks: one who only becomes root here (squashed) keeps no more."""
        if self._ids is not None:
            caller = _on_host(self._ids, caller)
        if _NOBODY_AT_ALL in (caller.uid, caller.gid):
            raise OSError(errno.EINVAL, "not a uid or gid")
        if self._squash is not None:
            caller = _settable(self._squash, caller)
        as_root = is_root and caller.uid == 0
        if self._permitted is None or (as_root and self._own_uid == 0 and caller.gid == self._own_gid and not caller.groups):
            with _umask(caller.umask):
                yield
            return
        if as_root:
            kept = self._permitted
        self._become(caller, kept, self._permitted)
        try:
            with _umask(caller.umask):
                yield
        finally:
            self._return(caller, kept, self._permitted)

    def _become(self, caller: Caller, kept: int, permitted: int) -> None:
        """Uid and capabilities last: changing the others takes them."""
        try:
            if caller.groups:
                filecalls.set_thread_groups(caller.groups)
            filecalls.set_thread_gid(caller.gid)
            if caller.uid != 0:
                filecalls.set_thread_uid(caller.uid)  # clears the effective set, if we were uid 0
            if caller.uid != 0 or kept != permitted:
                filecalls.set_thread_effective_capabilities(permitted & kept, permitted)
        except OSError:
            self._return(caller, kept, permitted)
            raise

    def _return(self, caller: Caller, kept: int, permitted: int) -> None:
        try:
            if caller.uid != 0:
                filecalls.set_thread_uid(self._own_uid)
            if caller.uid != 0 or kept != permitted:
                filecalls.set_thread_effective_capabilities(permitted, permitted)
            filecalls.set_thread_gid(self._own_gid)
            if caller.groups:
                filecalls.set_thread_groups(())
        except OSError:
            os._exit(EXIT_CREDENTIALS_LOST)

    @contextmanager
    def without_fsetid(self) -> Iterator[None]:
        """Inside the block the kernel takes set-id bits away where this thread changes a file's contents, as from any user.

        Without capabilities of its own the broker is such a user anyway.
        """
        permitted = self._permitted or 0
        if not permitted & CAP_FSETID:
            yield
            return
        filecalls.set_thread_effective_capabilities(permitted & ~CAP_FSETID, permitted)
        try:
            yield
        finally:
            try:
                filecalls.set_thread_effective_capabilities(permitted, permitted)
            except OSError:
                os._exit(EXIT_CREDENTIALS_LOST)


def _settable(squash: IdSquash, caller: Caller) -> Caller:
    uid, gid = squash.settable(caller.uid, caller.gid)
    return Caller(uid, gid, caller.umask, squash.settable_groups(caller.groups))


def _on_host(ids: IdMaps, caller: Caller) -> Caller:
    uid, gid = ids.to_host(caller.uid, caller.gid)
    return Caller(uid, gid, caller.umask, [ids.gids.to_host(group) for group in caller.groups])


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
