"""Starts the daemon under test, or one of the two it is compared with, for a guest: vfsd, the Rust and the C virtiofsd.

The same suite runs against any of them (`VFSD_TEST_DAEMON=vfsd|rust|c`), which shows that it tests virtio-fs and not
vfsd's opinions.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.guest.guest import DIES_WITH_US
from tests.support.guest.packages import TRIXIE, unpack
from tests.support.guest.uml_proxy import UmlProxy

C_DAEMON = "/usr/lib/qemu/virtiofsd"
START_TIMEOUT_SECONDS = 30.0


class DaemonError(Exception):
    """The daemon did not start or did not end; the text has what it logged."""


class Daemon(ABC):
    """A running daemon as a context manager. `socket` is where a frontend connects."""

    name: str
    request_queues = 1  # how many it can serve

    def __init__(
        self, share: str, *, options: Sequence[str] = (), tag: str = "myfs", prefix: Sequence[str] = (), socket_folder: str | None = None
    ) -> None:
        self.share = share
        self.tag = tag
        self.options = list(options)
        self.prefix = list(prefix)
        self._folder = tempfile.mkdtemp(prefix="daemon-", dir=socket_folder)
        self.socket = f"{self._folder}/socket"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def argv(self) -> list[str]:
        """The command line."""

    @abstractmethod
    def inode_holder(self) -> int:
        """The process that keeps the guest's inodes: the one whose descriptors must not grow."""

    @property
    def pid(self) -> int:
        if self._process is None:
            raise DaemonError(f"{self.name} is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        with open(f"{self._folder}/log", "wb") as log:
            self._process = subprocess.Popen(
                [*DIES_WITH_US, *self.prefix, *self.argv()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def log(self) -> str:
        return Path(self._folder, "log").read_text(errors="replace")

    def processes(self) -> list[int]:
        """The daemon's process and all its descendants."""
        found = [self.pid]
        for pid in found:
            found.extend(children(pid))
        return found

    def fd_count(self) -> int:
        """Descriptors of the process that keeps the guest's inodes."""
        return len(os.listdir(f"/proc/{self.inode_holder()}/fd"))

    def ended(self) -> str | None:
        """Why nobody answers the guest any more, if the daemon has ended."""
        if self._process is not None and self._process.poll() is None:
            return None
        return f"the daemon ended, its log:\n{self.log()[-4000:]}"

    def wait(self, timeout: float = 10.0) -> int:
        """The exit code, once the daemon ended by itself (as it does when the frontend goes)."""
        if self._process is None:
            raise DaemonError(f"{self.name} is not running")
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise DaemonError(f"{self.name} did not end within {timeout:.0f} s; its log:\n{self.log()[-4000:]}") from None

    def close(self) -> None:
        """Ends the daemon and everything it started. May be called twice."""
        if self._process is None:
            return
        started = self.processes()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                for pid in started:
                    _kill(pid)
        self._process.wait()
        self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self._ready():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DaemonError(f"{self.name} did not start; its log:\n{self.log()[-4000:]}")
            time.sleep(0.02)

    def _ready(self) -> bool:
        return os.path.exists(self.socket)


class VfsdDaemon(Daemon):
    name = "vfsd"
    request_queues = 4

    def argv(self) -> list[str]:
        return [sys.executable, "-m", "vfsd", "--shared-dir", self.share, "--socket-path", self.socket, "--tag", self.tag, *self.options]

    def inode_holder(self) -> int:
        return next(pid for pid in self.processes() if b"vfsd.broker" in command_line(pid))

    def _ready(self) -> bool:
        return "Waiting for vhost-user socket connection" in self.log()


class PeerDaemon(Daemon):
    """One of the daemons vfsd is compared with. Frontends reach it through `UmlProxy`, which makes it fit for User-Mode Linux."""

    proxy_answers_tag = False

    def __enter__(self) -> Self:
        super().__enter__()
        own_socket, self.socket = self.socket, f"{self._folder}/proxy-socket"
        self._proxy = UmlProxy(self.socket, own_socket, self.tag if self.proxy_answers_tag else None)
        return self

    def inode_holder(self) -> int:
        return self.processes()[-1]  # with a sandbox it forks, and the child does the work

    def close(self) -> None:
        if self._process is not None and hasattr(self, "_proxy"):
            self._proxy.close()
        super().close()


class RustDaemon(PeerDaemon):
    """Of Debian's next suite, unpacked: it runs with the libraries that it came with."""

    name = "rust"

    def argv(self) -> list[str]:
        tree = unpack(TRIXIE, ["virtiofsd", "libc6", "libgcc-s1", "libcap-ng0", "libseccomp2"])
        libraries = tree / "usr/lib/x86_64-linux-gnu"
        loader = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(tree / "usr/libexec/virtiofsd")]
        return [*loader, "--shared-dir", self.share, "--socket-path", self.socket, "--tag", self.tag, *self.options]


class CDaemon(PeerDaemon):
    """QEMU 7.2's."""

    name = "c"
    proxy_answers_tag = True

    def argv(self) -> list[str]:
        return [C_DAEMON, f"--socket-path={self.socket}", "-o", f"source={self.share}", *self.options]


DAEMONS: dict[str, type[Daemon]] = {kind.name: kind for kind in (VfsdDaemon, RustDaemon, CDaemon)}


def daemon_under_test() -> type[Daemon]:
    return DAEMONS[os.environ.get("VFSD_TEST_DAEMON", "vfsd")]


def children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        return [int(child) for thread in threads for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
