"""The supervisor: starts broker, control and workers, watches them, hands the frontend's connection over, ends everything.

Who controls the bytes: children may be hostile; what they say comes bounded and typed from the channel codec and can only
make the supervisor log, start one of the bounded number of workers, or end. One thread, no blocking call while serving:
one selector over pidfds, channels, the listening socket and the signal wake-up. It must stay the thread that spawns,
because children die with the thread that started them (PR_SET_PDEATHSIG).

Exit status: 0 when the frontend closed the connection or a signal (SIGTERM, SIGINT, SIGHUP) asked for the end, else 1.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from vfsd.channel import ChannelClosed
from vfsd.children import Child, wait_for_deaths
from vfsd.config import Options, RoleConfig
from vfsd.deaths import Deaths
from vfsd.errors import ChildBreach
from vfsd.fds import OwnedFd
from vfsd.filters import make_filters
from vfsd.heartbeat import Heartbeat
from vfsd.limits import set_nofile
from vfsd.log import ERROR, WARNING, StderrLog, decode_text
from vfsd.record import Record, Report
from vfsd.roles import Roles, check_starter, make_roles, more_capabilities, resolve_share
from vfsd.sandbox import landlock
from vfsd.sandbox.lockdown import lock_down
from vfsd.sandbox.user_namespace import enter_user_namespace
from vfsd.service_manager import Given, ServiceManager, connect_notify_socket
from vfsd.signals import catch_signals
from vfsd.sockets import VhostSocket, adopt_socket, make_listener
from vfsd.vigil import Vigil, late_to_start
from vfsd.wire.channel import (
    BROKER_TO_SUPERVISOR,
    CONTROL_TO_SUPERVISOR,
    WORKER_TO_SUPERVISOR,
    AddWorker,
    Alive,
    AreYouWell,
    Breach,
    ChannelMessage,
    Completed,
    Connection,
    Failed,
    FrontendGone,
    IAmWell,
    Log,
    NeedWorker,
    Ready,
    Stop,
    Table,
)
from vfsd.wire.fault_channel import KillMe

if TYPE_CHECKING:
    from vfsd.fault_desk import FaultDesk

START_SECONDS = 30.0  # generous: a busy machine; a child that hangs must still end in a message
LONGEST_START_SECONDS = 600.0  # where a service manager, which has a limit of its own, is told of readiness
STOP_SECONDS = 0.3  # from Stop to SIGKILL; libvirt and systemd kill us some seconds after their SIGTERM
KILL_SECONDS = 0.5  # then whatever is still there sits in an uninterruptible call of the host's kernel
CULPRIT_SECONDS = 0.1  # peers of a child that crashed see their socket close before the kernel reports the crash
MESSAGES_PER_TURN = 64  # of one child, before the others get their turn
DRAIN_TURNS = 100  # more than a socket's buffer holds
BROKER_SOCKET_BYTES = 1 << 20  # several packets of 128 KiB; the kernel caps it at net.core.wmem_max


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
        return adopt_socket(options.fd, options.fd_from)
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


class Supervisor:
    """`run` once; `status` becomes the exit status as soon as something decides that it is over."""

    def __init__(
        self, roles: Roles, endpoint: VhostSocket, log: StderrLog, manager: ServiceManager, faults: FaultDesk | None = None
    ) -> None:
        self._roles = roles
        self._endpoint = endpoint
        self._log = log
        self._manager = manager
        self._faults = faults
        self._share = os.fsdecode(roles.options.shared_dir)
        self._selector = selectors.DefaultSelector()
        self._children: list[Child] = []
        self._workers: dict[int, Child] = {}
        self._deaths = Deaths()
        self._status: int | None = None
        self._accepting = False
        self._record = Record(roles.options, more_capabilities(roles.options))
        self._vigil = Vigil(log)

    def run(self) -> int:
        wake_read, wake_write = socket.socketpair()
        with wake_read, wake_write, self._selector, self._record:
            restore = catch_signals(wake_write)
            try:
                self._watch(wake_read.fileno(), partial(self._on_signal, wake_read))
                if self._faults is not None:
                    self._faults.serve(self._selector, lambda: self._children)
                self._start_children()
                return self._loop()
            finally:
                self._stop_children()
                restore()

    # --- starting ------------------------------------------------------------------------------------------------------

    def _start_children(self) -> None:
        self._broker = self._spawn("broker", "vfsd.broker", BROKER_TO_SUPERVISOR, self._roles.broker)
        # From here on only what it takes to start workers; they inherit the smaller bounding set and this filter.
        done = lock_down(self._roles.supervisor())
        self._record.enter(os.getpid(), Report(role="supervisor", **asdict(done)))
        self._control = self._spawn("control", "vfsd.worker.control", CONTROL_TO_SUPERVISOR, self._roles.control)
        self._start_worker(0)

    def _start_worker(self, index: int) -> None:
        broker_ours, broker_theirs = _packet_pair(BROKER_SOCKET_BYTES)
        control_ours, control_theirs = _packet_pair()
        with broker_ours, broker_theirs, control_ours, control_theirs:
            give = (control_theirs.fileno(), broker_theirs.fileno())

            def make_config(channel_fd: int) -> RoleConfig:
                return self._roles.worker(index, channel_fd, *give)

            self._workers[index] = self._spawn(f"worker {index}", "vfsd.worker", WORKER_TO_SUPERVISOR, make_config, give)
            told = self._broker.send(AddWorker(index), [broker_ours]) and self._control.send(AddWorker(index), [control_ours])
        if not told and not self._look_for_deaths([self._broker, self._control]):
            self._end(1, f"worker {index} could not be introduced: broker or control do not read their channel")

    def _spawn(self, role: str, module: str, accepts: Table, make_config: Callable[[int], RoleConfig], give: tuple[int, ...] = ()) -> Child:
        if self._faults is not None:
            module, accepts, make_config = self._faults.dress(role, module, accepts, make_config)
            give = (*give, self._faults.counters_fd)
        child = Child(
            role,
            module,
            accepts,
            make_config,
            pass_fds=(self._roles.supervisor_pidfd, *give),
            pid_namespace=self._roles.options.sandbox == "namespace",
            log=self._log,
        )
        self._children.append(child)
        self._watch(child.pidfd.fileno(), partial(self._on_death, child))
        self._watch(child.channel.fileno(), partial(self._on_channel, child))
        self._log.debug(f"{role} started: pid {child.pid}")
        return child

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    # --- serving -------------------------------------------------------------------------------------------------------

    def _loop(self) -> int:
        while self._status is None:
            sleep, managers = self._vigil.seconds(self._children), self._manager.seconds()
            for key, _ in self._selector.select(timeout=sleep if managers is None else min(sleep, managers)):
                key.data()
                if self._status is not None:
                    break
            else:
                self._watch_over_children(time.monotonic())
            self._manager.tick()
        return self._status or 0

    def _watch_over_children(self, now: float) -> None:
        self._vigil.watch(self._children, now)
        seconds = LONGEST_START_SECONDS if self._manager.told and not self._accepting else START_SECONDS
        late = late_to_start(self._children, now, seconds)
        if late and not self._accepting:
            self._end(1, f"not ready after {seconds:.0f} s: {', '.join(child.role for child in late)}")
        for child in late if self._accepting else ():
            child.started_at = now
            self._vigil.kill(child, f"is not ready after {seconds:.0f} s")

    def _on_signal(self, wake_read: socket.socket) -> None:
        number = wake_read.recv(1)[0]
        self._log.info(f"{signal.Signals(number).name} received, shutting down")
        self._end(0)

    def _on_ready(self, child: Child, said: Ready) -> None:
        if not child.ready:  # what it says later may be somebody else's words
            self._record.enter(child.pid, Report(role=child.role, **asdict(said)))
        child.ready = True
        if child in self._workers.values():
            child.heartbeat = Heartbeat(time.monotonic())
        if not self._accepting and all(each.ready for each in self._children):
            self._accepting = True
            self._manager.ready(f"Waiting for a frontend, to serve {self._share}", lambda: self._broker.send(AreYouWell()))
            self._open_for_business()
        elif not self._accepting:
            self._manager.status(f"Starting: {', '.join(each.role for each in self._children if not each.ready)}")

    def _open_for_business(self) -> None:
        if self._endpoint.listening:
            # Kata's runtime-rs reads our stderr until this very text appears.
            self._log.info("Waiting for vhost-user socket connection...")
            self._watch(self._endpoint.socket.fileno(), self._on_connect)
        else:
            self._hand_over(OwnedFd(self._endpoint.socket.detach()))

    def _on_connect(self) -> None:
        try:
            connection, _ = self._endpoint.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it left again, or went to another process that holds the socket of --fd
        # One frontend per vfsd: a second one is refused by the kernel, not left waiting.
        self._selector.unregister(self._endpoint.socket)
        self._endpoint.socket.close()
        self._hand_over(OwnedFd(connection.detach()))

    def _hand_over(self, connection: OwnedFd) -> None:
        with connection:
            if self._control.send(Connection(), [connection]):
                self._log.info("Client connected, servicing requests")
                self._manager.status(f"Serving {self._share} to {_peer(connection.fileno())}")
            else:
                self._end(1, "the connection could not be handed to control: it does not read its channel")

    # --- what children say ---------------------------------------------------------------------------------------------

    def _on_channel(self, child: Child) -> None:
        """Hear one child; at the end of its channel only stop listening, how it died is told by its pidfd."""
        if child not in self._children:
            return  # it was replaced while this turn's events were dealt with
        try:
            for _ in range(MESSAGES_PER_TURN):
                received = child.channel.receive()
                if received is None:
                    return
                self._on_message(child, received.message)
        except ChannelClosed:
            self._selector.unregister(child.channel.fileno())
        except ChildBreach as error:
            self._end(1, f"{child.role} broke the protocol of its supervisor channel: {error}")

    def _on_message(self, child: Child, message: ChannelMessage) -> None:  # noqa: C901  # one case a message
        match message:
            case Log(level, text):
                child.lines.write(level, text)
            case Ready():
                self._on_ready(child, message)
            case Completed():
                child.completed = True
            case Alive() if child.heartbeat is not None:
                child.heartbeat.answered(time.monotonic())
            case Failed(text):
                self._end(1, f"{child.role} {'cannot go on' if child.ready else 'could not start'}: {decode_text(text)}")
            case NeedWorker(index):
                self._on_need_worker(index)
            case FrontendGone(text, clean):
                self._on_frontend_gone(decode_text(text), clean)
            case IAmWell():
                self._manager.healthy()
            case KillMe():
                child.kill()
            case Breach(index, text):
                self._end(1, f"worker {index} broke the broker's protocol: {decode_text(text)}")

    def _on_need_worker(self, index: int) -> None:
        if index in self._workers or not 0 < index < self._roles.options.request_queues:
            self._end(1, f"control asked for worker {index}, which exists or must not exist")
        else:
            self._start_worker(index)

    def _on_frontend_gone(self, text: str, clean: bool) -> None:
        if clean:
            self._log.info("Client disconnected, shutting down" + (f" ({text})" if text else ""))
            self._end(0)
        else:
            self._end(1, f"the frontend's connection was closed: {text}")

    # --- ending --------------------------------------------------------------------------------------------------------

    def _end(self, status: int, last_line: str = "") -> None:
        """The first one decides; what follows from it (children losing their peers) is not the reason."""
        if self._status is None:
            self._status = status
            self._manager.stopping(last_line or "Ending")
            if last_line:
                self._log.log(ERROR, last_line)

    def _on_death(self, child: Child) -> None:
        """A worker that died while the device serves is replaced, unless too many died. Any other death is the end."""
        if child not in self._children:
            return
        culprit, how = child, child.reap()
        if not how.startswith("was killed"):
            culprit, how = self._find_killed(child, how)
        self._drain(culprit)
        for line in culprit.last_words()[:-1]:
            culprit.lines.write(ERROR, line.encode())
        words = f": {culprit.last_words()[-1]}" if culprit.last_words() else ""
        when = "" if culprit.ready else " before it was ready"
        what = f"{culprit.role} (pid {culprit.pid}) {how}{when}{words}"
        index = next((index for index, worker in self._workers.items() if worker is culprit), None)
        if index is None or not self._accepting or self._status is not None:
            self._end(1, what)
        elif reason := self._deaths.too_many(index, culprit.returncode, completed=culprit.completed, now=time.monotonic()):
            self._end(1, f"{what}; it is not replaced: {reason}")
        else:
            self._log.warning(f"{what}; another one takes its place")
            self._discard(culprit)
            self._start_worker(index)

    def _discard(self, child: Child) -> None:
        for fd in (child.pidfd.fileno(), child.channel.fileno()):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        self._children.remove(child)
        self._record.leave(child.pid)
        child.close()

    def _look_for_deaths(self, children: list[Child]) -> bool:
        """Whether one of these has just died; then that is dealt with."""
        dead = wait_for_deaths(children, CULPRIT_SECONDS, enough=1)
        if dead:
            self._on_death(dead[0])
        return bool(dead)

    def _drain(self, child: Child) -> None:
        """What it said before it died; that may be the reason (Failed)."""
        for _ in range(DRAIN_TURNS):
            if child.channel.fileno() not in self._selector.get_map():
                return
            self._on_channel(child)

    def _find_killed(self, child: Child, how: str) -> tuple[Child, str]:
        """A child that ended by itself has often only lost a peer: prefer to blame one that a signal killed meanwhile.

        Broker and control are to blame however they ended: a worker cannot go on without them.
        """
        for other in wait_for_deaths([each for each in self._children if each is not child], CULPRIT_SECONDS, enough=1):
            others_end = other.reap()
            if others_end.startswith("was killed") or other in (self._broker, self._control):
                return other, others_end
        return child, how

    def _stop_children(self) -> None:
        for child in self._children:
            child.send(Stop())
        dead = wait_for_deaths(self._children, STOP_SECONDS)
        left = [child for child in self._children if child not in dead]
        for child in left:
            child.kill()
        dead += wait_for_deaths(left, KILL_SECONDS)
        for child in self._children:
            if child in dead:
                child.reap()
            else:
                self._log.warning(f"{child.role} (pid {child.pid}) does not die: it waits in a call of the host's kernel")
            child.close()


def _peer(fd: int) -> str:
    """Who connected, by what the kernel noted then; a process outside of our pid namespace has no number here."""
    credentials = socket.socket(fileno=os.dup(fd))
    with credentials:
        pid = struct.unpack("3i", credentials.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return f"process {pid}" if pid else "a process outside of this pid namespace"


def _packet_pair(send_bytes: int | None = None) -> tuple[OwnedFd, OwnedFd]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        if send_bytes is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    return OwnedFd(ends[0].detach()), OwnedFd(ends[1].detach())
