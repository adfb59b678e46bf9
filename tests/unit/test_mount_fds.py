"""Descriptors of mounts: on the right mount, one each, closed with the last inode that needs it."""

import errno
import os
import stat
import threading
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.broker import ImmediateCloser, path_fd, proc_self_fd
from vfsd.broker.mount_fds import MountFds
from vfsd.sandbox import filecalls, syscalls

MS_BIND = 4096


@pytest.fixture
def mounts():
    with proc_self_fd() as proc:
        yield MountFds(proc.fileno(), ImmediateCloser())


@contextmanager
def bound(source, target):
    target.mkdir(exist_ok=True)
    syscalls.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND)
    try:
        yield target
    finally:
        syscalls.umount2(os.fsencode(target), syscalls.MNT_DETACH)


def acquire(mounts, path, mount_id=None):
    """(whether it worked, the mount's id) for the inode at a path."""
    with path_fd(path) as fd:
        seen = filecalls.statx(fd.fileno())
        chosen = seen.mnt_id if mount_id is None else mount_id
        return mounts.acquire(chosen, fd.fileno(), stat.S_IFMT(seen.mode)), chosen


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_the_descriptor_is_a_real_one_on_that_mount(mounts, tmp_path, kind):
    path = tmp_path
    if kind == "file":
        path = tmp_path / "file"
        path.touch()
    worked, mount_id = acquire(mounts, path)
    assert worked
    fd = mounts.borrow(mount_id)
    assert filecalls.statx(fd).mnt_id == mount_id
    assert not os.get_inheritable(fd)
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
    assert not flags & os.O_PATH
    assert flags & os.O_ACCMODE == os.O_RDONLY
    mounts.release(mount_id)
    assert len(mounts) == 0


def test_it_is_opened_once_and_closed_with_the_last_reference(mounts, tmp_path):
    for _ in range(3):
        worked, mount_id = acquire(mounts, tmp_path)
        assert worked
    fd = mounts.borrow(mount_id)
    for _ in range(2):
        mounts.release(mount_id)
        assert mounts.borrow(mount_id) == fd
    mounts.release(mount_id)
    with pytest.raises(KeyError):
        mounts.borrow(mount_id)


def special_files(tmp_path):
    os.symlink("nowhere", tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    return [tmp_path / "link", tmp_path / "fifo", "/dev/null"]


def test_nothing_is_opened_by_way_of_a_special_file(mounts, tmp_path):
    """Opening a FIFO or a device has effects, and a symlink cannot be opened."""
    for path in special_files(tmp_path):
        assert acquire(mounts, path)[0] is False
    assert len(mounts) == 0


def test_a_special_file_takes_a_reference_where_the_mount_is_known(mounts, tmp_path):
    _, mount_id = acquire(mounts, tmp_path)
    link = special_files(tmp_path)[0]
    assert acquire(mounts, link) == (True, mount_id)
    mounts.release(mount_id)
    mounts.release(mount_id)
    assert len(mounts) == 0


def test_a_descriptor_on_another_mount_is_refused(mounts, tmp_path):
    with pytest.raises(OSError, match="instead of") as caught:
        acquire(mounts, tmp_path, mount_id=1)
    assert caught.value.errno == errno.EIO
    assert len(mounts) == 0


def test_a_type_that_is_not_the_inodes_is_refused(mounts, tmp_path):
    (tmp_path / "file").touch()
    with path_fd(tmp_path / "file") as fd, pytest.raises(NotADirectoryError):
        mounts.acquire(filecalls.statx(fd.fileno()).mnt_id, fd.fileno(), stat.S_IFDIR)
    with path_fd(tmp_path) as fd, pytest.raises(OSError, match="instead of"):
        mounts.acquire(filecalls.statx(fd.fileno()).mnt_id, fd.fileno(), stat.S_IFREG)


def test_property_19_threads_that_meet_a_mount_at_once_share_one_descriptor(mounts, tmp_path):
    threads = 8
    start = threading.Barrier(threads)
    results = []

    def take():
        start.wait()
        results.append(acquire(mounts, tmp_path))

    for _ in range(20):
        running = [threading.Thread(target=take) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert len(mounts) == 1
        for worked, mount_id in results:
            assert worked
            assert mounts.borrow(mount_id) >= 0
        for _, mount_id in results:
            mounts.release(mount_id)
        assert len(mounts) == 0
        results.clear()


@pytest.mark.root
def test_two_mounts_of_one_directory_are_two(mounts, tmp_path):
    (tmp_path / "source").mkdir()
    with ExitStack() as stack:
        ids = set()
        for name in ("one", "two"):
            target = stack.enter_context(bound(tmp_path / "source", tmp_path / name))
            worked, mount_id = acquire(mounts, target)
            assert worked
            assert filecalls.statx(mounts.borrow(mount_id)).mnt_id == mount_id
            ids.add(mount_id)
        assert len(ids) == 2
        for mount_id in ids:
            mounts.release(mount_id)


@pytest.mark.root
def test_what_is_mounted_over_the_inode_does_not_matter(mounts, tmp_path):
    (tmp_path / "under").mkdir()
    (tmp_path / "other").mkdir()
    with path_fd(tmp_path / "under") as fd:
        mount_id = filecalls.statx(fd.fileno()).mnt_id
        with bound(tmp_path / "other", tmp_path / "under"):
            assert mounts.acquire(mount_id, fd.fileno(), stat.S_IFDIR)
            assert filecalls.statx(mounts.borrow(mount_id)).mnt_id == mount_id
            mounts.release(mount_id)


@pytest.mark.root
def test_the_host_can_unmount_when_the_last_inode_is_gone(mounts, tmp_path):
    (tmp_path / "source").mkdir()
    with bound(tmp_path / "source", tmp_path / "target") as target:
        _, mount_id = acquire(mounts, target)
        with pytest.raises(OSError, match="busy"):
            syscalls.umount2(os.fsencode(target), 0)
        mounts.release(mount_id)
        syscalls.umount2(os.fsencode(target), 0)
        syscalls.mount(os.fsencode(tmp_path / "source"), os.fsencode(target), None, MS_BIND)  # for the end of the block
