"""A worker's start, with faults: `python -I -m vfsd.worker.faulty CONFIG_FD`. See vfsd.faulty."""

from __future__ import annotations

import select
import sys
from functools import partial

from vfsd.channel import Channel
from vfsd.config import WorkerConfig, read_config
from vfsd.faulty import Faults, run_faulty_role, substitute
from vfsd.log import ChildLog
from vfsd.wire import broker_messages, fault_messages
from vfsd.worker import __main__ as plain
from vfsd.worker import appends, event_loop, guest_memory, ops_dirs, ops_files, ops_inodes, ring_table
from vfsd.worker.event_loop import EventLoop
from vfsd.worker.faulty.requests import FaultyBrokerClient, FaultyDispatcher, Pauses
from vfsd.worker.faulty.rings import FaultyRing, FaultyRingTable, FaultyTable, FaultyVirtqueue

_OS_CALLS = {
    "preadv": "preadv2",
    "pwritev": "pwritev2",
    "lseek": "lseek",
    "copy_file_range": "copy_file_range",
}
_FILE_CALLS = {"fstat": "fstat", "mode_of": "fstat", "getdents64": "getdents64"}
# By module, and the name of what it calls them by.
_CALLS = {
    **{(module, "os"): _OS_CALLS for module in (appends, ops_dirs, ops_files, ops_inodes)},
    **{(module, "filecalls"): _FILE_CALLS for module in (appends, ops_dirs, ops_files, ops_inodes)},
    (guest_memory, "mmap"): {"mmap": "mmap"},
}


class FaultyEventLoop(EventLoop):
    def __init__(self, pauses: Pauses, *rest: object) -> None:
        self._pauses = pauses
        super().__init__(*rest)  # type: ignore[arg-type]

    def _timeout(self) -> float:
        seconds, paused = super()._timeout(), self._pauses.seconds()
        if paused is None:
            return seconds
        return paused if seconds < 0 else min(seconds, paused)

    def _turn(self) -> None:
        self._pauses.resume()
        super()._turn()


def main() -> None:
    config = read_config(WorkerConfig, int(sys.argv[1]))
    run_faulty_role(config, f"worker{config.index}", lambda channel, log: serve(config, channel, log))


def serve(config: WorkerConfig, channel: Channel, log: ChildLog) -> None:
    nothing = select.epoll()  # the one call by which a worker may wait
    faults = Faults("worker", config.faults or b"", channel, log, lambda seconds: nothing.poll(-1 if seconds is None else seconds))
    broker_messages.permit(fault_messages.SPEC)
    pauses = Pauses()
    substitute(plain, "EventLoop", partial(FaultyEventLoop, pauses))
    substitute(plain, "BrokerClient", partial(FaultyBrokerClient, faults))
    substitute(event_loop, "Dispatcher", partial(FaultyDispatcher, faults, pauses))
    substitute(event_loop, "RingTable", partial(FaultyRingTable, faults))
    substitute(ring_table, "Ring", partial(FaultyRing, faults))
    substitute(ring_table, "Virtqueue", partial(FaultyVirtqueue, faults))
    substitute(ring_table, "MappedTable", partial(FaultyTable, faults))
    for (module, name), calls in _CALLS.items():
        substitute(module, name, faults.calls("worker", vars(module)[name], calls))
    plain.serve(config, channel, log)


if __name__ == "__main__":
    main()
