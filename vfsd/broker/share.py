"""The shared directory as the broker knows it: inodes, mounts, open files, sessions. What the request handlers work on.

Everything that a freed inode or a closed file leaves behind comes through here, so that descriptors, mount references and
donated copies go in one place. One lock orders inodes, open files, grants and drops; no system call is made under it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vfsd.broker.closer import Closer
from vfsd.broker.credentials import Credentials
from vfsd.broker.donations import NodeDonations
from vfsd.broker.file_handles import FileHandles, Log, device_of
from vfsd.broker.inode_store import Identity, InodeStore, Pin, Released
from vfsd.broker.locks import Locks
from vfsd.broker.mount_fds import MountFds
from vfsd.broker.open_files import OpenFile, OpenFiles
from vfsd.broker.path_fds import PathFd, PathFds
from vfsd.broker.reply_slots import ReplySlots
from vfsd.broker.traits import Traits
from vfsd.broker.whereabouts import Whereabouts
from vfsd.broker.xattr_map import parse as parse_xattr_map
from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd
from vfsd.sandbox import filecalls
from vfsd.sandbox.filecalls import Statx
from vfsd.wire.attr import ATTR, ATTR_SUBMOUNT, STATX, encode_rdev
from vfsd.wire.broker_messages import SESSION_LOCKS, TRAIT_FLUSH, DropFile, DropNode, Notice
from vfsd.wire.id_map import IdMaps

_NO_FD = -1
_STATX_TOLD = filecalls.STATX_BASIC_STATS | filecalls.STATX_BTIME  # mount ids of the host are not the guest's business
_MOST_WIPED_TABLES = 4  # then a new session waits: a guest must not begin sessions faster than they are freed
COPIES_BESIDE_BUDGET = 64  # on their way to workers, when the guest has as many descriptors as it may
_REOPEN_AS_PATH = os.O_PATH | os.O_CLOEXEC


class Entry(NamedTuple):
    """An inode whose lookup has been counted: nodeid and attribute record."""

    nodeid: int
    attr: bytes


class Settings(NamedTuple):
    """What the user decided."""

    inode_file_handles: str
    readonly: bool
    announce_submounts: bool
    path_fd_budget: int
    most_guest_fds: int  # descriptors that a guest may make the broker hold: open files, and inodes without a handle
    xattr: bool = False
    posix_acl: bool = False
    xattrmap: str | None = None
    allow_direct_io: bool = False
    preserve_noatime: bool = False
    writeback: bool = False
    ids: IdMaps | None = None

    @property
    def open_flags(self) -> int:
        """What of the guest's open flags reaches the host.

        O_APPEND does not: descriptions are shared, each write says whether it appends (answer_files._open has the exception). O_DIRECT and O_NOATIME do if the
        user says so: the Rust daemon's default too.
        """
        direct = os.O_DIRECT if self.allow_direct_io else 0
        return os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | direct | (os.O_NOATIME if self.preserve_noatime else 0)


def encode_attr(seen: Statx, flags: int = 0) -> bytes:
    return ATTR.pack(
        seen.ino, seen.size, seen.blocks, seen.atime, seen.mtime, seen.ctime, seen.atime_nsec, seen.mtime_nsec, seen.ctime_nsec,
        seen.mode, seen.nlink, seen.uid, seen.gid, encode_rdev(seen.rdev_major, seen.rdev_minor), seen.blksize, flags,
    )  # fmt: skip


def encode_statx(seen: Statx) -> bytes:
    return STATX.pack(
        seen.mask & _STATX_TOLD, seen.blksize, seen.attributes, seen.nlink, seen.uid, seen.gid, seen.mode, seen.ino, seen.size, seen.blocks,
        seen.attributes_mask, seen.atime, seen.atime_nsec, seen.btime, seen.btime_nsec, seen.ctime, seen.ctime_nsec,
        seen.mtime, seen.mtime_nsec, seen.rdev_major, seen.rdev_minor, seen.dev_major, seen.dev_minor,
    )  # fmt: skip


class Share:
    """`notify(worker bits, notice)` queues a notice to those workers."""

    def __init__(
        self, root: OwnedFd, proc_self_fd: OwnedFd, settings: Settings, credentials: Credentials, log: Log,
        notify: Callable[[int, Notice], None], closer: Closer, whereabouts: Whereabouts,
        wake_reaper: Callable[[Callable[[], bool]], None],
    ) -> None:  # fmt: skip
        self.root = root
        self.proc_self_fd = proc_self_fd.fileno()
        self._proc_self_fd = proc_self_fd
        self.settings = settings
        self.credentials = credentials
        self.log = log
        self._notify = notify
        self.lock = threading.Lock()
        self.mounts = MountFds(self.proc_self_fd, closer)
        self.handles = FileHandles(settings.inode_file_handles, self.mounts, log)
        self.paths = PathFds(self.handles, settings.path_fd_budget)
        self.store = InodeStore(self.lock, self._release_inodes)
        self.files = OpenFiles(self.lock)
        self.locks = Locks()
        self.donations = NodeDonations()
        self.traits = Traits()
        self.reply_slots = ReplySlots()
        self.closer = closer
        self.whereabouts = whereabouts
        self.queued_copies: Callable[[], int] = lambda: 0  # descriptors on their way to workers
        self._wake_reaper = wake_reaper
        self._reaping = threading.Lock()
        self.xattr_map = None if settings.xattrmap is None else parse_xattr_map(settings.xattrmap)
        self.session = 0
        self.session_flags = 0
        # Read-only by its mounts too (namespace mode): then a mount that is not is one that came later.
        self._mounts_are_readonly = settings.readonly and bool(os.fstatvfs(root.fileno()).f_flag & os.ST_RDONLY)
        self._mounts_seen: set[int] = set()
        self._insert_root()

    def _insert_root(self) -> None:
        root_fd = os.open(b".", _REOPEN_AS_PATH, dir_fd=self.root.fileno())
        identity = self.handles.settle(root_fd)
        held = identity.handle_key is not None and self.mounts.acquire(identity.mount_id, root_fd, identity.file_type)
        self.store.insert_root(identity, fd=root_fd, held_mount=held)

    def has_room_for_fd(self) -> bool:
        """Whether the guest may have another descriptor: the broker keeps some for itself, or it could not go on."""
        while self._guest_fds() >= self.settings.most_guest_fds:
            if not self.reap():  # what an ended session left is the first to go
                return False
        return True

    def _guest_fds(self) -> int:
        return len(self.files) + self.store.fd_count + len(self.locks) + len(self.closer) + self.queued_copies()

    def require_room_for_fd(self) -> None:
        """ENFILE when the guest has as many descriptors as it may."""
        if not self.has_room_for_fd():
            raise ReplyErrno(errno.ENFILE)

    def require_room_for_copy(self) -> None:
        """ENFILE for another copy of what is open already: while workers read there is always room, if they do not, as for others."""
        if self.queued_copies() >= COPIES_BESIDE_BUDGET:
            self.require_room_for_fd()

    def own_open(self, fd: int, traits: int, mount_id: int) -> OwnedFd:
        """An open file, or a copy on its way to a worker; where closing one may wait for a server, that is left to the closer."""
        return self.closer.own(fd, mount_id) if traits & TRAIT_FLUSH else OwnedFd(fd)

    def path_of(self, inode: Pin) -> PathFd:
        return self.paths.of(inode)

    @contextmanager
    def outliving(self, session: int, directory: PathFd, name: bytes) -> Iterator[None]:
        """The inode behind a name that goes inside the block lives for a moment longer, if the guest knows it.

        With write-back the guest then sets the times of what had the name, and its syncfs(2) reports it if that cannot be: by
        handle alone it would be ESTALE.
        """
        victim = self._find_known(session, directory, name) if self.settings.writeback else None
        if victim is None:
            yield
            return
        nodeid, path_fd = victim
        with path_fd:
            yield
            with suppress(ReplyErrno), self.store.pin(nodeid, session) as inode:
                self.paths.keep(inode, path_fd.detach())

    def _find_known(self, session: int, directory: PathFd, name: bytes) -> tuple[int, OwnedFd] | None:
        """Nodeid and O_PATH descriptor of what has this name now, None if there is nothing or the guest does not know it."""
        try:
            found = OwnedFd(os.open(name, _REOPEN_AS_PATH | os.O_NOFOLLOW, dir_fd=directory.fd))
        except OSError:
            return None
        with suppress(OSError, ReplyErrno):
            nodeid = self.store.find(self.handles.identify(found.fileno(), filecalls.statx(found.fileno())), session)
            if nodeid is not None:
                return nodeid, found
        found.close()
        return None

    def adopt(self, session: int, path_fd: OwnedFd, parent: Pin) -> Entry:
        """Make the inode behind an O_PATH descriptor known to the guest, and count one lookup.

        Handle, attributes and type all come from this one descriptor, so they are of one inode whatever happens to its name.
        Takes over `path_fd`.
        """
        try:
            self.whereabouts.found_it()
            seen = filecalls.statx(path_fd.fileno())
            identity = self.handles.identify(path_fd.fileno(), seen)
            if self._mounts_are_readonly and seen.mnt_id != parent.mount_id:
                self._warn_if_writable(path_fd.fileno(), seen.mnt_id)
            nodeid = self.store.count_lookup(identity, session)
            if nodeid is None:
                nodeid = self._insert(session, path_fd, identity)
            return Entry(nodeid, encode_attr(self.as_guest(seen), self._attr_flags(seen, parent)))
        finally:
            path_fd.close()

    def _warn_if_writable(self, path_fd: int, mount_id: int) -> None:
        """Say once of a mount that the host made later that only the broker keeps the guest from writing to it."""
        if mount_id in self._mounts_seen:
            return
        self._mounts_seen.add(mount_id)
        if not os.fstatvfs(path_fd).f_flag & os.ST_RDONLY:
            where = os.fsdecode(os.readlink(b"%d" % path_fd, dir_fd=self.proc_self_fd))
            self.log.warning(
                f"--readonly: the mount at {where!r} of the share was made later and is writable; requests to write are refused"
            )

    def _insert(self, session: int, path_fd: OwnedFd, identity: Identity) -> int:
        held = identity.handle_key is not None and self.mounts.acquire(identity.mount_id, path_fd.fileno(), identity.file_type)
        if not held:
            self.require_room_for_fd()
        kept = _NO_FD if held else os.dup(path_fd.fileno())
        if not held:  # without a mount descriptor the handle could not be opened: it must not be found by it
            identity = identity._replace(handle_key=None)
        while self.store.full and self.reap():
            pass
        try:
            nodeid, inserted = self.store.insert(identity, session, fd=kept, held_mount=held)
        except ReplyErrno:
            self._give_back(identity.mount_id, kept, held=held)
            raise
        if not inserted:
            self._give_back(identity.mount_id, kept, held=held)
        return nodeid

    def _give_back(self, mount_id: int, fd: int, *, held: bool) -> None:
        if held:
            self.mounts.release(mount_id)
        if fd != _NO_FD:
            os.close(fd)

    def _attr_flags(self, seen: Statx, parent: Pin) -> int:
        if not self.settings.announce_submounts or seen.mode & 0o170000 != 0o040000:
            return 0
        return ATTR_SUBMOUNT if seen.mnt_id != parent.mount_id or device_of(seen) != parent.device else 0

    def as_guest(self, seen: Statx) -> Statx:
        """Attributes with the ids that the guest is to see."""
        ids = self.settings.ids
        if ids is None:
            return seen
        uid, gid = ids.to_guest(seen.uid, seen.gid)
        return seen._replace(uid=uid, gid=gid)

    @contextmanager
    def killing_set_id(self, inode: Pin | OpenFile, kill: int) -> Iterator[None]:
        """With `kill`, the set-id bits go from the file whose contents are changed inside the block, and do not come back."""
        if not kill:
            yield
            return
        with self.files.set_id.changing(inode.nodeid) as record:
            before, record.known = record.known, 0
            try:
                with self.credentials.without_fsetid():
                    yield
            except BaseException:
                record.known = before  # nothing was done
                raise

    def open_inode(self, inode: Pin, flags: int) -> OwnedFd:
        """A real descriptor of an inode: the only place where one is made. EBADF for all but regular files and directories.

        The kernel's answer is checked: an inode's type never changes, but a broken file system must not hand us a device.
        """
        if not inode.may_be_opened:
            raise ReplyErrno(errno.EBADF)
        flags |= os.O_CLOEXEC | os.O_NOCTTY
        if inode.is_directory:
            flags |= os.O_DIRECTORY
        if inode.handle_key is not None and inode.fd == _NO_FD:
            fd = OwnedFd(self.handles.open(inode.handle_key, flags))
        else:
            fd = OwnedFd(os.open(b"%d" % inode.fd, flags & ~os.O_NOFOLLOW, dir_fd=self.proc_self_fd))
        try:
            if os.fstat(fd.fileno()).st_mode & 0o170000 != inode.file_type:
                raise ReplyErrno(errno.EBADF)
        except (ReplyErrno, OSError):
            fd.close()
            raise
        return fd

    def path_again(self, fd: int) -> OwnedFd:
        """An O_PATH descriptor of the inode behind an open one."""
        return OwnedFd(os.open(b"%d" % fd, _REOPEN_AS_PATH, dir_fd=self.proc_self_fd))

    def release_file(self, nodeid: int, fh: int, session: int, worker: int) -> None:
        """RELEASE from one worker; the others are told to drop their copies."""
        others = self.files.release(nodeid, fh, session) & ~(1 << worker)
        self.locks.drop_file(nodeid, fh)
        self.locks.freed(nodeid)
        if others:
            self._notify(others, DropFile(fh))

    def _release_inodes(self, released: list[Released]) -> None:
        for inode in released:
            self.paths.drop(inode.nodeid)
            self.locks.drop_inode(inode.nodeid)
            self._give_back(inode.mount_id, inode.fd, held=inode.held_mount)
            holders = self.donations.forget(inode.nodeid)
            if holders:
                self._notify(holders, DropNode(inode.nodeid))

    def note_locks(self, session: int) -> None:
        """POSIX locks are in use in this session: a worker that greets from now on hears it at once."""
        with self.lock:
            if session == self.session:
                self.session_flags |= SESSION_LOCKS

    def begin_session(self, flags: int) -> int:
        """Forget everything the last session left; returns the new session's number. The reaper frees it."""
        with self.lock:
            self.session += 1
            self.session_flags = flags
            session = self.session
        self.credentials.begin_session(flags)
        self.files.begin_session(session)
        self.locks.begin_session(session)
        self.store.begin_session(session)
        self.donations.clear()  # the notice of the new session says it all
        self.reply_slots.begin_session()
        self.paths.drop_all()
        while self.store.wiped_tables > _MOST_WIPED_TABLES:
            self.reap()
        self._wake_reaper(self.reap)
        return session

    def reap(self) -> bool:
        """Free a bit of what ended sessions left: a fraction of a millisecond's work. False if nothing is left."""
        with self._reaping:
            wiped = self.store.take_wiped()
            if wiped is None:
                return False
            for fd in wiped.fds:
                os.close(fd)
            for mount_id, references in wiped.mounts.items():
                self.mounts.release(mount_id, references)
            self.store.settle_wiped(wiped)
            return True
