"""Every rule of the policy is executed in a process confined as its role: as it permits, and with each condition broken.

And everything that no rule is about is executed, too: it kills.
"""

import os
import platform
import select
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.security.rule_cases import CASES, Call, Case, Fd
from tests.security.sandbox import Outcome, Sandbox, Spec, broker, control, number_of, supervisor, worker
from vfsd.sandbox.seccomp import load_policy
from vfsd.sandbox.seccomp_policy import Rule

POLICY = load_policy()
MACHINE = platform.machine()
CONFINED = ("worker", "control", "broker")
ALL_BITS = (1 << 64) - 1
LOW_BITS = (1 << 32) - 1
SOME_ADDRESS = 0x7F0000000000
# More than any kernel's table has today (Linux 6.18: 469), and on x86-64 the entry of the x32 ABI: its own numbers, some of the others.
X32_BIT = 0x40000000
NUMBERS = [*range(500), *(X32_BIT | number for number in (*range(0, 500, 16), *range(512, 548)))]
# Two calls of x86-64 that the kernel shows to no filter, since they belong to its own trampolines for probes (Linux 6.11 and 6.17).
# From anywhere else the one raises SIGILL, the other fails.
SHOWN_TO_NO_FILTER = {335: "uretprobe", 336: "uprobe"} if MACHINE == "x86_64" else {}


@dataclass(frozen=True)
class Attempt:
    """`verdict`: what the policy says of the last call."""

    rule: Rule
    case: Case
    calls: list[list[Any]]
    verdict: str | int


def rules(role: str) -> list[Rule]:
    return POLICY.roles[role].rules_for(MACHINE)


def value(argument: int | str, fds: dict[Fd, int]) -> int:
    """A number for what conditions are checked with; an address may be any."""
    if isinstance(argument, Fd):
        return fds.get(argument, 5)
    return argument & ALL_BITS if isinstance(argument, int) else SOME_ADDRESS


def values(call: Call, fds: dict[Fd, int]) -> tuple[int, ...]:
    return tuple([*(value(each, fds) for each in call[1:]), 0, 0, 0, 0, 0, 0][:6])


def rule_of(role: str, case: Case) -> Rule | None:
    """The rule that decides about a case; one that the kernel makes us make is named by the case."""
    if case.about is not None:
        return next((rule for rule in rules(role) if rule.syscall == case.about), None)
    return POLICY.roles[role].deciding_rule(case.syscall, values(case.calls[-1], {}), MACHINE)


def encoded(call: Call, fds: dict[Fd, int]) -> list[Any]:
    return [number_of(str(call[0])), *(fds[each] if isinstance(each, Fd) else each for each in call[1:])]


def as_permitted(role: str, fds: dict[Fd, int]) -> Iterator[Attempt]:
    for case in CASES[role]:
        rule = rule_of(role, case)
        if rule is not None:
            yield Attempt(rule, case, [encoded(call, fds) for call in case.calls], rule.action)


def some_bits(mask: int) -> set[int]:
    """The lowest and the highest."""
    return {mask & -mask, 1 << mask.bit_length() - 1} if mask else set()


def broken(rule: Rule, call: list[Any], fds: dict[Fd, int]) -> Iterator[tuple[int, int]]:
    """(argument, its new value): one bit wrong, among those that must be set, must not be, and in the upper half."""
    for each in rule.comparisons:
        assert each.operator == "masked", "the shipped policy uses no other"
        bits: set[int] = set()
        for mask in (each.operand, each.value & ~each.operand & LOW_BITS, each.value & ~LOW_BITS):
            bits |= some_bits(mask)
        good = value(call[each.argument + 1] if each.argument + 1 < len(call) else 0, fds)
        yield from ((each.argument, good ^ bit) for bit in sorted(bits))


def perturbed(role: str, fds: dict[Fd, int]) -> Iterator[Attempt]:
    for attempt in as_permitted(role, fds):
        if attempt.case.about is not None:
            continue
        *before, call = attempt.calls
        for argument, wrong in broken(attempt.rule, call, fds):
            changed = [*call, *[0] * (argument + 2 - len(call))]
            changed[argument + 1] = wrong
            arguments = tuple([value(each, fds) for each in changed[1:]] + [0] * 6)[:6]
            verdict = POLICY.roles[role].verdict(attempt.rule.syscall, arguments, MACHINE)
            if verdict != "allow":  # another rule may permit it
                yield Attempt(attempt.rule, attempt.case, [*before, changed], verdict)


@pytest.fixture(scope="module")
def share(tmp_path_factory):
    folder = tmp_path_factory.mktemp("share")
    (folder / "file").write_bytes(b"contents")
    (folder / "other file").write_bytes(b"contents")
    return folder


@pytest.fixture
def fds(share) -> Iterator[dict[Fd, int]]:
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    os.close(read_end)
    epoll = select.epoll()
    memfd = os.memfd_create("memory")
    os.ftruncate(memfd, 4096)
    found = {
        Fd.FILE: os.open(share / "file", os.O_RDWR),
        Fd.OTHER_FILE: os.open(share / "other file", os.O_RDWR),
        Fd.DIRECTORY: os.open(share, os.O_RDONLY | os.O_DIRECTORY),
        Fd.SOCKET: ours.detach(),
        Fd.EPOLL: os.dup(epoll.fileno()),
        Fd.NULL: os.open(os.devnull, os.O_RDWR),
        Fd.MEMFD: memfd,
        Fd.BROKEN_PIPE: write_end,
        Fd.SPARE: os.open(os.devnull, os.O_RDONLY),
    }
    yield found
    theirs.close()
    epoll.close()
    for fd in found.values():
        os.close(fd)


