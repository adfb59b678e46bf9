"""Names and inodes through the broker: which names are refused, what is made and found, what a read-only share refuses."""

import errno
import os
import stat

import pytest

from tests.support.broker import Bench, attributes, changed, naming
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.whereabouts import Place, PoolThread
from vfsd.wire import attr
from vfsd.wire import broker_messages as wire

ME = os.getuid(), os.getgid()


@pytest.fixture(params=["never", pytest.param("mandatory", marks=pytest.mark.root)])
def handles(request):
    return request.param


@pytest.fixture
def bench(tmp_path, handles):
    bench = Bench(tmp_path, inode_file_handles=handles)
    yield bench
    bench.close()


@pytest.fixture
def worker(bench):
    worker = bench.add(0)
    bench.begin_session()
    return worker


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"/", b"a/b", b"/etc/passwd", b"../x", b"a/..", b"a\0b", b"\0", b"dir/", b"a/" + b"n" * 250], ids=lambda name: repr(name)[:20]
)
def test_a_name_is_one_component(worker, tmp_path, name):
    (tmp_path / "ok").touch()
    (tmp_path / "dir").mkdir()
    before = sorted(os.listdir(tmp_path))
    for message in naming(name):
        assert worker.errno_of(message) == errno.EINVAL, type(message)
    file = worker.lookup(b"ok")
    assert worker.errno_of(wire.Link(file, ROOT_NODEID, name)) == errno.EINVAL
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", [b".", b".."])
def test_dots_are_no_names(worker, tmp_path, name):
    (tmp_path / "ok").touch()
    (tmp_path / "dir").mkdir()
    directory = worker.lookup(b"dir")
    assert worker.errno_of(wire.Lookup(directory, name)) == errno.EINVAL
    for message in naming(name)[1:]:
        assert worker.errno_of(message) == errno.EINVAL, type(message)
    assert worker.ask_ok(wire.Lookup(ROOT_NODEID, name)).fields[0] == ROOT_NODEID, "there is nothing above the root"


def test_an_empty_name_is_enoent(worker):
    for message in naming(b""):
        assert worker.errno_of(message) == errno.ENOENT, type(message)


@pytest.mark.parametrize("name", [b"n" * 255, b"\xff\xfe", b"new\nline", b" ", b"..."])
def test_any_other_bytes_are_a_name(worker, tmp_path, name):
    got = worker.ask_ok(wire.MkDir(ROOT_NODEID, name, 0o755, *ME))
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    assert worker.lookup(name) == got.fields[0]


def test_a_symlink_is_never_followed(worker, tmp_path):
    (tmp_path / "share").mkdir()
    (tmp_path / "out").symlink_to("/etc")
    nodeid = worker.lookup(b"out")
    assert attributes(worker.ask_ok(wire.GetAttr(nodeid)).fields[0])["mode"] & 0o170000 == stat.S_IFLNK
    assert worker.ask_ok(wire.ReadLink(nodeid)).fields == [b"/etc"]
    assert worker.errno_of(wire.Lookup(nodeid, b"passwd")) == errno.ENOTDIR
    assert worker.errno_of(wire.OpenDir(nodeid)) == errno.ENOTDIR


@pytest.mark.parametrize("nodeid", [0, 2, 77, 1 << 24, 2**64 - 1])
def test_an_unknown_nodeid_is_ebadf(worker, nodeid):
    messages = [
        wire.Lookup(nodeid, b"x"), wire.LookupMany(nodeid, [b"x"]), wire.GetAttr(nodeid), changed(nodeid, 0), wire.ReadLink(nodeid),
        wire.SymLink(nodeid, b"x", b"t", *ME), wire.MkNod(nodeid, b"x", 0o644, 0, *ME), wire.MkDir(nodeid, b"x", 0o755, *ME),
        wire.Unlink(nodeid, b"x"), wire.RmDir(nodeid, b"x"), wire.Rename(nodeid, b"x", ROOT_NODEID, b"y", 0),
        wire.Rename(ROOT_NODEID, b"x", nodeid, b"y", 0), wire.Link(nodeid, ROOT_NODEID, b"x"), wire.Link(ROOT_NODEID, nodeid, b"x"),
        wire.Open(nodeid, 0), wire.OpenDir(nodeid), wire.Create(nodeid, b"x", 0, 0o644, *ME), wire.StatFs(nodeid),
        wire.Access(nodeid, 0, *ME), wire.SyncFs(nodeid),
    ]  # fmt: skip
    assert [worker.errno_of(message) for message in messages] == [errno.EBADF] * len(messages)


