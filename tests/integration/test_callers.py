"""Who makes a file: owner, groups and what the host refuses them; and ids that mean another on the host."""

import errno
import os
import stat
import struct

import pytest

from tests.support.frontend.checks import raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import LINUX_INIT_FLAGS
from tests.support.frontend.serving import own_directory
from tests.support.on_host import as_user
from vfsd.wire import fuse_abi as abi

GROUP = 2000
USER = (1000, 1000)
MANY_GROUPS = [*range(5000, 5400), GROUP]


@pytest.fixture
def fs(plain_fs):
    """A session whose guest tells the groups of who makes a file."""
    use_flags(plain_fs, LINUX_INIT_FLAGS | abi.FUSE_CREATE_SUPP_GROUP)
    return plain_fs


def use_flags(fs, flags):
    fs.client.destroy()
    fs.client.init(flags=flags)
    fs.enter()


def groups(*numbers):
    """The extension that tells them."""
    body = struct.pack(f"<I{len(numbers)}I", len(numbers), *numbers)
    size = abi.FUSE_REC_ALIGN(abi.fuse_ext_header.size + len(body))
    return (abi.fuse_ext_header.pack(size, abi.FUSE_EXT_GROUPS) + body).ljust(size, b"\0")


# Every way to make a file: in the guest, and by a process of the host.
WAYS = {
    "create": (
        lambda client, parent, mode, ext: client.release(*created(client.create(parent, b"new", mode, extensions=ext))),
        lambda mode: os.close(os.open("reference", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)),
    ),
    "mkdir": (
        lambda client, parent, mode, ext: client.mkdir(parent, b"new", mode, extensions=ext),
        lambda mode: os.mkdir("reference", mode),
    ),
    "mknod": (
        lambda client, parent, mode, ext: client.mknod(parent, b"new", stat.S_IFIFO | mode, extensions=ext),
        lambda mode: os.mknod("reference", stat.S_IFIFO | mode),
    ),
}


def created(made):
    entry, opened = made
    return entry.nodeid, opened.fh


def compare(fs, way, mode, user, *, tells, inside=None):
    """Make a file in the guest and one on the host; both errnos, and what is known of both."""
    in_guest, on_host = WAYS[way]
    inside = inside or fs.host
    try:
        with fs.client.acting_as(*user):
            in_guest(fs.client, fs.client.lookup(fs.dir, os.fsencode(inside.name)).nodeid, mode, groups(*tells) if tells else b"")
        error = 0
    except OSError as raised:
        error = raised.errno
    expected = as_user(*user, lambda: on_host(mode), inside=inside, groups=tells)
    return (error, seen(inside / "new")), (expected, seen(inside / "reference"))


def seen(path):
    if not path.exists():
        return None
    status = path.stat()
    return oct(status.st_mode), status.st_uid, status.st_gid


@pytest.fixture
def directory(fs):
    path = fs.host / "directory"
    path.mkdir()
    os.chown(path, 0, GROUP)
    return path


@pytest.mark.parametrize("tells", [(), (GROUP,), tuple(MANY_GROUPS), (7, 8), (0,)], ids=["none", "its group", "many", "others", "root's"])
@pytest.mark.parametrize("user", [USER, (0, 0), (1000, GROUP), (0, 1000)], ids=str)
@pytest.mark.parametrize("mode", [0o755, 0o2775])
@pytest.mark.parametrize("way", WAYS)
def test_property_38_a_set_group_id_directory_gives_its_group_and_its_bit_as_the_host_does(fs, directory, way, mode, user, tells):
    """CVE-2022-0358: only a member of the directory's group, or root, makes set-group-id files of that group."""
    directory.chmod(0o2777)
    in_guest, on_host = compare(fs, way, mode, user, tells=tells, inside=directory)
    assert in_guest == on_host
    assert in_guest[0] == 0


