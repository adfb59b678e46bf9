"""The daemon under test as a process: start it, read its log, count its descriptors, stop it."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from vfsd.tools.syscall_trace import strace_command

READY = "Waiting for vhost-user socket connection"
START_SECONDS = 40.0
STOP_SECONDS = 10.0

CommandLine = Callable[[Path, Path, "Options"], list[str]]


@dataclass(frozen=True)
class Options:
    """What every virtio-fs daemon can be told, in one form; `extra` goes to the command line as it is."""

    cache: str = "auto"
    handles: str = "prefer"
    sandbox: str = "namespace"
    request_queues: int = 1
    readonly: bool = False
    tag: str | None = None
    extra: tuple[str, ...] = ()


def vfsd(share: Path, socket: Path, options: Options) -> list[str]:
    """This tree's vfsd, by the running interpreter."""
    command = [sys.executable, "-m", "vfsd", "--shared-dir", str(share), "--socket-path", str(socket)]
    command += ["--cache", options.cache, "--inode-file-handles", options.handles, "--sandbox", options.sandbox]
    command += ["--num-request-queues", str(options.request_queues)]
    if options.readonly:
        command.append("--readonly")
    if options.tag is not None:
        command += ["--tag", options.tag]
    return [*command, *options.extra]


def c_virtiofsd(share: Path, socket: Path, options: Options) -> list[str]:
    """The C daemon of QEMU 7.2: no file handles, one request queue, no read-only mode."""
    cache = {"never": "none"}.get(options.cache, options.cache)
    sandbox = "chroot" if options.sandbox == "none" else options.sandbox
    return ["/usr/lib/qemu/virtiofsd", f"--socket-path={socket}", "-o", f"source={share},cache={cache},sandbox={sandbox}", *options.extra]


def rust_virtiofsd(share: Path, socket: Path, options: Options, *, program: str = "/usr/libexec/virtiofsd") -> list[str]:
    """The Rust daemon: one request queue."""
    command = [program, "--shared-dir", str(share), "--socket-path", str(socket)]
    command += ["--cache", options.cache, "--inode-file-handles", options.handles, "--sandbox", options.sandbox]
    if options.readonly:
        command.append("--readonly")
    if options.tag is not None:
        command += ["--tag", options.tag]
    return [*command, *options.extra]


# VFSD_TEST_DAEMON=c runs tests against another daemon: a test that fails there too may be the one that is wrong.
COMMANDS: dict[str, CommandLine] = {"vfsd": vfsd, "c": c_virtiofsd, "rust": rust_virtiofsd}


def command_under_test() -> CommandLine:
    return COMMANDS[os.environ.get("VFSD_TEST_DAEMON", "vfsd")]


# VFSD_TEST_RECORD_SYSCALLS=DIRECTORY: what each vfsd calls is written there by strace, which is not its parent: pids, signals and
# exit statuses are as without.
_run_numbers = itertools.count()


def _recorded(argv: Sequence[str]) -> Sequence[str]:
    folder = os.environ.get("VFSD_TEST_RECORD_SYSCALLS")
    if folder is None or argv[:3] != [sys.executable, "-m", "vfsd"]:
        return argv
    return strace_command(argv, os.path.join(folder, f"{os.getpid()}-{next(_run_numbers)}.strace"))


class DaemonFailed(AssertionError):
    """The daemon did not do what a test needs of it before it can begin."""


class Daemon:
    """One daemon process and its children. Use as a context manager, or call stop()."""

    def __init__(
        self,
        share: Path,
        socket: Path,
        options: Options | None = None,
        *,
        command: CommandLine | None = None,
        env: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        self.share = share
        self.socket = socket
        self.argv: Sequence[str] = _recorded((command or command_under_test())(share, socket, options or Options()))
        # Not the tests' own stdin; its own session, so that a ^C reaches the tests first and they stop it in order.
        self.process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=None if env is None else dict(env),
        )
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.stop()
                raise

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self._lines.append(line.decode(errors="backslashreplace").rstrip("\n"))
                self._news.notify_all()

    # Log

    @property
    def log(self) -> list[str]:
        """Every line on stderr so far."""
        with self._news:
            return list(self._lines)

    def wait_for_log(self, pattern: str, timeout: float = 10.0) -> str:
        """The first line that matches; DaemonFailed if none comes in time."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for line in self._lines:
                    if re.search(pattern, line):
                        return line
                remaining = deadline - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                if remaining <= 0 or ended:
                    raise DaemonFailed(f"no log line matches {pattern!r}; {self.describe()}")
                self._news.wait(min(remaining, 0.1))

    def wait_ready(self) -> None:
        """Until it says that it waits for a connection, which is what its users wait for."""
        self.wait_for_log(READY, START_SECONDS)

    def describe(self) -> str:
        """For failure messages."""
        status = self.process.poll()
        state = "runs" if status is None else f"ended with {status}"
        return f"the daemon {state}; its log:\n" + "\n".join(self._lines[-40:])

    # Life

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """Wait for it to end by itself: the exit status."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def stop(self) -> int:
        """End it as a service manager would: SIGTERM, and SIGKILL if that does not help."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(STOP_SECONDS)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return int(self.process.returncode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # Processes and descriptors

    def pids(self) -> list[int]:
        """The daemon and all its descendants."""
        found = [self.pid]
        for pid in found:
            found += _children(pid)
        return found

    def fd_census(self) -> dict[str, Counter[str]]:
        """What each process holds: role -> kind of descriptor -> how many. Needs root or the same user."""
        return {f"{_role(pid)}": _descriptors(pid) for pid in self.pids()}

    def fd_count(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.fd_census().values())

    def wait_for_census(self, expected: Mapping[str, Counter[str]], timeout: float = 5.0) -> None:
        """Until the descriptors are those of `expected` again (closing may be asynchronous); AssertionError says what is different."""
        deadline = time.monotonic() + timeout
        while (now := self.fd_census()) != expected:
            if time.monotonic() > deadline:
                raise AssertionError("descriptors leaked or lost: " + describe_difference(expected, now))
            time.sleep(0.02)


def describe_difference(before: Mapping[str, Counter[str]], after: Mapping[str, Counter[str]]) -> str:
    changes = []
    for role in sorted(before.keys() | after.keys()):
        old, new = before.get(role, Counter()), after.get(role, Counter())
        changes += [f"{role}: {new[kind] - old[kind]:+d} {kind}" for kind in sorted(old.keys() | new.keys()) if old[kind] != new[kind]]
    return "; ".join(changes) or "none"


def _children(pid: int) -> list[int]:
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found


def _role(pid: int) -> str:
    """Which part of the daemon a process is: its module and, to tell workers apart, its pid."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return f"gone {pid}"
    module = words[words.index(b"-m") + 1].decode() if b"-m" in words else words[0].decode()
    return f"{module} {pid}"


def _descriptors(pid: int) -> Counter[str]:
    """Links of /proc/PID/fd, with numbers that change from one descriptor to the next taken out."""
    kinds: Counter[str] = Counter()
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return kinds
    for name in names:
        try:
            link = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        kinds[re.sub(r"^(socket|pipe):\[\d+\]$", r"\1", link)] += 1
    return kinds
