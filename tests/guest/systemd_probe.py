"""A frontend for one conversation, run in the guest: connects to the socket of a unit, and uses the share when that serves.

`python -m tests.guest.systemd_probe SOCKET UNIT NAME [hold]`: prints as JSON what it read of the file NAME in the share, and
what became of a few other requests. With `hold` it stays connected until it is ended.
"""

import json
import os
import signal
import subprocess
import sys
import time

from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.sequences import QEMU_10

START_SECONDS = 900  # of an emulated machine, on a host that has other things to do


def converse(device: Device, name: bytes) -> dict[str, str]:
    client = FuseClient(device, timeout=120.0)
    client.init()
    said = {"read": client.read_file(client.lookup(ROOT, name).nodeid).decode()}
    made = client.write_file(ROOT, b"made", b"by the guest").nodeid
    for what, attempt in {
        "mknod fifo": lambda: client.mknod(ROOT, b"fifo", 0o010644),
        "mknod device": lambda: client.mknod(ROOT, b"null", 0o020666, rdev=0x103),
        "chmod u+s": lambda: client.setattr(made, mode=0o104755),
        "chown 1234": lambda: client.setattr(made, uid=1234, gid=1234),
    }.items():
        said[what] = outcome(attempt)
    client.unlink(ROOT, b"fifo")
    return said


def outcome(attempt) -> str:
    try:
        attempt()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "done"


def status(unit: str) -> str:
    return subprocess.run(["systemctl", "show", "-P", "StatusText", unit], capture_output=True, text=True, check=True).stdout.strip()


def main(socket: str, unit: str, name: str, *hold: str) -> None:
    device = Device(socket)  # which starts the unit; it accepts when it is ready
    deadline = time.monotonic() + START_SECONDS
    while not (text := status(unit)).startswith("Serving") and time.monotonic() < deadline:
        time.sleep(1)
    device.client.sock.settimeout(120.0)
    device.attach(QEMU_10)
    print(json.dumps({"status": text, "pid": os.getpid(), **converse(device, os.fsencode(name))}), flush=True)
    if hold:
        signal.pause()
    device.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
