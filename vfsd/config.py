"""What the user asked for (`Options`), and what each child is told (`BrokerConfig`, `ControlConfig`, `WorkerConfig`).

A child's configuration is one msgpack map in a memfd that the supervisor writes, so it is trusted; the guest, the frontend
and the other children have no part in it. Descriptor numbers in it are those that the child was started with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import msgpack

from vfsd.fds import OwnedFd
from vfsd.sandbox.id_maps import IdMap
from vfsd.sandbox.lockdown import Confinement

CacheMode = Literal["auto", "always", "metadata", "never"]
SandboxMode = Literal["namespace", "chroot", "none"]
Wish = Literal["off", "auto", "on"]  # auto: if the guest can; on: a guest that cannot is refused
SeccompMode = Literal["kill", "log", "trap", "none"]
HandleMode = Literal["never", "prefer", "mandatory"]

MAX_TAG_BYTES = 36  # virtio 1.2, 5.11.4: the tag field of the configuration space
MAX_REQUEST_QUEUES = 64
MAX_SPARE_WORKERS = 8
DEFAULT_NOFILE = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What is offered to the guest: the defaults are those of the command line."""

    xattr: bool = False
    posix_acl: Wish = "off"
    security_label: Wish = "off"
    killpriv_v2: bool = False
    posix_lock: bool = True
    flock: bool = True
    readdirplus: bool = True
    writeback: bool = False
    allow_mmap: bool = False
    capability_remapped: bool = False  # --xattrmap hides file capabilities from the host's kernel: a write must be told


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line, checked as far as it can be without touching the system."""

    shared_dir: bytes
    socket_path: bytes | None
    socket_group: str | None
    fd: int | None
    fd_from: str = ""  # what gave us that number, where it was not --fd
    keep_listening: bool = False
    spare_workers: int = 0
    tag: bytes | None
    cache: CacheMode
    sandbox: SandboxMode
    seccomp: SeccompMode
    seccomp_policy: str | None = None  # None: the one that vfsd comes with
    allow_weak_policy: bool = False
    inode_file_handles: HandleMode
    request_queues: int
    readonly: bool
    announce_submounts: bool
    features: Features
    xattrmap: str | None
    translate_uid: tuple[str, ...] = ()
    translate_gid: tuple[str, ...] = ()
    allow_direct_io: bool
    preserve_noatime: bool
    rlimit_nofile: int | None  # None: the default, which may fall back to the hard limit; 0: leave the limit alone
    modcaps: tuple[tuple[bool, str], ...] = ()  # whether it is given to the broker or taken from it, and which capability
    log_level: int
    syslog: bool = False
    fault_rules: str | None = None
    fault_socket: bytes | None = None
    # Of the user namespace that an ordinary user gets; empty: own id only, as it is.
    uid_map: IdMap
    gid_map: IdMap


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleConfig:
    """What every child is told."""

    channel_fd: int
    supervisor_pidfd: int
    confinement: Confinement
    sandbox: SandboxMode
    log_level: int
    faults: bytes | None = None  # vfsd.faults.given, where faults are to be injected


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig(RoleConfig):
    shared_dir: bytes
    readonly: bool
    inode_file_handles: HandleMode
    announce_submounts: bool
    xattr: bool
    posix_acl: bool
    xattrmap: str | None
    translate_uid: tuple[str, ...] = ()
    translate_gid: tuple[str, ...] = ()
    allow_direct_io: bool
    preserve_noatime: bool
    writeback: bool = False
    nofile: int  # the limit of open files it runs under: the inode store's budget comes from it
    # Who it can be while it makes a file, and who it is otherwise.
    uid_map: IdMap
    gid_map: IdMap
    own_uid: int
    own_gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig(RoleConfig):
    tag: bytes | None
    request_queues: int
    keep_listening: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(RoleConfig):
    index: int | None  # None: a spare one, which takes a dead one's place when it is introduced
    control_fd: int
    broker_fd: int
    cache: CacheMode
    features: Features
    translate_uid: tuple[str, ...] = ()
    translate_gid: tuple[str, ...] = ()


Config = TypeVar("Config", bound=RoleConfig)


def pack_config(config: RoleConfig) -> bytes:
    packed: bytes = msgpack.packb(asdict(config))
    return packed


def unpack_config(kind: type[Config], packed: bytes) -> Config:
    # use_list=False: the tuples of a Confinement come back as the tuples they were
    values: dict[str, Any] = msgpack.unpackb(packed, use_list=False)
    values["confinement"] = Confinement(**values["confinement"])
    if "features" in values:
        values["features"] = Features(**values["features"])
    return kind(**values)


@contextmanager
def config_memfd(config: RoleConfig) -> Iterator[int]:
    """A memfd that holds the configuration, for as long as it takes to start the child that inherits it."""
    with OwnedFd(os.memfd_create("vfsd-config")) as memfd:
        fd = memfd.fileno()
        os.write(fd, pack_config(config))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd


def read_config(kind: type[Config], fd: int) -> Config:
    """The configuration that this process was started with; closes the memfd."""
    with OwnedFd(fd):
        size = os.fstat(fd).st_size
        return unpack_config(kind, os.pread(fd, size, 0))
