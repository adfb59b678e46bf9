"""The same with several request queues, each with a worker: Linux 6.12 uses them all. Full runs only, since it takes minutes."""

import shutil
import tempfile
from contextlib import ExitStack

import pytest

from tests.guest.crashing import work_and_kill
from tests.support.guest.daemons import VfsdDaemon, daemon_under_test
from tests.support.guest.guest import QemuGuest
from tests.support.guest.images import qemu_image
from tests.support.guest.packages import TRIXIE

QUEUES = 3
SECONDS = 120

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(daemon_under_test() is not VfsdDaemon, reason="no other daemon survives its own crash"),
]


@pytest.mark.timeout(900)
def test_nothing_is_lost_while_workers_of_several_queues_die() -> None:
    with ExitStack() as stack:
        host = tempfile.mkdtemp(prefix="share-", dir="/var/tmp")
        stack.callback(shutil.rmtree, host, ignore_errors=True)
        daemon = stack.enter_context(VfsdDaemon(host, options=[f"--num-request-queues={QUEUES}"]))
        device = f"queue-size=1024,num-request-queues={QUEUES}"
        guest = stack.enter_context(QemuGuest([daemon.socket], image=qemu_image(TRIXIE), device_options=device))
        guest.daemon_ended = daemon.ended
        guest.mount()
        work_and_kill(guest, daemon, "/mnt/work", f"{host}/work", SECONDS)
        assert "ERROR" not in daemon.log()
