"""Millions of FUSE requests through the in-process frontend: a mix as a busy guest makes it, every answer checked.

Each request queue has a *lane* of 64 places; a round fills them all and kicks once. What a round learns (nodeids, open files) the
next ones use and give back, so the daemon's tables breathe and must not grow. FORGETs go through the hiprio queue.
"""

import errno
import os
import random
import struct
from collections import deque
from pathlib import Path

from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.fuse_session import HIPRIO
from tests.support.frontend.fuse_types import ProtocolViolation
from tests.support.frontend.lane import Lane, Place
from vfsd.wire import fuse_abi as abi

BLOCK = 4096
BLOCKS = 256  # of each file that is read and written
PATTERNS = [random.Random(number).randbytes(BLOCK) for number in range(16)]
NAMES = 200
LISTED = 24
MISSING = b"missing\0"
LISTING_BYTES = 4096

# How many of each in a round of 64. Places of one kind lie together.
MIX = {
    abi.FUSE_GETATTR: 15,
    abi.FUSE_READ: 14,
    abi.FUSE_LOOKUP: 9,
    abi.FUSE_WRITE: 6,
    abi.FUSE_RELEASE: 6,
    abi.FUSE_OPEN: 4,
    abi.FUSE_CREATE: 2,
    abi.FUSE_UNLINK: 2,
    abi.FUSE_FLUSH: 1,
    abi.FUSE_SETATTR: 1,
    abi.FUSE_STATFS: 1,
    abi.FUSE_OPENDIR: 1,
    abi.FUSE_READDIRPLUS: 1,
    abi.FUSE_RELEASEDIR: 1,
}
FORGETS = 7  # of one inode each, and one of many: the 8 places of the hiprio lane
_FORGET_MANY = 32
_NAME_BYTES = 8  # with the NUL
_ENTRY_BYTES = abi.fuse_entry_out.size
_BYTES = {  # of the request's body, of the reply's
    abi.FUSE_GETATTR: (abi.fuse_getattr_in.size, abi.fuse_attr_out.size),
    abi.FUSE_READ: (abi.fuse_read_in.size, BLOCK),
    abi.FUSE_LOOKUP: (_NAME_BYTES, _ENTRY_BYTES),
    abi.FUSE_WRITE: (abi.fuse_write_in.size + BLOCK, abi.fuse_write_out.size),
    abi.FUSE_RELEASE: (abi.fuse_release_in.size, 8),  # the reply is a header alone, which has its room anyway
    abi.FUSE_OPEN: (abi.fuse_open_in.size, abi.fuse_open_out.size),
    abi.FUSE_CREATE: (abi.fuse_create_in.size + _NAME_BYTES, _ENTRY_BYTES + abi.fuse_open_out.size),
    abi.FUSE_UNLINK: (_NAME_BYTES, 8),
    abi.FUSE_FLUSH: (abi.fuse_flush_in.size, 8),
    abi.FUSE_SETATTR: (abi.fuse_setattr_in.size, abi.fuse_attr_out.size),
    abi.FUSE_STATFS: (0, abi.fuse_statfs_out.size),
    abi.FUSE_OPENDIR: (abi.fuse_open_in.size, abi.fuse_open_out.size),
    abi.FUSE_READDIRPLUS: (abi.fuse_read_in.size, LISTING_BYTES),
    abi.FUSE_RELEASEDIR: (abi.fuse_release_in.size, 8),
}


def make_files(share: Path, queues: int) -> None:
    """What the lanes find: for each queue a directory with names, one that is listed, a file to read and one to write."""
    share.chmod(0o755)
    for queue in range(1, queues + 1):
        folder = share / f"q{queue}"
        for name, count in (("names", NAMES), ("listed", LISTED)):
            (folder / name).mkdir(parents=True)
            for number in range(count):
                (folder / name / f"n{number:06d}").touch()
        (folder / "made").mkdir()
        for name in ("read", "written"):
            (folder / name).write_bytes(b"".join(PATTERNS[block % len(PATTERNS)] for block in range(BLOCKS)))


