"""A host's disk without room, as programs in a real guest see it."""

import errno
from pathlib import Path

import pytest

from tests.guest import probes
from tests.guest.configurations import KINDS, extra_options
from tests.support.file_systems import Mounts
from tests.support.guest.daemons import daemon_under_test


@pytest.mark.uml
def test_what_the_guests_cache_cannot_write_back_fails_its_fsync(tmp_path: Path) -> None:
    """write(2) ends in the guest's cache; the host has room for the beginning only, which is a short count to whoever looks."""
    with Mounts(tmp_path) as mounts:
        share = mounts.mount(tmp_path / "share", "-t", "tmpfs", "-o", "size=200k", "test")
        with daemon_under_test()(str(share), options=[*extra_options(), "--writeback"]) as daemon, KINDS["uml"]([daemon.socket]) as guest:
            guest.mount()
            wrote, first, again, closed = guest.call(probes.write_and_sync, "/mnt/file", 250_000)
            assert (wrote, first, again) == (0, errno.ENOSPC, 0)
            assert closed in (0, errno.ENOSPC)
            assert guest.call(probes.write_and_sync, "/mnt/file", 100_000)[1] == 0
