"""What a taken-over worker can do with descriptors that the broker donated, layer by layer.

With its filter it dies of every one of these calls. Then the filter is left out on purpose, and Landlock with it, to see what
the layers beneath refuse: namespaces and roots, the broker's mounts, user nobody without a capability. The worker is a real
one, in hostile hands (`puppet.py`); the descriptors come from a real broker.

The table is what was observed. Where a column says `ok` that layer alone is not enough, and docs/threat-model.md says so.
"""

import errno
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.security.arena import Arena
from tests.security.sandbox import NOBODY
from vfsd.sandbox import filecalls, landlock
from vfsd.sandbox.seccomp import load_policy
from vfsd.wire import broker_messages as wire

AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
AF_NETLINK, AF_PACKET, AF_VSOCK = 16, 17, 40
PTRACE_ATTACH = 16
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
OPEN_TREE_CLONE = 1
MODES = ("namespace", "chroot", "none")


class Try(NamedTuple):
    """A call, and its outcome with Landlock and without it: one word for all of MODES, or one for each. `|`: one or the other.

    `abi`: the version of Landlock from which on it refuses this.
    """

    call: tuple[str | int | bytes, ...]
    confined: str
    without_landlock: str
    abi: int = 1


# In calls: "D" the share's directory, "F" a file of it for reading and writing, "P" the same as O_PATH; "BROKER" its pid,
# "SIBLING" that of another process of user nobody, as other workers are.
ESCAPES = {
    # Up and out. The broker of namespace mode has the share for the root of its mounts, so `..` of what it donates stays there.
    "up": Try(("openat", "D", b"..", os.O_RDONLY), "EACCES", "ok"),
    "up to a secret": Try(("openat", "D", b"../secret", os.O_RDONLY), "ENOENT EACCES EACCES", "ENOENT ok ok"),
    "up to a secret, as O_PATH": Try(("openat", "D", b"../secret", os.O_PATH), "ENOENT ok ok", "ENOENT ok ok"),
    "its attributes": Try(("newfstatat", "D", b"../secret", bytes(256), 0), "ENOENT ok ok", "ENOENT ok ok"),
    "a symlink out of the share": Try(("openat", "D", b"relative", os.O_RDONLY), "ELOOP EACCES EACCES", "ELOOP ok ok"),
    "an absolute symlink": Try(("openat", "D", b"absolute", os.O_RDONLY), "ELOOP EACCES EACCES", "ELOOP EACCES ok"),
    "its target": Try(("readlinkat", "D", b"relative", bytes(100), 100), "ok", "ok"),
    "an absolute path": Try(("openat", AT_FDCWD, "SECRET", os.O_RDONLY), "EACCES", "EACCES EACCES ok"),
    "make a directory outside": Try(("mkdirat", "D", b"../made", 0o777), "EACCES", "ok EACCES EACCES"),
    "link a file out": Try(("linkat", "D", b"file", "D", b"../linked", 0), "EACCES", "ok EACCES EACCES"),
    "link an open file": Try(("linkat", "F", b"", "D", b"directory/linked", AT_EMPTY_PATH), "ENOENT", "ENOENT"),
    "move a file out": Try(("renameat2", "D", b"loose", "D", b"../moved", 0), "EACCES", "ok EACCES EACCES"),
    "a file handle": Try(("open_by_handle_at", "D", "HANDLE", os.O_RDONLY), "EPERM", "EPERM"),
    # Below: with nobody's rights, what the broker would do with the guest's.
    "open below": Try(("openat", "D", b"file", os.O_RDONLY), "EACCES", "ok"),
    "open below, for writing": Try(("openat", "D", b"file", os.O_RDWR), "EACCES", "ok"),
    "make a directory below": Try(("mkdirat", "D", b"directory/made", 0o777), "EACCES", "ok"),
    "make a device below": Try(("mknodat", "D", b"directory/null", 0o020666, 0x103), "EACCES", "EPERM"),
    "change a mode": Try(("fchmod", "F", 0o6777), "EPERM", "EPERM"),
    "change an owner": Try(("fchown", "F", 0, 0), "EPERM", "EPERM"),
    "read by an O_PATH descriptor": Try(("read", "P", bytes(4), 4), "EBADF", "EBADF"),
    "reopen by /proc": Try(("openat", AT_FDCWD, "PROC-F", os.O_RDWR), "EACCES", "EACCES EACCES ok"),
    # A root of its own.
    "enter the directory": Try(("fchdir", "D"), "ok", "ok"),
    "and up from there": Try(("openat", AT_FDCWD, b"../secret", os.O_RDONLY), "ENOENT EACCES EACCES", "ENOENT ok ok"),
    "make it the root": Try(("chroot", b"."), "EPERM", "EPERM"),
    "pivot": Try(("pivot_root", b".", b"."), "EPERM", "EPERM"),
    "mount": Try(("mount", b"x", b"/", b"tmpfs", 0, 0), "EPERM", "EPERM"),
    "clone a mount": Try(("open_tree", "D", b"", AT_EMPTY_PATH | OPEN_TREE_CLONE), "EPERM", "EPERM"),
    "a network namespace": Try(("unshare", CLONE_NEWNET), "EPERM", "EPERM"),
    # /proc, of which there is none.
    "its executable": Try(("openat", AT_FDCWD, b"/proc/self/exe", os.O_RDONLY), "EACCES", "EACCES EACCES ok"),
    "another's root": Try(("openat", AT_FDCWD, "PROC-BROKER-ROOT", os.O_RDONLY), "EACCES", "EACCES"),
    # Other processes.
    "signal the broker": Try(("kill", "BROKER", 0), "ESRCH EPERM EPERM", "ESRCH EPERM EPERM"),
    "signal a sibling": Try(("kill", "SIBLING", 0), "ESRCH EPERM EPERM", "ESRCH ok ok", abi=6),
    "trace the broker": Try(("ptrace", PTRACE_ATTACH, "BROKER", 0, 0), "ESRCH EPERM EPERM", "ESRCH EPERM EPERM"),
    "a pidfd of the broker": Try(("pidfd_open", "BROKER", 0), "ESRCH ok ok", "ESRCH ok ok"),
    # Ids.
    "be root": Try(("setresuid", 0, 0, 0), "EPERM", "EPERM"),
    "be in root's group": Try(("setgroups", 1, bytes(4)), "EPERM", "EPERM"),
    # Sockets.
    "a network socket": Try(("socket", socket.AF_INET, socket.SOCK_STREAM, 0), "ok", "ok"),
    "a packet socket": Try(("socket", AF_PACKET, socket.SOCK_RAW, 0), "EPERM", "EPERM"),
    "a socket of the host's hypervisor": Try(("socket", AF_VSOCK, socket.SOCK_STREAM, 0), "ok|EAFNOSUPPORT", "ok|EAFNOSUPPORT"),
    "a netlink socket": Try(("socket", AF_NETLINK, socket.SOCK_RAW, 0), "ok", "ok"),
    # Code of its own.
    "a memory file": Try(("memfd_create", b"x", 0), "ok", "ok"),
}  # fmt: skip


