"""A guest kernel as an object: boot it, run functions and programs in it, mount the share, power it off.

Two kinds with one interface: `UmlGuest` (User-Mode Linux: a second to boot, native speed, one CPU) and `QemuGuest`
(QEMU without KVM: slower, two CPUs, PCI, several request queues). Each has two channels to us, both socket pairs: the
console, which a thread drains so that its text is at hand when something fails, and the agent's serial line.
The agent inside is trusted; the guest's kernel is a test fixture, not an adversary.
"""

import inspect
import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

from tests.support.guest.images import Image, qemu_image, uml_image
from tests.support.guest.link import Link, LinkClosedError

BOOT_TIMEOUT_SECONDS = 120.0
CALL_TIMEOUT_SECONDS = 120.0
GUEST_APPEND = "console=ttyS0 agent=/dev/ttyS1 quiet panic=-1"
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")  # util-linux; a test run that is killed leaves no guest behind


class GuestError(Exception):
    """The guest did not boot, died, or does not answer; the text ends with what its console said."""


class GuestRaisedError(Exception):
    """Code sent to the guest raised; `errno` is set when that was an OSError."""

    def __init__(self, text: str, errno: int | None) -> None:
        super().__init__(text)
        self.errno = errno


@dataclass(frozen=True)
class Completed:
    """What a program in the guest did."""

    code: int
    stdout: str
    stderr: str


class Line(NamedTuple):
    """Our guest's end of a serial line. Two descriptors of one socket: UML waits for "readable" and "writable" on separate ones."""

    into: int
    out: int


