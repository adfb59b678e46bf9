"""What each role may do and is told: the options turned into one configuration per child.

Pure decisions, except that the seccomp filters are compiled here. Who controls the bytes: the command line and
seccomp_policy.toml, both the administrator's.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Literal

from vfsd.config import BrokerConfig, ControlConfig, Options, WorkerConfig
from vfsd.errors import ConfigError
from vfsd.sandbox.lockdown import Confinement
from vfsd.sandbox.seccomp import load_policy

Role = Literal["broker", "control", "worker", "supervisor"]

NOBODY = 65534
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
    filters: dict[Role, bytes]
    supervisor_pidfd: int
    nofile: int
    privileged: bool  # whether we may become nobody, and have capabilities to give

    def broker(self, channel_fd: int) -> BrokerConfig:
        options = self.options
        handle_capability = () if options.inode_file_handles == "never" else (_HANDLE_CAPABILITY,)
        return BrokerConfig(
            channel_fd=channel_fd,
            supervisor_pidfd=self.supervisor_pidfd,
            confinement=self._confinement("broker", capabilities=_BROKER_CAPABILITIES + handle_capability, nofile=self.nofile),
            sandbox=options.sandbox,
            log_level=options.log_level,
            shared_dir=options.shared_dir,
            readonly=options.readonly,
            inode_file_handles=options.inode_file_handles,
            announce_submounts=options.announce_submounts,
            posix_acl=options.features.posix_acl != "off",
            xattrmap=options.xattrmap,
            allow_direct_io=options.allow_direct_io,
            preserve_noatime=options.preserve_noatime,
            nofile=self.nofile,
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
        )

    def worker(self, index: int, channel_fd: int, control_fd: int, broker_fd: int) -> WorkerConfig:
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
        )

    def supervisor(self) -> Confinement:
        return self._confinement("supervisor", capabilities=SUPERVISOR_CAPABILITIES)

    def _confinement(self, role: Role, *, capabilities: tuple[str, ...] = (), nofile: int | None = None) -> Confinement:
        """Control and workers become nobody with nothing; the broker and the supervisor stay who they are."""
        powerless = role in {"control", "worker"}
        become = NOBODY if powerless and self.privileged else None
        return Confinement(
            role=role,
            sandbox=self.options.sandbox,
            seccomp_filter=self.filters[role],
            uid=become,
            gid=become,
            capabilities=capabilities if self.privileged else (),
            landlock=powerless,
            nofile=nofile,
            supervisor_pidfd=None if role == "supervisor" else self.supervisor_pidfd,
        )


def make_roles(options: Options, supervisor_pidfd: int, nofile: int) -> Roles:
    return Roles(
        options=options,
        filters=_compile_filters(options),
        supervisor_pidfd=supervisor_pidfd,
        nofile=nofile,
        privileged=os.geteuid() == 0,
    )


def _compile_filters(options: Options) -> dict[Role, bytes]:
    roles: tuple[Role, ...] = ("broker", "control", "worker", "supervisor")
    if options.seccomp == "none":
        return dict.fromkeys(roles, b"")
    policy = load_policy()
    return {role: policy.compile(role, options.seccomp) for role in roles}


def resolve_share(options: Options) -> bytes:
    """The shared directory's real path: the children start in `/`. Raises ConfigError if it is not a directory."""
    option = f"--shared-dir={os.fsdecode(options.shared_dir)}"
    path = os.path.realpath(options.shared_dir)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ConfigError(f"{option}: does not exist; name a directory that exists") from None
    except OSError as error:
        raise ConfigError(f"{option}: cannot be reached: {error.strerror}; name a directory that vfsd may enter") from error
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{option}: is not a directory; name a directory that exists")
    return path