class Prison:
    """An arena without the filter, and what the puppet was given."""

    def __init__(self, mode: str, *, with_landlock: bool, arguments: tuple[str, ...] = ("--seccomp=none",)) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="escapes-", dir="/var/tmp"))
        self.folder.chmod(0o755)  # what stops nobody must not be the way there
        self.arena = Arena(self.folder, "--sandbox", mode, *arguments, landlock=with_landlock)
        share = self.arena.share
        (share / "relative").symlink_to("../secret")
        (share / "absolute").symlink_to(self.arena.secret)
        (share / "loose").touch()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(share / "socket"))
        self.listener.listen()
        for path in (share, share / "directory", share / "file", share / "loose", share / "socket"):
            path.chmod(0o777)
        self.sibling = subprocess.Popen(["sleep", "300"], user=NOBODY, group=NOBODY, extra_groups=[])
        self.values = self._give() | {"BROKER": self.arena.broker.pid, "SIBLING": self.sibling.pid}

    def _give(self) -> dict[str, int | bytes]:
        broker, hostile = self.arena.broker, self.arena.hostile
        _, directory = broker.open(wire.OpenDir(1))
        _, file = broker.open(wire.Open(self.arena.file, os.O_RDWR))
        broker.errno_of(wire.GetAttr(self.arena.file))
        path = broker.ask(wire.GetAttr(self.arena.file)).fd
        assert path is not None
        secret = os.open(self.arena.secret, os.O_PATH)
        handle = filecalls.name_to_handle_at(secret)
        os.close(secret)
        with directory, file, path:
            given = {name: hostile.give(fd.fileno()) for name, fd in (("D", directory), ("F", file), ("P", path))}
        return given | {
            "HANDLE": handle,
            "SECRET": os.fsencode(self.arena.secret),
            "PROC-F": b"/proc/self/fd/%d" % given["F"],
            "PROC-BROKER-ROOT": b"/proc/%d/root" % broker.pid,
        }

    def attempt(self, call: tuple[str | int | bytes, ...]) -> str:
        """`ok`, or the name of the errno."""
        name, *arguments = call
        assert isinstance(name, str)
        result = self.arena.hostile.attempt(name, *[self.values[each] if isinstance(each, str) else each for each in arguments])
        return "ok" if result >= 0 else errno.errorcode[-result]

    def close(self) -> None:
        self.sibling.kill()
        self.sibling.wait()
        self.listener.close()
        self.arena.close()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module", params=[(mode, on) for mode in MODES for on in (True, False)], ids=lambda each: f"{each[0]}-{each[1]}")
