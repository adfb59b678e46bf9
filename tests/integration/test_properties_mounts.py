"""Properties of semantics.md about mounts in the share: bind mounts, submounts that come and go, over-mounts, odd mount points.

The share lies on a mount with shared propagation, as on a host with systemd: what the host mounts or unmounts in it later
reaches the broker's namespace, and a mount that the broker holds cannot be unmounted.
"""

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.file_systems import Mounts
from tests.support.frontend.checks import assert_same, errno_of, eventually, raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start
from vfsd.wire import fuse_abi as abi


@pytest.fixture
def mounts(tmp_path):
    with Mounts(tmp_path) as mounts:
        mounts.tmpfs(tmp_path / "host", shared=True)
        (tmp_path / "host" / "share").mkdir()
        yield mounts


@pytest.fixture
def share(mounts, tmp_path):
    return tmp_path / "host" / "share"


@pytest.fixture(params=["never", "mandatory"])
def handles(request):
    return request.param


@pytest.fixture(params=["namespace", "chroot"])
def sandbox(request):
    return request.param


@pytest.fixture
def serve(share, handles, sandbox):
    """Start a daemon on the share, at last: after what is to be mounted before."""
    started = []

    def serve(*extra):
        started.append(start(share.parent, Options(handles=handles, sandbox=sandbox, extra=extra)))
        return started[-1].client

    yield serve
    for served in started:
        assert served.unexpected_log() == []
        served.close()


def unmountable(path):
    """Whether the host can unmount it now; it is unmounted then."""
    return subprocess.run(["umount", path], check=False, capture_output=True).returncode == 0


