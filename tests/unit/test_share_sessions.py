"""What a share does with what an ended session held: known no more at once, freed bit by bit, and counted until then."""

import errno
import os

import pytest

from tests.support.broker import RecordingLog, close_share, open_share, path_fd, reap_all
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.errors import ReplyErrno

COUNT = 20


class Lazy:
    """A share whose reaper does nothing until it is told."""

    def __init__(self, path, **settings):
        self.path = path
        for number in range(COUNT):
            (path / f"file-{number}").touch()
        self.share = open_share(path, RecordingLog(), lambda *_notice: None, **settings)
        self.woken = 0
        self.share._wake_reaper = self._wake

    def _wake(self, work):
        assert work == self.share.reap
        self.woken += 1

    def look_up(self, number):
        share = self.share
        with share.store.pin(ROOT_NODEID, share.session) as root:
            return share.adopt(share.session, path_fd(self.path / f"file-{number}"), root).nodeid

    def close(self):
        self.share._wake_reaper = reap_all
        close_share(self.share)


@pytest.fixture
def make(tmp_path):
    made = []

    def make(**settings):
        made.append(Lazy(tmp_path, **settings))
        return made[-1]

    yield make
    for lazy in made:
        lazy.close()


def test_a_new_session_leaves_the_freeing_to_the_reaper(make):
    lazy = make()
    for number in range(COUNT):
        lazy.look_up(number)
    assert lazy.share.store.fd_count == 1 + COUNT
    lazy.share.begin_session(0)
    assert (lazy.woken, len(lazy.share.store)) == (1, 1)
    assert lazy.share.store.fd_count == 1 + COUNT, "they are still open"
    reap_all(lazy.share.reap)
    assert lazy.share.store.fd_count == 1


@pytest.mark.root
def test_mount_references_of_an_ended_session_are_given_back(make, tmp_path):
    lazy = make(inode_file_handles="mandatory")
    for number in range(COUNT):
        lazy.look_up(number)
    (mount,) = lazy.share.mounts._mounts.values()
    assert mount.references == 1 + COUNT
    lazy.share.begin_session(0)
    assert mount.references == 1 + COUNT
    reap_all(lazy.share.reap)
    assert mount.references == 1, "the root's"


def test_one_who_needs_room_frees_what_an_ended_session_left(make):
    """A guest that begins anew must not be told that its last life took all descriptors."""
    lazy = make(most_guest_fds=10)
    for number in range(9):
        lazy.look_up(number)
    with pytest.raises(ReplyErrno) as caught:
        lazy.look_up(9)
    assert caught.value.errno == errno.ENFILE
    lazy.share.begin_session(0)
    for number in range(9):
        lazy.look_up(number + 3)
    with pytest.raises(ReplyErrno):
        lazy.look_up(0)


def test_a_full_store_is_freed_of_what_an_ended_session_left(make):
    lazy = make()
    lazy.share.store._max_inodes = 3
    for _ in range(3):
        lazy.look_up(0)
        lazy.look_up(1)
        with pytest.raises(ReplyErrno):
            lazy.look_up(2)
        lazy.share.begin_session(0)


def test_sessions_cannot_begin_faster_than_they_are_freed(make):
    lazy = make()
    for number in range(COUNT):
        lazy.look_up(number)
        lazy.share.begin_session(0)
        assert lazy.share.store.wiped_tables <= 4
    assert lazy.share.store.fd_count <= 1 + 4


@pytest.mark.root
def test_directories_of_an_ended_session_are_not_remembered(make, tmp_path):
    lazy = make(inode_file_handles="mandatory")
    (tmp_path / "dir").mkdir()
    share = lazy.share
    with share.store.pin(ROOT_NODEID, share.session) as root:
        directory = share.adopt(share.session, path_fd(tmp_path / "dir"), root).nodeid
    with share.store.pin(directory, share.session) as inode:
        with share.path_of(inode):
            pass
        assert len(share.paths) == 1
        with share.path_of(inode) as lent:
            share.begin_session(0)
            assert len(share.paths) == 0
            os.fstat(lent.fd)  # its user still has it
