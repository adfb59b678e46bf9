"""What every child with fault injection does at its start: map the counters, hear of rules, put faulty parts in place of others.

A child with faults is another program (`vfsd.worker.faulty` in place of `vfsd.worker`, and so on): it replaces names in modules
that it has imported, before its lock-down, and then runs the same start. So nothing of this is in a process without the option,
and nothing there asks whether there are faults. Who controls the bytes: the supervisor, which is trusted.
"""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import vfsd.role
from vfsd.channel import Channel, ChannelClosed, Received
from vfsd.config import RoleConfig
from vfsd.faults import catalogue
from vfsd.faults.counters import COUNTERS_BYTES, Counters
from vfsd.faults.given import GivenRule, unpack_given
from vfsd.faults.grammar import parse_rule
from vfsd.faults.injector import Armed, Hit, Injector
from vfsd.faults.rule import Rule
from vfsd.fds import OwnedFd
from vfsd.log import ChildLog
from vfsd.wire import fault_channel
from vfsd.wire.channel import SUPERVISOR_TO_CHILD
from vfsd.wire.fault_channel import FaultGone, FaultRule, KillMe

_AGAIN_SECONDS = 0.05

Sleep = Callable[[float | None], Any]  # seconds; None: for ever


def sleep_by_poll() -> Sleep:
    """For roles whose filter permits poll(2). To be made before the lock-down."""
    nothing = select.poll()
    return lambda seconds: nothing.poll(None if seconds is None else seconds * 1000)


def substitute(module: ModuleType, name: str, replacement: Any) -> None:
    """Put something else in the place of a name of a module. RuntimeError if the module has no such name."""
    if name not in vars(module):
        raise RuntimeError(f"{module.__name__} has no {name} to be replaced")
    vars(module)[name] = replacement


class Replaced:
    """A module with some of its functions replaced; all else is looked up in the module itself."""

    def __init__(self, module: ModuleType, functions: dict[str, Callable[..., Any]]) -> None:
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Faults:
    """Of one process: its rules, its end. `sleep` must be a call that the role's filter permits."""

    def __init__(self, role: str, given: bytes, channel: Channel, log: ChildLog, sleep: Sleep) -> None:
        told = unpack_given(given)
        self._role = role
        if isinstance(channel, FaultyChannel):
            channel.faults = self
        self._channel = channel
        self.sleep = sleep
        with OwnedFd(told.counters_fd) as fd:
            self._counters = Counters(memoryview(mmap.mmap(fd.fileno(), COUNTERS_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)))
        self._place = told.place
        self.injector = Injector(told.place, self._counters, log, time.monotonic_ns)
        for rule in told.rules:
            self._arm(rule)

    def _arm(self, given: GivenRule) -> Armed:
        armed = Armed(given.number, given.slot, parse_rule(given.expression), given.seed, given.given_ns)
        self.injector.put(armed)
        return armed

    def heard(self, message: object) -> bool:
        """Whether it was about faults, and is done with."""
        if isinstance(message, FaultGone):
            self.injector.drop(message.number)
            self._counters.hear(self._place, message.change)
        elif isinstance(message, FaultRule):
            armed = self._arm(GivenRule(message.number, message.slot, message.seed, message.given_ns, message.expression.decode()))
            self._counters.hear(self._place, message.change)  # before a rule that says "now"
            if armed.rule.point == catalogue.NOW:
                self.arrived(armed.rule, self.injector.hits([armed], "the rule arrived"))
        else:
            return False
        return True

    def arrived(self, _rule: Rule, hits: list[Hit]) -> None:
        """A rule that is to be hit when it comes has come."""
        self.act(hits)

    def at(self, point: str, what: str, **facts: Any) -> None:
        """The process is at that point of its life."""
        rules = self.injector.about(self._role, point, **facts)
        if rules:
            self.act(self.injector.hits(rules, what))

    def act(self, hits: list[Hit]) -> None:
        for hit in hits:
            if hit.rule.action.name == "delay":
                self.sleep(hit.delay_seconds)
            elif hit.rule.action.name == "hang":
                self.sleep(None)
            elif hit.rule.action.name == "kill":
                self.die()

    def die(self) -> NoReturn:
        """By SIGKILL, as it comes to processes: our filter permits no kill(2), so the supervisor sends it. Nothing is done meanwhile."""
        while True:
            try:
                told = self._channel.send(KillMe())
            except ChannelClosed:
                os._exit(1)
            self.sleep(None if told else _AGAIN_SECONDS)

    def calls(self, role: str, module: ModuleType, functions: dict[str, str]) -> Replaced:
        """The module with those of its functions replaced that make a system call which may fail: function → system call."""
        return Replaced(module, {name: self._failing(role, call, getattr(module, name)) for name, call in functions.items()})

    def _failing(self, role: str, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        about, hits, what = self.injector.about, self.injector.hits, f"{role}.{call}"

        def failing(*arguments: Any, **keywords: Any) -> Any:
            rules = about(what)
            for hit in hits(rules, call) if rules else ():
                if hit.rule.action.name == "error":
                    raise OSError(hit.rule.action.number, os.strerror(hit.rule.action.number))
                self.sleep(hit.delay_seconds)
            return function(*arguments, **keywords)

        return failing


class FaultyChannel(Channel):
    """The supervisor's channel: what is about faults is done with here, and nobody else sees it."""

    faults: Faults | None = None

    def receive(self) -> Received | None:
        while (received := super().receive()) is not None and self.faults is not None and self.faults.heard(received.message):
            pass
        return received


def run_faulty_role(config: RoleConfig, role: str, body: Callable[[Channel, ChildLog], None]) -> NoReturn:
    """As run_role, with a channel that hears of faults."""
    substitute(vfsd.role, "Channel", FaultyChannel)
    substitute(vfsd.role, "SUPERVISOR_TO_CHILD", fault_channel.to_child(SUPERVISOR_TO_CHILD))
    fault_channel.from_child({})  # what it names can be sent from now on
    vfsd.role.run_role(config, role, body)
