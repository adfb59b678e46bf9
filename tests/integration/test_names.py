"""LOOKUP, creation, removal, links and renames: what the guest does to names is what the host then has, and the other way round."""

import errno
import os
import stat

import pytest

from tests.support.frontend.checks import MALFORMED, NOT_FOUND, assert_same, raises
from tests.support.frontend.fuse_client import ROOT

NO_SUCH_NODEID = 0x7777_7777
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4

ODD_NAMES = [
    b"...",
    b"..a",
    b"-rf",
    b" leading and trailing ",
    b"line\nfeed",
    b"\xff\xfe not UTF-8 \x80",
    "ünï©ode ☃".encode(),
    bytes(range(1, 47)) + bytes(range(48, 128)),
    bytes(range(128, 256)),
    b"n" * 255,
    b"%s%n$(id)`id`\\",
]


# LOOKUP


def test_lookup_gives_nodeid_and_attributes(fs):
    path = fs.put("file", b"abc")
    entry = fs.client.lookup(fs.dir, b"file")
    assert entry.nodeid not in (0, ROOT, fs.dir)
    assert_same(entry.attr, path)


def test_lookup_of_what_is_not_there_is_enoent(fs):
    with raises(errno.ENOENT):
        fs.client.lookup(fs.dir, b"nothing")


def test_lookup_in_what_is_no_directory_is_enotdir(fs):
    fs.put("file")
    with raises(errno.ENOTDIR):
        fs.client.lookup(fs.lookup(b"file"), b"x")


def test_lookup_below_a_dead_nodeid_is_refused(fs):
    with raises(*NOT_FOUND):
        fs.client.lookup(NO_SUCH_NODEID, b"x")


def test_lookup_does_not_follow_symlinks(fs):
    os.symlink("/etc", fs.path("link"))
    entry = fs.client.lookup(fs.dir, b"link")
    assert stat.S_ISLNK(entry.attr.mode)
    with raises(errno.ENOTDIR, errno.ELOOP):
        fs.client.lookup(entry.nodeid, b"passwd")


def test_dotdot_stays_inside_the_share(fs):
    """At the root it is the root itself; elsewhere it is refused, because no guest asks for it without EXPORT_SUPPORT."""
    assert fs.client.lookup(ROOT, b"..").attr.ino == os.stat(fs.served.share).st_ino
    with raises(errno.EINVAL):
        fs.client.lookup(fs.dir, b"..")


@pytest.mark.parametrize("name", [b"a/b", b"/", b"/etc/passwd", b"../etc", b"./file", b"file/"])
def test_a_slash_in_a_name_is_refused_by_every_operation(fs, name):
    fs.put("file")
    client, nodeid = fs.client, fs.lookup(b"file")
    os.mkdir(fs.path("a"))
    for operation in (
        lambda: client.lookup(fs.dir, name),
        lambda: client.create(fs.dir, name),
        lambda: client.mkdir(fs.dir, name),
        lambda: client.mknod(fs.dir, name, stat.S_IFREG | 0o600),
        lambda: client.symlink(fs.dir, name, b"target"),
        lambda: client.link(nodeid, fs.dir, name),
        lambda: client.unlink(fs.dir, name),
        lambda: client.rmdir(fs.dir, name),
        lambda: client.rename(fs.dir, b"file", fs.dir, name),
        lambda: client.rename2(fs.dir, name, fs.dir, b"other"),
    ):
        with raises(errno.EINVAL):
            operation()
    assert sorted(os.listdir(fs.host)) == ["a", "file"]


@pytest.mark.parametrize("name", [b".", b".."])
def test_dot_names_are_refused_by_every_operation_but_lookup(fs, name):
    fs.put("file")
    client, nodeid = fs.client, fs.lookup(b"file")
    for operation in (
        lambda: client.create(fs.dir, name),
        lambda: client.mkdir(fs.dir, name),
        lambda: client.mknod(fs.dir, name, stat.S_IFREG | 0o600),
        lambda: client.symlink(fs.dir, name, b"target"),
        lambda: client.link(nodeid, fs.dir, name),
        lambda: client.unlink(fs.dir, name),
        lambda: client.rmdir(fs.dir, name),
        lambda: client.rename(fs.dir, b"file", fs.dir, name),
        lambda: client.rename(fs.dir, name, fs.dir, b"other"),
    ):
        with raises(errno.EINVAL):
            operation()