# --- lookups --------------------------------------------------------------------------------------------------------


def test_two_names_of_one_file_are_one_inode(bench, worker, tmp_path):
    (tmp_path / "one").touch()
    os.link(tmp_path / "one", tmp_path / "two")
    (tmp_path / "other").touch()
    nodeid = worker.lookup(b"one")
    assert worker.lookup(b"two") == nodeid != worker.lookup(b"other")
    worker.send(wire.Forget([nodeid, 1]))
    bench.pump()
    assert worker.errno_of(wire.GetAttr(nodeid)) == 0
    worker.send(wire.Forget([nodeid, 1]))
    bench.pump()
    assert worker.errno_of(wire.GetAttr(nodeid)) == errno.EBADF


def test_of_two_threads_that_meet_a_file_at_once_the_second_keeps_nothing(bench, worker, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    nodeid = worker.lookup(b"file")
    references = [mount.references for mount in bench.share.mounts._mounts.values()]
    fds = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(bench.share.store, "count_lookup", lambda *_identity: None)  # as before the other thread's insert
    assert worker.lookup(b"file") == nodeid
    assert len(os.listdir("/proc/self/fd")) == fds
    assert [mount.references for mount in bench.share.mounts._mounts.values()] == references


def test_many_names_are_looked_up_each_for_itself(worker, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    results = worker.ask_ok(wire.LookupMany(ROOT_NODEID, [b"file", b"missing", b"a/b", b"", b"dir"])).fields
    assert [result[0] for result in results] == [0, errno.ENOENT, errno.EINVAL, errno.ENOENT, 0]
    assert [result[1:] for result in results[1:4]] == [[0, b""]] * 3
    assert [results[0][1], results[4][1]] == [worker.lookup(b"file"), worker.lookup(b"dir")]
    assert attributes(results[0][2])["ino"] == (tmp_path / "file").stat().st_ino


def test_a_listing_leaves_out_a_name_at_which_another_thread_hangs(bench, worker, tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / name).touch()
    hanging = PoolThread("pool7")
    hanging.place = Place(1, ROOT_NODEID, b"dead")
    bench.share.whereabouts.late.append(hanging)
    found = worker.ask_ok(wire.LookupMany(ROOT_NODEID, [b"dead", b"alive"])).fields
    assert [(error, bool(nodeid)) for error, nodeid, _attr in found] == [(errno.EAGAIN, False), (0, True)]
    bench.share.whereabouts.late.clear()
    assert worker.ask_ok(wire.LookupMany(ROOT_NODEID, [b"dead"])).fields[0][0] == 0


def test_a_full_store_says_enfile_and_keeps_nothing(bench, worker, tmp_path):
    bench.share.store._max_inodes = 2
    for name in ("one", "two"):
        (tmp_path / name).touch()
    one = worker.lookup(b"one")
    fds, mounts = len(os.listdir("/proc/self/fd")), len(bench.share.mounts)
    assert worker.errno_of(wire.Lookup(ROOT_NODEID, b"two")) == errno.ENFILE
    assert (len(os.listdir("/proc/self/fd")), len(bench.share.mounts)) == (fds, mounts)
    worker.send(wire.Forget([one, 1]))
    bench.pump()
    assert worker.lookup(b"two")


def test_a_million_forgets_of_strangers_do_no_harm(bench, worker):
    worker.send(wire.Forget([number for nodeid in range(2, 2000) for number in (nodeid, 2**64 - 1)]))
    bench.pump()
    assert worker.errno_of(wire.GetAttr(ROOT_NODEID)) == 0


def test_a_deleted_inode_lives_by_its_descriptor_and_is_stale_by_its_handle(worker, tmp_path, handles):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    nodeids = [worker.lookup(b"file"), worker.lookup(b"dir")]
    assert worker.errno_of(wire.Lookup(nodeids[1], b"x")) == errno.ENOENT
    (tmp_path / "file").unlink()
    (tmp_path / "dir").rmdir()
    expected = 0 if handles == "never" else errno.ESTALE
    for nodeid in nodeids:
        assert worker.errno_of(wire.GetAttr(nodeid)) == expected
    for message in (wire.Lookup(nodeids[1], b"x"), wire.MkDir(nodeids[1], b"x", 0o755, *ME)):
        assert worker.errno_of(message) == (expected or errno.ENOENT)


# --- making and removing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (wire.MkDir(ROOT_NODEID, b"x", 0o1755, *ME), stat.S_IFDIR),
        (wire.MkNod(ROOT_NODEID, b"x", 0o600, 0, *ME), stat.S_IFREG),
        (wire.MkNod(ROOT_NODEID, b"x", stat.S_IFREG | 0o600, 0, *ME), stat.S_IFREG),
        (wire.MkNod(ROOT_NODEID, b"x", stat.S_IFIFO | 0o600, 0, *ME), stat.S_IFIFO),
        (wire.MkNod(ROOT_NODEID, b"x", stat.S_IFSOCK | 0o600, 0, *ME), stat.S_IFSOCK),
        (wire.SymLink(ROOT_NODEID, b"x", b"t" * 4095, *ME), stat.S_IFLNK),
    ],
)
def test_what_is_made_is_what_was_asked_for(worker, tmp_path, message, kind):
    nodeid, record = worker.ask_ok(message).fields
    made = os.lstat(tmp_path / "x")
    assert stat.S_IFMT(made.st_mode) == kind
    assert attributes(record)["mode"] == made.st_mode
    assert attributes(record)["ino"] == made.st_ino
    assert worker.lookup(b"x") == nodeid
    assert worker.errno_of(message) == errno.EEXIST


