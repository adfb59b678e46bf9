"""OPENDIR, READDIR and READDIRPLUS list what the host has, in pieces of any size, and count lookups for exactly what they list."""

import errno
import os
import stat

import pytest

from tests.support.frontend.checks import NOT_FOUND, assert_same, eventually, permits, raises
from tests.support.frontend.fuse_client import ROOT


def fill(fs, count):
    names = [b"entry-%05d" % i for i in range(count)]
    for name in names:
        os.close(os.open(fs.path(name), os.O_CREAT | os.O_WRONLY, 0o644))
    return names


def named(dirents):
    return {dirent.name: dirent for dirent in dirents if dirent.name not in (b".", b"..")}


@pytest.mark.parametrize("plus", [False, True], ids=["readdir", "readdirplus"])
def test_a_listing_has_every_type_and_ino(fs, plus):
    fs.put("file", b"x")
    os.mkdir(fs.path("dir"))
    os.symlink("x", fs.path("link"))
    os.mkfifo(fs.path("fifo"))
    listed = fs.client.list(fs.dir, plus=plus)
    for name, dirent in named(listed).items():
        status = os.lstat(fs.path(name))
        assert (dirent.ino, dirent.type) == (status.st_ino, stat.S_IFMT(status.st_mode) >> 12)
    assert sorted(dirent.name for dirent in listed) == [b".", b"..", b"dir", b"fifo", b"file", b"link"]


def test_an_empty_directory_lists_only_itself_and_its_parent(fs):
    assert sorted(dirent.name for dirent in fs.client.list(fs.dir)) == [b".", b".."]


@pytest.mark.parametrize("plus", [False, True], ids=["readdir", "readdirplus"])
@pytest.mark.parametrize("size", [256, 4096, 65536])
def test_10_000_entries_in_buffers_of_any_size(plain_fs, plus, size):
    names = fill(plain_fs, 10_000 if size > 256 else 1_000)
    listed = [dirent.name for dirent in plain_fs.client.list(plain_fs.dir, size=size, plus=plus)]
    assert sorted(listed) == sorted([*names, b".", b".."])


def test_a_listing_goes_on_at_any_offset(fs):
    fill(fs, 300)
    fh = fs.client.opendir(fs.dir).fh
    everything = []
    while some := fs.client.readdir(fs.dir, fh, everything[-1].off if everything else 0, 1024):
        everything += some
    for position in (0, 1, 17, 150, 298, 301):
        rest = fs.client.readdir(fs.dir, fh, everything[position].off, 1 << 20)
        assert rest == everything[position + 1 :]
    assert fs.client.readdir(fs.dir, fh, 0, 1024) == everything[: len(fs.client.readdir(fs.dir, fh, 0, 1024))]
    fs.client.releasedir(fs.dir, fh)


def test_two_listings_of_one_directory_do_not_disturb_each_other(fs):
    fill(fs, 200)
    first, second = fs.client.opendir(fs.dir).fh, fs.client.opendir(fs.dir).fh
    lists = {first: [], second: []}
    for _ in range(300):
        for fh, listed in lists.items():
            listed.extend(fs.client.readdir(fs.dir, fh, listed[-1].off if listed else 0, 300))
    assert lists[first] == lists[second]
    assert len(lists[first]) == 202
    for fh in lists:
        fs.client.releasedir(fs.dir, fh)


def test_entries_made_and_removed_during_a_listing(fs):
    names = fill(fs, 500)
    fh = fs.client.opendir(fs.dir).fh
    listed = fs.client.readdir(fs.dir, fh, 0, 2048)
    seen = {dirent.name for dirent in listed}
    for name in sorted(set(names) - seen)[:100]:
        os.unlink(fs.path(name))
    fs.put("new")
    while some := fs.client.readdir(fs.dir, fh, listed[-1].off, 2048):
        listed += some
    counted = [dirent.name for dirent in listed]
    assert len(counted) == len(set(counted))
    assert set(os.listdir(os.fsencode(fs.host))) - {b"new"} <= set(counted)
    fs.client.releasedir(fs.dir, fh)


