"""The broker's start, with faults: `python -I -m vfsd.broker.faulty CONFIG_FD`. See vfsd.faulty."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from vfsd.broker import __main__ as plain
from vfsd.broker import server
from vfsd.broker.faulty.server import BrokerFaults, FaultyLink, FaultyServer
from vfsd.broker.pool import Pool
from vfsd.broker.requests import HANDLERS, Row
from vfsd.broker.worker_link import Task
from vfsd.channel import Channel
from vfsd.config import BrokerConfig, read_config
from vfsd.faulty import Faults, run_faulty_role, sleep_by_poll, substitute
from vfsd.log import ChildLog
from vfsd.wire import broker_messages, fault_messages

_OS_CALLS = {
    "open": "openat", "mkdir": "mkdirat", "mknod": "mknodat", "symlink": "symlinkat", "link": "linkat", "unlink": "unlinkat",
    "rmdir": "unlinkat", "readlink": "readlinkat", "ftruncate": "ftruncate", "fsync": "fsync", "fdatasync": "fdatasync",
    "chmod": "fchmodat", "fstatvfs": "fstatfs", "dup": "dup", "getxattr": "getxattr", "setxattr": "setxattr",
    "listxattr": "listxattr", "removexattr": "removexattr",
}  # fmt: skip
_FILE_CALLS = {
    name: name
    for name in (
        "statx", "name_to_handle_at", "open_by_handle_at", "renameat2", "fchownat", "utimensat", "fallocate", "syncfs",
    )
}  # fmt: skip


class FaultyPool(Pool[Task]):
    def __init__(self, faults: Faults, *rest: Any) -> None:
        super().__init__(*rest)
        self._faults = faults

    def release(self) -> None:
        """System calls can fail from here on: those of the start are not a guest's."""
        for name, module in list(sys.modules.items()):
            if name.startswith("vfsd.broker.") and not name.startswith("vfsd.broker.faulty"):
                for imported, calls in (("os", _OS_CALLS), ("filecalls", _FILE_CALLS)):
                    if imported in vars(module):
                        substitute(module, imported, self._faults.calls("broker", vars(module)[imported], calls))
        super().release()


def main() -> None:
    config = read_config(BrokerConfig, int(sys.argv[1]))
    run_faulty_role(config, "broker", lambda channel, log: serve(config, channel, log))


def serve(config: BrokerConfig, channel: Channel, log: ChildLog) -> None:
    faults = BrokerFaults(config.faults or b"", channel, log, sleep_by_poll())
    share_dir = config.shared_dir.rstrip(b"/") if config.sandbox == "none" else b""
    broker_messages.permit(fault_messages.SPEC)
    HANDLERS[fault_messages.MatchPath] = Row(faults.paths.answer(share_dir), writes=False)
    substitute(plain, "Server", partial(FaultyServer, faults))
    substitute(plain, "Pool", _Pools(faults))
    substitute(server, "WorkerLink", partial(FaultyLink, faults))
    plain.serve(config, channel, log)


class _Pools:
    """In place of the class, which is named with what it is a pool of."""

    def __init__(self, faults: Faults) -> None:
        self._make = partial(FaultyPool, faults)

    def __getitem__(self, _task: object) -> Any:
        return self._make

    def __call__(self, *arguments: Any) -> FaultyPool:
        return self._make(*arguments)


if __name__ == "__main__":
    main()
