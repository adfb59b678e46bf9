"""Injected faults as programs in a real guest see them: the errno, in the right place, and no more than that."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import probes
from tests.guest.configurations import KINDS, extra_options
from tests.support.guest.daemons import Daemon, daemon_under_test
from vfsd.tools.fault import ask, wait_until_heard

pytestmark = pytest.mark.skipif(os.environ.get("VFSD_TEST_DAEMON", "vfsd") != "vfsd", reason="other daemons have no such rules")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    share = tmp_path / "share"
    (share / "db").mkdir(parents=True, mode=0o755)
    (share / "db" / "table").write_bytes(b"rows")
    (share / "other").write_bytes(b"rows")
    with daemon_under_test()(str(share), options=[*extra_options(), "--fault-rules=/dev/null"]) as running:
        yield running


@pytest.mark.uml
@pytest.mark.fault("operation:error")
@pytest.mark.fault("broker.call:error")
def test_programs_of_a_guest_get_the_errno(daemon: Daemon) -> None:
    path = os.fsencode(daemon.socket)

    def rules(*texts: str) -> None:
        ask(path, {"do": "clear"})
        ask(path, {"do": "add", "rules": list(texts)})
        assert wait_until_heard(path) == []

    with KINDS["uml"]([daemon.socket]) as guest:
        guest.mount()
        rules("READ:error=EIO:path=/db/*", "WRITE:error=ENOSPC:path=/db/*")
        assert guest.call(probes.attempt, "read", "/mnt/db/table") == errno.EIO
        assert guest.call(probes.attempt, "write", "/mnt/db/table") == errno.ENOSPC
        assert guest.call(probes.attempt, "read", "/mnt/other") == 0
        rules("broker.fsync:error=EDQUOT", "CREATE,MKNOD:error=EROFS")
        assert guest.call(probes.attempt, "fsync", "/mnt/other") == errno.EDQUOT
        assert guest.call(probes.attempt, "create", "/mnt/new") == errno.EROFS
        rules("worker:kill:at=before-publish:every=5:times=3")
        for number in range(20):
            assert guest.call(probes.attempt, "create", f"/mnt/file{number}") == 0
        (rule,) = ask(path, {"do": "list"})["rules"]
        assert rule["hits"] == 3
    assert daemon.wait() == 0
