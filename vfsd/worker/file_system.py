"""The file system as one worker serves it: what its handlers (ops_*.py) work on. Knows nothing of rings.

A handler is a function of (FileSystem, Request). It returns the reply's body; or `Placed`, if the data already stands in the
guest's memory; or `NO_REPLY`. One that must wait is a generator: it yields a message for the broker and gets a `Given`, or
a Job for the pool and gets its result; an errno comes back as ReplyErrno, raised where it waits.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from vfsd.config import Features
from vfsd.errors import ReplyErrno
from vfsd.fds import TempFd
from vfsd.log import ChildLog
from vfsd.sandbox.filecalls import Stat
from vfsd.wire import broker_messages as wire
from vfsd.wire.id_map import IdMaps
from vfsd.worker.broker_client import BrokerClient
from vfsd.worker.cache_policy import CachePolicy
from vfsd.worker.files import Mount, Mounts, NodeFds, OpenFile, OpenFiles
from vfsd.worker.io_pool import IoPool, Job
from vfsd.worker.keepers import Keepers
from vfsd.worker.request import Request
from vfsd.worker.tally import Tally


class Given(NamedTuple):
    """The broker's answer."""

    fields: list[Any]
    donated: TempFd | None


class Placed(NamedTuple):
    """So many bytes of data stand behind the reply header's place."""

    length: int


class NoReply:
    """The request is not owed one (FORGET, INTERRUPT)."""


NO_REPLY = NoReply()

Outcome = bytes | Placed | NoReply
Waiting = Generator[wire.Request | Job, Any, Outcome]
Handler = Callable[["FileSystem", Request], Outcome | Waiting]

_ENTRY_HEAD = struct.Struct("<QQQQII")  # a fuse_entry_out up to its fuse_attr


class _NobodyWaits:
    """For a job whose result concerns nobody."""

    def finished(self, result: Any, error: Exception | None) -> None:
        pass


_NOBODY_WAITS = _NobodyWaits()
_DEFAULT_FEATURES = Features()


class FileSystem:
    """One per worker; the ring thread's alone."""

    def __init__(
        self, broker: BrokerClient, cache: CachePolicy, log: ChildLog, pool: IoPool, most_files: int,
        features: Features = _DEFAULT_FEATURES, ids: IdMaps | None = None,
    ) -> None:  # fmt: skip
        self.broker = broker
        self.cache = cache
        self.features = features
        self._ids = ids
        self._agreed = 0
        self._locks_session = 0  # the last session in which a POSIX lock was asked for
        self.log = log
        self._pool = pool
        self.files = OpenFiles(most_files)
        self.nodes = NodeFds(most_files)
        self.mounts = Mounts()
        self.keepers = Keepers()
        self.tally = Tally()
        self.active = False
        broker.listen(self.noticed)

    def begin_session(self, notice: wire.SessionNotice) -> None:
        """Drop everything of the session before, and say so. An older one than ours is an answer that was overtaken."""
        if notice.session < self.broker.session:
            return
        self.files.clear()
        self.nodes.clear()
        self.mounts.clear()
        self.broker.begin_session(notice.session)
        self.active = bool(notice.flags & wire.SESSION_ACTIVE)
        self._agreed = notice.flags >> wire.SESSION_OWN_FLAGS_SHIFT
        if notice.flags & wire.SESSION_LOCKS:
            self._locks_session = notice.session
        self.broker.tell(wire.SessionAck(notice.session))

    def agreed(self, flag: int) -> bool:
        """Whether an INIT flag was offered by the guest and taken by us."""
        return bool(self._agreed & flag)

    @property
    def locks_in_use(self) -> bool:
        """Whether a FLUSH may drop locks, in this session: whichever worker they were taken through."""
        return self._locks_session == self.broker.session

    def noticed(self, notice: wire.Notice) -> None:
        """What the broker says unasked."""
        if isinstance(notice, wire.SessionNotice):
            self.begin_session(notice)
        elif isinstance(notice, wire.DropFile):
            self.files.drop(notice.fh)
        elif isinstance(notice, wire.LocksNotice):
            self._locks_session = max(self._locks_session, notice.session)
            self.broker.tell(wire.LocksAck(notice.session))
        else:
            self.nodes.drop(notice.nodeid)

    def keep_open(self, nodeid: int, fh: int, traits: int, mount_key: int, donated: TempFd) -> OpenFile:
        """Enter a donated descriptor of an open file."""
        mount = self.mounts.get(mount_key)
        mount.slow = bool(traits & wire.TRAIT_SLOW)
        opened = OpenFile(fh, nodeid, donated, mount, traits, self._discard)
        self.files.add(opened)
        return opened

    def _discard(self, mount: Mount, fd: TempFd) -> None:
        """Close a descriptor; where that waits for a server (its file system has a flush method), on the pool."""
        if mount.slow:
            self._pool.submit(Job(mount.key, fd.close, remote=True), _NOBODY_WAITS)
        else:
            fd.close()

    def fetch(self, nodeid: int, fh: int) -> Generator[wire.Request | Job, Any, OpenFile]:
        """The open file, asked for if this worker lacks it. ReplyErrno EBADF if there is none."""
        opened = self.files.get(nodeid, fh)
        if opened is not None:
            return opened
        given: Given = yield wire.Fetch(nodeid, fh)
        traits, mount_key = given.fields
        return self.keep_open(nodeid, fh, traits, mount_key, take_donation(given))

    def as_guest(self, seen: Stat) -> Stat:
        """Attributes with the ids that the guest is to see."""
        if self._ids is None:
            return seen
        uid, gid = self._ids.to_guest(seen.uid, seen.gid)
        return seen._replace(uid=uid, gid=gid)

    def encode_entry(self, nodeid: int, attr: bytes) -> bytes:
        """A fuse_entry_out."""
        timeout = self.cache.timeout_seconds
        return fuse_entry_head(nodeid, timeout) + attr


def fuse_entry_head(nodeid: int, timeout: int) -> bytes:
    """The part of a fuse_entry_out before its attributes: generation 0, since nodeids are never reused."""
    return _ENTRY_HEAD.pack(nodeid, 0, timeout, timeout, 0, 0)


def take_donation(given: Given) -> TempFd:
    """The descriptor of an answer that always brings one."""
    if given.donated is None:
        raise OSError(errno.EIO, "the broker donated no descriptor")
    return given.donated


def check_name(name: bytes) -> bytes:
    """ENAMETOOLONG here: a longer name would not fit the broker's message. All else is the broker's check."""
    if len(name) > wire.MAX_NAME_BYTES:
        raise ReplyErrno(errno.ENAMETOOLONG)
    return name
