"""Trouble of the host's storage reaches the guest as it is: real full disks, quotas, disks that lose what is written back."""

import errno
import os
import random
import subprocess

import pytest

from tests.support.failing_disk import FailingDisk
from tests.support.file_systems import Mounts
from tests.support.frontend.checks import raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.faults import SPOKEN, add_fault
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import REPLACED, kill_worker
from tests.support.frontend.serving import start
from vfsd.wire import fuse_abi as abi

TROUBLE = "of the host's storage|is used up"
MIB = 1 << 20
WITH_FAULTS = ("--fault-rules", "/dev/null")


@pytest.fixture
def mounts(tmp_path):
    (tmp_path / "share").mkdir()
    with Mounts(tmp_path) as mounts:
        yield mounts


@pytest.fixture
def serve_share(tmp_path, mounts):
    """Serve tmp_path/share, once what the test wants is mounted there."""
    served = []

    def serve_share(**options):
        served.append(start(tmp_path, Options(**options)))
        served[-1].expect_log(TROUBLE)
        return served[-1]

    yield serve_share
    for each in served:
        print(each.daemon.describe())
        each.close()
        assert each.unexpected_log() == []


@pytest.fixture
def disk(tmp_path, mounts):
    return FailingDisk(mounts, tmp_path, tmp_path / "share")