class QueueLoad:
    """One request queue's rounds. After a round `forgets` and `listed` hold the nodeids that it counted a lookup of, to be forgotten."""

    def __init__(self, device: Device, client: FuseClient, queue: int, seed: int) -> None:
        self._random = random.Random(seed)
        client.queue = queue  # the other queues' rings may belong to lanes by now
        home = client.lookup(ROOT, b"q%d" % queue).nodeid
        look = {name: client.lookup(home, name).nodeid for name in (b"names", b"listed", b"made", b"read", b"written")}
        self._names, self._listed, self._made = look[b"names"], look[b"listed"], look[b"made"]
        self._read, self._written = look[b"read"], look[b"written"]
        self._known = [client.lookup(self._names, b"n%06d" % number).nodeid for number in range(32)]
        self._read_fh = client.open(self._read).fh
        self._written_fh = client.open(self._written, os.O_RDWR).fh
        self._listing_fh = client.opendir(self._listed).fh
        self._blocks = [block % len(PATTERNS) for block in range(BLOCKS)]
        self._opened: deque[list[int]] = deque([[], []])  # fhs of the file to read: of the last round, of the one before
        self._created: list[tuple[int, int, bytes]] = []  # nodeid, fh, name
        self._directory_fh = 0
        self._made_so_far = 0
        places = [Place(opcode, *_BYTES[opcode]) for opcode, count in MIX.items() for _ in range(count)]
        self._by_opcode = {opcode: [place for place in places if place.opcode == opcode] for opcode in MIX}
        self.lane = Lane(device, queue, places, first_unique=queue << 48)
        self.forgets: list[int] = []
        self.listed: list[int] = []

    def begin(self) -> None:
        """Fill and start a round. What it depends on was answered in earlier ones."""
        self._fill_attributes()
        self._fill_data()
        self._fill_names()
        self._fill_open_files()
        self.lane.begin()

    def _fill_attributes(self) -> None:
        lane, of = self.lane, self._by_opcode
        for place in of[abi.FUSE_GETATTR]:
            lane.fill(place, self._random.choice(self._known), abi.fuse_getattr_in.pack(0, 0))
        mode = abi.fuse_setattr_in.pack(abi.FATTR_MODE, 0, 0, 0, 0, 0, 0, 0, 0, 0, self._random.choice((0o100600, 0o100644)), 0, 0)
        lane.fill(of[abi.FUSE_SETATTR][0], self._random.choice(self._known), mode)
        lane.fill(of[abi.FUSE_STATFS][0], ROOT, b"")

    def _fill_data(self) -> None:
        lane, randrange = self.lane, self._random.randrange
        writing = {}
        for place in self._by_opcode[abi.FUSE_WRITE]:
            block, pattern = randrange(BLOCKS), randrange(len(PATTERNS))
            while block in writing:
                block = randrange(BLOCKS)
            writing[block] = pattern
            lane.fill(place, self._written, abi.fuse_write_in.pack(self._written_fh, block * BLOCK, BLOCK, 0, 0, 2) + PATTERNS[pattern])
        fresh = self._opened[0]
        for number, place in enumerate(self._by_opcode[abi.FUSE_READ]):
            block = randrange(BLOCKS)
            if number < len(fresh):
                nodeid, fh, pattern = self._read, fresh[number], block % len(PATTERNS)
            elif number % 2 or block in writing:
                nodeid, fh, pattern = self._read, self._read_fh, block % len(PATTERNS)
            else:
                nodeid, fh, pattern = self._written, self._written_fh, self._blocks[block]
            place.tag = pattern
            lane.fill(place, nodeid, abi.fuse_read_in.pack(fh, block * BLOCK, BLOCK, 0, 0, 0))
        for block, pattern in writing.items():
            self._blocks[block] = pattern

    def _fill_names(self) -> None:
        lane, of = self.lane, self._by_opcode
        *lookups, missing = of[abi.FUSE_LOOKUP]
        for place in lookups:
            lane.fill(place, self._names, b"n%06d\0" % self._random.randrange(NAMES))
        lane.fill(missing, self._names, MISSING)
        for place in of[abi.FUSE_CREATE]:
            self._made_so_far += 1
            place.tag = name = b"%07d\0" % (self._made_so_far % 10_000_000)
            lane.fill(place, self._made, abi.fuse_create_in.pack(os.O_RDWR | os.O_EXCL, 0o100644, 0o22, 0) + name)

    def _fill_open_files(self) -> None:
        """In the first rounds there is not yet anything to give back: the places ask for attributes' sake then, and are refused."""
        lane, of = self.lane, self._by_opcode
        for place in of[abi.FUSE_OPEN]:
            lane.fill(place, self._read, abi.fuse_open_in.pack(os.O_RDONLY, 0))
        old = [(self._read, fh) for fh in self._opened[1]] + [(nodeid, fh) for nodeid, fh, _ in self._created]
        for number, place in enumerate(of[abi.FUSE_RELEASE]):
            nodeid, fh = old[number] if number < len(old) else (self._read, 0)
            lane.fill(place, nodeid, abi.fuse_release_in.pack(fh, 0, 0, 0))
        for number, place in enumerate(of[abi.FUSE_UNLINK]):
            place.tag = number < len(self._created)
            lane.fill(place, self._made, self._created[number][2] if place.tag else MISSING)
        lane.fill(of[abi.FUSE_FLUSH][0], self._written, abi.fuse_flush_in.pack(self._written_fh, 0))
        lane.fill(of[abi.FUSE_OPENDIR][0], self._listed, abi.fuse_open_in.pack(os.O_RDONLY | os.O_DIRECTORY, 0))
        lane.fill(of[abi.FUSE_READDIRPLUS][0], self._listed, abi.fuse_read_in.pack(self._listing_fh, 0, LISTING_BYTES, 0, 0, 0))
        lane.fill(of[abi.FUSE_RELEASEDIR][0], self._listed, abi.fuse_release_in.pack(self._directory_fh, 0, 0, 0))

    def finish(self) -> int:
        """Wait for the round, hold every answer against what is known, and note what it gave. How many requests it was."""
        lane, of = self.lane, self._by_opcode
        lane.finish()
        self.forgets = []
        for opcode in (abi.FUSE_GETATTR, abi.FUSE_SETATTR, abi.FUSE_STATFS, abi.FUSE_FLUSH, abi.FUSE_WRITE):
            for place in of[opcode]:
                lane.body(place)
        for place in of[abi.FUSE_READ]:
            if lane.body(place) != PATTERNS[place.tag]:
                raise ProtocolViolation("READ gave other bytes than were written")
        self._take_names()
        self._opened.pop()
        self._opened.appendleft([_fh(lane.body(place)) for place in of[abi.FUSE_OPEN]])
        self._directory_fh = _fh(lane.body(of[abi.FUSE_OPENDIR][0]))
        return len(lane.places)

    def _take_names(self) -> None:
        lane, of = self.lane, self._by_opcode
        *lookups, missing = of[abi.FUSE_LOOKUP]
        self.forgets += [_nodeid(lane.body(place)) for place in lookups]
        if missing.error != errno.ENOENT:
            raise ProtocolViolation(f"LOOKUP of a missing name gave {missing.error}")
        for place in of[abi.FUSE_UNLINK]:
            if place.error != (0 if place.tag else errno.ENOENT):
                raise OSError(place.error, f"UNLINK: {os.strerror(place.error)}")
        self.forgets += [nodeid for nodeid, _, _ in self._created]
        self._created = []
        for place in of[abi.FUSE_CREATE]:
            body = lane.body(place)
            self._created.append((_nodeid(body), _fh(body[_ENTRY_BYTES:]), place.tag))
        self.listed = _listed_nodeids(lane.body(of[abi.FUSE_READDIRPLUS][0]))


