"""Other file systems mounted in the share: announced at their root and nowhere else, known apart, and let go again."""

import os
import subprocess
from contextlib import contextmanager

import pytest

from tests.support.frontend.checks import assert_same, eventually
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start
from vfsd.wire import fuse_abi as abi


@contextmanager
def tmpfs(path):
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)


@pytest.fixture
def mounted(tmp_path, handles):
    """A share with a tmpfs in it, from before the daemon's start."""

    @contextmanager
    def mounted(*extra):
        with tmpfs(tmp_path / "share" / "plain" / "sub") as sub:
            (sub / "dir").mkdir()
            (sub / "file").write_bytes(b"on tmpfs")
            served = start(tmp_path, Options(handles=handles, extra=extra))
            try:
                yield served, sub
            finally:
                served.close()

    return mounted


def submount_flags(client):
    """Path -> whether LOOKUP says that a submount begins there."""
    paths = (b"plain", b"plain/sub", b"plain/sub/dir", b"plain/sub/file")
    return {path: bool(client.walk(ROOT, path).attr.flags & abi.FUSE_ATTR_SUBMOUNT) for path in paths}


def test_property_16_a_submount_is_announced_at_its_root_only(mounted):
    with mounted() as (served, sub):
        assert submount_flags(served.client) == {b"plain": False, b"plain/sub": True, b"plain/sub/dir": False, b"plain/sub/file": False}
        listed = {dirent.name: dirent for dirent in served.client.list(served.client.lookup(ROOT, b"plain").nodeid, plus=True)}
        assert listed[b"sub"].entry.attr.flags & abi.FUSE_ATTR_SUBMOUNT
        root = served.client.walk(ROOT, b"plain/sub")
        assert_same(root.attr, sub)
        assert served.client.statfs(root.nodeid).blocks == os.statvfs(sub).f_blocks


def test_property_16_submounts_need_not_be_announced(mounted):
    with mounted("--no-announce-submounts") as (served, _):
        assert not any(submount_flags(served.client).values())


def test_files_of_a_submount_are_served(mounted):
    with mounted() as (served, sub):
        client = served.client
        nodeid = client.walk(ROOT, b"plain/sub/file").nodeid
        assert client.read_file(nodeid) == b"on tmpfs"
        directory = client.walk(ROOT, b"plain/sub").nodeid
        client.write_file(directory, b"new", b"x" * 10_000)
        assert (sub / "new").read_bytes() == b"x" * 10_000
        client.syncfs(directory)


def test_the_host_can_unmount_what_the_guest_has_forgotten(mounted):
    with mounted() as (served, sub):
        client = served.client
        client.read_file(client.walk(ROOT, b"plain/sub/file").nodeid)
        client.init()
        assert eventually(lambda: subprocess.run(["umount", sub], check=False, capture_output=True).returncode == 0)
        assert os.listdir(sub) == []
