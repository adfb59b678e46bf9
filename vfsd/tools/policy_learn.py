"""`vfsdctl policy learn -- CMD...`: run a daemon under observation, and say what its policy lacks and what it did not need."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType

import prctl

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import POLICY_FILE, Policy, load_policy
from vfsd.tools.proposal import propose_rules
from vfsd.tools.rule_coverage import unused_rules
from vfsd.tools.syscall_record import Recorder, SyscallRecord, new_record
from vfsd.tools.syscall_trace import SyscallTrace, strace_command

_READ_BYTES = 1 << 16
_LOOK_AGAIN_MILLISECONDS = 100
_OPTION = "--seccomp"
_STDERR = 2  # ours, for what the command prints: our own output is the report


def add_to(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "learn",
        help="run a daemon under observation: which calls its policy lacks, which rules it did not use",
        description="Run CMD, a command line of vfsd, with --seccomp=log under strace until it ends, then say per role which calls were "
        "made after lock-down that the policy does not allow, and which rules were not used. Rules are proposed for what is missing, without "
        "a reason: a policy is refused until somebody gives one. Signals TERM and INT are passed on. Exit status 1 if anything is missing.",
        allow_abbrev=False,
    )
    parser.add_argument("--record", metavar="FILE", help="write what was seen to FILE, for vfsdctl policy coverage")
    parser.add_argument("--policy", default=POLICY_FILE, metavar="FILE", help="compare with this policy (default: the one vfsd comes with)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("command", nargs="+", metavar="CMD", help="after --: vfsd and its options")
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    policy = load_policy(found.policy)
    record = new_record(policy, runs=1)
    status = observe(_with_log_action(found.command), Recorder(policy, record))
    if not record.roles:
        raise ConfigError(f"{found.command[0]} ended with status {status}, and no process of it was locked down; is it vfsd?")
    if found.record is not None:
        with open(found.record, "w", encoding="utf-8") as file:
            file.write(record.to_json())
    print(json.dumps(_document(policy, record, status), indent=2) if found.json else _text(policy, record, status))
    return 1 if status or any(role.missing for role in record.roles.values()) else 0


def _with_log_action(command: Sequence[str]) -> list[str]:
    """With the action kill, a run would end at the first call that is missing."""
    said = [word for word in command if word == _OPTION or word.startswith(f"{_OPTION}=")]
    if not said:
        return [*command, f"{_OPTION}=log"]
    if f"{_OPTION}=none" in said or "none" in command[command.index(said[0]) + 1 :][:1]:
        raise ConfigError("--seccomp=none: without a filter nothing tells where lock-down is; leave it out")
    return list(command)


def observe(command: Sequence[str], recorder: Recorder) -> int:
    """Run it to its end; its exit status. Our own end, if it comes first, is SIGTERM to it."""
    trace = SyscallTrace(recorder.observe)
    with tempfile.TemporaryDirectory(prefix="vfsdctl-") as folder:
        fifo = os.path.join(folder, "strace")
        os.mkfifo(fifo, 0o600)
        with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as lines:
            process = subprocess.Popen(  # a session of its own: what a terminal sends comes to us, and we pass it on once
                strace_command(command, fifo),
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                start_new_session=True,
                preexec_fn=partial(prctl.set_pdeathsig, signal.SIGTERM),  # noqa: PLW1509  # there is one thread here
            )
            with _passing_on_signals(process):
                for line in _lines(lines.fileno(), process):
                    trace.feed(line)
                return process.wait()


def _lines(fd: int, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Whole lines, until strace, which holds the other end for as long as anything that it traces runs, closes it."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    rest = b""
    while True:
        events = poller.poll(_LOOK_AGAIN_MILLISECONDS)
        if not events and process.poll() is not None and not rest:
            return  # strace could not even start
        chunk = os.read(fd, _READ_BYTES) if events else None
        if chunk == b"":
            return
        *whole, rest = (rest + (chunk or b"")).split(b"\n")
        yield from (line.decode(errors="backslashreplace") for line in whole)


@contextmanager
def _passing_on_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(policy: Policy, record: SyscallRecord, status: int) -> str:
    lines = [f"the command ended with status {status}"]
    for name, role in record.roles.items():
        lines.append(
            f"{name}: {len(role.used)} rules used, {len(unused_rules(policy, record, name))} not, {len(role.missing)} calls missing"
        )
        lines += [f"  missing: {syscall} ({missing.count} times)" for syscall, missing in sorted(role.missing.items())]
        lines += [f"  not used: {rule}" for rule in unused_rules(policy, record, name)]
    return "\n".join([*lines, *propose_rules(record)])


def _document(policy: Policy, record: SyscallRecord, status: int) -> dict[str, object]:
    return {
        "status": status,
        "record": json.loads(record.to_json()),
        "unused": {name: unused_rules(policy, record, name) for name in record.roles},
        "proposal": propose_rules(record),
    }