class ForgetLane:
    """The hiprio queue: FORGETs of what a round was answered, before the next round's are due."""

    def __init__(self, device: Device) -> None:
        many = abi.fuse_batch_forget_in.size + _FORGET_MANY * abi.fuse_forget_one.size
        self._one = [Place(abi.FUSE_FORGET, abi.fuse_forget_in.size, 0) for _ in range(FORGETS)]
        self._many = Place(abi.FUSE_BATCH_FORGET, many, 0)
        self.lane = Lane(device, HIPRIO, [*self._one, self._many], first_unique=1 << 56)

    def forget(self, nodeids: list[int], listed: list[int]) -> int:
        """At least FORGETS and one, each once. How many requests it was. Waits for the ones before."""
        self.lane.finish()
        for nodeid, place in zip(nodeids, self._one, strict=False):
            self.lane.fill(place, nodeid, abi.fuse_forget_in.pack(1))
        rest = nodeids[FORGETS:] + listed
        body = abi.fuse_batch_forget_in.pack(len(rest)) + b"".join(abi.fuse_forget_one.pack(nodeid, 1) for nodeid in rest)
        self.lane.fill(self._many, 0, body.ljust(self._many.body_bytes, b"\0"))
        self.lane.begin()
        return FORGETS + 1


def _nodeid(entry: bytes) -> int:
    return int.from_bytes(entry[:8], "little")


def _fh(opened: bytes) -> int:
    return int.from_bytes(opened[:8], "little")


def _listed_nodeids(data: bytes) -> list[int]:
    """Those that a READDIRPLUS counted a lookup of."""
    found = []
    while data:
        nodeid = _nodeid(data)
        if nodeid:
            found.append(nodeid)
        (length,) = struct.unpack_from("<I", data, abi.fuse_direntplus.size - 8)
        data = data[abi.FUSE_REC_ALIGN(abi.fuse_direntplus.size + length) :]
    return found
