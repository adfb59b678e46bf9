"""Properties of semantics.md about single inodes: special files, symlinks, replaced names, what the host notices."""

import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import sys

import pytest

from tests.support.frontend.checks import assert_same, errno_of, eventually, raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from vfsd.wire import fuse_abi as abi

SPECIAL = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "character device": stat.S_IFCHR, "block device": stat.S_IFBLK}
NO_FH = (1 << 64) - 1


@pytest.mark.parametrize("kind", SPECIAL)
def test_property_11_special_files_are_seen_but_never_opened(fs, kind):
    path = fs.path("special")
    os.mknod(path, SPECIAL[kind] | 0o666, os.makedev(1, 3) if "device" in kind else 0)
    entry = fs.client.lookup(fs.dir, b"special")
    nodeid = entry.nodeid
    assert_same(entry.attr, path)
    assert_same(fs.client.attr(nodeid), path)
    locking = abi.fuse_lk_in.pack(NO_FH, 1, 0, NO_FH >> 1, 0, 4242, 0)
    refused = {
        "open": lambda: fs.client.open(nodeid, os.O_RDONLY | os.O_NONBLOCK),
        "open for writing": lambda: fs.client.open(nodeid, os.O_WRONLY | os.O_NONBLOCK),
        "truncate": lambda: fs.client.setattr(nodeid, size=0),
        "fsync": lambda: fs.client.fsync(nodeid, NO_FH),
        "getlk": lambda: fs.client.request(abi.FUSE_GETLK, nodeid, locking, abi.fuse_lk_out.size),
    }
    errnos = {name: errno_of(operation) for name, operation in refused.items()}
    if errnos["getlk"] == errno.ENOSYS:  # locks are not served: then nothing is opened either
        del errnos["getlk"]
    assert set(errnos.values()) == {errno.EBADF}, errnos
    assert errno_of(lambda: fs.client.opendir(nodeid)) in (errno.EBADF, errno.ENOTDIR)
    if kind == "fifo":
        with raises(errno.ENXIO):  # nobody has it open for reading
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    fs.client.setattr(nodeid, mode=0o600)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600


def test_property_12_a_symlink_is_itself_and_its_target_is_never_opened(fs, handles):
    os.mkfifo(fs.path("fifo"))
    os.symlink("fifo", fs.path("link"))
    nodeid = fs.lookup(b"link")
    assert_same(fs.client.attr(nodeid), fs.path("link"))
    assert fs.client.readlink(nodeid) == b"fifo"
    for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR):
        with raises(errno.EBADF):
            fs.client.open(nodeid, flags)
    with raises(errno.ENXIO):
        os.open(fs.path("fifo"), os.O_WRONLY | os.O_NONBLOCK)
    os.unlink(fs.path("link"))
    os.symlink("elsewhere", fs.path("link"))
    assert fs.lookup(b"link") != nodeid
    if handles == "never":
        assert fs.client.readlink(nodeid) == b"fifo"
    else:  # the handle was the link's own
        with raises(errno.ESTALE):
            fs.client.readlink(nodeid)


REPLACE = """
import os, sys
os.chdir(sys.argv[1])
for step in range(int(sys.argv[2])):
    kind = step % 3
    if kind == 0:
        os.close(os.open("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    elif kind == 1:
        os.mkfifo("new")
    else:
        os.symlink("x", "new")
    os.rename("new", "name")
"""
KIND_OF = {stat.S_IFREG: (0,), stat.S_IFIFO: (0,), stat.S_IFLNK: (1,)}


def attr_unless_gone(client, nodeid):
    """ext4 says ENOMEM instead of ESTALE while the inode's number is being given to a new file (iget_locked, I_CREATING)."""
    try:
        return client.attr(nodeid)
    except OSError as error:
        if error.errno not in (errno.ESTALE, errno.ENOMEM):
            raise
        return None


