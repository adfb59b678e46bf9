"""What is beyond POSIX works in the guest as on the host's own file system, where the configuration has it."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guest import feature_probes as probes
from tests.guest.configurations import KINDS, extra_options
from tests.guest.conftest import Share
from tests.support.guest.daemons import daemon_under_test
from tests.support.guest.guest import GuestRaisedError

RUN = "import json, sys; from tests.guest import feature_probes; print(json.dumps(getattr(feature_probes, sys.argv[1])(*sys.argv[2:])))"


def assert_as_on_host(share: Share, probe: Callable[[str], Any]) -> None:
    """The probe says in a directory of the share, in the guest, what it says in one beside the share, on the host."""
    os.mkdir(f"{share.host}/inside")
    beside = tempfile.mkdtemp(prefix="host-", dir="/var/tmp")
    try:
        command = [sys.executable, "-c", RUN, probe.__name__, beside]  # not in this process: probes fork and change users
        on_host = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    finally:
        shutil.rmtree(beside)
    in_guest = share.call(probe, f"{share.inside}/inside")
    assert in_guest == on_host, f"\nguest {in_guest}\nhost  {on_host}"


def test_extended_attributes(share: Share) -> None:
    if "--xattr" in share.configuration.options:
        assert_as_on_host(share, probes.extended_attributes)
    else:
        os.mkdir(f"{share.host}/directory")
        assert share.call(probes.short_buffer, f"{share.inside}/directory", 10) == [-1, False]


def test_extended_attributes_are_the_hosts(share: Share) -> None:
    if "--xattr" not in share.configuration.options:
        pytest.skip("this configuration has no extended attributes")
    os.mkdir(f"{share.host}/directory")
    os.setxattr(f"{share.host}/directory", "user.of-the-host", b"\x00\xff")
    share.guest.python("import os; os.setxattr(path, 'user.of-the-guest', b'guest')", path=f"{share.inside}/directory")
    listed = share.guest.python("import os; result = sorted(os.listxattr(path))", path=f"{share.inside}/directory")
    assert listed == sorted(os.listxattr(f"{share.host}/directory")) == ["user.of-the-guest", "user.of-the-host"]
    assert os.getxattr(f"{share.host}/directory", "user.of-the-guest") == b"guest"


def test_access_control_lists(share: Share) -> None:
    if "--posix-acl" not in share.configuration.options:
        pytest.skip("this configuration has no ACLs")
    assert_as_on_host(share, probes.access_lists)


def test_files_without_a_name(share: Share) -> None:
    assert_as_on_host(share, probes.unnamed_files)


def test_birth_times_are_the_hosts(share: Share) -> None:
    if share.guest.kernel < (6, 6):
        pytest.skip("FUSE_STATX came with Linux 6.6")
    os.mkdir(f"{share.host}/directory")
    os.symlink("x", f"{share.host}/link")
    share.guest.check("touch", f"{share.inside}/file")
    for name in ("directory", "link", "file"):
        assert share.call(probes.birth_time, f"{share.inside}/{name}") == probes.birth_time(f"{share.host}/{name}") is not None


def test_inode_flags(share: Share) -> None:
    assert_as_on_host(share, probes.inode_flags)


def test_direct_io_is_the_hosts_only_if_allowed(share: Share) -> None:
    """The host's file system refuses what is not aligned to its blocks; without the option it never learns of O_DIRECT."""
    allowed = "--allow-direct-io" in share.configuration.options
    assert share.call(probes.write_direct, f"{share.inside}/file", 4096, 0) == 4096
    assert share.call(probes.write_direct, f"{share.inside}/file", 100, 50) == ("EINVAL" if allowed else 100)


def test_shared_mappings_without_a_cache(share: Share) -> None:
    assert share.call(probes.map_shared, f"{share.inside}/file") == ("mapped" if share.maps_shared() else "ENODEV")


@pytest.mark.uml
def test_a_file_system_mounted_in_the_share_is_one_in_the_guest(tmp_path: Path) -> None:
    """Mounted before the daemon starts: whether a later mount reaches its namespace is the host's choice."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "of-the-host", mounted], check=True)
    try:
        (mounted / "file").write_text("on tmpfs")
        with daemon_under_test()(str(tmp_path), options=extra_options()) as daemon, KINDS["uml"]([daemon.socket]) as guest:
            guest.mount()
            # stat(2) alone does not cross into what the guest's kernel mounts when it is first needed
            ask = "import os; os.listdir('/mnt/mounted'); result = [os.stat(f'/mnt{path}').st_dev for path in ('', '/mounted', '/mounted/file', '/mounted/..')]"
            root, inside, file, above = guest.python(ask)
            assert inside == file != above == root
            assert guest.python("import os; result = os.statvfs('/mnt/mounted/file').f_blocks") == os.statvfs(mounted).f_blocks
            with pytest.raises(GuestRaisedError) as refused:
                guest.python("import os; os.rename('/mnt/mounted/file', '/mnt/file')")
            assert refused.value.errno == errno.EXDEV
            assert guest.check("cat", "/mnt/mounted/file") == "on tmpfs"
    finally:
        subprocess.run(["umount", mounted], check=True)