@pytest.mark.parametrize("tells", [(), (GROUP,), (7,)], ids=["none", "its group", "another"])
@pytest.mark.parametrize("directory_mode", [0o700, 0o770, 0o777, 0o707], ids=oct)
@pytest.mark.parametrize("way", WAYS)
def test_property_36_the_host_decides_who_may_make_a_file_if_it_knows_the_groups(fs, directory, way, directory_mode, tells):
    directory.chmod(directory_mode)
    in_guest, on_host = compare(fs, way, 0o640, USER, tells=tells, inside=directory)
    assert in_guest == on_host
    assert in_guest[0] in (0, errno.EACCES)
    if not in_guest[0]:  # a lookup is privileged, whoever may search the directory
        with fs.client.acting_as(*USER):
            assert fs.client.walk(fs.dir, b"directory/new").attr.uid == USER[0]


def test_property_36_a_guest_that_tells_no_groups_is_believed(plain_fs):
    plain_fs.host.chmod(0o770)
    os.chown(plain_fs.host, 0, GROUP)
    with plain_fs.client.acting_as(*USER):
        plain_fs.client.mkdir(plain_fs.dir, b"new")
    assert os.stat(plain_fs.path("new")).st_uid == USER[0]


def test_groups_do_not_outlast_their_request(fs):
    fs.host.chmod(0o777)
    os.chown(fs.host, 0, GROUP)
    with fs.client.acting_as(*USER):
        fs.client.mkdir(fs.dir, b"one", extensions=groups(GROUP))
    fs.host.chmod(0o770)
    with fs.client.acting_as(*USER):
        fs.client.mkdir(fs.dir, b"two", extensions=groups(GROUP))
        with raises(errno.EACCES):
            fs.client.mkdir(fs.dir, b"three")


def test_the_umask_of_the_daemon_and_of_the_caller_leave_modes_alone(fs):
    fs.host.chmod(0o777)
    with fs.client.acting_as(*USER):
        entry, opened = fs.client.create(fs.dir, b"new", 0o666, umask=0, extensions=groups(GROUP))
        fs.client.release(entry.nodeid, opened.fh)
    assert stat.S_IMODE(os.stat(fs.path("new")).st_mode) == 0o666


# Translated ids: the guest's 0 to 999 are the host's 100000 to 100999.

TRANSLATED = Options(
    extra=(
        "--translate-uid=map:0:100000:1000", "--translate-uid", "forbid-guest:1000:1000", "--translate-uid=squash-host:0:65534:100000",
        "--translate-gid=guest:0:100000:1000", "--translate-gid=host:100000:0:1000", "--translate-gid=squash-guest:3000:100:1000",
    )
)  # fmt: skip


@pytest.fixture
def ids(pool):
    with own_directory(pool, "translated", TRANSLATED, mode=0o777) as fs:
        yield fs


def owner(path):
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def test_files_are_made_as_the_hosts_ids(ids):
    for number, (uid, gid, expected) in enumerate(
        [(0, 0, (100000, 100000)), (5, 6, (100005, 100006)), (999, 3500, (100999, 100)), (2000, 2000, (2000, 2000))]
    ):
        name = b"new%d" % number
        with ids.client.acting_as(uid, gid):
            entry = ids.client.mkdir(ids.dir, name)
        assert owner(ids.path(name)) == expected
        guest_gid = gid if gid < 1000 else expected[1]
        assert (entry.attr.uid, entry.attr.gid) == (uid if uid < 1000 else 65534, guest_gid)


def test_attributes_are_the_guests_ids_whoever_reads_them(ids):
    path = ids.put("file", b"content")
    os.chown(path, 100007, 100008)
    nodeid = ids.lookup(b"file")
    fh = ids.client.open(nodeid).fh
    answers = [ids.client.lookup(ids.dir, b"file").attr, ids.client.attr(nodeid), ids.client.attr(nodeid), ids.client.attr(nodeid)]
    answers.append(ids.client.getattr(nodeid, fh).attr)
    answers += [dirent.entry.attr for dirent in ids.client.list(ids.dir, plus=True) if dirent.name == b"file"]
    assert [(attr.uid, attr.gid) for attr in answers] == [(7, 8)] * len(answers)
    assert len(answers) == 6
    ids.client.release(nodeid, fh)
    os.chown(path, 42, 43)
    nodeid = ids.lookup(b"file")
    assert (ids.client.attr(nodeid).uid, ids.client.attr(nodeid).gid) == (65534, 43)


