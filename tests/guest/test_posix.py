"""A program cannot tell virtio-fs from the host's own file system: the same system calls have the same results on both.

The scenarios are in posix/; here they run on the host, next to the share on the same file system, and in the guest on the
share. Each side records what it saw, and the records must be equal, but for what posix/differences.py explains. Each
configuration runs a part of the scenarios, another one than the next; in full runs the first ones run them all.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.guest.configurations import EVERY_VALUE_ONCE, FULL
from tests.guest.conftest import Share
from tests.guest.posix import contents, machine, names, other_process, owners, program, walk
from tests.guest.posix.differences import DIFFERENCES, Difference, Facts

MODULES = (other_process, machine, names, owners, contents, walk, program)  # in the order of their imports
PARTS = {"names": 16, "owners": 32, "contents": 8, "walk": 16}

Records = dict[str, Any]


class Side(NamedTuple):
    """Which scenarios run, and whether it is compared when times move."""

    catalogue: str
    part: int
    parts: int
    times: bool


class Found(NamedTuple):
    """One place where the two sides differ."""

    place: str
    host: Any
    guest: Any

    def explained_by(self, known: Difference, facts: Facts) -> bool:
        return known.explains(self.place, str(self.host), str(self.guest), facts)

    def __str__(self) -> str:
        return f"{self.place}\n    host  {self.host}\n    guest {self.guest}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("catalogue", list(PARTS))
def test_calls_have_the_results_they_have_on_the_host(share: Share, catalogue: str) -> None:
    facts = Facts(share.guest.kernel, share.serving.configuration.options)
    whole = FULL and share.serving.configuration.number < len(EVERY_VALUE_ONCE)
    parts = 1 if whole else PARTS[catalogue]
    times = times_move_at_once() and "--writeback" not in facts.options  # with write-back the guest's clock sets them, in jiffies
    ran = Side(catalogue, share.serving.configuration.number % parts, parts, times)
    expected = record_on_host(ran)
    found = [found for name, records in in_guest(share, ran, expected).items() for found in compare(ran, name, expected[name], records)]
    unexplained = [str(one) for one in found if not any(one.explained_by(known, facts) for known in DIFFERENCES)]
    assert not unexplained, f"{len(unexplained)} differences:\n" + "\n".join(unexplained[:40])
    for known in DIFFERENCES:
        tried = whole and known.applies(facts) and known.sure(facts) and known.catalogue == catalogue
        assert not tried or any(one.explained_by(known, facts) for one in found), f"no longer so: {known.reason}"


def in_guest(share: Share, ran: Side, expected: Records) -> Records:
    """The guest's records of those scenarios that it records differently."""
    for module in MODULES:
        share.guest.load(module)
    share.call(program.harden, program.hardening())
    digests = {name: program.digest(records) for name, records in expected.items()}
    folder = f"{share.inside}/posix"
    names, different = share.call(program.different, ran.catalogue, ran.part, ran.parts, folder, ran.times, digests, timeout=1000)
    assert names == list(expected)
    return different


def record_on_host(ran: Side) -> Records:
    """In another process: scenarios change user and working directory, and threads run in this one."""
    root = tempfile.mkdtemp(prefix="host-", dir="/var/tmp")
    try:
        os.chmod(root, 0o755)
        command = [sys.executable, "-m", program.__name__, ran.catalogue, str(ran.part), str(ran.parts), root, "times" if ran.times else ""]
        recorded: Records = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        return recorded
    finally:
        shutil.rmtree(root)


def times_move_at_once() -> bool:
    """Whether the host gives each change a time of its own (Linux 6.13), or all of a jiffy the same."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        seen = set()
        for number in range(20):
            os.chmod(folder, 0o700 + number % 2)
            seen.add(os.stat(folder).st_ctime_ns)
    return len(seen) == 20


def compare(ran: Side, name: str, host: Records, guest: Records) -> Iterator[Found]:
    steps = dict(program.chosen(ran.catalogue, ran.part, ran.parts))[name]
    for step, on_host, in_guest in zip(steps, host["steps"], guest["steps"], strict=True):
        if on_host != in_guest:
            yield Found(f"{name} | {step}", on_host, in_guest)
    for path in sorted(host["left"].keys() | guest["left"].keys()):
        on_host, in_guest = host["left"].get(path), guest["left"].get(path)
        if on_host != in_guest:
            yield Found(f"{name} | leaves {path}", on_host, in_guest)
