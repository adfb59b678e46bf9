"""From the parsed options to the exit status: what is checked and made before there is a supervisor.

Who controls the bytes: the command line and the environment, which are the administrator's.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

from vfsd.config import Options
from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd
from vfsd.filters import make_filters
from vfsd.limits import set_nofile
from vfsd.log import WARNING, StderrLog
from vfsd.roles import check_starter, make_roles, more_capabilities, resolve_share
from vfsd.sandbox import landlock
from vfsd.sandbox.user_namespace import enter_user_namespace
from vfsd.service_manager import Given, ServiceManager, connect_notify_socket
from vfsd.sockets import VhostSocket, adopt_socket, make_listener
from vfsd.supervisor import Supervisor

if TYPE_CHECKING:
    from vfsd.fault_desk import FaultDesk


def serve(options: Options, log: StderrLog, given: Given) -> int:
    """Everything from the parsed options to the exit status. Raises ConfigError for what the user can mend."""
    check_starter(options)
    options = replace(options, shared_dir=resolve_share(options))
    nofile = set_nofile(options.rlimit_nofile)
    if nofile.warning:
        log.log(WARNING, nofile.warning)
    if more := more_capabilities(options):
        log.log(WARNING, f"--modcaps: the broker has more capabilities than it needs: {', '.join(more).lower()}")
    if options.features.writeback and options.cache in ("never", "metadata"):
        log.log(WARNING, f"--writeback: the guest has no cache to write back with --cache={options.cache}; leave one out")
    if not landlock.abi_version():
        log.log(WARNING, "this kernel has no Landlock: one of the layers that keep control and workers from files is missing")
    filters = make_filters(options, log)
    with (
        OwnedFd(os.pidfd_open(os.getpid())) as pidfd,
        closing(_make_endpoint(options)) as endpoint,
        closing(_make_manager(given, log)) as manager,
        ExitStack() as closed_later,
    ):
        faults = _make_faults(options, log, closed_later)
        # The socket was made before: its group may not be known inside.
        if options.sandbox == "namespace" and os.geteuid() != 0:
            enter_user_namespace(options.uid_map, options.gid_map)
        roles = make_roles(options, pidfd.fileno(), nofile.limit, filters)
        return Supervisor(roles, endpoint, log, manager, faults).run()


def _make_endpoint(options: Options) -> VhostSocket:
    if options.fd is not None:
        endpoint = adopt_socket(options.fd, options.fd_from)
        if options.keep_listening and not endpoint.listening:
            endpoint.close()
            raise ConfigError(f"--keep-listening: the socket of --fd={options.fd} is connected already; pass one that listens")
        return endpoint
    return make_listener(options.socket_path or b"", options.socket_group)


def _make_faults(options: Options, log: StderrLog, closed_later: ExitStack) -> FaultDesk | None:
    """Nothing of it is in this process, or in any other, unless it is asked for."""
    if options.fault_rules is None and options.fault_socket is None:
        return None
    from vfsd.fault_desk import FaultDesk  # noqa: PLC0415  # as above

    return closed_later.enter_context(closing(FaultDesk(options, log)))


def _make_manager(given: Given, log: StderrLog) -> ServiceManager:
    """A manager that cannot be told will end us if it waits to be; one that does not wait (a variable left over) must not stop us."""
    try:
        return ServiceManager(connect_notify_socket(given.notify_socket), given.watchdog_seconds())
    except (OSError, ValueError) as error:
        log.log(WARNING, f"NOTIFY_SOCKET={given.notify_socket}: the service manager cannot be told of readiness: {error}")
        return ServiceManager()