def test_an_empty_name_is_refused(fs):
    for operation in (fs.client.lookup, fs.client.create, fs.client.mkdir, fs.client.unlink, fs.client.rmdir):
        with raises(errno.ENOENT, *MALFORMED):
            operation(fs.dir, b"")


def test_a_name_that_is_too_long_is_enametoolong(fs):
    for operation in (fs.client.lookup, fs.client.create, fs.client.mkdir, fs.client.unlink):
        with raises(errno.ENAMETOOLONG):
            operation(fs.dir, b"n" * 256)


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_odd_names_work_everywhere(plain_fs, name):
    fs = plain_fs
    entry = fs.client.write_file(fs.dir, name, b"data")
    assert fs.get(name) == b"data"
    assert fs.client.lookup(fs.dir, name).nodeid == entry.nodeid
    assert name in [dirent.name for dirent in fs.client.list(fs.dir)]
    other = name[:-1] + b"~"
    fs.client.rename(fs.dir, name, fs.dir, other)
    fs.client.link(entry.nodeid, fs.dir, name)
    assert sorted(os.listdir(os.fsencode(fs.host))) == sorted([name, other])
    fs.client.unlink(fs.dir, name)
    fs.client.unlink(fs.dir, other)
    fs.client.mkdir(fs.dir, name)
    assert stat.S_ISDIR(os.stat(fs.path(name)).st_mode)
    fs.client.rmdir(fs.dir, name)
    assert os.listdir(fs.host) == []


# Creation


def test_mkdir_mknod_symlink_create_what_was_asked_for(fs):
    made = {
        b"dir": fs.client.mkdir(fs.dir, b"dir", 0o751),
        b"reg": fs.client.mknod(fs.dir, b"reg", stat.S_IFREG | 0o640),
        b"fifo": fs.client.mknod(fs.dir, b"fifo", stat.S_IFIFO | 0o606),
        b"sock": fs.client.mknod(fs.dir, b"sock", stat.S_IFSOCK | 0o600),
        b"char": fs.client.mknod(fs.dir, b"char", stat.S_IFCHR | 0o600, rdev=(1 << 8) | 3),
        b"block": fs.client.mknod(fs.dir, b"block", stat.S_IFBLK | 0o600, rdev=0x45 | 0x123 << 8 | 0x456 << 20),
        b"link": fs.client.symlink(fs.dir, b"link", b"../\xff target"),
        b"file": fs.client.create(fs.dir, b"file", 0o604)[0],
    }
    for name, entry in made.items():
        assert_same(entry.attr, fs.path(name))
        assert fs.client.lookup(fs.dir, name).nodeid == entry.nodeid
    assert os.lstat(fs.path(b"char")).st_rdev == os.makedev(1, 3)
    assert os.lstat(fs.path(b"block")).st_rdev == os.makedev(0x123, 0x45645)
    assert os.readlink(fs.path(b"link")) == b"../\xff target"


def test_the_daemon_has_no_umask_of_its_own(fs):
    fs.client.create(fs.dir, b"file", 0o666)
    fs.client.mkdir(fs.dir, b"dir", 0o777)
    fs.client.mknod(fs.dir, b"node", stat.S_IFREG | 0o666)
    modes = {name: stat.S_IMODE(os.stat(fs.path(name)).st_mode) for name in os.listdir(fs.host)}
    assert modes == {"file": 0o666, "dir": 0o777, "node": 0o666}


def test_a_mode_that_the_guest_has_masked_stays_as_it_is(fs):
    """Without FUSE_DONT_MASK the guest's kernel applies the umask, and sends both."""
    fs.client.create(fs.dir, b"file", 0o640, umask=0o027)
    fs.client.mkdir(fs.dir, b"dir", 0o750, umask=0o027)
    fs.client.mknod(fs.dir, b"fifo", stat.S_IFIFO | 0o640, umask=0o027)
    modes = {name: stat.S_IMODE(os.stat(fs.path(name)).st_mode) for name in os.listdir(fs.host)}
    assert modes == {"file": 0o640, "dir": 0o750, "fifo": 0o640}


def test_creation_over_what_exists_is_eexist(fs):
    fs.put("there")
    client = fs.client
    for operation in (
        lambda: client.mkdir(fs.dir, b"there"),
        lambda: client.mknod(fs.dir, b"there", stat.S_IFREG | 0o600),
        lambda: client.symlink(fs.dir, b"there", b"x"),
        lambda: client.create(fs.dir, b"there", flags=os.O_RDWR | os.O_EXCL),
        lambda: client.link(fs.lookup(b"there"), fs.dir, b"there"),
    ):
        with raises(errno.EEXIST):
            operation()