def test_a_change_of_owner_is_translated_both_ways(ids):
    path = ids.put("file")
    nodeid = ids.lookup(b"file")
    attr = ids.client.setattr(nodeid, uid=1, gid=2).attr
    assert owner(path) == (100001, 100002)
    assert (attr.uid, attr.gid) == (1, 2)
    ids.client.setattr(nodeid, gid=5)
    assert owner(path) == (100001, 100005)


def test_forbidden_ids_are_eperm(ids):
    path = ids.put("file")
    nodeid = ids.lookup(b"file")
    with raises(errno.EPERM):
        ids.client.setattr(nodeid, uid=1500)
    assert owner(path) == (0, 0)
    with ids.client.acting_as(1000, 5):
        for make in (
            lambda: ids.client.mkdir(ids.dir, b"new"),
            lambda: ids.client.create(ids.dir, b"new"),
            lambda: ids.client.symlink(ids.dir, b"new", b"target"),
            lambda: ids.client.access(nodeid, os.R_OK),
        ):
            with raises(errno.EPERM):
                make()
    assert os.listdir(ids.host) == ["file"]


def test_access_compares_on_the_host(ids):
    path = ids.put("file", mode=0o640)
    os.chown(path, 100005, 100006)
    nodeid = ids.lookup(b"file")
    with ids.client.acting_as(5, 7):
        ids.client.access(nodeid, os.R_OK | os.W_OK)
    with ids.client.acting_as(6, 6):
        ids.client.access(nodeid, os.R_OK)
        with raises(errno.EACCES):
            ids.client.access(nodeid, os.W_OK)


def test_supplementary_groups_are_translated(ids):
    use_flags(ids, LINUX_INIT_FLAGS | abi.FUSE_CREATE_SUPP_GROUP)
    os.chown(ids.host, 0, 100050)
    ids.host.chmod(0o770)
    with ids.client.acting_as(5, 5):
        with raises(errno.EACCES):
            ids.client.mkdir(ids.dir, b"new", extensions=groups(51))
        ids.client.mkdir(ids.dir, b"new", extensions=groups(50))


def test_the_guests_root_may_what_root_may_though_it_is_another_user_on_the_host(ids):
    use_flags(ids, LINUX_INIT_FLAGS | abi.FUSE_CREATE_SUPP_GROUP)
    os.chown(ids.host, 100007, 100008)
    ids.host.chmod(0o2700)
    ids.client.mkdir(ids.dir, b"dir")
    ids.client.release(*created(ids.client.create(ids.dir, b"file", 0o2755)))
    ids.client.mknod(ids.dir, b"device", stat.S_IFCHR | 0o600, rdev=(1 << 8) | 3)
    assert {name: owner(ids.path(name)) for name in os.listdir(ids.host)} == dict.fromkeys(["dir", "file", "device"], (100000, 100008))
    assert os.stat(ids.path("file")).st_mode & 0o7777 == 0o2755
    with ids.client.acting_as(5, 5), raises(errno.EACCES):
        ids.client.mkdir(ids.dir, b"new")


# Devices


def test_devices_can_be_made_and_are_the_hosts_numbers(plain_fs):
    entry = plain_fs.client.mknod(plain_fs.dir, b"null", stat.S_IFCHR | 0o666, rdev=(1 << 8) | 3)
    assert os.lstat(plain_fs.path("null")).st_rdev == os.makedev(1, 3)
    assert stat.S_ISCHR(entry.attr.mode)


@pytest.mark.parametrize("mode", [0o2777, 0o770])
def test_members_of_group_0_are_what_they_are_on_the_host(fs, mode):
    """It is the broker's own group, of which it is no member any more while it is somebody else."""
    directory = fs.host / "roots"
    directory.mkdir()
    os.chown(directory, 0, 0)
    directory.chmod(mode)
    in_guest, on_host = compare(fs, "create", 0o2755, USER, tells=(0,), inside=directory)
    assert in_guest == on_host
