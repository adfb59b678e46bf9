"""`python -m tools.measure_inodes`: what inodes cost the broker: descriptors, bytes, and pauses.

Two measurements. The store alone, in this process: it grows, is wiped as by a new session and grows again, and the longest
single call is the longest pause that it can cause. Then a real vfsd on a tree of empty files, walked with READDIRPLUS
through the in-process frontend as find(1) would, wiped by a new INIT and walked again; all the while another request queue
looks a file up once a millisecond and notes how long each answer takes. A process that is not vfsd is asked too: neither can
be faster than the machine, which others may share.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from tests.support.frontend.daemon import Daemon, Options
from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.sequences import QEMU_10
from tools.bench import table
from vfsd.broker.inode_store import Identity, InodeStore

FILES_PER_DIRECTORY = 1000
PROBE = b"probe"
PROBE_SECONDS = 0.001
NOTHING = "not vfsd: a byte to another process and back"
SETTLE_SECONDS = 3.0
LISTING_BYTES = 32768  # as a Linux guest asks
SECOND_REQUEST_QUEUE = 2


@dataclass
class Latencies:
    """Seconds that calls or requests took."""

    seconds: array[float] = field(default_factory=lambda: array("d"))

    def cells(self) -> list[str]:
        """Median, 99.9 %, longest; in milliseconds."""
        found = sorted(self.seconds)
        if not found:
            return ["-"] * 3
        return [f"{found[int(share * (len(found) - 1))] * 1e3:.3f}" for share in (0.5, 0.999, 1.0)]


def main() -> int:
    arguments = parse_arguments()
    if os.geteuid() != 0:
        print("measure_inodes: vfsd's sandbox and file handles need uid 0", file=sys.stderr)
        return 1
    if not arguments.daemon_only:
        measure_store(arguments.files)
    if not arguments.store_only:
        measure_daemon(arguments)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="measure_inodes", description="Measure what inodes cost the broker.")
    parser.add_argument("--files", type=int, default=1_000_000, help="how many (default: 1000000)")
    parser.add_argument("--handles", choices=["prefer", "mandatory", "never"], default="mandatory", help="default: mandatory")
    parser.add_argument("--folder", default="/var/tmp", help="where the tree is made")
    parser.add_argument("--store-only", action="store_true")
    parser.add_argument("--daemon-only", action="store_true")
    return parser.parse_args()


# --- the store alone ------------------------------------------------------------------------------------------------


def measure_store(files: int) -> None:
    """In CPU time, so that what else runs on the machine does not count."""
    gc.disable()  # as in the broker
    store = InodeStore(threading.Lock(), lambda _released: None)
    store.insert_root(_identity(0, stat.S_IFDIR), fd=0, held_mount=True)
    control = Latencies()
    for _ in range(files):
        timed(control, lambda: None)
    rows = [["nothing at all: what the machine itself adds", *control.cells()]]
    for session, title in enumerate(["", ", again"]):
        inserts, lookups, wipe, steps = Latencies(), Latencies(), Latencies(), Latencies()
        for number in range(1, files + 1):
            timed(inserts, partial(store.insert, _identity(number, stat.S_IFREG), session, fd=-1, held_mount=True))
        for number in range(1, files + 1, 10):
            timed(lookups, partial(store.count_lookup, _identity(number, stat.S_IFREG), session))
        timed(wipe, partial(store.begin_session, session + 1))
        while store.wiped_tables:
            timed(steps, partial(_free_some, store))
        rows.append([f"insert{title}", *inserts.cells()])
        rows.append([f"find a known one{title}", *lookups.cells()])
        rows.append([f"begin a session{title}", *wipe.cells()])
        rows.append([f"each of {len(steps.seconds)} steps that free the old one{title}", *steps.cells()])
    gc.enable()
    print(f"\n### The store alone, {files} inodes\n")
    table(["milliseconds of CPU time", "median", "99.9 %", "longest"], rows)


def _free_some(store: InodeStore) -> None:
    wiped = store.take_wiped()
    if wiped is not None:
        store.settle_wiped(wiped)


def _identity(number: int, file_type: int) -> Identity:
    """As on ext4: mount id, handle header, inode number and generation; (ino, dev, mount id)."""
    return Identity(number.to_bytes(24, "little"), number.to_bytes(24, "little"), 7, 99, file_type)


def timed(latencies: Latencies, call: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> None:
    start = clock()
    call()
    latencies.seconds.append(clock() - start)


# --- a running daemon -----------------------------------------------------------------------------------------------


class Prober(threading.Thread):
    """Asks something once a millisecond, and notes how long each answer takes."""

    def __init__(self, ask: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.latencies = Latencies()
        self._ask = ask
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(PROBE_SECONDS):
            timed(self.latencies, self._ask, time.perf_counter)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self.join()


def lookups(device: Device) -> Callable[[], object]:
    """A question for the probe file's inode, on a request queue of its own."""
    client = FuseClient(device)
    client.queue = SECOND_REQUEST_QUEUE
    return lambda: client.lookup(ROOT, PROBE)


