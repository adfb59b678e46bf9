"""Serving costs no memory that does not come back: the collector is off, so one cycle per request would be a leak without end."""

import errno
import os
from pathlib import Path

import pytest

from tests.support.frontend.fuse_client import ROOT

ROUNDS = 3000
TOLERATED_BYTES = 1 << 20  # a leak of one exception and its frames per request is several times that


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no RssAnon")


def memory_of(served) -> dict[int, int]:
    return {pid: anonymous_bytes(pid) for pid in served.daemon.pids()}


def fail_by_the_broker(client, _nodeid: int) -> None:
    with pytest.raises(OSError) as failed:
        client.lookup(ROOT, b"no such name")
    assert failed.value.errno == errno.ENOENT


def fail_in_the_worker(client, nodeid: int) -> None:
    with pytest.raises(OSError) as failed:
        client.lseek(nodeid, 1 << 40, 0, os.SEEK_SET)
    assert failed.value.errno == errno.EBADF


def succeed(client, nodeid: int) -> None:
    opened = client.open(nodeid)
    client.read(nodeid, opened.fh, 0, 4096)
    client.release(nodeid, opened.fh)


def list_with_attributes(client, _nodeid: int) -> None:
    client.list(ROOT, plus=True)


@pytest.mark.parametrize("act", [fail_by_the_broker, fail_in_the_worker, succeed, list_with_attributes])
def test_requests_leave_no_memory_behind(fs, act):
    fs.put("file", b"contents")
    nodeid = fs.lookup(b"file")
    for _ in range(ROUNDS // 10):
        act(fs.client, nodeid)
    before = memory_of(fs.served)
    for _ in range(ROUNDS):
        act(fs.client, nodeid)
    after = memory_of(fs.served)
    grown = {pid: after[pid] - before[pid] for pid in before if after[pid] - before[pid] > TOLERATED_BYTES}
    assert grown == {}