class Guest(ABC):
    """A context manager; on exit the guest is powered off, or killed when it does not comply."""

    kind: str
    boot_timeout_seconds = BOOT_TIMEOUT_SECONDS

    def __init__(
        self,
        image: Image,
        sockets: Sequence[str] = (),
        *,
        memory_mib: int = 1024,
        prefix: Sequence[str] = (),
        tags: Sequence[str] = ("myfs",),
    ) -> None:
        self.image = image
        self.sockets = list(sockets)
        self.tags = list(tags)
        self.memory_mib = memory_mib
        self.prefix = list(prefix)
        self.uname: list[str] = []
        self.daemon_ended: Callable[[], str | None] | None = None  # a guest whose daemon is gone waits for ever: ask while waiting
        self._process: subprocess.Popen[bytes] | None = None
        self._ids = itertools.count(1)
        self._loaded: set[str] = set()
        self._console_text = bytearray()
        self._scratch = ""

    @abstractmethod
    def argv(self, console: Line, agent: Line) -> list[str]:
        """The command that boots this kind of guest with the descriptors as its serial lines."""

    def confinement(self) -> Sequence[str]:
        return ()

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def __enter__(self) -> Self:
        self._scratch = tempfile.mkdtemp(prefix="guest-")
        self._console, console_end = socket.socketpair()
        self._agent, agent_end = socket.socketpair()
        with console_end, agent_end, console_end.dup() as console_out, agent_end.dup() as agent_out:
            console = Line(console_end.fileno(), console_out.fileno())
            agent = Line(agent_end.fileno(), agent_out.fileno())
            self._process = subprocess.Popen(
                [*DIES_WITH_US, *self.confinement(), *self.prefix, *self.argv(console, agent)],
                stdin=subprocess.DEVNULL,
                stdout=console_end,
                stderr=console_end,
                pass_fds=[*console, *agent],
                env=self.environment(),
                start_new_session=True,
            )
        self._link = Link(self._agent.fileno())
        self._relay: int | None = None
        self._reader = threading.Thread(target=self._drain_console, daemon=True, name="guest console")
        self._reader.start()
        try:
            self.uname = self._answer(0, self.boot_timeout_seconds)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and self._process is not None:
                self.power_off()
        finally:
            self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def kernel(self) -> tuple[int, int]:
        """Major and minor version of the guest's kernel."""
        major, minor = self.uname[2].split(".")[:2]
        return int(major), int(minor)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def console(self) -> str:
        return self._console_text.decode(errors="replace")

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = CALL_TIMEOUT_SECONDS) -> Any:
        """Runs a module-level function in the guest. Its module may import the standard library, and what was loaded before."""
        module = sys.modules[function.__module__]
        self.load(module, timeout)
        return self._request("call", {"module": module.__name__, "function": function.__name__, "arguments": list(arguments)}, timeout)

    def load(self, module: ModuleType, timeout: float = CALL_TIMEOUT_SECONDS) -> None:
        """Sends a module over as source, once; modules that import each other go in the order of their imports."""
        if module.__name__ not in self._loaded:
            self._request("load", {"name": module.__name__, "source": inspect.getsource(module)}, timeout)
            self._loaded.add(module.__name__)

    def python(self, source: str, timeout: float = CALL_TIMEOUT_SECONDS, **names: Any) -> Any:
        """Runs statements in the guest; the value is what they assign to `result`."""
        return self._request("python", {"source": source, "arguments": names}, timeout)

    def run(
        self, *argv: str, cwd: str | None = None, env: dict[str, str] | None = None, stdin: str = "", timeout: float = CALL_TIMEOUT_SECONDS
    ) -> Completed:
        arguments = {"argv": list(argv), "cwd": cwd, "env": env or {}, "stdin": stdin}
        return Completed(*self._request("run", arguments, timeout))

    def check(
        self, *argv: str, cwd: str | None = None, env: dict[str, str] | None = None, stdin: str = "", timeout: float = CALL_TIMEOUT_SECONDS
    ) -> str:
        """The standard output of a program that must succeed."""
        done = self.run(*argv, cwd=cwd, env=env, stdin=stdin, timeout=timeout)
        if done.code != 0:
            raise GuestRaisedError(
                f"{' '.join(argv)} ended with {done.code} in the guest: {done.stdout[-2000:]}{done.stderr[-2000:]}", None
            )
        return done.stdout

    def mount(self, tag: str = "myfs", at: str = "/mnt", options: str = "") -> None:
        self.check("mkdir", "-p", at)
        self.check("mount", "-t", "virtiofs", *(["-o", options] if options else []), tag, at)

    def unmount(self, at: str = "/mnt") -> None:
        self.check("umount", at)

    def drop_caches(self) -> None:
        """Writes back and forgets what can be forgotten, which sends FORGET for every inode nobody uses."""
        self.check("sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches")

    def shell(self, columns: int, lines: int, terminal_in: int, terminal_out: int) -> int:
        """An interactive shell of the guest on our caller's terminal (raw already), until the user leaves it."""
        self._relay = terminal_out
        try:
            number = self._send("shell", {"columns": columns, "lines": lines})
            while not select.select([self._agent], [], [], 0)[0]:
                if terminal_in in select.select([terminal_in, self._agent], [], [])[0]:
                    typed = os.read(terminal_in, 4096)
                    if not typed:  # end of input is not a key: tell the shell as a terminal would
                        typed = b"\x04"
                        time.sleep(0.1)
                    self._console.sendall(typed)
            return int(self._answer(number, CALL_TIMEOUT_SECONDS))
        finally:
            self._relay = None

    def power_off(self, timeout: float = 30.0) -> None:
        if not self.alive():
            raise GuestError(f"the guest died before it was powered off{self._tail()}")
        self._send("poweroff", {})
        try:
            assert self._process is not None
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not power off within {timeout:.0f} s{self._tail()}") from None

    def close(self) -> None:
        """Ends the guest if it still runs, and gives everything back. May be called twice."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # not waited for yet, so the number is still ours
        self._process.wait()
        self._process = None
        self._console.shutdown(socket.SHUT_RDWR)
        self._reader.join(10)
        self._console.close()
        self._agent.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _request(self, operation: str, arguments: dict[str, Any], timeout: float) -> Any:
        return self._answer(self._send(operation, arguments), timeout)

    def _send(self, operation: str, arguments: dict[str, Any]) -> int:
        number = next(self._ids)
        self._exchange(lambda: self._link.send({"id": number, "op": operation, "args": arguments}, CALL_TIMEOUT_SECONDS))
        return number

    def _answer(self, number: int, timeout: float) -> Any:
        message = self._exchange(lambda: self._wait_and_receive(timeout))
        if message["id"] != number:
            raise GuestError(f"the guest answered request {message['id']} instead of {number}")
        if "error" in message:
            raise GuestRaisedError(message["error"], message["errno"])
        return message["result"]

    def _wait_and_receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while not select.select([self._agent], [], [], 0.5)[0]:
            if self.daemon_ended is not None and (reason := self.daemon_ended()):
                raise ConnectionAbortedError(reason)
            if time.monotonic() > deadline:
                raise TimeoutError
        return self._link.receive(timeout)

    def _exchange(self, action: Callable[[], Any]) -> Any:
        """After a failure the two ends no longer agree whose turn it is: the guest is of no more use, and is ended."""
        if not self.alive():
            raise GuestError(f"the guest is gone{self._tail()}")
        try:
            return action()
        except (OSError, LinkClosedError) as error:
            reason = "does not answer" if isinstance(error, TimeoutError) else f"is of no more use: {error}"
            tail = self._tail()
            self.close()
            raise GuestError(f"the guest {reason}{tail}") from error

    def _drain_console(self) -> None:
        while data := self._console.recv(1 << 16):
            self._console_text += data
            if self._relay is not None:
                os.write(self._relay, data)

    def _tail(self) -> str:
        time.sleep(0.2)  # what it said last may still be on its way
        return f"; its console said:\n{self.console()[-4000:]}" if self._console_text else "; its console said nothing"


class UmlGuest(Guest):
    """User-Mode Linux. Its driver asks the daemon for the tag, so the daemon must have been given one."""

    kind = "uml"

    def __init__(
        self, sockets: Sequence[str] = (), *, memory_mib: int = 1024, prefix: Sequence[str] = (), tags: Sequence[str] = ("myfs",)
    ) -> None:
        super().__init__(uml_image(), sockets, memory_mib=memory_mib, prefix=prefix, tags=tags)

    def argv(self, console: Line, agent: Line) -> list[str]:
        return [
            str(self.image.kernel),
            f"mem={self.memory_mib}M",
            f"initrd={self.image.initramfs}",
            "rdinit=/init",
            f"uml_dir={self._scratch}",
            "umid=guest",
            "con=null",
            f"con0=fd:{console.into},fd:{console.out}",
            "ssl=null",
            f"ssl0=fd:{agent.into},fd:{agent.out}",
            "agent=/dev/ttyS0",
            *(f"virtio_uml.device={path}:26" for path in self.sockets),
            "quiet",
            "panic=-1",
            "noreboot",
        ]

    def confinement(self) -> Sequence[str]:
        """UML has helper processes that outlive it when it is killed: a pid namespace of its own takes them along."""
        return ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--")

    def environment(self) -> dict[str, str]:
        """Guest memory is a file of its own in TMPDIR: on tmpfs where that has room, or else the host writes it back to disk."""
        shm = Path("/dev/shm")
        roomy = shm.is_dir() and shutil.disk_usage(shm).free > (self.memory_mib + 64) << 20
        return {**os.environ, "TMPDIR": str(shm) if roomy else self._scratch}


class QemuGuest(Guest):
    """QEMU, system emulation without KVM: it needs no device of the host's and behaves the same everywhere."""

    kind = "qemu"

    def __init__(
        self,
        sockets: Sequence[str] = (),
        *,
        memory_mib: int = 1024,
        prefix: Sequence[str] = (),
        tags: Sequence[str] = ("myfs",),
        image: Image | None = None,
        cpus: int = 2,
        device_options: str = "queue-size=1024",
        extra: Sequence[str] = (),
        append: str = GUEST_APPEND,
    ) -> None:
        super().__init__(image or qemu_image(), sockets, memory_mib=memory_mib, prefix=prefix, tags=tags)
        self.cpus = cpus
        self.device_options = device_options
        self.extra = list(extra)
        self.append = append

    def argv(self, console: Line, agent: Line) -> list[str]:
        memory = f"{self.memory_mib}M"
        options = {
            # With a thread per vCPU, one may run into the breakpoint that another is just patching over (int3 panics at boot).
            "-accel": "tcg,thread=single",
            "-cpu": "qemu64,-cx16",  # TCG of QEMU 7.2 corrupts flags in cmpxchg16b, and one guest in ten panics early
            "-smp": str(self.cpus),
            "-m": memory,
            "-object": f"memory-backend-memfd,id=mem,size={memory},share=on",
            "-numa": "node,memdev=mem",
            "-kernel": str(self.image.kernel),
            "-initrd": str(self.image.initramfs),
            "-append": self.append,
        }
        return [
            "qemu-system-x86_64",
            *itertools.chain.from_iterable(options.items()),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-chardev", f"socket,id=console,fd={console.into}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,fd={agent.into}", "-serial", "chardev:agent"),
            *itertools.chain.from_iterable(self._device(number) for number in range(len(self.sockets))),
            *self.extra,
        ]

    def _device(self, number: int) -> list[str]:
        device = ",".join(filter(None, [f"vhost-user-fs-pci,chardev=fs{number},tag={self.tags[number]}", self.device_options]))
        return ["-chardev", f"socket,id=fs{number},path={self.sockets[number]}", "-device", device]
