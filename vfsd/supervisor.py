"""The supervisor: starts broker, control and workers, watches them, hands the frontend's connection over, ends everything.

Who controls the bytes: children may be hostile; what they say comes bounded and typed from the channel codec and can only
make the supervisor log, start one of the bounded number of workers, or end. One thread, no blocking call while serving:
one selector over pidfds, channels, the listening socket and the signal wake-up. It must stay the thread that spawns,
because children die with the thread that started them (PR_SET_PDEATHSIG).

Exit status: 0 when the frontend closed the connection or a signal (SIGTERM, SIGINT, SIGHUP) asked for the end, else 1.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from vfsd.channel import ChannelClosed
from vfsd.children import CULPRIT_SECONDS, Child, find_killed, stop_all, wait_for_deaths
from vfsd.config import RoleConfig
from vfsd.deaths import Deaths
from vfsd.errors import ChildBreach, ConfigError
from vfsd.fds import OwnedFd, sealed_memfd
from vfsd.heartbeat import Heartbeat, is_half_dead
from vfsd.kernel_log import KernelLog
from vfsd.log import ERROR, StderrLog, decode_text
from vfsd.record import Record, Report
from vfsd.replacements import Replacements
from vfsd.roles import Roles, more_capabilities
from vfsd.sandbox.lockdown import lock_down
from vfsd.service_manager import ServiceManager
from vfsd.signals import catch_signals
from vfsd.sockets import VhostSocket, peer_name
from vfsd.spares import Spares, make_worker
from vfsd.vigil import Vigil, late_to_start
from vfsd.wire.channel import (
    BROKER_TO_SUPERVISOR,
    CONTROL_TO_SUPERVISOR,
    AddWorker,
    Alive,
    AreYouWell,
    Breach,
    ChannelMessage,
    Completed,
    Connection,
    Counted,
    Failed,
    FrontendGone,
    IAmWell,
    InflightGiven,
    KillWorker,
    Log,
    NeedInflight,
    NeedWorker,
    Ready,
    Silent,
    Table,
)
from vfsd.wire.fault_channel import KillMe
from vfsd.wire.inflight import TABLE_STRIDE_BYTES

if TYPE_CHECKING:
    from vfsd.fault_desk import FaultDesk

START_SECONDS = 30.0  # generous: a busy machine; a child that hangs must still end in a message
LONGEST_START_SECONDS = 600.0  # where a service manager, which has a limit of its own, is told of readiness
LEAVE_SECONDS = 7.0  # a worker drains its rings for 5 s (worker.ring.DRAIN_SECONDS)
MESSAGES_PER_TURN = 64  # of one child, before the others get their turn
DRAIN_TURNS = 100  # more than a socket's buffer holds

_CONTROL = -1  # among workers' indexes


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
        self._leaving: set[Child] = set()  # workers whose control process died: they end by themselves
        self._leave_until = 0.0
        self._spares = Spares(partial(make_worker, self._spawn, roles, None), roles.options.spare_workers)
        self._replacements = Replacements(log)
        self._status: int | None = None
        self._accepting = False
        self._may_need_inflight = False
        self._record = Record(roles.options, more_capabilities(roles.options))
        self._vigil = Vigil(log)
        self._kernel_log = KernelLog()

    def run(self) -> int:
        wake_read, wake_write = socket.socketpair()
        with wake_read, wake_write, self._selector, self._record, closing(self._kernel_log):
            restore = catch_signals(wake_write)
            try:
                self._watch(wake_read.fileno(), partial(self._on_signal, wake_read))
                if self._faults is not None:
                    self._faults.serve(self._selector, lambda: self._children)
                self._start_children()
                return self._loop()
            finally:
                stop_all(self._children, self._log)
                self._spares.close()
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
        worker = self._spares.take(index) or make_worker(self._spawn, self._roles, index)
        if worker.child.ready:
            worker.child.heartbeat = Heartbeat(time.monotonic())
            self._record.rename(worker.child.pid, worker.child.role)
        self._workers[index] = worker.child
        with worker.broker_end, worker.control_end:
            told = self._broker.send(AddWorker(index), [worker.broker_end]) and self._control.send(AddWorker(index), [worker.control_end])
        if not told and not self._look_for_deaths([self._broker, self._control]):
            self._end(1, f"worker {index} could not be introduced: broker or control do not read their channel")
        elif self._accepting and self._status is None:
            with suppress(ConfigError, OSError, MemoryError):  # the next death tries again
                self._spares.keep()

    def _replace_worker(self, index: int) -> None:
        """What it takes to start one may be there again a moment later."""
        try:
            self._start_worker(index)
        except (ConfigError, OSError, MemoryError) as error:
            if reason := self._replacements.failed(index, error, time.monotonic()):
                self._end(1, reason)
        else:
            self._replacements.started(index)

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
            sleep = self._replacements.seconds(self._vigil.seconds(self._children, hurry=bool(self._leaving)))
            managers = self._manager.seconds()
            for key, _ in self._selector.select(timeout=sleep if managers is None else min(sleep, managers)):
                key.data()
                if self._status is not None:
                    break
            else:
                self._watch_over_children(time.monotonic())
            self._manager.tick()
            self._record.write_counts()
        return self._status or 0

    def _watch_over_children(self, now: float) -> None:
        self._vigil.watch(self._children, now)
        if is_half_dead(self._broker.pid) and not wait_for_deaths([self._broker], CULPRIT_SECONDS):
            self._end(1, f"broker (pid {self._broker.pid}) was killed, and cannot end: it waits in a call of the host's kernel")
        if self._leaving and now > self._leave_until:
            self._leave_until = math.inf
            for child in self._leaving:
                self._vigil.kill(child, "does not let go of the frontend's memory")
        for index in self._replacements.due(now):
            self._replace_worker(index)
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
        if not self._accepting and not self._leaving and all(each.ready for each in self._children):
            self._accepting = True
            self._manager.ready(f"Waiting for a frontend, to serve {self._share}", lambda: self._broker.send(AreYouWell()))
            self._open_for_business()
        elif not self._accepting:
            self._manager.status(f"Starting: {', '.join(each.role for each in self._children if not each.ready)}")

    def _open_for_business(self) -> None:
        self._spares.keep()
        if self._endpoint.listening:
            # Kata's runtime-rs reads our stderr until this very text appears.
            self._log.info("Waiting for vhost-user socket connection...")
            self._watch(self._endpoint.socket.fileno(), self._on_connect)
        else:
            self._hand_over(OwnedFd(self._endpoint.socket.detach()))

    def _on_connect(self) -> None:
        if not self._accepting:
            return  # control died in this very turn: it waits for the next one
        try:
            connection, _ = self._endpoint.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it left again, or went to another process that holds the socket of --fd
        self._selector.unregister(self._endpoint.socket)
        if not self._roles.options.keep_listening:
            # One frontend per vfsd: a second one is refused by the kernel, not left waiting.
            self._endpoint.socket.close()
        self._hand_over(OwnedFd(connection.detach()))

    def _hand_over(self, connection: OwnedFd) -> None:
        self._may_need_inflight = True
        with connection:
            if self._control.send(Connection(), [connection]):
                self._log.info("Client connected, servicing requests")
                self._manager.status(f"Serving {self._share} to {peer_name(connection.fileno())}")
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

    def _on_message(self, child: Child, message: ChannelMessage) -> None:  # one case a message
        match message:
            case Log(level, text):
                child.lines.write(level, text)
            case Ready():
                self._on_ready(child, message)
            case Completed():
                child.completed = self._control.completed = True
            case Counted(replayed, refused, undecided):
                self._record.count(replayed=replayed, refused=refused, undecided=undecided)
            case Alive() if child.heartbeat is not None:
                child.heartbeat.answered(time.monotonic())
            case Failed(text):
                self._end(1, f"{child.role} {'cannot go on' if child.ready else 'could not start'}: {decode_text(text)}")
            case IAmWell():
                self._manager.healthy()
            case KillMe():
                child.kill()
            case _:
                self._on_wish(message)

    def _on_wish(self, message: ChannelMessage) -> None:
        """What control wants, and what the broker tells of a worker."""
        match message:
            case Breach(index, text) if index in self._workers:
                self._workers[index].breach = True
                self._vigil.kill(self._workers[index], f"broke the broker's protocol ({decode_text(text)})")
            case Silent(index, text) if index in self._workers:
                self._vigil.kill(self._workers[index], decode_text(text))
            case NeedWorker(index):
                self._on_need_worker(index)
            case KillWorker(index, text) if index in self._workers:
                self._vigil.kill(self._workers[index], f"does not let go ({decode_text(text)})")
            case NeedInflight():
                self._on_need_inflight()
            case FrontendGone(text, clean):
                self._on_frontend_gone(decode_text(text), clean)

    def _on_need_worker(self, index: int) -> None:
        if index in self._workers or not 0 < index < self._roles.options.request_queues:
            self._end(1, f"control asked for worker {index}, which exists or must not exist")
        else:
            self._replace_worker(index)

    def _on_need_inflight(self) -> None:
        """Once for each frontend: control could keep all of it, and fill it."""
        if not self._may_need_inflight:
            self._end(1, "control asked for in-flight tables without a frontend, or twice for the same one")
            return
        self._may_need_inflight = False
        with sealed_memfd("vfsd-inflight", (self._roles.options.request_queues + 1) * TABLE_STRIDE_BYTES) as memory:
            self._control.send(InflightGiven(), [memory])

    def _on_frontend_gone(self, text: str, clean: bool) -> None:
        if self._roles.options.keep_listening:
            if clean:
                self._log.info("Client disconnected" + (f" ({text})" if text else ""))
            else:
                self._log.error(f"the frontend's connection was closed: {text}")
            self._open_for_business()
        elif clean:
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
        """A worker that died while the device serves is replaced, unless too many died; so is control with --keep-listening.

        Any other death is the end.
        """
        if child not in self._children:
            return
        if child in self._leaving:
            self._log.debug(f"{child.role} (pid {child.pid}) {child.reap()}")
            self._discard(child)
            self._come_back()
            return
        if self._spares.lose(child):
            self._log.warning(f"{child.role} (pid {child.pid}) {child.reap(self._kernel_log)}")
            self._discard(child)
            return
        culprit, how = child, child.reap(self._kernel_log)
        if not how.startswith("was killed"):
            culprit, how = find_killed(child, how, self._children, (self._broker, self._control), self._kernel_log)
        self._drain(culprit)
        self._drain(self._broker)  # a worker whose socket the broker has closed ends by itself; why is said there
        for line in culprit.last_words()[:-1]:
            culprit.lines.write(ERROR, line.encode())
        words = f": {culprit.last_words()[-1]}" if culprit.last_words() else ""
        when = "" if culprit.ready else " before it was ready"
        what = f"{culprit.role} (pid {culprit.pid}) {how}{when}{words}"
        index = next((index for index, worker in self._workers.items() if worker is culprit), None)
        if culprit is self._control and self._roles.options.keep_listening:
            index = _CONTROL
        if index is None or not self._accepting or self._status is not None:
            self._end(1, what)
        elif reason := self._deaths.too_many(
            index, culprit.returncode, completed=culprit.completed, breach=culprit.breach, now=time.monotonic()
        ):
            self._end(1, f"{what}; it is not replaced: {reason}")
        else:
            self._replace(index, culprit, what)

    def _replace(self, index: int, culprit: Child, what: str) -> None:
        self._discard(culprit)
        if index == _CONTROL:
            self._record.count(control_deaths=1)
            self._log.warning(f"{what}; the frontend is disconnected, and may connect again when another one has taken its place")
            self._leave()
        else:
            self._record.count(worker_deaths=1)
            self._log.warning(f"{what}; another one takes its place")
            self._replace_worker(index)

    def _leave(self) -> None:
        """Control is dead: workers complete what they have taken and end, for nobody could tell them of another frontend."""
        self._accepting = False
        if self._endpoint.socket in self._selector.get_map():
            self._selector.unregister(self._endpoint.socket)
        self._leaving = set(self._workers.values())
        self._workers.clear()
        self._replacements.forget()
        self._leave_until = time.monotonic() + LEAVE_SECONDS
        for child in self._leaving:
            child.heartbeat = None
        self._come_back()

    def _come_back(self) -> None:
        """Start control again when nothing is left that knows the frontend before. What the guest has open is the broker's, and stays."""
        if not self._leaving:
            self._control = self._spawn("control", "vfsd.worker.control", CONTROL_TO_SUPERVISOR, self._roles.control)
            self._start_worker(0)

    def _discard(self, child: Child) -> None:
        for fd in (child.pidfd.fileno(), child.channel.fileno()):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        self._children.remove(child)
        self._leaving.discard(child)
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