def prison(request):
    mode, with_landlock = request.param
    if with_landlock and not landlock.abi_version():
        pytest.skip("this kernel has no Landlock")
    prison = Prison(mode, with_landlock=with_landlock)
    yield mode, with_landlock, prison
    prison.close()


def expected(tried: Try, mode: str, *, with_landlock: bool) -> str:
    words = (tried.confined if with_landlock and landlock.abi_version() >= tried.abi else tried.without_landlock).split()
    return words[0] if len(words) == 1 else words[MODES.index(mode)]


def test_what_the_layers_beneath_the_filter_refuse(prison):
    """In the order of the table: one process tries all."""
    mode, with_landlock, inside = prison
    found = {name: inside.attempt(tried.call) for name, tried in ESCAPES.items()}
    wanted = {name: expected(tried, mode, with_landlock=with_landlock) for name, tried in ESCAPES.items()}
    assert {name: word for name, word in found.items() if word not in wanted[name].split("|")} == {}, wanted
    secret = inside.folder / "secret"
    assert secret.read_text() == "outside"
    assert sorted(os.listdir(inside.folder)) == ["secret", "share"]


def test_above_the_share_is_the_share_in_namespace_mode_and_the_host_elsewhere(prison):
    mode, with_landlock, inside = prison
    hostile = inside.arena.hostile
    above = hostile.attempt("openat", inside.values["D"], b"..", os.O_RDONLY)
    if with_landlock:
        assert above == -errno.EACCES
    else:
        seen = [name for name in (b"file", b"secret") if hostile.attempt("openat", above, name, os.O_RDONLY) >= 0]
        assert seen == ([b"file"] if mode == "namespace" else [b"secret"])


def test_connections_without_the_filter(prison):
    """Sockets below a donated directory, and abstract ones of the host: the latter are of another network in namespace mode."""
    mode, with_landlock, inside = prison
    hostile = inside.arena.hostile
    hostile.attempt("fchdir", inside.values["D"])
    assert connect(hostile, b"socket") == "ok"  # no layer but the filter refuses this
    name = b"\0vfsd-test-%d" % os.getpid()
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(name)
        abstract.listen()
        refused = "ECONNREFUSED" if mode == "namespace" else "EPERM" if with_landlock and landlock.abi_version() >= 6 else "ok"
        assert connect(hostile, name) == refused