def test_creation_below_what_is_no_directory_is_enotdir(fs):
    fs.put("file")
    nodeid = fs.lookup(b"file")
    for operation in (fs.client.mkdir, fs.client.create):
        with raises(errno.ENOTDIR):
            operation(nodeid, b"x")
    with raises(errno.ENOTDIR):
        fs.client.symlink(nodeid, b"x", b"y")


def test_a_long_symlink_target_is_read_back_whole(fs):
    target = b"t" * 4095
    entry = fs.client.symlink(fs.dir, b"link", target)
    assert fs.client.readlink(entry.nodeid) == target


def test_readlink_of_what_is_no_symlink_is_refused(fs):
    fs.put("file")
    with raises(errno.EINVAL, errno.ENOENT):
        fs.client.readlink(fs.lookup(b"file"))


def test_a_deep_tree(fs):
    nodeid, path = fs.dir, os.fsencode(fs.host)
    for depth in range(60):
        name = b"level-%d" % depth
        nodeid, path = fs.client.mkdir(nodeid, name).nodeid, path + b"/" + name
    fs.client.write_file(nodeid, b"leaf", b"deep")
    with open(path + b"/leaf", "rb") as leaf:
        assert leaf.read() == b"deep"


# Credentials


def test_what_a_user_creates_belongs_to_that_user(fs):
    os.chmod(fs.host, 0o777)
    with fs.client.acting_as(1000, 1001):
        fs.client.create(fs.dir, b"file")
        fs.client.mkdir(fs.dir, b"dir")
        fs.client.symlink(fs.dir, b"link", b"x")
        fs.client.mknod(fs.dir, b"fifo", stat.S_IFIFO | 0o600)
        fs.client.mknod(fs.dir, b"node", stat.S_IFREG | 0o600)
    owners = {name: (os.lstat(fs.path(name)).st_uid, os.lstat(fs.path(name)).st_gid) for name in os.listdir(fs.host)}
    assert owners == dict.fromkeys(["file", "dir", "link", "fifo", "node"], (1000, 1001))


def test_the_guests_permission_check_is_not_repeated(fs):
    """The guest's kernel knows the user's groups, the host does not: what it permits is done, in the user's name."""
    with fs.client.acting_as(1000, 1001):
        fs.client.create(fs.dir, b"file")
        fs.client.mkdir(fs.dir, b"dir")
    assert {(os.stat(fs.path(name)).st_uid, os.stat(fs.path(name)).st_gid) for name in os.listdir(fs.host)} == {(1000, 1001)}
    fs.client.create(fs.dir, b"roots")  # the daemon is itself again
    assert os.lstat(fs.path("roots")).st_uid == 0


def test_a_setgid_directory_gives_its_group_but_no_setgid_file_to_strangers(fs):
    """CVE-2022-0358: the caller is not in group 0, whatever supplementary groups the daemon has."""
    os.chown(fs.host, 0, 0)
    os.chmod(fs.host, 0o2777)
    with fs.client.acting_as(1000, 1000):
        fs.client.create(fs.dir, b"file", 0o2755)
        fs.client.mknod(fs.dir, b"node", stat.S_IFREG | 0o2755)
        fs.client.mkdir(fs.dir, b"dir", 0o755)
    for name in ("file", "node"):
        status = os.stat(fs.path(name))
        assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0o755)
    assert os.stat(fs.path("dir")).st_mode & stat.S_ISGID


# Removal


def test_property_39_unlink_and_rmdir_remove_looked_up_and_unknown_names(fs):
    for name in ("seen", "unseen"):
        fs.put(name)
        os.mkdir(fs.path(name + "-dir"))
    fs.lookup(b"seen")
    fs.lookup(b"seen-dir")
    for name in (b"seen", b"unseen"):
        fs.client.unlink(fs.dir, name)
        fs.client.rmdir(fs.dir, name + b"-dir")
    assert os.listdir(fs.host) == []


def test_removal_errors_are_the_hosts(fs):
    os.makedirs(fs.path("full/inner"))
    fs.put("file")
    with raises(errno.ENOENT):
        fs.client.unlink(fs.dir, b"nothing")
    with raises(errno.ENOENT):
        fs.client.rmdir(fs.dir, b"nothing")
    with raises(errno.ENOTEMPTY):
        fs.client.rmdir(fs.dir, b"full")
    with raises(errno.EISDIR):
        fs.client.unlink(fs.dir, b"full")
    with raises(errno.ENOTDIR):
        fs.client.rmdir(fs.dir, b"file")
    with raises(*NOT_FOUND):
        fs.client.unlink(NO_SUCH_NODEID, b"file")


