"""What each role may do and is told: the options turned into one configuration per child.

Pure decisions. Who controls the bytes: the command line, which is the administrator's.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace

from vfsd.config import BrokerConfig, ControlConfig, Options, WorkerConfig
from vfsd.errors import ConfigError
from vfsd.sandbox import capabilities
from vfsd.sandbox.id_maps import choose_powerless_id
from vfsd.sandbox.lockdown import Confinement
from vfsd.sandbox.role_names import RoleName
from vfsd.sandbox.user_namespace import Standing, read_standing

# Without DAC_READ_SEARCH (handles=never) no file handle can be opened, whatever the broker is made to do.
_BROKER_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETUID", "SETGID", "MKNOD", "SETFCAP")
_HANDLE_CAPABILITY = "DAC_READ_SEARCH"
# What the supervisor needs after the broker's start: to give later workers their namespaces, root, uid and filter, and to kill.
SUPERVISOR_CAPABILITIES = ("SYS_ADMIN", "SYS_CHROOT", "SETPCAP", "SETUID", "SETGID", "KILL")

# Control keeps a descriptor per memory region (509) and three per vring; a worker its mapped regions' and cached TempFds.
_CONTROL_NOFILE = 2048
_WORKER_NOFILE = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Makes the configuration of any child, also of one that is started much later."""

    options: Options
    filters: dict[RoleName, bytes]
    supervisor_pidfd: int
    nofile: int
    privileged: bool  # whether we may become somebody else, and have capabilities to give
    standing: Standing

    def broker(self, channel_fd: int) -> BrokerConfig:
        options = self.options
        return BrokerConfig(
            channel_fd=channel_fd,
            supervisor_pidfd=self.supervisor_pidfd,
            confinement=self._confinement("broker", capabilities=broker_capabilities(options), nofile=self.nofile),
            sandbox=options.sandbox,
            log_level=options.log_level,
            shared_dir=options.shared_dir,
            readonly=options.readonly,
            inode_file_handles=options.inode_file_handles,
            announce_submounts=options.announce_submounts,
            xattr=options.features.xattr,
            posix_acl=options.features.posix_acl != "off",
            xattrmap=options.xattrmap,
            translate_uid=options.translate_uid,
            translate_gid=options.translate_gid,
            allow_direct_io=options.allow_direct_io,
            preserve_noatime=options.preserve_noatime,
            writeback=options.features.writeback,
            nofile=self.nofile,
            uid_map=self.standing.uid_map if self.privileged else (),
            gid_map=self.standing.gid_map if self.privileged else (),
            own_uid=self.standing.own_uid if self.privileged else os.geteuid(),
            own_gid=self.standing.own_gid if self.privileged else os.getegid(),
        )

    def control(self, channel_fd: int) -> ControlConfig:
        return ControlConfig(
            channel_fd=channel_fd,
            supervisor_pidfd=self.supervisor_pidfd,
            confinement=self._confinement("control", nofile=min(self.nofile, _CONTROL_NOFILE)),
            sandbox=self.options.sandbox,
            log_level=self.options.log_level,
            tag=self.options.tag,
            request_queues=self.options.request_queues,
            keep_listening=self.options.keep_listening,
        )

    def worker(self, index: int | None, channel_fd: int, control_fd: int, broker_fd: int) -> WorkerConfig:
        return WorkerConfig(
            index=index,
            channel_fd=channel_fd,
            supervisor_pidfd=self.supervisor_pidfd,
            confinement=self._confinement("worker", nofile=min(self.nofile, _WORKER_NOFILE)),
            sandbox=self.options.sandbox,
            log_level=self.options.log_level,
            control_fd=control_fd,
            broker_fd=broker_fd,
            cache=self.options.cache,
            features=self.options.features,
            translate_uid=self.options.translate_uid,
            translate_gid=self.options.translate_gid,
        )

    def supervisor(self) -> Confinement:
        return self._confinement("supervisor", capabilities=SUPERVISOR_CAPABILITIES)

    def _confinement(self, role: RoleName, *, capabilities: tuple[str, ...] = (), nofile: int | None = None) -> Confinement:
        """Control and workers become nobody, or who else is mapped, with nothing."""
        powerless = role in {"control", "worker"}
        uid, gid = self._ids(role) if self.privileged else (None, None)
        return Confinement(
            role=role,
            sandbox=self.options.sandbox,
            seccomp_filter=self.filters[role],
            uid=uid,
            gid=gid,
            capabilities=capabilities if self.privileged else (),
            landlock=powerless,
            nofile=nofile,
            supervisor_pidfd=None if role == "supervisor" else self.supervisor_pidfd,
            may_drop_groups=self.standing.may_drop_groups,
        )

    def _ids(self, role: RoleName) -> tuple[int | None, int | None]:
        """None: it stays who it is. The supervisor does, so that it can remove the socket that it made."""
        standing = self.standing
        if role == "supervisor":
            return None, None
        if role == "broker":
            return (
                None if standing.own_uid == os.geteuid() else standing.own_uid,
                None if standing.own_gid == os.getegid() else standing.own_gid,
            )
        return choose_powerless_id(standing.uid_map, standing.own_uid), choose_powerless_id(standing.gid_map, standing.own_gid)