def connect(hostile, name: bytes) -> str:
    fd = hostile.attempt("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)
    result = hostile.attempt("connect", fd, struct.pack("H", socket.AF_UNIX) + name, 2 + len(name))
    return "ok" if result >= 0 else errno.errorcode[-result]


# A program for x86-64: exit_group(77 + the errno of unshare(CLONE_NEWUSER)).
CODE = bytes.fromhex("b810010000bf000000100f05f7d88d784db8e70000000f05")
PROGRAM = (
    b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 120 + len(CODE), 120 + len(CODE), 4096) + CODE
)  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="its program is for x86-64")
def test_only_the_filter_keeps_it_from_a_program_of_its_own_and_so_from_a_user_namespace():
    """Made in memory. Unlike a worker that program has one thread, so it may unshare(2); what it is root of then is empty."""
    prison = Prison("namespace", with_landlock=True)
    try:
        hostile = prison.arena.hostile
        assert hostile.order("clone", CLONE_NEWUSER) == [-1, errno.EAGAIN], "a limit forbids it further processes"
        assert hostile.attempt("unshare", CLONE_NEWUSER) == -errno.EINVAL, "it has several threads"
        memfd = hostile.attempt("memfd_create", b"x", 0)
        assert hostile.order("send_file", memfd, PROGRAM) == len(PROGRAM)
        with pytest.raises(EOFError, match="ended with exit status 77"):
            hostile.attempt("execveat", memfd, b"", 0, 0, AT_EMPTY_PATH)
    finally:
        prison.close()


# --- with the filter ----------------------------------------------------------------------------------------------------------

# What is left open by the layers beneath somewhere above, and more of what an exploit would try.
FATAL = {
    name: ESCAPES[name].call for name in ("up", "up to a secret, as O_PATH", "move a file out", "enter the directory", "signal a sibling")
}


def test_by_its_policy_a_worker_dies_of_every_escape():
    """But of two: fstat inside the C library must not kill, and reading is what it is for."""
    worker, machine = load_policy().roles["worker"], os.uname().machine
    verdicts = {}
    for name, tried in ESCAPES.items():
        syscall, *arguments = tried.call
        numbers = [each if isinstance(each, int) else 3 for each in arguments]
        verdicts[name] = worker.verdict(str(syscall), (*numbers, *[0] * (6 - len(numbers))), machine)
    assert verdicts.pop("its attributes") == errno.ENOSYS
    assert verdicts.pop("read by an O_PATH descriptor") == "allow"
    assert set(verdicts.values()) == {"kill"}


@pytest.mark.parametrize("what", FATAL)
def test_a_worker_with_all_its_layers_dies_of(what):
    prison = Prison("namespace", with_landlock=True, arguments=())
    try:
        with pytest.raises(EOFError, match="killed by SIGSYS"):
            prison.attempt(FATAL[what])
        prison.arena.check_service()
    finally:
        prison.close()


# --- donated files, mapped ----------------------------------------------------------------------------------------------------

MAP_SHARED, PROT_READ_WRITE = 1, 3


def test_a_donated_file_can_be_mapped_as_it_was_opened_and_not_otherwise():
    """The filter cannot tell the frontend's memory from files. To map what it may write anyway gains a worker nothing."""
    prison = Prison("namespace", with_landlock=True, arguments=())
    try:
        hostile, broker = prison.arena.hostile, prison.arena.broker
        fh, for_reading = broker.open(wire.Open(prison.arena.file, os.O_RDONLY))
        with for_reading:
            reading = hostile.give(for_reading.fileno())
        assert hostile.attempt("mmap", 0, 4096, PROT_READ_WRITE, MAP_SHARED, reading, 0) == -errno.EACCES
        assert hostile.attempt("mmap", 0, 4096, PROT_READ_WRITE, MAP_SHARED, prison.values["D"], 0) == -errno.EACCES
        assert hostile.attempt("mmap", 0, 4096, PROT_READ_WRITE, MAP_SHARED, prison.values["P"], 0) == -errno.EBADF
        assert hostile.attempt("mmap", 0, 4096, PROT_READ_WRITE, MAP_SHARED, prison.values["F"], 0) > 0
        broker.tell(wire.Release(prison.arena.file, fh))
        prison.arena.check_service()
    finally:
        prison.close()
