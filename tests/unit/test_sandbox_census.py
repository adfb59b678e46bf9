import os
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
