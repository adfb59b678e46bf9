"""Properties of semantics.md that depend on the file system, on each kind that this machine can mount."""

import errno
import os
from contextlib import ExitStack

import pytest

from tests.support.file_systems import KINDS, WITHOUT_HANDLES, Mounts
from tests.support.frontend.checks import assert_same, errno_of, eventually, raises
from tests.support.frontend.daemon import DaemonFailed, Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import Pool, own_directory, start
from vfsd.sandbox import filecalls


@pytest.fixture(scope="module", params=KINDS)
def file_system(request, tmp_path_factory):
    """(kind, a pool of daemons that share a file system of that kind)."""
    with ExitStack() as stack:

        def make_folder():
            folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
            stack.enter_context(Mounts(folder)).file_system(request.param, folder / "share")
            return folder

        pool = Pool(make_folder)
        stack.callback(pool.close)
        yield request.param, pool


@pytest.fixture(params=["never", "prefer"])
def on(request, file_system):
    """(whether inodes are known by handle, a directory on the file system)."""
    kind, pool = file_system
    with own_directory(pool, kind, Options(handles=request.param)) as fs:
        yield request.param == "prefer" and kind not in WITHOUT_HANDLES, fs


def test_property_01_a_reused_inode_number_is_a_new_nodeid(on, file_system):
    by_handle, fs = on
    reused = 0
    for _ in range(10):
        ino = os.stat(fs.put("a", b"old")).st_ino
        old = fs.lookup(b"a")
        os.unlink(fs.path("a"))
        reused += os.stat(fs.put("b", b"newer")).st_ino == ino
        new = fs.lookup(b"b")
        assert new != old
        if by_handle:
            with raises(errno.ESTALE):
                fs.client.attr(old)
            with raises(errno.ESTALE):
                fs.client.open(old)
        else:  # its descriptor keeps the deleted file, and thereby its number
            assert (fs.client.attr(old).nlink, fs.client.attr(old).size) == (0, 3)
            assert fs.client.read_file(old) == b"old"
        assert fs.client.read_file(new) == b"newer"
        os.unlink(fs.path("b"))
    if by_handle and file_system[0] == "ext4":  # the others give a freed number away later, if at all
        assert reused, "without a number used again this test shows nothing"


def test_property_02_an_open_file_keeps_its_nodeid_until_release(on):
    by_handle, fs = on
    ino = os.stat(fs.put("a", b"old")).st_ino
    nodeid = fs.lookup(b"a")
    fh = fs.client.open(nodeid).fh
    os.unlink(fs.path("a"))
    assert all(os.stat(fs.put(f"b-{i}")).st_ino != ino for i in range(20))
    assert (fs.client.attr(nodeid).nlink, fs.client.attr(nodeid).ino) == (0, ino)
    assert fs.client.read(nodeid, fh, 0, 10) == b"old"
    fs.client.release(nodeid, fh)
    if by_handle:
        assert eventually(lambda: fs.is_dead(nodeid))
        with raises(errno.ESTALE):
            fs.client.attr(nodeid)
    else:
        assert fs.client.attr(nodeid).nlink == 0


def test_property_09_hard_links_are_one_inode_with_as_many_lookups(on):
    _, fs = on
    path = fs.put("a", b"x")
    os.link(path, fs.path("b"))
    nodeid = fs.lookup(b"a")
    assert fs.lookup(b"b") == nodeid
    assert fs.client.attr(nodeid).nlink == 2
    fs.client.forget(nodeid, 1)
    assert_same(fs.client.attr(nodeid), path)
    fs.client.forget(nodeid, 1)
    assert eventually(lambda: fs.is_dead(nodeid))


def test_property_10_a_nodeid_survives_a_rename_by_the_host(on):
    _, fs = on
    fs.put("before", b"content")
    os.mkdir(fs.path("dir"))
    nodeid = fs.lookup(b"before")
    os.rename(fs.path("before"), fs.path("dir/after"))
    assert_same(fs.client.attr(nodeid), fs.path("dir/after"))
    assert fs.client.read_file(nodeid) == b"content"
    assert fs.client.walk(fs.dir, b"dir/after").nodeid == nodeid


def operations_in(client, directory, file):
    """Everything that a guest may do with its working directory."""
    return {
        "lookup": lambda: client.lookup(directory, b"x"),
        "access": lambda: client.access(directory, os.R_OK),
        "create": lambda: client.create(directory, b"x"),
        "mkdir": lambda: client.mkdir(directory, b"x"),
        "mknod": lambda: client.mknod(directory, b"x", 0o100600),
        "symlink": lambda: client.symlink(directory, b"x", b"y"),
        "link": lambda: client.link(file, directory, b"x"),
        "unlink": lambda: client.unlink(directory, b"x"),
        "rmdir": lambda: client.rmdir(directory, b"x"),
        "rename": lambda: client.rename(directory, b"x", directory, b"y"),
        "opendir": lambda: client.releasedir(directory, client.opendir(directory).fh),
        "statfs": lambda: client.statfs(directory),
        "syncfs": lambda: client.syncfs(directory),
        "setattr": lambda: client.setattr(directory, mode=0o700),
        "getattr": lambda: client.getattr(directory),
    }


# What works on a directory without a name. What needs a name in it is ENOENT, as in a host process whose directory is gone.
USABLE_WHEN_DELETED = {"access", "opendir", "statfs", "syncfs", "setattr", "getattr"}


