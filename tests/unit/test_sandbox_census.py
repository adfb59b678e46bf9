import mmap
import os
import resource
import threading

import pytest

from vfsd.sandbox.census import NAMESPACES, open_fds, take_census


def test_a_census_of_ourselves_says_what_we_know():
    census = take_census(os.getpid())
    assert census.leader.uids == (*os.getresuid(), os.geteuid())
    assert census.leader.groups == tuple(sorted(os.getgroups()))
    assert set(census.namespaces or {}) == set(NAMESPACES)
    assert census.root_entries == tuple(sorted(ascii(name)[1:-1] for name in os.listdir("/")))
    assert census.leader.no_new_privs is False


def test_every_thread_is_counted():
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(3)]
    before = len(take_census(os.getpid()).threads)
    for thread in threads:
        thread.start()
    try:
        census = take_census(os.getpid())
        assert len(census.threads) == before + 3
        assert {thread.native_id for thread in threads} <= {thread.tid for thread in census.threads}
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_descriptors_are_listed_with_their_targets(tmp_path):
    path = tmp_path / "odd\nname\x1b"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    try:
        fds = open_fds(os.getpid())
        assert fds is not None
        assert fds[fd].endswith("odd\\nname\\x1b")
    finally:
        os.close(fd)
    assert fd not in (open_fds(os.getpid()) or {})


def test_there_is_no_census_of_a_process_that_is_gone():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        take_census(pid)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_what_may_not_be_seen_is_none():
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        census = take_census(os.getppid())
        unseen = census.namespaces is None and census.fds is None and census.root_entries is None
        os.write(write_fd, b"unseen" if unseen and census.threads else b"seen")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read_fd, 10) == b"unseen"
    os.close(read_fd)
    os.close(write_fd)


def test_files_mapped_shared_are_listed_as_their_descriptors_are(tmp_path):
    path = tmp_path / "odd name \xff\x1b"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as shared:
        census = take_census(os.getpid())
        fd = census.fds[file.fileno()]
        assert (fd.inode, fd.target) in census.mapped
        assert len(shared) == 4096
    assert (fd.inode, fd.target) not in take_census(os.getpid()).mapped


def test_limits_environment_and_mounts_are_those_of_the_process():
    census = take_census(os.getpid(), list_root=False)
    assert census.limits["open files"] == tuple(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert census.limits["core file size"] == tuple(resource.getrlimit(resource.RLIMIT_CORE))
    assert census.parent == os.getppid()
    assert "PATH" in census.environment
    assert any(mount.point == "/proc" and mount.fs_type == "proc" for mount in census.mounts)
    assert census.leader.cwd == ascii(os.getcwd())[1:-1]
    assert census.root_entries is None