def broker_capabilities(options: Options) -> tuple[str, ...]:
    handle_capability = () if options.inode_file_handles == "never" else (_HANDLE_CAPABILITY,)
    return capabilities.change(_BROKER_CAPABILITIES + handle_capability, options.modcaps)


def more_capabilities(options: Options) -> tuple[str, ...]:
    """What --modcaps gives to the broker beyond what it has anyway."""
    usual = broker_capabilities(replace(options, modcaps=()))
    return tuple(name for name in broker_capabilities(options) if name not in usual)


def make_roles(options: Options, supervisor_pidfd: int, nofile: int, filters: dict[RoleName, bytes]) -> Roles:
    return Roles(
        options=options,
        filters=filters,
        supervisor_pidfd=supervisor_pidfd,
        nofile=nofile,
        privileged=os.geteuid() == 0 or options.sandbox == "namespace",
        standing=read_standing(),
    )


def check_starter(options: Options) -> None:
    """ConfigError if whoever starts vfsd cannot have what the options ask for."""
    if options.sandbox == "chroot" and not capabilities.may("SYS_CHROOT"):
        raise ConfigError("--sandbox=chroot: only root may change its root directory; use --sandbox=namespace or --sandbox=none")
    for added, name in options.modcaps:
        if added and not (capabilities.may(name) or (options.sandbox == "namespace" and os.geteuid() != 0)):
            raise ConfigError(f"--modcaps: {name.lower()} cannot be given to the broker: vfsd itself does not have it; leave it out")
        if not added and name == _HANDLE_CAPABILITY and options.inode_file_handles != "never":
            raise ConfigError(f"--modcaps: file handles take {name.lower()}; keep it, or use --inode-file-handles=never")
    for option, id_map in (("--uid-map", options.uid_map), ("--gid-map", options.gid_map)):
        if id_map and os.geteuid() == 0:
            raise ConfigError(f"{option}: is for vfsd started by an ordinary user; leave it out: root sets any id without")
        if id_map and options.sandbox != "namespace":
            raise ConfigError(f"{option}: needs a user namespace, which --sandbox={options.sandbox} has not; use --sandbox=namespace")


def resolve_share(options: Options) -> bytes:
    """The shared directory's real path: the children start in `/`. Raises ConfigError if it is not a directory."""
    option = f"--shared-dir={os.fsdecode(options.shared_dir)}"
    try:
        path = os.path.realpath(options.shared_dir)
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ConfigError(f"{option}: does not exist; name a directory that exists") from None
    except OSError as error:
        raise ConfigError(f"{option}: cannot be reached: {error.strerror}; name a directory that vfsd may enter") from error
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{option}: is not a directory; name a directory that exists")
    return path