# Links


def test_property_41_a_link_is_to_the_inode_whatever_it_is_known_by(fs):
    path = fs.put("a", b"x")
    first = fs.lookup(b"a")
    linked = fs.client.link(first, fs.dir, b"b")
    assert linked.nodeid == first
    assert linked.attr.nlink == 2
    os.link(path, fs.path("c"))
    assert fs.lookup(b"c") == first
    assert os.path.samefile(fs.path("a"), fs.path("b"))


def test_property_41_a_symlink_is_linked_itself(fs):
    os.symlink("/etc/passwd", fs.path("link"))
    entry = fs.client.link(fs.lookup(b"link"), fs.dir, b"second")
    assert stat.S_ISLNK(entry.attr.mode)
    assert os.readlink(fs.path("second")) == b"/etc/passwd"


def test_link_errors(fs):
    fs.put("file")
    os.mkdir(fs.path("dir"))
    with raises(errno.EPERM):
        fs.client.link(fs.lookup(b"dir"), fs.dir, b"x")
    with raises(*NOT_FOUND):
        fs.client.link(NO_SUCH_NODEID, fs.dir, b"x")
    with raises(*NOT_FOUND):
        fs.client.link(fs.lookup(b"file"), NO_SUCH_NODEID, b"x")


# Renames


def test_rename_moves_between_directories_and_keeps_the_nodeid(fs):
    fs.put("a", b"content")
    os.mkdir(fs.path("dir"))
    nodeid, target = fs.lookup(b"a"), fs.lookup(b"dir")
    fs.client.rename(fs.dir, b"a", target, b"b")
    assert fs.get("dir/b") == b"content"
    assert fs.client.lookup(target, b"b").nodeid == nodeid
    assert fs.client.read_file(nodeid) == b"content"


def test_rename_over_replaces(fs):
    fs.put("new", b"new")
    fs.put("old", b"old")
    old, new = fs.lookup(b"old"), fs.lookup(b"new")
    fh = fs.client.open(old).fh
    fs.client.rename(fs.dir, b"new", fs.dir, b"old")
    assert fs.get("old") == b"new"
    assert fs.lookup(b"old") == new
    assert fs.client.read(old, fh, 0, 10) == b"old"  # whoever has it open goes on reading it
    fs.client.release(old, fh)


def test_property_39_rename_of_names_never_looked_up(fs):
    fs.put("a", b"1")
    fs.client.rename(fs.dir, b"a", fs.dir, b"b")
    assert os.listdir(fs.host) == ["b"]


def test_rename2_flags(fs):
    fs.put("a", b"a")
    fs.put("b", b"b")
    with raises(errno.EEXIST):
        fs.client.rename2(fs.dir, b"a", fs.dir, b"b", RENAME_NOREPLACE)
    fs.client.rename2(fs.dir, b"a", fs.dir, b"b", RENAME_EXCHANGE)
    assert (fs.get("a"), fs.get("b")) == (b"b", b"a")
    fs.client.rename2(fs.dir, b"a", fs.dir, b"c", RENAME_NOREPLACE)
    fs.client.rename2(fs.dir, b"c", fs.dir, b"b")
    assert os.listdir(fs.host) == ["b"]
    with raises(errno.EINVAL):
        fs.client.rename2(fs.dir, b"b", fs.dir, b"x", RENAME_NOREPLACE | RENAME_EXCHANGE)
    with raises(errno.EINVAL):
        fs.client.rename2(fs.dir, b"b", fs.dir, b"x", 0x8000)


def test_rename_errors(fs):
    fs.put("file")
    os.makedirs(fs.path("dir/inner"))
    with raises(errno.ENOENT):
        fs.client.rename(fs.dir, b"nothing", fs.dir, b"x")
    with raises(errno.EINVAL):
        fs.client.rename(fs.dir, b"dir", fs.client.walk(fs.dir, b"dir/inner").nodeid, b"x")
    with raises(errno.EISDIR):
        fs.client.rename(fs.dir, b"file", fs.dir, b"dir")
    with raises(*NOT_FOUND):
        fs.client.rename(fs.dir, b"file", NO_SUCH_NODEID, b"x")
