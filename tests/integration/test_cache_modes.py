"""--cache: the timeouts, open flags and READDIRPLUS of the Rust daemon's modes."""

import os

import pytest

from tests.support.frontend.checks import assert_same
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import own_directory
from vfsd.wire import fuse_abi as abi

CACHE_FLAGS = abi.FOPEN_DIRECT_IO | abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR
DAY = 86400.0

#        timeout, OPEN and CREATE, OPENDIR, READDIRPLUS
MODES = {
    "auto": (1.0, 0, 0, True),
    "always": (DAY, abi.FOPEN_KEEP_CACHE, abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR, True),
    "metadata": (DAY, abi.FOPEN_DIRECT_IO, abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR, True),
    "never": (0.0, abi.FOPEN_DIRECT_IO, 0, False),
}


@pytest.fixture(params=MODES)
def cache(request):
    return request.param


@pytest.fixture
def mode(cache):
    return MODES[cache]


@pytest.fixture
def fs(pool, cache):
    with own_directory(pool, "cache", Options(cache=cache)) as fs:
        yield fs


def test_timeouts_of_entries_and_attributes(fs, mode):
    timeout = mode[0]
    os.mkdir(fs.path("dir"))
    fs.put("file")
    entries = [
        fs.client.lookup(fs.dir, b"file"),
        fs.client.lookup(fs.dir, b"dir"),
        fs.client.mkdir(fs.dir, b"new-dir"),
        fs.client.symlink(fs.dir, b"link", b"x"),
        fs.client.create(fs.dir, b"created")[0],
    ]
    assert {(entry.entry_valid, entry.attr_valid, entry.generation) for entry in entries} == {(timeout, timeout, 0)}
    for nodeid in (ROOT, entries[0].nodeid, entries[1].nodeid):
        assert fs.client.getattr(nodeid).attr_valid == timeout
    assert fs.client.setattr(entries[0].nodeid, mode=0o600).attr_valid == timeout


def test_readdirplus_has_the_same_timeouts(fs, mode):
    timeout, _, _, readdirplus = mode
    if not readdirplus:
        assert fs.client.init().flags & (abi.FUSE_DO_READDIRPLUS | abi.FUSE_READDIRPLUS_AUTO) == 0
        return
    fs.put("file")
    (entry,) = [dirent.entry for dirent in fs.client.list(fs.dir, plus=True) if dirent.name == b"file"]
    assert (entry.entry_valid, entry.attr_valid) == (timeout, timeout)
    assert_same(entry.attr, fs.path("file"))


def test_open_flags(fs, mode):
    _, file_flags, dir_flags, _ = mode
    fs.put("file")
    nodeid = fs.lookup(b"file")
    assert fs.client.open(nodeid).open_flags & CACHE_FLAGS == file_flags
    assert fs.client.open(nodeid, os.O_RDWR).open_flags & CACHE_FLAGS == file_flags
    assert fs.client.create(fs.dir, b"new")[1].open_flags & CACHE_FLAGS == file_flags
    assert fs.client.opendir(fs.dir).open_flags & CACHE_FLAGS == dir_flags
