"""The broker's open files: fh and nodeid belong together, a description lives until its last user is done."""

import errno
import os
import threading

import pytest

from vfsd.broker.open_files import OpenFiles
from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd

NODEID = 5


@pytest.fixture
def files():
    files = OpenFiles(threading.Lock())
    yield files
    files.begin_session(99)
    assert len(files) == 0


def new_fd():
    return OwnedFd(os.memfd_create("file", os.MFD_CLOEXEC))


def add(files, nodeid=NODEID, session=0, **keywords):
    return files.add(session, nodeid, new_fd(), traits=3, mount_key=7, **({"is_directory": False} | keywords))


def fails(number, call, *arguments, **keywords):
    with pytest.raises(ReplyErrno) as caught:
        call(*arguments, **keywords)
    assert caught.value.errno == number


def test_an_open_file_is_found_by_nodeid_and_fh_together(files):
    opened, other = add(files), add(files, nodeid=6)
    with files.pin(NODEID, opened.fh, 0) as found:
        assert found is opened
        assert (found.traits, found.mount_key, found.is_directory) == (3, 7, False)
    fails(errno.EBADF, files.pin, NODEID, other.fh, 0)
    fails(errno.EBADF, files.pin, 6, opened.fh, 0)
    fails(errno.EBADF, files.pin, NODEID, 0, 0)
    fails(errno.EBADF, files.pin, NODEID, 2**64 - 1, 0)


def test_an_fh_is_never_used_again(files):
    seen = set()
    for session in range(5):
        files.begin_session(session)
        for _ in range(3):
            opened = add(files, session=session)
            assert opened.fh not in seen | {0}
            seen.add(opened.fh)
            files.release(NODEID, opened.fh, session)


def test_release_closes_and_tells_who_holds_copies(files):
    opened = add(files)
    with files._lock:
        files.grant(opened.fh, 0)
        files.grant(opened.fh, 3)
    assert files.release(NODEID, opened.fh, 0) == 0b1001
    assert opened.fd.closed
    assert not files.alive(opened.fh)
    assert files.release(NODEID, opened.fh, 0) == 0
    fails(errno.EBADF, files.pin, NODEID, opened.fh, 0)


def test_a_release_that_names_another_inode_or_session_does_nothing(files):
    opened = add(files)
    assert files.release(6, opened.fh, 0) == 0
    assert files.release(NODEID, opened.fh, 1) == 0
    assert files.release(NODEID, 77, 0) == 0
    assert not opened.fd.closed


def test_a_file_in_use_is_closed_after_its_last_use(files):
    opened = add(files)
    with files.pin(NODEID, opened.fh, 0):
        with files.pin(NODEID, opened.fh, 0):
            files.release(NODEID, opened.fh, 0)
            os.fstat(opened.fd.fileno())
        os.fstat(opened.fd.fileno())
    assert opened.fd.closed


def test_a_new_session_closes_all_but_what_is_in_use_and_that_a_moment_later(files):
    idle, used = add(files), add(files)
    with files.pin(NODEID, used.fh, 0):
        files.begin_session(1)
        assert idle.fd.closed
        os.fstat(used.fd.fileno())
        assert not files.alive(used.fh)
    assert used.fd.closed


def test_what_was_opened_for_a_session_that_has_ended_is_closed(files):
    files.begin_session(1)
    fd = new_fd()
    fails(errno.ESTALE, files.add, 0, NODEID, fd, 0, 0, is_directory=False)
    assert fd.closed
    assert len(files) == 0
    fails(errno.ESTALE, files.pin, NODEID, 1, 0)


def test_a_duplicate_is_of_the_same_description_and_not_inherited(files):
    opened = add(files)
    with opened.duplicate() as copy:
        os.lseek(copy.fileno(), 1234, os.SEEK_SET)
        assert os.lseek(opened.fd.fileno(), 0, os.SEEK_CUR) == 1234
        assert not os.get_inheritable(copy.fileno())
