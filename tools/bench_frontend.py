"""Workloads of the benchmark that speak FUSE to a daemon directly, without a guest kernel: one request at a time, or many per kick.

Each takes a session and the nodeids it works on, and gives the number of requests it made.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.fuse_session import Pending
from vfsd.wire import fuse_abi as abi

PER_KICK = 30


@dataclass
class Session:
    """A FUSE session with the benchmark's files looked up and one of them open."""

    client: FuseClient
    small: int
    large: int
    fh: int


def open_session(client: FuseClient) -> Session:
    data = client.lookup(ROOT, b"data").nodeid
    small, large = client.lookup(data, b"small").nodeid, client.lookup(data, b"large").nodeid
    return Session(client, small, large, client.open(large, os.O_RDWR).fh)


def getattr_one(session: Session) -> int:
    for _ in range(500):
        session.client.getattr(session.large)
    return 500


def lookup_one(session: Session) -> int:
    for _ in range(500):
        session.client.lookup(session.small, b"0001")
    return 500


def lookup_missing(session: Session) -> int:
    for number in range(500):
        with suppress(FileNotFoundError):  # or a negative entry, which is an answer with nodeid 0
            session.client.lookup(session.small, b"missing-%d" % number)
    return 500


def read_4k(session: Session) -> int:
    for number in range(500):
        session.client.read(session.large, session.fh, number * 4096, 4096)
    return 500


def write_4k(session: Session) -> int:
    data = bytes(4096)
    for number in range(500):
        session.client.write(session.large, session.fh, number * 4096, data)
    return 500


def read_1m(session: Session) -> int:
    for number in range(32):
        session.client.read(session.large, session.fh, number << 20, 1 << 20)
    return 32


def open_release(session: Session) -> int:
    for _ in range(300):
        session.client.release(session.large, session.client.open(session.large).fh)
    return 300


def create_unlink(session: Session) -> int:
    for number in range(200):
        name = b"created-%d" % number
        entry, opened = session.client.create(session.small, name)
        session.client.release(entry.nodeid, opened.fh)
        session.client.unlink(session.small, name)
        session.client.forget(entry.nodeid)
    return 200


def list_plus(session: Session) -> int:
    """2000 entries with attributes, 32 KiB a request as a guest asks."""
    found = session.client.list(session.small, size=32768, plus=True)
    forgets = [(entry.entry.nodeid, 1) for entry in found if entry.entry is not None and entry.entry.nodeid]
    for start in range(0, len(forgets), 100):
        session.client.batch_forget(forgets[start : start + 100])
    return len(found)


def getattr_many(session: Session) -> int:
    return _batches(
        session, 20, lambda: session.client.send(abi.FUSE_GETATTR, session.large, abi.fuse_getattr_in.pack(0, 0), 104, kick=False)
    )


def lookup_many(session: Session) -> int:
    return _batches(
        session, 20, lambda: session.client.send(abi.FUSE_LOOKUP, session.small, b"0001\0", abi.fuse_entry_out.size, kick=False)
    )


def read_4k_many(session: Session) -> int:
    return _batches(session, 20, lambda: session.client.send_read(session.large, session.fh, 8192, 4096, kick=False))


def _batches(session: Session, rounds: int, send: Callable[[], Pending]) -> int:
    ring = session.client.device.rings[session.client.queue]
    for _ in range(rounds):
        pending = [send() for _ in range(PER_KICK)]
        ring.kick()
        session.client.finish_all(pending)
        for one in pending:
            session.client.result(one)
    return rounds * PER_KICK


WORKLOADS: dict[str, Callable[[Session], int]] = {
    "GETATTR": getattr_one,
    "LOOKUP, known": lookup_one,
    "LOOKUP, missing": lookup_missing,
    "READ 4 KiB": read_4k,
    "WRITE 4 KiB": write_4k,
    "READ 1 MiB": read_1m,
    "OPEN + RELEASE": open_release,
    "CREATE + RELEASE + UNLINK": create_unlink,
    "READDIRPLUS, per entry": list_plus,
    f"GETATTR, {PER_KICK} per kick": getattr_many,
    f"LOOKUP, {PER_KICK} per kick": lookup_many,
    f"READ 4 KiB, {PER_KICK} per kick": read_4k_many,
}
