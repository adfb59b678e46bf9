"""A running daemon with a frontend attached and a FUSE session in it; a pool of them for tests that only need one that works."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.frontend.checks import NOT_FOUND, eventually, eventually_stable
from tests.support.frontend.daemon import CommandLine, Daemon, Options
from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.sequences import QEMU_10, Frontend

_directory_numbers = iter(range(1, 1 << 30))


@dataclass
class Served:
    """A daemon, the frontend that is connected to it, and a FUSE session over that."""

    daemon: Daemon
    device: Device
    client: FuseClient
    share: Path
    baseline: dict[str, Counter[str]] = field(default_factory=dict)
    log_mark: int = 0
    expected_log: list[str] = field(default_factory=list)

    def expect_log(self, pattern: str) -> None:
        """Warnings and errors that match are part of this test."""
        self.expected_log.append(pattern)

    def new_log(self) -> list[str]:
        return self.daemon.log[self.log_mark :]

    def wait_for_new_log(self, pattern: str, timeout: float = 10.0) -> str:
        """The first line of this test that matches; it is expected."""
        self.expect_log(pattern)
        line = eventually(lambda: next((line for line in self.new_log() if re.search(pattern, line)), None), timeout)
        assert line, f"no new log line matches {pattern!r}: {self.daemon.describe()}"
        return line

    def unexpected_log(self) -> list[str]:
        return [
            line
            for line in self.new_log()
            if re.search(r"\b(WARN|ERROR)\b|Traceback|Warning:", line)
            and not any(re.search(pattern, line) for pattern in self.expected_log)
        ]

    def new_session(self) -> None:
        """Forget all that was looked up and opened."""
        self.client.destroy()
        self.client.init()

    def close(self) -> None:
        self.device.close()
        self.daemon.stop()


def start(
    folder: Path,
    options: Options | None = None,
    *,
    frontend: Frontend = QEMU_10,
    queues: int = 2,
    init: bool = True,
    device_options: dict[str, Any] | None = None,
    command: CommandLine | None = None,
) -> Served:
    """A daemon that serves folder/share, with a frontend attached."""
    share = folder / "share"
    share.mkdir(exist_ok=True)
    daemon = Daemon(share, folder / "vfsd.sock", options, command=command)
    try:
        device = Device(str(daemon.socket), queues=queues, **(device_options or {}))
        try:
            device.attach(frontend)
            client = FuseClient(device)
            if init:
                client.init()
        except BaseException:
            device.close()
            raise
    except BaseException:
        daemon.stop()
        print(daemon.describe())
        raise
    return Served(daemon, device, client, share, log_mark=len(daemon.log))


class Pool:
    """Running daemons by configuration: starting one takes longer than most tests."""

    def __init__(self, make_folder: Callable[[], Path]) -> None:
        self._make_folder = make_folder
        self._served: dict[tuple[str, Options], Served] = {}

    def get(self, name: str, options: Options) -> Served:
        key = (name, options)
        served = self._served.get(key)
        if served is None or not served.daemon.running:
            served = self._served[key] = start(self._make_folder(), options, queues=options.request_queues + 1)
            _warm_up(served)
        served.log_mark = len(served.daemon.log)
        served.expected_log.clear()
        return served

    def discard(self, served: Served) -> None:
        """After a failure: the next test gets a new daemon."""
        self._served = {key: other for key, other in self._served.items() if other is not served}
        served.close()

    def close(self) -> None:
        for served in self._served.values():
            served.close()


def _warm_up(served: Served) -> None:
    """Make what is made once per process (a mount fd, a thread) before descriptors are counted."""
    client = served.client
    warm_up = served.share / "warm-up"
    warm_up.write_bytes(b"x")
    client.read_file(client.lookup(ROOT, b"warm-up").nodeid)
    client.list(ROOT, plus=True)
    warm_up.unlink()
    served.new_session()
    served.baseline = eventually_stable(served.daemon.fd_census)


@dataclass
class Fs:
    """One test's own directory in the share, seen from the guest (`dir`, a nodeid) and from the host."""

    served: Served
    host: Path
    name: bytes
    dir: int = 0

    @property
    def client(self) -> FuseClient:
        return self.served.client

    def enter(self) -> int:
        """LOOKUP the test's directory, in this session."""
        self.dir = self.client.lookup(ROOT, self.name).nodeid
        return self.dir

    def path(self, name: bytes | str) -> bytes:
        """Where the host has an entry of the test's directory."""
        return os.fsencode(self.host) + b"/" + os.fsencode(name)

    def put(self, name: bytes | str, data: bytes = b"", mode: int = 0o644) -> bytes:
        """A file made by the host; its path."""
        path = self.path(name)
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, mode)
        return path

    def get(self, name: bytes | str) -> bytes:
        with open(self.path(name), "rb") as file:
            return file.read()

    def lookup(self, name: bytes) -> int:
        return self.client.lookup(self.dir, name).nodeid

    def is_dead(self, nodeid: int) -> bool:
        """Whether the daemon knows this nodeid no longer."""
        try:
            self.client.getattr(nodeid)
        except OSError as error:
            return error.errno in NOT_FOUND
        return False


@contextmanager
def checked_session(pool: Pool, served: Served) -> Iterator[Served]:
    """A test's use of a pooled daemon: afterwards it lives, says nothing unexpected, and holds no descriptor more than before."""
    try:
        yield served
        assert served.daemon.running, served.daemon.describe()
        served.new_session()
        served.daemon.wait_for_census(served.baseline)
        assert served.unexpected_log() == []
    except BaseException:
        print(served.daemon.describe())
        pool.discard(served)
        raise


@contextmanager
def own_directory(pool: Pool, name: str, options: Options, mode: int = 0o755) -> Iterator[Fs]:
    with checked_session(pool, pool.get(name, options)) as served:
        host = served.share / f"test-{next(_directory_numbers)}"
        host.mkdir()
        host.chmod(mode)
        fs = Fs(served, host, os.fsencode(host.name))
        fs.enter()
        yield fs