def test_readdirplus_entries_are_lookups(fs):
    names = fill(fs, 50)
    for name, dirent in named(fs.client.list(fs.dir, plus=True)).items():
        assert dirent.entry.nodeid
        assert_same(dirent.entry.attr, fs.path(name))
        assert fs.lookup(name) == dirent.entry.nodeid
    assert len(names) == 50


def test_readdirplus_gives_no_nodeid_for_dot_and_dotdot(fs):
    dots = [dirent for dirent in fs.client.list(fs.dir, plus=True) if dirent.name in (b".", b"..")]
    assert [dirent.entry.nodeid for dirent in dots] == [0, 0]


@pytest.mark.parametrize("size", [400, 1000, 4096])
def test_property_40_readdirplus_counts_one_lookup_for_each_listed_entry_and_none_for_others(fs, size):
    """One FORGET for each entry that was listed ends its nodeid: none was counted twice, and what did not fit was not counted."""
    fill(fs, 40)
    nodeids = [dirent.entry.nodeid for dirent in named(fs.client.list(fs.dir, size=size, plus=True)).values()]
    assert len(set(nodeids)) == 40
    fs.client.batch_forget([(nodeid, 1) for nodeid in nodeids])
    for nodeid in nodeids:
        assert eventually(lambda nodeid=nodeid: fs.is_dead(nodeid))


def test_readdirplus_of_half_a_directory_keeps_nothing_of_the_other_half(fs):
    fill(fs, 40)
    fh = fs.client.opendir(fs.dir).fh
    listed = fs.client.readdir(fs.dir, fh, 0, 2000, plus=True)
    fs.client.releasedir(fs.dir, fh)
    assert 0 < len(listed) < 40
    for dirent in named(listed).values():
        fs.client.forget(dirent.entry.nodeid)
    # What was forgotten or never counted gets a new nodeid: none of the old ones comes back.
    assert {fs.lookup(b"entry-%05d" % i) for i in range(40)}.isdisjoint({dirent.entry.nodeid for dirent in listed})


def test_the_listing_of_the_root_does_not_look_outside(fs):
    by_name = {dirent.name: dirent for dirent in fs.client.list(ROOT)}
    outside = os.stat(fs.served.share.parent).st_ino
    assert by_name[b"."].ino == os.stat(fs.served.share).st_ino
    assert by_name[b".."].ino != outside


def test_opendir_errors(fs):
    fs.put("file")
    with raises(errno.ENOTDIR):
        fs.client.opendir(fs.lookup(b"file"))
    with raises(*NOT_FOUND):
        fs.client.opendir(0x7777_7777)


def test_readdir_of_a_file_and_read_of_a_directory_are_refused(fs):
    fs.put("file", b"x")
    nodeid = fs.lookup(b"file")
    fh, dir_fh = fs.client.open(nodeid).fh, fs.client.opendir(fs.dir).fh
    with raises(errno.ENOTDIR, errno.EBADF):
        fs.client.readdir(nodeid, fh)
    with raises(errno.EISDIR, errno.EBADF):
        fs.client.read(fs.dir, dir_fh, 0, 10)
    fs.client.release(nodeid, fh)
    fs.client.releasedir(fs.dir, dir_fh)


def test_a_removed_open_directory_lists_nothing(fs):
    os.mkdir(fs.path("dir"))
    nodeid = fs.lookup(b"dir")
    fh = fs.client.opendir(nodeid).fh
    fs.client.rmdir(fs.dir, b"dir")
    with permits(errno.ENOENT):  # what the host's own getdents64() says
        assert named(fs.client.readdir(nodeid, fh)) == {}
    with raises(errno.ENOENT, errno.ESTALE):
        fs.client.create(nodeid, b"x")
    fs.client.releasedir(nodeid, fh)