def test_property_42_a_deleted_directory_is_stale_in_every_operation(on):
    by_handle, fs = on
    os.mkdir(fs.path("cwd"))
    fs.put("file")
    directory, file = fs.lookup(b"cwd"), fs.lookup(b"file")
    os.rmdir(fs.path("cwd"))
    os.mkdir(fs.path("cwd"))  # the same name, perhaps the same inode number
    before = os.lstat(fs.path("cwd"))
    for name, operation in operations_in(fs.client, directory, file).items():
        by_descriptor = 0 if name in USABLE_WHEN_DELETED else errno.ENOENT
        by_file_handle = 0 if name == "syncfs" else errno.ESTALE  # what is on its file system can be synced without it
        assert errno_of(operation) == (by_file_handle if by_handle else by_descriptor), name
    assert os.lstat(fs.path("cwd")) == before
    assert os.listdir(fs.path("cwd")) == []
    assert fs.lookup(b"cwd") != directory
    fs.client.forget(directory)
    assert eventually(lambda: errno_of(lambda: fs.client.getattr(directory)) == errno.EBADF)


def test_names_and_targets_that_are_not_utf8_work_on_every_file_system(on):
    _, fs = on
    name, target = b"\xff\xfe name \x80", b"/\xc3\x28/\xff"
    entry = fs.client.write_file(fs.dir, name, b"x")
    fs.client.symlink(fs.dir, b"\xe9", target)
    assert {name, b"\xe9"} <= {dirent.name for dirent in fs.client.list(fs.dir, plus=True)}
    assert fs.client.readlink(fs.lookup(b"\xe9")) == os.readlink(fs.path(b"\xe9")) == target
    fs.client.rename(fs.dir, name, fs.dir, b"\x80")
    fs.client.link(entry.nodeid, fs.dir, b"\x81")
    assert fs.get(b"\x80") == fs.get(b"\x81") == b"x"
    for gone in (b"\x80", b"\x81", b"\xe9"):
        fs.client.unlink(fs.dir, gone)
    assert os.listdir(fs.host) == []


# Handles themselves


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_HANDLES])
def test_property_44_a_handle_is_the_same_each_time_it_is_made(kind, tmp_path):
    with Mounts(tmp_path) as mounts:
        path = mounts.file_system(kind, tmp_path / "share") / "file"
        path.write_bytes(b"content")
        fd = os.open(path, os.O_PATH)
        try:
            handle = filecalls.name_to_handle_at(fd)
            assert {filecalls.name_to_handle_at(fd) for _ in range(10_000)} == {handle}
        finally:
            os.close(fd)
        os.link(path, path.with_name("link"))
        assert {handle_of(path), handle_of(path.with_name("link"))} == {handle}


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_property_44_a_handle_outlives_an_unmount(kind, tmp_path):
    with Mounts(tmp_path) as mounts:
        image = mounts.image(kind)
        share = mounts.loop(image, tmp_path / "share")
        (share / "file").write_bytes(b"content")
        handle = handle_of(share / "file")
        mounts.unmount(share)
        mounts.loop(image, share)
        assert handle_of(share / "file") == handle
        mount_fd = os.open(share, os.O_RDONLY)
        try:
            fd = filecalls.open_by_handle_at(mount_fd, handle, os.O_RDONLY)
            assert os.read(fd, 100) == b"content"
            os.close(fd)
        finally:
            os.close(mount_fd)


def handle_of(path):
    fd = os.open(path, os.O_PATH)
    try:
        return filecalls.name_to_handle_at(fd)
    finally:
        os.close(fd)


def test_property_43_a_plain_overlay_is_served_by_descriptors(tmp_path):
    """AT_HANDLE_FID would make handles here that cannot be opened."""
    with Mounts(tmp_path) as mounts:
        mounts.overlay("overlay", tmp_path / "share")
        served = start(tmp_path, Options(handles="prefer"))
        try:
            served.daemon.wait_for_log("cannot be opened by file handle .*not supported.*as with never")
            before = served.daemon.fd_count()
            nodeid = served.client.lookup(ROOT, b"lower").nodeid
            assert served.daemon.fd_count() == before + 1
            assert served.client.read_file(nodeid) == b"from the lower layer"
            served.client.write_file(ROOT, b"upper", b"x" * 1000)
            assert (tmp_path / "share" / "upper").read_bytes() == b"x" * 1000
        finally:
            served.close()
        with pytest.raises(DaemonFailed, match="mandatory: the shared directory cannot be opened by file handle"):
            start(tmp_path, Options(handles="mandatory"))


def test_property_43_an_overlay_with_nfs_export_is_served_by_handles(tmp_path):
    with Mounts(tmp_path) as mounts:
        share = mounts.overlay("overlay with nfs_export", tmp_path / "share")
        for i in range(50):
            (share / f"file-{i}").touch()
        served = start(tmp_path, Options(handles="mandatory"))
        try:
            nodeid = served.client.lookup(ROOT, b"lower").nodeid
            before = served.daemon.fd_count()
            for i in range(50):
                served.client.lookup(ROOT, b"file-%d" % i)
            assert served.daemon.fd_count() <= before
            fh = served.client.open(nodeid, os.O_RDWR).fh  # copied up: still the same inode
            served.client.write(nodeid, fh, 0, b"FROM")
            served.client.release(nodeid, fh)
            assert served.client.read_file(nodeid) == b"FROM the lower layer"
            assert served.client.lookup(ROOT, b"lower").nodeid == nodeid
        finally:
            served.close()
