"""FUSE requests of a hostile guest to a running vfsd: confined processes, real rings, buffers laid out anyhow.

Oracle: as for `fuse_requests`, and the daemon lives, says nothing unexpected, serves a right request right, and holds no
descriptor more than before. The daemon is not instrumented: what reaches new code here is what `fuse_requests` found.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.fuzz import fuse_sequences
from tests.fuzz.fuse_grammar import Guest
from tests.fuzz.provider import Provider, Recipe
from tests.fuzz.share import CONTENT, SmallShare
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.ring import JOINED, LINUX, Layout, randomly
from tests.support.frontend.serving import Served, start
from tests.support.worker import pack_request
from vfsd.wire import fuse_abi as abi

NEEDS_ROOT = True
_OPTIONS = Options(request_queues=1, extra=("--xattr", "--posix-acl=auto"))
_MOST_REQUESTS = 60
_rig: list[tuple[SmallShare, Served]] = []


def open_rig(folder: Path) -> None:
    share = SmallShare(folder)
    try:
        served = start(folder, _OPTIONS)
    except BaseException:
        share.close()
        raise
    _rig.append((share, served))
    share.fill()
    _check_it_serves(share, served)
    served.new_session()
    served.baseline = served.daemon.fd_census()


def close_rig() -> None:
    share, served = _rig.pop()
    served.close()
    share.close()


def one_input(data: bytes) -> None:
    provider = Provider(data)
    share, served = _rig[0]
    share.fill()
    served.new_session()
    served.log_mark = len(served.daemon.log)
    rng = random.Random(provider.byte())
    guest = Guest()
    for _ in range(_MOST_REQUESTS):
        if not provider.left:
            break
        layout = provider.pick((JOINED, LINUX, Layout(randomly(rng), randomly(rng)), Layout(randomly(rng), randomly(rng), indirect=True)))
        made = guest.make(provider)
        # A wait for a lock would end only with another request.
        opcode = abi.FUSE_SETLK if made.opcode == abi.FUSE_SETLKW else made.opcode
        message = pack_request(opcode, made.body, nodeid=made.nodeid, uid=made.uid, gid=made.gid, length=made.length)
        reply = served.client.raw(message, made.room, layout=layout)
        if reply is not None:
            guest.check(made, *reply)
    _check_it_serves(share, served)
    served.new_session()
    served.daemon.wait_for_census(served.baseline)
    assert served.daemon.running
    assert served.unexpected_log() == []


def _check_it_serves(share: SmallShare, served: Served) -> None:
    served.client.init()
    nodeid = served.client.lookup(ROOT, share.new_file()).nodeid
    assert served.client.read_file(nodeid) == CONTENT
    assert share.canary.read_bytes() == b"canary"
    assert os.listdir(share.path.parent)


def seeds() -> dict[str, bytes]:
    """Those of `fuse_requests`; before each request stands how it is laid out."""
    return {name: bytes(Recipe().byte(1).raw(requests)) for name, requests in fuse_sequences.sequences(before_each=b"\1").items()}
