"""The in-process frontend against another daemon: what it takes for correct is not just what vfsd does.

The C virtiofsd of QEMU 7.2 (Debian 12: qemu-system-common) is an implementation that real guests have used for years.
"""

import os

import pytest

from tests.support.frontend.checks import assert_same
from tests.support.frontend.daemon import Daemon, c_virtiofsd
from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.ring import JOINED, LINUX, Layout, pieces
from tests.support.frontend.sequences import FRONTENDS

PROGRAM = "/usr/lib/qemu/virtiofsd"
pytestmark = pytest.mark.skipif(not os.path.exists(PROGRAM), reason=f"needs {PROGRAM} (Debian 12: qemu-system-common)")


@pytest.mark.parametrize("frontend", FRONTENDS, ids=lambda frontend: frontend.name)
def test_the_library_drives_the_c_daemon(tmp_path, frontend):
    share = tmp_path / "share"
    share.mkdir()
    with Daemon(share, tmp_path / "sock", command=c_virtiofsd) as daemon, Device(str(daemon.socket)) as device:
        client = FuseClient(device.attach(frontend))
        client.init()
        data = os.urandom(3 << 20)
        entry = client.write_file(ROOT, b"file", data)
        assert (share / "file").read_bytes() == data
        assert client.read_file(entry.nodeid) == data
        for layout in (JOINED, LINUX, Layout(pieces(8), pieces(64)), Layout(pieces(1), pieces(100), indirect=True)):
            with client.laid_out(layout):
                assert_same(client.attr(entry.nodeid), share / "file")
                assert {dirent.name for dirent in client.list(ROOT)} == {b".", b"..", b"file"}
        frontend.stop(device)
        frontend.cont(device)
        assert {dirent.name for dirent in client.list(ROOT, plus=True)} == {b".", b"..", b"file"}
        client.forget(entry.nodeid, 2)
        device.close()
        assert daemon.wait() == 0