def test_property_15_two_bind_mounts_of_one_directory_are_not_confused(mounts, share, serve, tmp_path):
    (tmp_path / "host" / "source").mkdir()
    (tmp_path / "host" / "source" / "file").write_bytes(b"x")
    mounts.bind(tmp_path / "host" / "source", share / "writable")
    mounts.bind(tmp_path / "host" / "source", share / "readonly", readonly=True)
    client = serve()
    nodeids = {name: client.walk(ROOT, name + b"/file").nodeid for name in (b"readonly", b"writable")}
    directories = {name: client.lookup(ROOT, name).nodeid for name in nodeids}
    assert len({*nodeids.values(), *directories.values()}) == 4
    for _ in range(2):  # whichever comes first
        for flags in (os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            with raises(errno.EROFS):
                client.open(nodeids[b"readonly"], flags)
        for operation in (
            lambda: client.create(directories[b"readonly"], b"new"),
            lambda: client.setattr(nodeids[b"readonly"], mode=0o600),
            lambda: client.setattr(nodeids[b"readonly"], size=0),
        ):
            with raises(errno.EROFS):
                operation()
        fh = client.open(nodeids[b"writable"], os.O_RDWR).fh
        client.write(nodeids[b"writable"], fh, 0, b"y")
        client.release(nodeids[b"writable"], fh)
        assert client.read_file(nodeids[b"readonly"]) == b"y"


def test_property_17_the_host_can_unmount_what_the_guest_has_forgotten(mounts, share, serve):
    sub = mounts.tmpfs(share / "sub")
    (sub / "file").write_bytes(b"content")
    client = serve()
    directory = client.lookup(ROOT, b"sub").nodeid
    file = client.lookup(directory, b"file").nodeid
    assert client.read_file(file) == b"content"
    assert not unmountable(sub)
    client.forget(directory)
    assert not unmountable(sub)
    client.forget(file)
    assert eventually(lambda: unmountable(sub))
    assert client.list(client.lookup(ROOT, b"sub").nodeid)[2:] == []


def test_property_18_a_mount_in_the_same_place_is_another(mounts, share, serve):
    """Lazily unmounted, the old file system lives on by what the guest holds of it; its nodeids never show the new one."""
    sub = mounts.tmpfs(share / "sub")
    (sub / "file").write_bytes(b"old")
    client = serve()
    old_directory = client.lookup(ROOT, b"sub").nodeid
    old_file = client.lookup(old_directory, b"file").nodeid
    mounts.unmount(sub, lazily=True)
    mounts.tmpfs(sub)
    (sub / "file").write_bytes(b"newer")
    new_directory = client.lookup(ROOT, b"sub").nodeid
    new_file = client.lookup(new_directory, b"file").nodeid
    assert len({old_directory, old_file, new_directory, new_file}) == 4
    assert client.read_file(old_file) == b"old"
    assert client.lookup(old_directory, b"file").nodeid == old_file
    assert client.read_file(new_file) == b"newer"
    for nodeid in (old_directory, old_file, old_file):
        client.forget(nodeid)
    assert eventually(lambda: errno_of(lambda: client.getattr(old_file)) == errno.EBADF)


def test_property_18_nodeids_of_a_mount_whose_id_is_used_again_stay_dead(mounts, share, serve):
    sub = share / "sub"
    client = serve()
    seen = set()
    mount_ids = set()
    for round_number in range(5):
        mounts.tmpfs(sub)
        (sub / "file").write_bytes(b"%d" % round_number)
        mount_ids.add(mount_id(sub))
        directory = client.lookup(ROOT, b"sub").nodeid
        file = client.lookup(directory, b"file").nodeid
        assert seen.isdisjoint({directory, file})
        assert client.read_file(file) == b"%d" % round_number
        for nodeid in seen:
            with raises(errno.EBADF):
                client.getattr(nodeid)
        seen |= {directory, file}
        client.batch_forget([(directory, 1), (file, 1)])
        assert eventually(lambda: unmountable(sub))
    print(f"{len(mount_ids)} mount ids in 5 rounds")


def mount_id(path):
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return next(int(line.split()[0]) for line in file if line.split()[4] == str(path))


def test_property_21_a_mount_point_of_any_name_works(mounts, share, serve):
    names = [b"sp ace", b"tab\tand\nnewline", b"back\\slash\\040", b"\xff\xfe"]
    paths = {name: os.path.join(os.fsencode(share), name) for name in names}
    for path in paths.values():
        mounts.tmpfs(Path(os.fsdecode(path)))
    client = serve()
    for name, path in paths.items():
        entry = client.lookup(ROOT, name)
        assert entry.attr.flags & abi.FUSE_ATTR_SUBMOUNT
        assert_same(entry.attr, path)
        made = client.write_file(entry.nodeid, b"file", name)
        assert client.read_file(made.nodeid) == name
        with open(path + b"/file", "rb") as file:
            assert file.read() == name
        assert client.lookup(entry.nodeid, b"file").nodeid == made.nodeid


def test_property_22_what_was_held_before_an_over_mount_still_works(mounts, share, serve):
    inner = mounts.tmpfs(share / "dir")
    (inner / "file").write_bytes(b"inner")
    client = serve()
    held = client.lookup(ROOT, b"dir").nodeid
    mounts.tmpfs(share / "dir")
    (share / "dir" / "file").write_bytes(b"outer")
    seen = client.lookup(ROOT, b"dir").nodeid
    assert seen != held
    assert client.read_file(client.lookup(seen, b"file").nodeid) == b"outer"
    assert client.read_file(client.lookup(held, b"file").nodeid) == b"inner"
    client.write_file(held, b"new", b"below")
    assert not (share / "dir" / "new").exists()
    mounts.unmount(share / "dir", lazily=True)
    assert (share / "dir" / "new").read_bytes() == b"below"


def test_property_22_a_mount_that_is_over_mounted_from_the_start_is_served_as_the_host_sees_it(mounts, share, serve):
    for content in (b"inner", b"outer"):
        mounts.tmpfs(share / "dir")
        (share / "dir" / "file").write_bytes(content)
    client = serve()
    assert client.read_file(client.walk(ROOT, b"dir/file").nodeid) == b"outer"


def test_property_23_a_file_may_be_the_root_of_a_mount(mounts, share, serve, tmp_path):
    (tmp_path / "host" / "source").write_bytes(b"content")
    (share / "file").touch()
    mounts.bind(tmp_path / "host" / "source", share / "file")
    client = serve()
    entry = client.lookup(ROOT, b"file")
    assert not entry.attr.flags & abi.FUSE_ATTR_SUBMOUNT, "the guest's kernel mounts directories only"
    assert client.read_file(entry.nodeid) == b"content"
    fh = client.open(entry.nodeid, os.O_RDWR).fh
    client.write(entry.nodeid, fh, 0, b"CON")
    client.release(entry.nodeid, fh)
    assert (tmp_path / "host" / "source").read_bytes() == b"CONtent"


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR], ids=["fifo", "socket", "device"])
def test_property_23_a_special_file_as_the_root_of_a_mount_is_never_opened(mounts, share, serve, tmp_path, kind):
    source = tmp_path / "host" / "source"
    os.mknod(source, kind | 0o666, os.makedev(1, 3))
    (share / "special").touch()
    mounts.bind(source, share / "special")
    client = serve()
    entry = client.lookup(ROOT, b"special")
    assert_same(entry.attr, source)
    assert client.lookup(ROOT, b"special").nodeid == entry.nodeid
    for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR | os.O_NONBLOCK):
        with raises(errno.EBADF):
            client.open(entry.nodeid, flags)
    if kind == stat.S_IFIFO:
        with raises(errno.ENXIO):  # nobody reads it
            os.open(source, os.O_WRONLY | os.O_NONBLOCK)
    client.forget(entry.nodeid, 2)
    assert eventually(lambda: unmountable(share / "special"))


@pytest.mark.parametrize("sandbox", ["chroot"], indirect=True)
@pytest.mark.parametrize("mounted", [False, True], ids=["a directory", "a mount point"])
def test_property_25_in_chroot_mode_the_root_is_opened_by_handle(mounts, share, serve, handles, mounted):
    if mounted:
        mounts.tmpfs(share)
    (share / "file").write_bytes(b"content")
    client = serve()
    assert_same(client.attr(ROOT), share)
    assert client.read_file(client.lookup(ROOT, b"file").nodeid) == b"content"
    client.write_file(ROOT, b"new", b"x")
    assert sorted(os.listdir(share)) == ["file", "new"]
