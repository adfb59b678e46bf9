"""A frontend for one conversation, run in the guest by /opt/vfsd's Python: connects to a vfsd's socket, uses the share, leaves.

`python -m tests.guest.systemd_probe SOCKET NAME [hold]`: prints as JSON what it read of the file NAME in the share, and what
became of a few other requests. With `hold` it then says "held" and stays connected until its input ends.
"""

import json
import os
import sys

from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.sequences import QEMU_10


def converse(socket: str, name: bytes) -> dict[str, object]:
    device = Device(socket).attach(QEMU_10)
    client = FuseClient(device)
    client.init()
    said: dict[str, object] = {"read": client.read_file(client.lookup(ROOT, name).nodeid).decode()}
    client.write_file(ROOT, b"made", b"by the guest")
    for what, attempt in {
        "mknod fifo": lambda: client.mknod(ROOT, b"fifo", 0o010644),
        "mknod device": lambda: client.mknod(ROOT, b"null", 0o020666, rdev=0x103),
        "chmod u+s": lambda: client.setattr(client.lookup(ROOT, b"made").nodeid, mode=0o104755),
        "chown 1234": lambda: client.setattr(client.lookup(ROOT, b"made").nodeid, uid=1234, gid=1234),
    }.items():
        said[what] = outcome(attempt)
    if sys.argv[3:] == ["hold"]:
        print(json.dumps(said), flush=True)
        print("held", flush=True)
        sys.stdin.read()
    device.close()
    return said


def outcome(attempt) -> str:
    try:
        attempt()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "done"


if __name__ == "__main__":
    conversation = converse(sys.argv[1], os.fsencode(sys.argv[2]))
    if sys.argv[3:] != ["hold"]:
        print(json.dumps(conversation))
