"""Started by an ordinary user: what works, whose files the guest makes, and what vfsd says where it cannot be."""

import errno
import os
import re
import stat

import pytest

from tests.support.as_user import User, command_as, folder_of
from tests.support.frontend.checks import raises
from tests.support.frontend.daemon import Daemon, Options, vfsd
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start

USER = User()
RANGES = User(subuid="vfsd-test:100000:65536\n", subgid="vfsd-test:200000:65536\n")
# As libvirt writes them: root of the guest is the user, the others come from /etc/subuid and /etc/subgid.
RANGE_MAPS = (f"--uid-map=:0:{USER.uid}:1:", "--uid-map=:1:100000:65536:", f"--gid-map=:0:{USER.gid}:1:", "--gid-map=:1:200000:65536:")
SQUASHED = "of the guest cannot be set here"
HANDLES = "cannot be opened by file handle"


@pytest.fixture
def folder():
    with folder_of(USER) as path:
        yield path


def command(user):
    return lambda share, socket, options: command_as(user, vfsd(share, socket, options))


@pytest.fixture
def serve(folder):
    served = []

    def serve(*extra, user=USER, **options):
        served.append(start(folder, Options(extra=extra, **options), command=command(user)))
        return served[-1]

    yield serve
    for each in served:
        print(each.daemon.describe())
        ran = each.daemon.running
        each.close()
        assert ran


@pytest.fixture
def failing(folder):
    """The exit status and last line of a vfsd that does not start."""

    def failing(*extra, user=USER, **options):
        daemon = Daemon(folder / "share", folder / "vfsd.sock", Options(extra=extra, **options), command=command(user), wait=False)
        try:
            return daemon.wait(40), daemon.log[-1]
        finally:
            daemon.stop()

    return failing


def owner(path):
    seen = path.lstat()
    return seen.st_uid, seen.st_gid


def warnings(served, pattern):
    return [line for line in served.daemon.log if "WARN" in line and re.search(pattern, line)]


# --- ids ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sandbox", ["namespace", "none"])
def test_a_start_without_further_options_serves(serve, folder, sandbox):
    served = serve(sandbox=sandbox, handles="never")
    client = served.client
    with client.acting_as(USER.uid, USER.gid):
        entry = client.write_file(ROOT, b"file", b"contents")
        client.mkdir(ROOT, b"directory")
        client.symlink(ROOT, b"symlink", b"file")
        client.link(entry.nodeid, ROOT, b"link")
        assert client.read_file(client.lookup(ROOT, b"link").nodeid) == b"contents"
        client.setattr(entry.nodeid, mode=0o600, mtime_ns=10**18)
        client.rename(ROOT, b"link", ROOT, b"renamed")
        assert {each.name for each in client.list(ROOT, plus=True)} >= {b"file", b"directory", b"symlink", b"renamed"}
        client.unlink(ROOT, b"renamed")
        client.rmdir(ROOT, b"directory")
    assert sorted(os.listdir(folder / "share")) == ["file", "symlink"]
    assert owner(folder / "share/file") == owner(folder / "share/symlink") == (USER.uid, USER.gid)
    assert owner(folder / "vfsd.sock") == owner(folder / "vfsd.sock.pid") == (USER.uid, USER.gid)
    assert client.attr(entry.nodeid).uid == USER.uid  # the guest sees the ids of the host
    assert served.unexpected_log() == []
    assert not warnings(served, SQUASHED)


@pytest.mark.parametrize("sandbox", ["namespace", "none"])
def test_files_of_users_that_cannot_be_set_belong_to_the_starter_which_is_said_once(serve, folder, sandbox):
    served = serve(sandbox=sandbox, handles="never")
    for number, (uid, gid) in enumerate([(1000, 1000), (0, 0), (1001, USER.gid), (USER.uid, 1002)]):
        with served.client.acting_as(uid, gid):
            served.client.create(ROOT, b"file-%d" % number)
            served.client.mkdir(ROOT, b"directory-%d" % number)
            served.client.mknod(ROOT, b"fifo-%d" % number, stat.S_IFIFO | 0o600)
    assert {owner(path) for path in (folder / "share").iterdir()} == {(USER.uid, USER.gid)}
    served.wait_for_new_log(SQUASHED)
    (line,) = warnings(served, SQUASHED)
    assert f"uid 1000, gid 1000 of the guest cannot be set here: what such users make belongs to uid {USER.uid}, gid {USER.gid}" in line
    assert "--uid-map" in line


@pytest.mark.parametrize("sandbox", ["namespace", "none"])
def test_a_change_of_owner_that_cannot_be_is_eperm(serve, folder, sandbox):
    client = serve(sandbox=sandbox, handles="never").client
    entry, _ = client.create(ROOT, b"file")
    for change in ({"uid": 1000}, {"gid": 1000}, {"uid": 0, "gid": 0}):
        with raises(errno.EPERM):
            client.setattr(entry.nodeid, **change)
    client.setattr(entry.nodeid, uid=USER.uid, gid=USER.gid)
    assert owner(folder / "share/file") == (USER.uid, USER.gid)


