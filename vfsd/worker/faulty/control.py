"""Control's start, with faults: `python -I -m vfsd.worker.faulty.control CONFIG_FD`. See vfsd.faulty."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from vfsd.channel import Channel, close_all
from vfsd.config import ControlConfig, read_config
from vfsd.faults import catalogue
from vfsd.faults.injector import Hit
from vfsd.faults.rule import Rule
from vfsd.faulty import Faults, run_faulty_role, sleep_by_poll, substitute
from vfsd.fds import OwnedFd
from vfsd.log import ChildLog
from vfsd.wire import vhost_user as vu
from vfsd.worker import control as plain
from vfsd.worker.control import Control
from vfsd.worker.device import Device
from vfsd.worker.frontend_stream import FrontendClosed

_WHY = "by a fault rule"


class ControlFaults(Faults):
    """Can lose the frontend, too."""

    def __init__(self, *rest: Any) -> None:
        super().__init__("control", *rest)
        self.frontend_lost = False

    def arrived(self, rule: Rule, hits: list[Hit]) -> None:
        if catalogue.FRONTEND in rule.subjects:
            self.frontend_lost = self.frontend_lost or bool(hits)
        else:
            super().arrived(rule, hits)

    def may_lose_frontend(self, point: str, message: str) -> None:
        """FrontendClosed if a rule says that the frontend goes away here."""
        if self.injector.hits(self.injector.about(catalogue.FRONTEND, point, message=message), message):
            raise FrontendClosed(_WHY)


class FaultyDevice(Device):
    def __init__(self, faults: ControlFaults, *rest: Any, **keywords: Any) -> None:
        super().__init__(*rest, **keywords)
        self._faults = faults

    def handle(self, message: vu.Message, fds: list[OwnedFd]) -> Any:
        name = message.name.removeprefix("VHOST_USER_")
        try:
            self._meet("before-message", name)
        except FrontendClosed:
            close_all(fds)
            raise
        reply = super().handle(message, fds)
        self._meet("before-reply", name)
        return reply

    def _meet(self, point: str, name: str) -> None:
        self._faults.at(point, name, message=name)
        self._faults.may_lose_frontend(point, name)


class FaultyControl(Control):
    def __init__(self, faults: ControlFaults, *rest: Any) -> None:
        super().__init__(*rest)
        self._faults = faults

    def _restore_arrived(self) -> None:
        lost, self._faults.frontend_lost = self._faults.frontend_lost, False
        if lost and self._stream is not None:
            raise FrontendClosed(_WHY)
        super()._restore_arrived()


def main() -> None:
    config = read_config(ControlConfig, int(sys.argv[1]))
    run_faulty_role(config, "control", lambda channel, log: serve(config, channel, log))


def serve(config: ControlConfig, channel: Channel, log: ChildLog) -> None:
    faults = ControlFaults(config.faults or b"", channel, log, sleep_by_poll())
    substitute(plain, "Device", partial(FaultyDevice, faults))
    substitute(plain, "Control", partial(FaultyControl, faults))
    plain.serve(config, channel, log)


if __name__ == "__main__":
    main()
