"""FUSE requests of a hostile guest through the real dispatcher and a real broker, on a real directory.

Oracle: each request is answered once, by a reply that the guest's kernel accepts, or not at all where none is owed; no request makes
a bug in the log, of worker or broker; what lies outside the share stays as it is; afterwards a right request is served right, and
when the session ends nothing is left: no descriptor, no inode, no open file, no lock.
"""

from __future__ import annotations

import os
import random

from tests.fuzz import fuse_grammar, fuse_sequences
from tests.fuzz.fuse_grammar import ALL_INIT_FLAGS, Guest
from tests.fuzz.provider import Provider, Recipe
from tests.fuzz.rigs import Rigs, check_nothing_is_left
from tests.fuzz.share import CONTENT, SmallShare, as_the_broker
from tests.support.broker import Bench
from tests.support.worker import Reply, Worker, pack_request
from vfsd.config import Features
from vfsd.wire import fuse_abi as abi

NEEDS_ROOT = True  # device nodes, other people's files, file handles
_CONFIGURATIONS = (
    {"inode_file_handles": "prefer", "xattr": True, "posix_acl": True},
    {"inode_file_handles": "never", "xattr": True, "xattrmap": ":map::user.virtiofs.:"},
    {"inode_file_handles": "prefer", "readonly": True},
)
_FEATURES = (
    Features(xattr=True, posix_acl="auto", security_label="auto", killpriv_v2=True),
    Features(xattr=True, capability_remapped=True),
    Features(posix_lock=False),
)
_MOST_REQUESTS = 60


class _Rig:
    """A share, and its broker and worker."""

    def __init__(self, share: SmallShare, number: int) -> None:
        self.share = share
        self.bench = Bench(share.path, **_CONFIGURATIONS[number])
        self.worker = Worker(self.bench, features=_FEATURES[number], cache=("auto", "never", "always")[number])
        self.end_session()
        self.fds = 0

    def begin_session(self, flags: int = ALL_INIT_FLAGS) -> None:
        self.worker.call(abi.FUSE_INIT, abi.fuse_init_in.pack(7, 38, 1 << 20, flags, 0xFFFFFFFF))

    def end_session(self) -> None:
        self.worker.call(abi.FUSE_DESTROY)
        self.bench.share.paths.sweep(float("inf"))

    def call(self, made: fuse_grammar.Made, rng: random.Random | None) -> Reply | None:
        """Submit it as a guest does, and wait until it is answered."""
        message = pack_request(made.opcode, made.body, nodeid=made.nodeid, uid=made.uid, gid=made.gid, length=made.length)
        head = self.worker.submit(message, made.room, rng)
        self.worker.turn()
        if head in self.worker.queue.chains and made.opcode == abi.FUSE_SETLKW:
            self.worker.dispatcher.end_lock_waits(self.worker.ring)
        return self.worker.finish(head)

    def check_it_serves(self) -> None:
        """A file that no guest has seen is found and read."""
        name = self.share.new_file()
        self.begin_session()
        nodeid = self.worker.lookup(name)
        fh = self.worker.open(nodeid, os.O_RDONLY)
        assert self.worker.read(nodeid, fh, 5, 1000) == (0, CONTENT[5:])
        assert self.share.canary.read_bytes() == b"canary"

    def check_nothing_is_left(self) -> None:
        assert self.worker.log.bugs == []
        assert self.bench.breaches == []
        check_nothing_is_left(self)
        self.worker.queue.pushed.clear()
        self.worker.log.lines.clear()

    def close(self) -> None:
        self.worker.close()
        self.bench.pump()
        self.bench.close()


_rigs = Rigs(_Rig, len(_CONFIGURATIONS))
open_rig, close_rig = _rigs.open, _rigs.close


def one_input(data: bytes) -> None:
    with as_the_broker():
        _one_guest(Provider(data))


def _one_guest(provider: Provider) -> None:
    rig = provider.pick(_rigs)
    rng = random.Random(provider.byte()) if provider.flag() else None
    rig.share.fill()
    rig.begin_session(provider.number(32) if provider.one_in(8) else ALL_INIT_FLAGS)
    guest = Guest()
    for _ in range(_MOST_REQUESTS):
        if not provider.left:
            break
        made = guest.make(provider)
        reply = rig.call(made, rng)
        if reply is not None:
            guest.check(made, *reply)
    rig.check_it_serves()
    rig.end_session()
    rig.check_nothing_is_left()


def seeds() -> dict[str, bytes]:
    found = {}
    for name, requests in fuse_sequences.sequences().items():
        found[name] = bytes(Recipe().byte(0).flag(False).one_in(8).raw(requests))
        found[f"{name}-cut-anywhere"] = bytes(Recipe().byte(1).flag(True).byte(7).one_in(8).raw(requests))
        found[f"{name}-read-only"] = bytes(Recipe().byte(2).flag(False).one_in(8).raw(requests))
    return found