def test_ranges_give_files_the_mapped_owners_on_the_host(serve, folder):
    served = serve(*RANGE_MAPS, user=RANGES, handles="never")
    client = served.client
    for uid, gid in ((0, 0), (1, 2), (1000, 1001), (0, 7), (8, 0)):
        with client.acting_as(uid, gid):
            name = b"%d-%d" % (uid, gid)
            entry, _ = client.create(ROOT, name)
        expected = (100000 + uid - 1 if uid else USER.uid, 200000 + gid - 1 if gid else USER.gid)
        assert owner(folder / "share" / os.fsdecode(name)) == expected
        attr = client.attr(entry.nodeid)
        assert (attr.uid, attr.gid) == (uid, gid)
    client.setattr(entry.nodeid, uid=33, gid=34)
    assert owner(folder / "share" / os.fsdecode(name)) == (100032, 200033)
    assert not warnings(served, SQUASHED)
    with client.acting_as(70000, 1):
        client.create(ROOT, b"beyond")
    assert owner(folder / "share/beyond") == (USER.uid, 200000)
    served.wait_for_new_log(SQUASHED)


def test_a_map_without_the_own_id_makes_the_broker_root_of_it(serve, folder):
    (folder / "share").chmod(0o777)
    served = serve("--uid-map=:0:100000:1000:", "--gid-map=:0:200000:1000:", user=RANGES, handles="never")
    with served.client.acting_as(5, 6):
        served.client.create(ROOT, b"file")
    served.client.create(ROOT, b"roots")
    assert owner(folder / "share/file") == (100005, 200006)
    assert owner(folder / "share/roots") == (100000, 200000)


def test_one_own_id_under_another_number_needs_no_program(serve, folder):
    served = serve(f"--uid-map=,1000,{USER.uid},1,", f"--gid-map=/1000/{USER.gid}/1/", handles="never")
    with served.client.acting_as(1000, 1000):
        entry, _ = served.client.create(ROOT, b"file")
    assert owner(folder / "share/file") == (USER.uid, USER.gid)
    assert served.client.attr(entry.nodeid).uid == 1000
    assert not warnings(served, SQUASHED)


def test_groups_of_the_user_still_count_where_they_cannot_be_dropped(serve, folder):
    os.chown(folder / "share", 0, 4800)
    (folder / "share").chmod(0o770)
    served = serve(user=User(groups=(4800,)), handles="never")
    with served.client.acting_as(USER.uid, USER.gid):
        served.client.create(ROOT, b"file")
    assert owner(folder / "share/file") == (USER.uid, USER.gid)


def test_a_proc_with_hidden_parts_is_no_obstacle(serve, folder):
    """As in a container: the kernel then refuses a new procfs in a user namespace."""
    served = serve(user=User(files=(("/proc/version", "hidden"),)), handles="never")
    entry = served.client.write_file(ROOT, b"file", b"contents")
    served.client.link(entry.nodeid, ROOT, b"link")
    assert (folder / "share/link").read_bytes() == b"contents"


def test_property_26_in_a_user_namespace_prefer_becomes_never_with_a_warning_and_mandatory_fails(serve, failing):
    status, last = failing(handles="mandatory")
    assert status == 1
    assert "--inode-file-handles=mandatory" in last
    served = serve(handles="prefer")
    served.client.write_file(ROOT, b"file", b"contents")
    (line,) = warnings(served, HANDLES)
    assert "using one descriptor per inode instead" in line
    assert "CAP_DAC_READ_SEARCH in the initial user namespace" in line


# --- what cannot be -----------------------------------------------------------------------------------------------------------


def test_ranges_that_the_user_does_not_have_are_refused_with_the_line_that_is_missing(failing):
    status, last = failing(*RANGE_MAPS)
    assert status == 1
    assert "--uid-map" in last
    assert "/etc/subuid has no line for vfsd-test: have root add vfsd-test:100000:65536" in last
    _, last = failing(*RANGE_MAPS, user=User(subuid=RANGES.subuid, subgid="vfsd-test:200000:10\n"))
    assert "--gid-map" in last
    assert "/etc/subgid" in last
    assert "vfsd-test:200000:65536" in last


def test_with_no_new_privs_ranges_cannot_be_had(failing):
    status, last = failing(*RANGE_MAPS, user=User(subuid=RANGES.subuid, subgid=RANGES.subgid, no_new_privs=True))
    assert status == 1
    assert "no_new_privs" in last


def test_without_user_namespaces_sandbox_none_is_named(failing):
    status, last = failing(user=User(user_namespaces=False))
    assert status == 1
    assert "user.max_user_namespaces is 0" in last
    assert "--sandbox=none" in last


def test_chroot_takes_root(failing):
    status, last = failing(sandbox="chroot")
    assert status == 1
    assert "--sandbox=chroot: only root" in last


@pytest.mark.parametrize("option", ["--uid-map", "--gid-map"])
def test_maps_are_for_ordinary_users_with_a_namespace(failing, folder, option):
    status, last = failing(f"{option}=:0:{USER.uid}:1:", sandbox="none")
    assert status == 1
    assert f"{option}: needs a user namespace" in last
    daemon = Daemon(folder / "share", folder / "root.sock", Options(extra=(f"{option}=:0:0:1:",)), wait=False)
    assert daemon.wait() == 1
    assert f"{option}: is for vfsd started by an ordinary user" in daemon.log[-1]
    daemon.stop()


def test_a_failed_start_leaves_neither_socket_nor_pid_file(failing, folder):
    failing(*RANGE_MAPS)
    assert os.listdir(folder) == ["share"]
