"""Boot, mount, unmount, power off, pull the plug: the daemon follows, and leaves nothing behind."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import probes
from tests.guest.configurations import KINDS, extra_options
from tests.support.guest.daemons import Daemon, daemon_under_test
from tests.support.guest.guest import QemuGuest
from tests.support.guest.images import qemu_image
from tests.support.guest.packages import TRIXIE

DRIVER = "/sys/bus/virtio/drivers/virtiofs"
GUESTS = [pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in ("uml", "qemu")]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    share = tmp_path / "share"
    share.mkdir(mode=0o755)
    (share / "hello").write_text("from the host")
    with daemon_under_test()(str(share), options=extra_options()) as running:
        yield running


def gone(pids: list[int], within: float) -> bool:
    """Whether all these processes have ended; a zombie that its parent has not waited for has."""
    deadline = time.monotonic() + within
    while any(_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("kind", GUESTS)
def test_the_daemon_ends_with_0_when_the_guest_powers_off(daemon: Daemon, kind: str) -> None:
    with KINDS[kind]([daemon.socket]) as guest:
        guest.mount()
        assert guest.call(probes.read_text, "/mnt/hello") == "from the host"
        pids = daemon.processes()
    assert daemon.wait() == 0
    assert gone(pids, within=2.0)


@pytest.mark.parametrize("kind", GUESTS)
def test_the_daemon_ends_with_0_when_the_guest_is_killed(daemon: Daemon, kind: str) -> None:
    with KINDS[kind]([daemon.socket]) as guest:
        guest.mount()
        guest.call(probes.write_pattern, "/mnt/file", 100_000)
        pids = daemon.processes()
        guest.close()
        assert daemon.wait() == 0
        assert gone(pids, within=2.0)


@pytest.mark.parametrize("kind", GUESTS)
def test_a_share_is_mounted_again_and_again(daemon: Daemon, kind: str) -> None:
    with KINDS[kind]([daemon.socket]) as guest:
        counts = []
        for number in range(5):
            guest.mount()
            guest.call(probes.write_text, f"/mnt/{number}", "written")
            assert len(guest.call(probes.names, "/mnt")) == number + 2
            guest.unmount()
            counts.append(daemon.fd_count())
        assert counts[1:] == counts[1:2] * 4, "each mount leaves descriptors behind"


@pytest.mark.parametrize("kind", GUESTS)
def test_the_driver_is_unbound_and_bound_again(daemon: Daemon, kind: str) -> None:
    """The guest resets the device and starts it anew, as at a reboot: vfsd serves on, and keeps nothing of before."""
    with KINDS[kind]([daemon.socket]) as guest:
        counts = []
        for number in range(4):
            guest.mount()
            guest.call(probes.write_text, f"/mnt/{number}", "written")
            assert len(guest.call(probes.names, "/mnt")) == number + 2
            guest.unmount()
            counts.append(daemon.fd_count())
            (device,) = [name for name in guest.call(probes.names, DRIVER) if name.startswith("virtio")]
            guest.call(probes.write_text, f"{DRIVER}/unbind", device)
            guest.call(probes.write_text, f"{DRIVER}/bind", device)
        guest.mount()
        assert guest.call(probes.read_text, "/mnt/hello") == "from the host"
        assert counts[1:] == counts[1:2] * 3, "each start leaves descriptors behind"


@pytest.mark.qemu
def test_a_newer_kernel_with_several_request_queues(daemon: Daemon) -> None:
    if daemon.request_queues < 2:
        pytest.skip(f"{daemon.name} serves one request queue only")
    guest = QemuGuest([daemon.socket], image=qemu_image(TRIXIE), device_options="queue-size=1024,num-request-queues=2")
    with guest:
        guest.mount()
        assert guest.uname[2].startswith("6.12")
        assert guest.call(probes.append_from_several, "/mnt/log", 4, 100) == 0
        guest.call(probes.make_tree, "/mnt/tree", 300)
        assert guest.call(probes.survey_digest, "/mnt/tree") == probes.survey_digest(f"{daemon.share}/tree")
    assert len(Path(daemon.share, "log").read_text().splitlines()) == 400
    assert daemon.wait() == 0


@pytest.mark.uml
def test_nothing_of_the_daemon_is_left_after_it_was_told_to_stop(daemon: Daemon) -> None:
    pids, socket = daemon.processes(), daemon.socket
    daemon.close()
    assert gone(pids, within=2.0)
    assert not os.path.exists(socket)