@pytest.mark.root
def test_a_device_has_the_number_the_guest_said(worker, tmp_path):
    rdev = attr.encode_rdev(300, 70000)
    _nodeid, record = worker.ask_ok(wire.MkNod(ROOT_NODEID, b"x", stat.S_IFCHR | 0o600, rdev, *ME)).fields
    made = os.lstat(tmp_path / "x").st_rdev
    assert (os.major(made), os.minor(made)) == (300, 70000)
    assert attributes(record)["rdev"] == rdev


@pytest.mark.parametrize("mode", [stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777, 0o170000 | 0o600])
def test_mknod_makes_no_directory_and_no_link(worker, tmp_path, mode):
    assert worker.errno_of(wire.MkNod(ROOT_NODEID, b"x", mode, 0, *ME)) == errno.EINVAL
    assert os.listdir(tmp_path) == []


def test_a_link_target_with_a_nul_is_refused(worker):
    assert worker.errno_of(wire.SymLink(ROOT_NODEID, b"x", b"a\0b", *ME)) == errno.EINVAL


def test_a_link_is_to_the_inode_itself(worker, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for source in (b"file", b"link"):
        nodeid = worker.lookup(source)
        assert worker.ask_ok(wire.Link(nodeid, ROOT_NODEID, b"hard-" + source)).fields[0] == nodeid
    assert (tmp_path / "hard-link").is_symlink()
    assert (tmp_path / "file").stat().st_nlink == 2


def test_removing_and_renaming(worker, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "dir").mkdir()
    directory = worker.lookup(b"dir")
    assert worker.errno_of(wire.Rename(ROOT_NODEID, b"a", directory, b"c", 0)) == 0
    assert (tmp_path / "dir" / "c").read_text() == "a"
    assert worker.errno_of(wire.Rename(ROOT_NODEID, b"b", directory, b"c", 1)) == errno.EEXIST
    assert worker.errno_of(wire.Rename(ROOT_NODEID, b"b", directory, b"c", 2)) == 0
    assert (tmp_path / "b").read_text() == "a"
    assert worker.errno_of(wire.Rename(ROOT_NODEID, b"b", directory, b"c", 8)) == errno.EINVAL
    assert worker.errno_of(wire.RmDir(ROOT_NODEID, b"dir")) == errno.ENOTEMPTY
    assert worker.errno_of(wire.Unlink(ROOT_NODEID, b"dir")) == errno.EISDIR
    assert worker.errno_of(wire.RmDir(ROOT_NODEID, b"b")) == errno.ENOTDIR
    assert worker.errno_of(wire.Unlink(directory, b"c")) == 0
    assert worker.errno_of(wire.RmDir(ROOT_NODEID, b"dir")) == 0
    assert worker.errno_of(wire.Unlink(ROOT_NODEID, b"b")) == 0
    assert os.listdir(tmp_path) == []