def errno_of(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except OSError as error:
        return error.errno
    return 0


def is_lost(function, *arguments, **keywords):
    """Whether a call tells of data that could not be written back: as the file system names it, which depends on what it was."""
    number = errno_of(function, *arguments, **keywords)
    assert number in (0, errno.ENOSPC, errno.EIO)
    return number != 0


def open_data(served):
    nodeid = served.client.lookup(ROOT, b"data").nodeid
    return nodeid, served.client.open(nodeid, os.O_RDWR).fh


def fill(client, nodeid, fh, chunk=MIB // 4, **how):
    """Write until that fails: what was written, and the errno."""
    done = 0
    while True:
        try:
            count = client.write(nodeid, fh, done, bytes(chunk), **how)
        except OSError as error:
            return done, error.errno
        done += count
        assert count


# --- errors of writing back --------------------------------------------------------------------------------------------


def test_an_error_of_writing_back_is_told_once_to_each_open_file(serve_share, disk):
    served = serve_share()
    client = served.client
    nodeid, first = open_data(served)
    second = client.open(nodeid, os.O_RDWR).fh
    reader = client.open(nodeid, os.O_RDONLY).fh
    disk.fail()
    assert client.write(nodeid, first, 0, b"x" * 8192) == 8192, "the page cache takes it"
    disk.sync()
    assert [is_lost(client.fsync, nodeid, fh) for fh in (first, first)] == [True, False]
    assert [is_lost(client.fsync, nodeid, fh, datasync=True) for fh in (second, second)] == [True, False]
    late = client.open(nodeid, os.O_RDWR).fh
    assert [is_lost(client.fsync, nodeid, fh) for fh in (late, reader, reader)] == [False, True, False]
    disk.mend()
    assert client.write(nodeid, first, 0, b"y" * 8192) == 8192
    assert [is_lost(client.fsync, nodeid, fh) for fh in (first, second, late, reader)] == [False] * 4
    assert (disk.mountpoint / "data").read_bytes()[:8192] == b"y" * 8192

    disk.fail()
    client.write(nodeid, first, MIB, b"x" * 8192)  # elsewhere: the disk has that block by now
    for fh in (first, second, late, reader):
        client.flush(nodeid, fh)
        client.release(nodeid, fh)
    disk.sync()
    again = client.open(nodeid, os.O_RDWR).fh
    assert [is_lost(client.fsync, nodeid, again) for _ in range(2)] == [True, False], "what nobody was told waits for the next"


def test_a_workers_death_swallows_no_error(serve_share, disk):
    """The description is the broker's, and so is the answer, until the guest has it."""
    served = serve_share(extra=WITH_FAULTS)
    client = served.client
    served.expect_log(SPOKEN)
    served.expect_log(REPLACED)
    nodeid, fh = open_data(served)
    deaths = {
        "before it was asked for": lambda: kill_worker(served),
        "when it was told": lambda: add_fault(served, "worker:kill:at=after-ask:times=1"),
        "when it was on its way to the guest": lambda: add_fault(served, "worker:kill:at=before-publish:times=1"),
    }
    for place, (when, die) in enumerate(deaths.items()):
        disk.fail()
        client.write(nodeid, fh, place * MIB, b"x" * 8192)
        disk.sync()
        for ask in (lambda: client.fsync(nodeid, fh), client.syncfs):
            die()
            assert [is_lost(ask), is_lost(ask)] == [True, False], when
        disk.mend()


@pytest.mark.parametrize("handles", ["never", "mandatory"])
def test_syncfs_tells_what_a_program_of_the_host_was_told_too(serve_share, disk, handles):
    served = serve_share(handles=handles)
    client = served.client
    nodeid, fh = open_data(served)
    disk.fail()
    client.write(nodeid, fh, 0, b"x" * 8192)
    disk.sync()
    disk.sync()
    assert [is_lost(client.syncfs) for _ in range(2)] == [True, False]
    assert is_lost(client.fsync, nodeid, fh), "that is another account"


def test_a_synchronous_write_fails_itself(serve_share, disk):
    served = serve_share()
    client = served.client
    nodeid, _fh = open_data(served)
    fh = client.open(nodeid, os.O_RDWR | os.O_SYNC).fh
    disk.fail()
    assert is_lost(client.write, nodeid, fh, 0, b"x" * 8192)


# --- disks that are full, quotas, read-only ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk_is_short_writes_then_enospc_until_there_is_room(serve_share, mounts, tmp_path, kind):
    share = tmp_path / "share"
    if kind == "tmpfs":
        mounts.mount(share, "-t", "tmpfs", "-o", f"size={MIB},nr_inodes=8", "test")
    else:
        mounts.loop(mounts.image("ext4"), share)
        room = os.statvfs(share)
        subprocess.run(["fallocate", "-l", str(room.f_bavail * room.f_frsize - MIB), share / "ballast"], check=True)
    served = serve_share()
    client = served.client
    made, opened = client.create(ROOT, b"file", 0o644, os.O_RDWR)
    nodeid, fh = made.nodeid, opened.fh
    chunk = MIB // 4 - 4096 - 1  # no divisor of the room that there is
    done, number = fill(client, nodeid, fh, chunk)
    assert number == errno.ENOSPC
    assert done % chunk, "the last one wrote what there was room for"
    assert client.getattr(nodeid, fh).attr.size == done
    assert errno_of(client.fsync, nodeid, fh) == 0, "all that was said to be written is"
    assert client.read(nodeid, fh, 0, 100) == bytes(100)
    if kind == "tmpfs":
        for name in (b"%d" % number for number in range(8)):
            number = errno_of(client.mkdir, ROOT, name) or number
        assert number == errno.ENOSPC
    assert errno_of(client.fallocate, nodeid, fh, 0, 400 * MIB) == errno.ENOSPC
    client.setattr(nodeid, size=0)
    assert client.write(nodeid, fh, 0, bytes(chunk)) == chunk
    lines = [line for line in served.new_log() if "ENOSPC" in line]
    assert 1 <= len(lines) <= 2


def test_what_the_guest_writes_back_is_written_wholly_or_fails(serve_share, mounts, tmp_path):
    """Of a page of its cache a guest's kernel takes a short count for success."""
    mounts.mount(tmp_path / "share", "-t", "tmpfs", "-o", f"size={MIB}", "test")
    served = serve_share(extra=("--writeback",))
    client = served.client
    made, opened = client.create(ROOT, b"file", 0o644, os.O_RDWR)
    nodeid, fh, chunk = made.nodeid, opened.fh, 3 * MIB // 4
    assert client.write(nodeid, fh, 0, bytes(chunk), flags=abi.FUSE_WRITE_CACHE) == chunk
    with raises(errno.ENOSPC):
        client.write(nodeid, fh, chunk, bytes(chunk), flags=abi.FUSE_WRITE_CACHE)
    assert client.write(nodeid, fh, chunk, bytes(chunk)) == MIB - chunk


def test_a_quota_is_edquot(serve_share, mounts, tmp_path):
    share = tmp_path / "share"
    mounts.loop(mounts.image("btrfs"), share)
    subprocess.run(["btrfs", "quota", "enable", share], check=True, capture_output=True)
    subprocess.run(["btrfs", "qgroup", "limit", "1M", share], check=True, capture_output=True)
    served = serve_share()
    made, opened = served.client.create(ROOT, b"file", 0o644, os.O_RDWR)
    done, number = fill(served.client, made.nodeid, opened.fh)
    assert number == errno.EDQUOT
    assert 0 < done < 2 * MIB
    subprocess.run(["btrfs", "qgroup", "limit", "none", share], check=True, capture_output=True)
    assert served.client.write(made.nodeid, opened.fh, done, b"more") == 4


def test_a_file_system_that_becomes_read_only_is_erofs_and_still_read(serve_share, mounts, tmp_path):
    share = tmp_path / "share"
    mounts.loop(mounts.image("ext4"), share)
    (share / "file").write_bytes(b"content")
    (share / "directory").mkdir()
    served = serve_share()
    client = served.client
    nodeid = client.lookup(ROOT, b"file").nodeid
    subprocess.run(["mount", "-o", "remount,ro", share], check=True)
    for function, *arguments in (
        (client.open, nodeid, os.O_RDWR),
        (client.create, ROOT, b"new", 0o644, os.O_RDWR),
        (client.mkdir, ROOT, b"new"),
        (client.unlink, ROOT, b"file"),
        (client.rmdir, ROOT, b"directory"),
        (client.rename, ROOT, b"file", ROOT, b"other"),
        (client.symlink, ROOT, b"link", b"target"),
    ):
        assert errno_of(function, *arguments) == errno.EROFS, function
    with raises(errno.EROFS):
        client.setattr(nodeid, mode=0o600)
    assert client.read_file(nodeid) == b"content"
    subprocess.run(["mount", "-o", "remount,rw", share], check=True)
    client.unlink(ROOT, b"file")


# --- disks that cannot be read -----------------------------------------------------------------------------------------


def test_a_read_that_fails_halfway_is_an_error_and_not_the_end_of_the_file(serve_share, mounts, tmp_path):
    """To a guest's kernel a short answer is the end: the rest would be zeros."""
    share = tmp_path / "share"
    image = mounts.image("ext4")
    mounts.loop(image, share)
    content = random.Random(1).randbytes(MIB)
    (share / "file").write_bytes(content)
    subprocess.run(["sync", "-f", share], check=True)
    extents = subprocess.run(["filefrag", "-b4096", "-e", share / "file"], check=True, capture_output=True, text=True).stdout
    first = int(extents.split("ext:")[1].split("0:")[1].split(":")[1].split("..")[0])
    served = serve_share()
    client = served.client
    nodeid = client.lookup(ROOT, b"file").nodeid
    fh = client.open(nodeid).fh
    with (share / "file").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size = image.stat().st_size
    os.truncate(image, (first + 128) * 4096)  # the second half of the file is on no disk any more
    assert client.read(nodeid, fh, 0, 65536) == content[:65536]
    for _ in range(2):
        with raises(errno.EIO):
            client.read(nodeid, fh, 0, MIB)
    assert client.read(nodeid, fh, 0, 65536) == content[:65536]
    os.truncate(image, size)
    served.wait_for_new_log(r"EIO.*of the host's storage")
