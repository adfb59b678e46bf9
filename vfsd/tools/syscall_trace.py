"""Which system calls each role makes once it is locked down, read off what strace says of a daemon that it runs.

strace and not a filter that notifies (SECCOMP_RET_USER_NOTIF): what runs is then the daemon with its own filters, seen from
outside; strace sees every call, also those that a filter answers with an errno or kills for; and it costs no code of ours in a
confined process.

Who controls the bytes: strace, which prints numbers; names of files and other strings occur only as arguments of execve, and
whoever is traced has chosen those. Nothing that is not understood is an error: see `SyscallTrace.feed`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vfsd.errors import ConfigError
from vfsd.tools.daemon import role_of_command

# Called with role, name of the system call and its arguments, for each call after lock-down.
Report = Callable[[str, str, tuple[int, ...]], None]

_SECCOMP_SET_MODE_FILTER = 1
_ARGUMENT_MASK = (1 << 64) - 1
_LINE = re.compile(r"(\d+) +(.*)")
_CALL = re.compile(r"(\w+)\((.*)")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_RESULT = re.compile(r"\) += (-?\w+)(?: /\* (\d+) in strace's PID NS \*/)?")
_NUMBER = re.compile(r"-?0x[0-9a-f]+|-?\d+")
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"')
_NEW_TASK = {"clone", "clone3", "fork", "vfork"}


def strace_command(command: Sequence[str], output: str) -> list[str]:
    """`command` under strace, which is its grandchild: pid, exit status and signals are the command's own."""
    strace = shutil.which("strace")
    if strace is None:
        raise ConfigError("strace is not installed, and system calls are recorded by it; install it (Debian: strace)")
    decoded = "execve,clone,clone3,fork,vfork"
    options = ["-f", "--quiet=attach,personality", "--daemonize", "--signal=none", "--decode-pids=pidns", "--string-limit=256"]
    return [strace, *options, f"--raw=!{decoded}", "-o", output, "--", *command]


@dataclass(slots=True)
class _Program:
    """What one process executes: from its execve to the next. Threads share it, and a forked child until it executes something."""

    role: str
    locked_down: bool = False


@dataclass(slots=True)
class SyscallTrace:
    """Reads strace's lines, one after another, as they come.

    A process is locked down when its own seccomp(SECCOMP_SET_MODE_FILTER) has returned; its threads exist by then, so a
    thread that nothing is known of has not come that far.
    """

    report: Report
    _programs: dict[int, _Program] = field(default_factory=dict)
    _unfinished: dict[int, str] = field(default_factory=dict)

    def feed(self, line: str) -> None:
        matched = _LINE.match(line)
        if matched is None:
            return
        tid, text = int(matched[1]), matched[2]
        if text.startswith("+++ "):
            self._programs.pop(tid, None)
            self._unfinished.pop(tid, None)
        elif call := _CALL.match(text):
            self._begin(tid, call[1], call[2])
        elif resumed := _RESUMED.match(text):
            self._end(tid, resumed[1], self._unfinished.pop(tid, ""), resumed[2])

    def _begin(self, tid: int, name: str, rest: str) -> None:
        program = self._programs.get(tid)
        if program is not None and program.locked_down:
            self.report(program.role, name, _numbers(rest))
        if "<unfinished ...>" in rest:
            self._unfinished[tid] = rest
        else:
            self._end(tid, name, rest, rest)

    def _end(self, tid: int, name: str, begun: str, ended: str) -> None:
        result = _RESULT.search(ended)
        if result is None or result[1].startswith("-"):
            return
        program = self._programs.get(tid)
        if name == "execve":
            self._programs[tid] = _Program(_role(_command(begun)))
        elif name in _NEW_TASK and program is not None:
            # A thread is in the same program for good; a forked child until it executes another.
            self._programs[int(result[2] or result[1], 0)] = program
        elif name == "seccomp" and program is not None and _numbers(begun)[:1] == (_SECCOMP_SET_MODE_FILTER,):
            program.locked_down = True


def _numbers(rest: str) -> tuple[int, ...]:
    """The arguments, up to the parenthesis that ends them; where one is decoded (clone's) there are none."""
    inside = rest.partition(")")[0].partition(" <unfinished")[0]
    words = inside.split(", ") if inside else []
    if not all(_NUMBER.fullmatch(word) for word in words):
        return ()
    return tuple(int(word, 0) & _ARGUMENT_MASK for word in words)


def _role(command: Sequence[str]) -> str:
    """Whatever is no child of a supervisor is taken for one."""
    role = role_of_command(command)
    return "supervisor" if role == "unknown" else role


def _command(rest: str) -> list[str]:
    """execve("PATH", ["ARGV0", ...], ...): the arguments; strace escapes what is in them."""
    listed = rest.partition("[")[2].partition("]")[0]
    return _WORD.findall(listed)