@contextmanager
def echoes() -> Iterator[Callable[[], object]]:
    """A question for nothing at all, to a process that only answers: what the machine adds to every answer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            ours.close()
            while question := theirs.recv(1):
                theirs.send(question)
            os._exit(0)
        theirs.close()
        yield lambda: (ours.send(b"?"), ours.recv(1))
    os.waitpid(child, 0)


def measure_daemon(arguments: argparse.Namespace) -> None:
    sys.setswitchinterval(1e-4)  # the prober must not wait for the walker's Python
    with ExitStack() as stack:
        folder = Path(stack.enter_context(scratch(arguments.folder)))
        share = folder / "share"
        print(f"making {arguments.files} files below {folder}", file=sys.stderr, flush=True)
        make_tree(share, arguments.files)
        daemon = stack.enter_context(Daemon(share, folder / "vfsd.sock", Options(handles=arguments.handles, request_queues=2)))
        device = Device(str(daemon.socket), queues=3)
        stack.callback(device.close)
        device.attach(QEMU_10)
        _measure_walks(daemon, FuseClient(device), arguments)


def _measure_walks(daemon: Daemon, client: FuseClient, arguments: argparse.Namespace) -> None:
    broker = next(pid for pid in daemon.pids() if b"vfsd.broker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    client.init()
    client.lookup(ROOT, PROBE)
    rows = []
    ask = lookups(client.device)
    with echoes() as nothing:
        for title, question in ((NOTHING, nothing), ("idle", ask)):
            with Prober(question) as prober:
                time.sleep(SETTLE_SECONDS)
            rows.append([title, f"{SETTLE_SECONDS:.1f}", *_held(broker), *prober.latencies.cells()])
    for title in ("walk", "walk again"):
        resident = resident_bytes(broker)
        with Prober(ask) as prober, echoes() as nothing, Prober(nothing) as floor:
            started = time.perf_counter()
            found = walk(client)
            took = time.perf_counter() - started
        each = (resident_bytes(broker) - resident) / found
        rows.append([f"{title}: {found} inodes", f"{took:.1f}", *_held(broker), *prober.latencies.cells()])
        rows.append([f"{NOTHING}, during it", "", "", "", *floor.latencies.cells()])
        print(f"{title}: {each:.0f} bytes of resident memory more for each inode", file=sys.stderr)
        started = time.perf_counter()
        client.init()
        wiped = time.perf_counter() - started
        with Prober(ask) as prober:
            time.sleep(SETTLE_SECONDS)
        rows.append([f"new session after {title}", f"{wiped:.3f}", *_held(broker), *prober.latencies.cells()])
        if title == "walk":
            first = each
    print(f"\n### A running vfsd, --inode-file-handles={arguments.handles}: {first:.0f} bytes of resident memory for each inode\n")
    table(["", "seconds", "broker's fds", "broker's MiB", "answer ms: median", "99.9 %", "longest"], rows)
    for line in daemon.log:
        if "WARN" in line or "ERROR" in line:
            print(line)


def _held(broker: int) -> list[str]:
    return [str(len(os.listdir(f"/proc/{broker}/fd"))), f"{resident_bytes(broker) / (1 << 20):.1f}"]


def walk(client: FuseClient) -> int:
    """Look everything up, as find(1) does through READDIRPLUS, and forget nothing; how many inodes that were."""
    found = 0
    for entry in client.list(ROOT, size=LISTING_BYTES, plus=True):
        if entry.entry is None or not entry.entry.nodeid:
            continue
        found += 1
        if stat.S_ISDIR(entry.entry.attr.mode):
            found += sum(
                bool(inner.entry and inner.entry.nodeid) for inner in client.list(entry.entry.nodeid, size=LISTING_BYTES, plus=True)
            )
    return found


def make_tree(share: Path, files: int) -> None:
    share.mkdir()
    (share / os.fsdecode(PROBE)).touch()
    for first in range(0, files, FILES_PER_DIRECTORY):
        directory = share / f"{first:08d}"
        directory.mkdir()
        fd = os.open(directory, os.O_RDONLY)
        try:
            for number in range(first, min(first + FILES_PER_DIRECTORY, files)):
                os.close(os.open(f"file-{number:08d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=fd))
        finally:
            os.close(fd)


@contextmanager
def scratch(parent: str) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="vfsd-inodes-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    sys.exit(main())
