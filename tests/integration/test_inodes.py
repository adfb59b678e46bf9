"""What a nodeid means: one inode, as long as the guest knows it, and never another one."""

import errno
import os

import pytest

from tests.support.frontend.checks import assert_same, eventually, permits, raises
from tests.support.frontend.fuse_client import ROOT

MAX_U64 = (1 << 64) - 1


def test_the_same_file_has_the_same_nodeid(fs):
    fs.put("file")
    assert len({fs.lookup(b"file") for _ in range(5)}) == 1


def test_forget_ends_a_nodeid_only_with_the_last_lookup(fs):
    path = fs.put("file")
    (nodeid,) = {fs.lookup(b"file") for _ in range(3)}
    fs.client.forget(nodeid, 2)
    assert_same(fs.client.attr(nodeid), path)
    fs.client.forget(nodeid, 1)
    assert eventually(lambda: fs.is_dead(nodeid))


def test_a_nodeid_is_never_used_again(fs):
    fs.put("file")
    seen = set()
    for _ in range(20):
        nodeid = fs.lookup(b"file")
        assert nodeid not in seen
        seen.add(nodeid)
        fs.client.forget(nodeid)
        assert eventually(lambda nodeid=nodeid: fs.is_dead(nodeid))


def test_batch_forget_ends_many(fs):
    for i in range(100):
        fs.put(f"file-{i}")
    nodeids = [fs.lookup(b"file-%d" % i) for i in range(100)]
    fs.client.batch_forget([(nodeid, 1) for nodeid in nodeids])
    assert eventually(lambda: all(fs.is_dead(nodeid) for nodeid in nodeids))


@pytest.mark.parametrize("nlookup", [2, 1 << 32, MAX_U64])
def test_forgetting_more_than_was_looked_up_harms_nobody(fs, nlookup):
    path = fs.put("file")
    other = fs.put("other")
    nodeid, kept = fs.lookup(b"file"), fs.lookup(b"other")
    fs.client.forget(nodeid, nlookup)
    assert eventually(lambda: fs.is_dead(nodeid))
    again = fs.lookup(b"file")
    assert_same(fs.client.attr(again), path)
    assert_same(fs.client.attr(kept), other)


def test_forgetting_what_does_not_exist_harms_nobody(fs):
    path = fs.put("file")
    nodeid = fs.lookup(b"file")
    fs.client.forget(0, 1)
    fs.client.forget(0x7777_7777, 1)
    fs.client.forget(MAX_U64, MAX_U64)
    fs.client.batch_forget([(0, 1), (0x7777_7777, 5), (MAX_U64, MAX_U64)])
    fs.client.batch_forget([])
    fs.client.forget(nodeid, 0)
    assert_same(fs.client.attr(nodeid), path)


def test_the_root_cannot_be_forgotten(fs):
    fs.client.forget(ROOT, 1000)
    fs.client.batch_forget([(ROOT, MAX_U64)])
    assert_same(fs.client.attr(ROOT), fs.served.share)
    assert fs.client.lookup(ROOT, fs.name).nodeid == fs.dir


def test_an_open_file_outlives_its_forget(fs):
    fs.put("file", b"content")
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid).fh
    fs.client.forget(nodeid)
    assert fs.client.read(nodeid, fh, 0, 100) == b"content"
    fs.client.release(nodeid, fh)


def test_created_entries_count_as_one_lookup(fs):
    made = [
        fs.client.mkdir(fs.dir, b"dir"),
        fs.client.symlink(fs.dir, b"link", b"x"),
        fs.client.create(fs.dir, b"file")[0],
    ]
    for entry in made:
        fs.client.forget(entry.nodeid)
        assert eventually(lambda entry=entry: fs.is_dead(entry.nodeid))


def test_a_link_counts_as_one_more_lookup(fs):
    fs.put("a")
    nodeid = fs.lookup(b"a")
    fs.client.link(nodeid, fs.dir, b"b")
    fs.client.forget(nodeid)
    assert not fs.is_dead(nodeid)
    fs.client.forget(nodeid)
    assert eventually(lambda: fs.is_dead(nodeid))


def test_a_nodeid_survives_renames_by_the_host(fs):
    fs.put("before", b"content")
    nodeid = fs.lookup(b"before")
    os.mkdir(fs.path("dir"))
    os.rename(fs.path("before"), fs.path("dir/after"))
    assert_same(fs.client.attr(nodeid), fs.path("dir/after"))
    assert fs.client.read_file(nodeid) == b"content"
    assert fs.client.walk(fs.dir, b"dir/after").nodeid == nodeid


def test_a_file_that_reuses_an_inode_number_has_a_nodeid_of_its_own(fs):
    """The heart of file handles: the old nodeid must not show the new file."""
    reused = 0
    for attempt in range(30):
        old = fs.put("old", b"old")
        old_ino = os.stat(old).st_ino
        nodeid = fs.lookup(b"old")
        os.unlink(old)
        fs.put("new", b"new!")
        reused += os.stat(fs.path("new")).st_ino == old_ino
        entry = fs.client.lookup(fs.dir, b"new")
        assert entry.nodeid != nodeid, f"attempt {attempt}"
        with permits(errno.ESTALE):
            attr = fs.client.attr(nodeid)
            assert (attr.nlink, attr.size) == (0, 3)  # a descriptor still holds the unlinked file
        assert fs.client.read_file(entry.nodeid) == b"new!"
        os.unlink(fs.path("new"))
    print(f"{reused} of 30 inode numbers were reused at once")


def test_all_operations_on_a_file_that_the_host_deleted_fail_cleanly(fs):
    fs.put("file", b"x")
    os.mkdir(fs.path("dir"))
    nodeid, directory = fs.lookup(b"file"), fs.lookup(b"dir")
    os.unlink(fs.path("file"))
    os.rmdir(fs.path("dir"))
    gone = (errno.ESTALE, errno.ENOENT)
    for operation in (
        lambda: fs.client.lookup(directory, b"x"),
        lambda: fs.client.create(directory, b"x"),
        lambda: fs.client.mkdir(directory, b"x"),
        lambda: fs.client.unlink(directory, b"x"),
    ):
        with raises(*gone):
            operation()
    for operation in (lambda: fs.client.getattr(nodeid), lambda: fs.client.release(nodeid, fs.client.open(nodeid).fh)):
        with permits(*gone):  # with a descriptor on it, it can still be used
            operation()
    fs.client.forget(nodeid)
    fs.client.forget(directory)


def test_without_handles_each_inode_holds_a_descriptor_until_it_is_forgotten(fs, handles):
    for i in range(200):
        fs.put(f"file-{i}")
    before = fs.served.daemon.fd_count()
    nodeids = [fs.lookup(b"file-%d" % i) for i in range(200)]
    during = fs.served.daemon.fd_count()
    if handles == "never":
        assert during >= before + 200
    else:
        print(f"{during - before} descriptors for 200 inodes known by handle")
    fs.client.batch_forget([(nodeid, 1) for nodeid in nodeids])
    assert eventually(lambda: fs.served.daemon.fd_count() <= before + 2)


def test_a_file_that_the_host_renames_over_is_seen_at_once(fs):
    """Each answer is of the inode that has the name now."""
    fs.put("file", b"x")
    for step in range(200):
        path = fs.put(f"replacement-{step}", b"y" * (step + 1))
        ino = os.stat(path).st_ino
        os.rename(path, fs.path("file"))
        entry = fs.client.lookup(fs.dir, b"file")
        assert (entry.attr.ino, entry.attr.size) == (ino, step + 1)
        assert fs.client.attr(entry.nodeid).ino == ino