def test_property_14_attributes_type_and_handle_are_of_one_inode(fs):
    """While the host replaces a name by another type of file, each answer fits together: size 1 is a symlink's."""
    fs.put("name")
    fs.served.expect_log("a request fails with ENOMEM")  # see attr_unless_gone
    with subprocess.Popen([sys.executable, "-c", REPLACE, os.fsencode(fs.host), "30000"]) as replacing:
        seen = {}
        stale = 0
        while replacing.poll() is None:
            entry = fs.client.lookup(fs.dir, b"name")
            kind = stat.S_IFMT(entry.attr.mode)
            assert entry.attr.size in KIND_OF[kind]
            assert seen.setdefault(entry.nodeid, (entry.attr.ino, kind)) == (entry.attr.ino, kind)
            attr = attr_unless_gone(fs.client, entry.nodeid)
            stale += attr is None
            assert attr is None or (attr.ino, stat.S_IFMT(attr.mode)) == (entry.attr.ino, kind)
            if len(seen) > 2000:  # the table is not what is tested
                fs.client.batch_forget([(nodeid, 1) for nodeid in seen])
                seen.clear()
                fs.enter()
        assert replacing.returncode == 0
    print(f"{stale} were replaced between LOOKUP and GETATTR")


# What the host notices of an inode that the guest knows


def links_below(fs):
    """What the daemon's processes have open in the test's directory: paths as inside the broker's root or outside."""
    mark = f"/{fs.host.name}/"
    return {link for kinds in fs.served.daemon.fd_census().values() for link in kinds if mark in f"{link}/"}


def test_property_47_nothing_that_is_merely_known_is_held_open(fs, handles):
    """On NFS an open descriptor would make each removal a rename to .nfsXXXX."""
    for i in range(20):
        fs.put(f"file-{i}", b"x")
    nodeids = [fs.lookup(b"file-%d" % i) for i in range(20)]
    for nodeid in nodeids:
        assert fs.client.read_file(nodeid) == b"x"
    held = eventually(lambda: links_below(fs) if handles == "never" else not links_below(fs))
    if handles == "never":
        assert {link.rsplit("/", 1)[-1] for link in held} >= {f"file-{i}" for i in range(20)}
    else:
        assert held, links_below(fs)


IN_DELETE_SELF = 0x400
IN_CLOEXEC_NONBLOCK = os.O_CLOEXEC | os.O_NONBLOCK
_EVENT = struct.Struct("iIII")


class Watch:
    """inotify: whether an inode has been deleted, as a program of the host learns it."""

    def __init__(self, path):
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(IN_CLOEXEC_NONBLOCK)
        assert libc.inotify_add_watch(self.fd, ctypes.c_char_p(path), IN_DELETE_SELF) >= 0

    def deleted(self, seconds):
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        return bool(_EVENT.unpack_from(os.read(self.fd, 4096))[1] & IN_DELETE_SELF)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)


def test_property_48_the_host_is_told_of_a_deletion_when_it_happens(fs, handles):
    path = fs.put("file", b"x")
    nodeid = fs.lookup(b"file")
    assert fs.client.read_file(nodeid) == b"x"
    if handles != "never":
        assert eventually(lambda: not any(link.endswith("/file") for link in links_below(fs)))
    with Watch(path) as watch:
        os.unlink(path)
        if handles == "never":  # the descriptor delays it until the guest forgets
            assert not watch.deleted(0)
            fs.client.forget(nodeid)
        assert watch.deleted(5)


# A new session


def test_property_45_a_second_init_leaves_nothing_of_the_first(serve, handles):
    served = serve(Options(handles=handles))
    client = served.client
    with raises(errno.EIO):
        client.destroy()
        client.getattr(ROOT)
    client.init()
    (served.share / "dir").mkdir()
    (served.share / "dir" / "file").write_bytes(b"content")
    before = eventually(served.daemon.fd_census)
    directory = client.lookup(ROOT, b"dir").nodeid
    file = client.lookup(directory, b"file").nodeid
    fh, dir_fh = client.open(file).fh, client.opendir(directory).fh
    client.init()
    client.init()
    for operation in (
        lambda: client.getattr(directory),
        lambda: client.getattr(file),
        lambda: client.lookup(directory, b"file"),
        lambda: client.read(file, fh, 0, 10),
        lambda: client.readdir(directory, dir_fh),
        lambda: client.fsync(file, fh),
    ):
        assert errno_of(operation) == errno.EBADF
    served.daemon.wait_for_census(before)
    assert client.lookup(ROOT, b"dir").nodeid != directory
