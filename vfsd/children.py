"""One child of the supervisor: started by fork and exec, watched by pidfd, heard over its channel.

Who controls the bytes: once it serves, a child may be taken over: what it says comes through the channel's codec and the
bounded, escaping log; how it died comes from the kernel. A child gets an empty environment, its own session (no terminal,
no Ctrl-C of ours), /dev/null as stdin and stdout, and as stderr a small sealed memfd that is read only when it died.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from vfsd.channel import Channel, ChannelClosed
from vfsd.config import RoleConfig, config_memfd
from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd, sealed_memfd
from vfsd.heartbeat import Heartbeat
from vfsd.kernel_log import KernelLog
from vfsd.log import ChildLines, StderrLog
from vfsd.sandbox.namespaces import USE_CHROOT
from vfsd.sandbox.spawn import FirstProcess, start_in_pid_namespace
from vfsd.wire.channel import ChannelMessage, Stop, Table

STOP_SECONDS = 0.3  # from Stop to SIGKILL; libvirt and systemd kill us some seconds after their SIGTERM
KILL_SECONDS = 0.5  # then whatever is still there sits in an uninterruptible call of the host's kernel
CULPRIT_SECONDS = 0.1  # peers of a child that crashed see their socket close before the kernel reports the crash
LAST_WORDS_BYTES = 8192  # room for the traceback of a child that cannot even import its modules


class Child:
    """A started child. `make_config` is given the number of the child's channel descriptor."""

    def __init__(
        self,
        role: str,
        module: str,
        accepts: Table,
        make_config: Callable[[int], RoleConfig],
        *,
        pass_fds: Sequence[int],
        pid_namespace: bool,
        log: StderrLog,
    ) -> None:
        self.role = role
        self.ready = False
        self.started_at = time.monotonic()
        self.completed = False  # of a worker: whether it completed a request
        self.breach = False  # of a worker: whether it broke the broker's protocol
        self.heartbeat: Heartbeat | None = None  # of a worker that serves
        self.returncode = 0  # meaningful once it is reaped
        self.syscall: int | None = None  # that its filter killed it for
        self.lines = ChildLines(log, role.replace(" ", ""))
        self._last_words = sealed_memfd("vfsd-last-words", LAST_WORDS_BYTES)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(ours, accepts)
        try:
            with theirs, config_memfd(make_config(theirs.fileno())) as config_fd:
                self._process = self._start(module, config_fd, (theirs.fileno(), config_fd, *pass_fds), pid_namespace)
            self.pidfd = OwnedFd(os.pidfd_open(self._process.pid))
        except BaseException:
            self.channel.close()
            self._last_words.close()
            raise

    def _start(self, module: str, config_fd: int, pass_fds: Sequence[int], pid_namespace: bool) -> subprocess.Popen[bytes] | FirstProcess:
        command, stderr = self._command(module, config_fd), self._last_words.fileno()
        try:
            if pid_namespace:
                return start_in_pid_namespace(command, stderr=stderr, pass_fds=pass_fds, remedy=USE_CHROOT)
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=pass_fds,
                cwd="/",
                env={},
                start_new_session=True,
            )
        except OSError as error:
            python = os.path.realpath(sys.executable)
            executable = error.errno not in (errno.EACCES, errno.ENOENT)
            remedy = "see what limits this host sets" if executable else "install vfsd where the user who starts it may execute it"
            raise ConfigError(f"cannot start {self.role} by {python}: {error.strerror}; {remedy}") from error

    @staticmethod
    def _command(module: str, config_fd: int) -> list[str]:
        """Isolated mode: nothing of the environment, the user or the working directory decides what is imported."""
        return [sys.executable, "-I", "-m", module, str(config_fd)]

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ChannelMessage, fds: Sequence[OwnedFd] = ()) -> bool:
        """Whether it went out: a child that died or does not read is dealt with by its pidfd."""
        try:
            return self.channel.send(message, fds)
        except ChannelClosed:
            return False

    def rename(self, role: str) -> None:
        """It has another duty from now on."""
        self.role = role
        self.lines.rename(role.replace(" ", ""))

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGKILL)
        except ProcessLookupError:
            return

    def reap(self, kernel_log: KernelLog | None = None) -> str:
        """How it died, in words. Call it only when the pidfd is readable, or it waits."""
        self.returncode = self._process.wait()
        if self.returncode == -signal.SIGSYS and kernel_log is not None and self.syscall is None:
            self.syscall = kernel_log.syscall_of(self.pid)
        return death(self.returncode, self.syscall)

    def last_words(self) -> list[str]:
        """What it wrote to stderr: the end of a traceback, or nothing."""
        text = os.pread(self._last_words.fileno(), LAST_WORDS_BYTES, 0).rstrip(b"\0")
        return [line for line in text.decode(errors="backslashreplace").splitlines() if line.strip()]

    def close(self) -> None:
        self.channel.close()
        self.pidfd.close()
        self._last_words.close()


def death(returncode: int, syscall: int | None = None) -> str:
    """A subprocess return code in words; of SIGSYS with the system call, if it is known."""
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    if -returncode == signal.SIGSYS:
        which = "unknown" if syscall is None else str(syscall)
        return f"was killed by {name} (system call {which}): it made a system call that its seccomp filter does not allow"
    return f"was killed by {name}"


def wait_for_deaths(children: list[Child], seconds: float, enough: int | None = None) -> list[Child]:
    """Those that died within that time; returns as soon as so many (default: all) have."""
    poller = select.poll()
    alive = {child.pidfd.fileno(): child for child in children}
    for fd in alive:
        poller.register(fd, select.POLLIN)
    dead: list[Child] = []
    deadline = time.monotonic() + seconds
    while alive and (enough is None or len(dead) < enough) and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poller.poll(left * 1000):
            poller.unregister(fd)
            dead.append(alive.pop(fd))
    return dead


def find_killed(child: Child, how: str, children: list[Child], principals: tuple[Child, Child], kernel_log: KernelLog) -> tuple[Child, str]:
    """A child that ended by itself has often only lost a peer: prefer to blame one that a signal killed meanwhile.

    The principals are to blame however they ended: a worker cannot go on without broker and control.
    """
    for other in wait_for_deaths([each for each in children if each is not child], CULPRIT_SECONDS, enough=1):
        others_end = other.reap(kernel_log)
        if others_end.startswith("was killed") or other in principals:
            return other, others_end
    return child, how


def stop_all(children: list[Child], log: StderrLog) -> None:
    """Ask them to end, and kill those that do not; closes them."""
    for child in children:
        child.send(Stop())
    dead = wait_for_deaths(children, STOP_SECONDS)
    left = [child for child in children if child not in dead]
    for child in left:
        child.kill()
    dead += wait_for_deaths(left, KILL_SECONDS)
    for child in children:
        if child in dead:
            child.reap()
        else:
            log.warning(f"{child.role} (pid {child.pid}) does not die: it waits in a call of the host's kernel")
        child.close()
