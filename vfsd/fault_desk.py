"""The supervisor's part of fault injection: it keeps the rules, tells children of them, counts nothing and injects nothing itself.

Made only where an option asks for it; then children are started by other modules (vfsd.faulty). Who controls the bytes: the
operator, by the file and the socket; a child can say that it wants to die, and write numbers into the counters.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import selectors
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vfsd.children import Child
from vfsd.config import Options, RoleConfig, WorkerConfig
from vfsd.errors import ConfigError
from vfsd.fault_socket import FaultSocket, make_fault_socket
from vfsd.faults.counters import BROKER, CONTROL, COUNTERS_BYTES, MAX_RULES, Counters, place_of_worker
from vfsd.faults.given import Given, GivenRule, pack_given
from vfsd.faults.grammar import parse_rule
from vfsd.faults.rule import Rule
from vfsd.faults.rule_file import RuleFile, parse_rule_file
from vfsd.fds import OwnedFd
from vfsd.log import StderrLog
from vfsd.wire.channel import ChannelMessage, Table
from vfsd.wire.fault_channel import FaultGone, FaultRule, from_child, to_child

COUNTERS_NAME = "vfsd-faults"
_MODULES = {
    "vfsd.broker": "vfsd.broker.faulty",
    "vfsd.worker": "vfsd.worker.faulty",
    "vfsd.worker.control": "vfsd.worker.faulty.control",
}
_MOST_FILE_BYTES = 1 << 20

MakeConfig = Callable[[int], RoleConfig]


@dataclass(frozen=True, slots=True)
class Kept:
    """A rule in force."""

    number: int
    slot: int
    given_ns: int
    seed: int
    rule: Rule

    def concerns(self, role: str) -> bool:
        """Paths are known to the broker alone."""
        return self.rule.role == role or (role == "broker" and self.rule.path is not None)

    def as_given(self) -> GivenRule:
        return GivenRule(self.number, self.slot, self.seed, self.given_ns, self.rule.text)

    def as_message(self, change: int) -> FaultRule:
        return FaultRule(change, self.number, self.slot, self.seed, self.given_ns, self.rule.text.encode())


class FaultDesk:
    def __init__(self, options: Options, log: StderrLog) -> None:
        file = _read_file(options.fault_rules)
        self._seed = int.from_bytes(os.urandom(7), "little") if file.seed is None else file.seed
        self._log = log
        self._numbers = 0
        self._kept: dict[int, Kept] = {}
        self._changes = 0
        self._told: dict[int, tuple[str, int]] = {}  # by place: who, and the last change that it was sent
        self._socket: FaultSocket | None = make_fault_socket(options.fault_socket, options.socket_path)
        self._memory = _make_counters()
        self._mapping = mmap.mmap(self._memory.fileno(), COUNTERS_BYTES)
        self._counters = Counters(memoryview(self._mapping))
        self._children: Callable[[], Iterable[Child]] = tuple
        to_child({})  # what is in these tables can be sent from now on
        for rule in file.rules:
            self._keep(rule)
        where = "no socket" if self._socket is None else f"rules may be changed by {os.fsdecode(self._socket.path)}"
        self._log.warning(f"fault injection is on: {len(self._kept)} rules, seed {self._seed}; {where}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._counters.close()
        self._mapping.close()
        self._memory.close()

    # --- children ------------------------------------------------------------------------------------------------------

    def dress(self, role: str, module: str, accepts: Table, make_config: MakeConfig) -> tuple[str, Table, MakeConfig]:
        """Module, table and configuration of a child that is about to be started."""

        def make(channel_fd: int) -> RoleConfig:
            config = make_config(channel_fd)
            return replace(config, faults=self._given(role.partition(" ")[0], config))

        return _MODULES[module], from_child(accepts), make

    @property
    def counters_fd(self) -> int:
        """Every child inherits it."""
        return self._memory.fileno()

    def _given(self, role: str, config: RoleConfig) -> bytes:
        place = place_of_worker(config.index or 0) if isinstance(config, WorkerConfig) else {"broker": BROKER, "control": CONTROL}[role]
        self._told.pop(place, None)  # it begins with all that holds
        return pack_given(
            Given(self._memory.fileno(), place, tuple(kept.as_given() for kept in self._kept.values() if kept.concerns(role)))
        )

    def _tell(self, kept: Kept, make: Callable[[int], ChannelMessage]) -> None:
        self._changes += 1
        for child in self._children():
            role, _, index = child.role.partition(" ")
            if not kept.concerns(role):
                continue
            if child.send(make(self._changes)):
                place = place_of_worker(int(index)) if role == "worker" else {"broker": BROKER, "control": CONTROL}[role]
                self._told[place] = (child.role, self._changes)
            else:
                self._log.warning(f"{child.role} could not be told of fault {kept.number}: it does not read its channel, or is gone")

    def _deaf(self) -> list[str]:
        """Who has not heard yet of what it was told."""
        return [role for place, (role, change) in self._told.items() if self._counters.heard(place) < change]

    # --- the operator --------------------------------------------------------------------------------------------------

    def serve(self, selector: selectors.BaseSelector, children: Callable[[], Iterable[Child]]) -> None:
        """Hear the operator from now on."""
        self._children = children
        if self._socket is not None:
            self._socket.serve(selector, self._answer)

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        match asked:
            case {"do": "add", "rules": [*texts]} if all(type(text) is str for text in texts):
                return {"added": self._add(texts)}
            case {"do": "list"}:
                return {"seed": self._seed, "rules": [self._shown(kept) for kept in self._kept.values()], "deaf": self._deaf()}
            case {"do": "remove", "numbers": [*numbers]} if all(type(number) is int for number in numbers):
                return {"removed": self._remove(numbers)}
            case {"do": "clear"}:
                return {"removed": self._remove(list(self._kept))}
        raise ConfigError("this vfsd does not know that request; use the vfsdctl of the same version")

    def _add(self, texts: list[str]) -> list[int]:
        """All of them, or none."""
        rules = [parse_rule(text) for text in texts]
        if len(self._kept) + len(rules) > MAX_RULES:
            raise ConfigError(f"there may be {MAX_RULES} fault rules at a time, and there are {len(self._kept)}; remove some")
        added = [self._keep(rule) for rule in rules]
        for kept in added:
            self._log.warning(f"fault {kept.number} {kept.rule.text}: added")
            self._tell(kept, kept.as_message)
        return [kept.number for kept in added]

    def _keep(self, rule: Rule) -> Kept:
        slot = min(set(range(MAX_RULES)) - {kept.slot for kept in self._kept.values()})
        self._counters.clear(slot)
        self._numbers += 1
        seed = self._seed if rule.seed is None else rule.seed
        kept = self._kept[self._numbers] = Kept(self._numbers, slot, time.monotonic_ns(), seed, rule)
        return kept

    def _remove(self, numbers: list[int]) -> list[int]:
        if unknown := [number for number in numbers if number not in self._kept]:
            raise ConfigError(f"there is no fault rule {unknown[0]}; vfsdctl fault list shows those that there are")
        for number in dict.fromkeys(numbers):
            kept = self._kept.pop(number)
            matches, hits = self._counters.totals(kept.slot)
            self._log.warning(f"fault {number} {kept.rule.text}: removed after {matches} matches, {hits} hits")
            self._tell(kept, partial(_gone, number))
        return numbers

    def _shown(self, kept: Kept) -> dict[str, Any]:
        matches, hits = self._counters.totals(kept.slot)
        return {"number": kept.number, "rule": kept.rule.text, "matches": matches, "hits": hits}


def _gone(number: int, change: int) -> FaultGone:
    return FaultGone(change, number)


def _read_file(name: str | None) -> RuleFile:
    if name is None:
        return RuleFile(None, [])
    option = f"--fault-rules={name}"
    try:
        with open(name, "rb") as file:
            text = file.read(_MOST_FILE_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"{option}: {error.strerror}; name a file that can be read") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{option}: is not UTF-8, and so not TOML; see docs/faults.md for an example") from None
    return parse_rule_file(text, option)


def _make_counters() -> OwnedFd:
    """A memfd that can neither grow nor shrink: a child can fill it, but neither fill memory by it nor make others die of it."""
    memfd = OwnedFd(os.memfd_create(COUNTERS_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(memfd.fileno(), COUNTERS_BYTES)
    fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return memfd
