"""The worker's caches of descriptors: bounded, least recently used first, and never closed under a pool thread's hands."""

import os

import pytest

from vfsd.fds import TempFd
from vfsd.worker import files as module
from vfsd.worker.files import NODE_IDLE_SECONDS, Mount, Mounts, NodeFds, OpenFile, OpenFiles

MOST = 3


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def new_fd():
    return TempFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


@pytest.fixture
def files():
    files = OpenFiles(MOST)
    yield files
    files.clear()
    assert len(files) == 0


@pytest.fixture
def nodes():
    nodes = NodeFds(MOST)
    yield nodes
    nodes.clear()
    assert len(nodes) == 0


def add(files, fh, nodeid=5):
    opened = OpenFile(fh, nodeid, new_fd(), Mount(1), 0, lambda _mount, fd: fd.close())
    files.add(opened)
    return opened


def is_open(opened):
    return not opened._fd.closed


# --- open files -----------------------------------------------------------------------------------------------------


def test_an_open_file_is_found_by_nodeid_and_fh_together(files):
    opened = add(files, 1)
    assert files.get(5, 1) is opened
    assert files.get(6, 1) is None
    assert files.get(5, 2) is None


def test_the_least_recently_used_is_closed_beyond_the_limit(files):
    opened = [add(files, fh) for fh in range(MOST)]
    files.get(5, 0)
    add(files, 10)
    assert [is_open(each) for each in opened] == [True, False, True]
    assert files.get(5, 1) is None
    assert len(files) == MOST


def test_a_question_about_another_nodeid_is_no_use(files):
    for fh in range(MOST):
        add(files, fh)
    files.get(6, 0)
    add(files, 10)
    assert files.get(5, 0) is None


def test_a_second_descriptor_of_a_file_replaces_the_first(files):
    first, second = add(files, 1), add(files, 1)
    assert not is_open(first)
    assert files.get(5, 1) is second
    assert len(files) == 1


@pytest.mark.parametrize("end", [lambda files: files.drop(1), OpenFiles.clear, lambda files: [add(files, fh) for fh in range(10, 20)]])
def test_a_pinned_file_stays_open_until_it_is_unpinned(files, end):
    opened = add(files, 1)
    opened.pin()
    opened.pin()
    assert opened.in_use
    end(files)
    assert files.get(5, 1) is None
    opened.unpin()
    os.fstat(opened.fd)
    opened.unpin()
    assert not opened.in_use
    assert not is_open(opened)


def test_unpinning_what_was_not_dropped_leaves_it_open(files):
    opened = add(files, 1)
    opened.pin()
    opened.unpin()
    assert is_open(opened)


def test_dropping_a_stranger_is_nothing(files):
    add(files, 1)
    files.drop(7)
    assert len(files) == 1


# --- inodes ---------------------------------------------------------------------------------------------------------


def test_an_inodes_descriptor_is_found_until_it_is_dropped(nodes):
    fd = new_fd()
    nodes.add(5, fd)
    assert nodes.get(5) == fd.fileno()
    assert nodes.get(6) is None
    nodes.drop(5)
    nodes.drop(5)
    assert fd.closed
    assert nodes.get(5) is None


def test_the_inode_used_least_recently_goes_first(nodes):
    fds = [new_fd() for _ in range(MOST)]
    for nodeid, fd in enumerate(fds):
        nodes.add(nodeid, fd)
    nodes.get(0)
    nodes.add(10, new_fd())
    assert [fd.closed for fd in fds] == [False, True, False]


def test_a_second_descriptor_of_an_inode_replaces_the_first(nodes):
    first, second = new_fd(), new_fd()
    nodes.add(5, first)
    nodes.add(5, second)
    assert first.closed
    assert nodes.get(5) == second.fileno()


def test_what_was_not_used_for_a_moment_is_closed(nodes, clock):
    fds = {nodeid: new_fd() for nodeid in (1, 2)}
    nodes.add(1, fds[1])
    nodes.add(2, fds[2])
    clock.now += NODE_IDLE_SECONDS * 0.6
    nodes.get(1)
    nodes.sweep(clock.now)
    assert len(nodes) == 2
    clock.now += NODE_IDLE_SECONDS * 0.5
    nodes.sweep(clock.now)
    assert [fds[1].closed, fds[2].closed] == [False, True]
    nodes.sweep(clock.now + NODE_IDLE_SECONDS)
    assert len(nodes) == 0


# --- mounts ---------------------------------------------------------------------------------------------------------


def test_what_is_learnt_of_a_mount_is_kept_by_its_key():
    mounts = Mounts()
    mounts.get(1).nowait_reads = False
    assert mounts.get(1).nowait_reads is False
    assert mounts.get(2).nowait_reads is True
    mounts.clear()
    assert mounts.get(1).nowait_reads is True


def test_a_slow_call_sends_its_mount_to_the_pool_for_a_moment(clock):
    mount = Mount(1)
    mount.took(clock.now - module.SLOW_CALL_SECONDS)
    assert not mount.pooled()
    mount.took(clock.now - module.SLOW_CALL_SECONDS * 1.1)
    assert mount.pooled()
    clock.now += module.POOLED_SECONDS * 0.99
    assert mount.pooled()
    clock.now += module.POOLED_SECONDS * 0.02
    assert not mount.pooled()


def test_a_mount_that_the_broker_calls_slow_is_always_pooled(clock):
    mount = Mount(1)
    mount.slow = True
    assert mount.pooled()
