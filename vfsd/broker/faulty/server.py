"""The broker's server with faults: points before and after each request, paths for workers' rules, donations that cannot be sent."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from vfsd.broker.answers import Answer, Call
from vfsd.broker.server import Server
from vfsd.broker.share import Share
from vfsd.broker.worker_link import Outcome, Task, WorkerLink
from vfsd.faults import catalogue
from vfsd.faults.given import unpack_given
from vfsd.faults.grammar import parse_rule
from vfsd.faults.rule import Rule
from vfsd.faulty import Faults
from vfsd.wire.fault_channel import FaultGone, FaultRule
from vfsd.wire.fault_messages import MatchPath, pack_numbers


class PathRules:
    """The rules of workers that select by path. Threads read it, the main thread changes it."""

    def __init__(self, given: bytes) -> None:
        self._rules: dict[int, Rule] = {}
        for rule in unpack_given(given).rules:
            self.put(rule.number, rule.expression)

    def put(self, number: int, expression: str) -> None:
        rule = parse_rule(expression)
        if rule.path is not None:
            self._rules = {**self._rules, number: rule}

    def heard(self, message: object) -> None:
        if isinstance(message, FaultRule):
            self.put(message.number, message.expression.decode())
        elif isinstance(message, FaultGone):
            self._rules = {number: rule for number, rule in self._rules.items() if number != message.number}

    def fitting(self, path: bytes) -> list[int]:
        return [number for number, rule in self._rules.items() if rule.fits_path(path)]

    def answer(self, share_dir: bytes) -> Callable[[Share, Call, Any], Answer]:
        """The handler of MatchPath. `share_dir`: what stands before paths where the broker's root is not the share."""

        def answer_match_path(share: Share, call: Call, message: MatchPath) -> Answer:
            with share.store.pin(message.nodeid, call.session) as inode, share.path_of(inode) as path:
                found = os.readlink(b"%d" % path.fd, dir_fd=share.proc_self_fd)
            if share_dir and (found == share_dir or found.startswith(share_dir + b"/")):
                found = found[len(share_dir) :] or b"/"
            if message.name:
                found = found.rstrip(b"/") + b"/" + message.name
            return Answer([pack_numbers(self.fitting(found))])

        return answer_match_path


class BrokerFaults(Faults):
    """Hears of the workers' rules too."""

    def __init__(self, given: bytes, *rest: Any) -> None:
        super().__init__("broker", given, *rest)
        self.paths = PathRules(given)

    def heard(self, message: object) -> bool:
        self.paths.heard(message)
        return super().heard(message)


class FaultyServer(Server):
    def __init__(self, faults: Faults, *rest: Any) -> None:
        super().__init__(*rest)
        self._faults = faults

    def _serve(self, task: Task) -> Outcome | None:
        message = task.spec.message.__name__
        self._faults.at("before-request", f"{message} of worker {task.link.index}", message=message)
        outcome = super()._serve(task)
        self._faults.at("after-request", f"{message} of worker {task.link.index}", message=message)
        return outcome


class FaultySocket:
    """A socket to a worker whose sends of descriptors may fail."""

    def __init__(self, faults: Faults, index: int, sock: socket.socket) -> None:
        self._injector = faults.injector
        self._what = f"descriptors for worker {index}"
        self._socket = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def sendmsg(self, data: Any, ancillary: Any, flags: int) -> int:
        for hit in self._injector.hits(self._injector.about(catalogue.SEND_FDS), self._what) if ancillary else ():
            raise OSError(hit.rule.action.number, os.strerror(hit.rule.action.number))
        return self._socket.sendmsg(data, ancillary, flags)


class FaultyLink(WorkerLink):
    def __init__(self, faults: Faults, index: int, sock: Any, *rest: Any) -> None:
        super().__init__(index, FaultySocket(faults, index, sock), *rest)  # type: ignore[arg-type]