def confined(role: str, share, fds: dict[Fd, int]) -> Spec:
    made = {"worker": worker, "control": control, "supervisor": supervisor, "broker": lambda **given: broker(str(share), **given)}
    return made[role](fds=tuple(fds.values()))


def explain(attempt: Attempt, outcome: Outcome) -> str:
    return f"{attempt.rule.where}: {attempt.calls}: {outcome}"


def test_every_rule_has_a_case_and_every_case_a_rule():
    for role in CONFINED:
        cases = [rule_of(role, case) for case in CASES[role] if not is_elsewhere(role, case)]
        assert None not in cases
        assert [rule.where for rule in rules(role) if rule not in cases] == []
    every = {rule.syscall for role in CONFINED for rule in POLICY.roles[role].rules}
    assert every == {case.syscall for role in CONFINED for case in CASES[role]}


def is_elsewhere(role: str, case: Case) -> bool:
    """Whether the policy speaks of that call on another machine only."""
    return case.syscall not in {rule.syscall for rule in rules(role)}


@pytest.mark.parametrize("role", CONFINED)
def test_what_a_rule_permits_works_and_what_it_answers_is_its_errno(sandbox: Sandbox, share, fds, role):
    attempts = list(as_permitted(role, fds))
    for attempt, outcome in zip(attempts, sandbox.attempt_each(confined(role, share, fds), [each.calls for each in attempts]), strict=True):
        case = attempt.case
        assert outcome.signal is None, explain(attempt, outcome)
        assert outcome.status == (case.ends or 0), explain(attempt, outcome)
        if case.ends is not None:
            continue
        if outcome.value == -1:
            assert outcome.errno in case.fails, explain(attempt, outcome)
        else:
            assert case.gives in (None, outcome.value), explain(attempt, outcome)
        if isinstance(attempt.verdict, int):
            assert outcome.value == (-1 if attempt.verdict else 0), explain(attempt, outcome)


@pytest.mark.parametrize("role", CONFINED)
def test_what_breaks_a_condition_dies_or_gets_the_errno_of_the_rule_that_is_left(sandbox: Sandbox, share, fds, role):
    attempts = list(perturbed(role, fds))
    for attempt, outcome in zip(attempts, sandbox.attempt_each(confined(role, share, fds), [each.calls for each in attempts]), strict=True):
        if attempt.verdict == "kill":
            assert outcome.signal == signal.SIGSYS, explain(attempt, outcome)
        else:
            assert (outcome.signal, outcome.value, outcome.errno) == (None, -1, attempt.verdict), explain(attempt, outcome)


@pytest.mark.parametrize("role", CONFINED)
def test_every_condition_is_broken_in_some_way_that_does_not_pass(role):
    fds = dict.fromkeys(Fd, 5)
    tried = {(attempt.rule.where, argument) for attempt in perturbed(role, fds) for argument in arguments_changed(attempt, fds)}
    missing = [(rule.where, each) for rule in rules(role) for each in rule.comparisons if (rule.where, each.argument) not in tried]
    assert missing == []


def arguments_changed(attempt: Attempt, fds: dict[Fd, int]) -> list[int]:
    before, after = values(attempt.case.calls[-1], fds), values(tuple(attempt.calls[-1]), fds)
    return [number for number in range(6) if before[number] != after[number]]


@pytest.mark.parametrize("role", CONFINED)
def test_every_other_system_call_kills(sandbox: Sandbox, share, fds, role):
    """All numbers that no rule is about, in a process that has no capability left, should one not be stopped."""
    spec = confined(role, share, fds)
    spec.capabilities = ()
    named = {number_of(rule.syscall) for rule in rules(role)}
    numbers = [number for number in NUMBERS if number not in named]
    outcomes = dict(zip(numbers, sandbox.attempt_each(spec, [[[number, *[-1] * 6]] for number in numbers]), strict=True))
    left = {number: outcome for number, outcome in outcomes.items() if not outcome.killed_by_filter}
    assert set(left) <= set(SHOWN_TO_NO_FILTER), left
    assert all(outcome.signal == signal.SIGILL or outcome.value == -1 for outcome in left.values()), left


def test_every_call_that_is_denied_to_the_supervisor_kills(sandbox: Sandbox, share, fds):
    spec = confined("supervisor", share, fds)
    spec.capabilities = ()
    names = [rule.syscall for rule in rules("supervisor")]
    outcomes = sandbox.attempt_each(spec, [[[number_of(name), *[-1] * 6]] for name in names])
    assert [name for name, outcome in zip(names, outcomes, strict=True) if not outcome.killed_by_filter] == []


def test_an_attempt_without_a_filter_is_not_killed(sandbox: Sandbox, filters, share, fds):
    """That the tests above can fail: the log action lets through what kill does not."""
    spec = confined("worker", share, fds)
    (outcome,) = Sandbox(filters["log"]).attempt_each(spec, [[[number_of("getppid")]]])
    assert (outcome.signal, outcome.status) == (None, 0)
    (outcome,) = sandbox.attempt_each(confined("worker", share, fds), [[[number_of("getppid")]]])
    assert outcome.killed_by_filter
