"""INIT, FORGET and the operations on names and inodes: what the guest sends, what the share shows, what the guest gets."""

import errno
import os
import stat

import pytest

from tests.support.broker import Bench
from tests.support.worker import Worker
from vfsd.config import Features
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.cache_policy import CACHE_POLICIES
from vfsd.worker.file_system import FileSystem, Given, take_donation

ALL_FLAGS = 0xFFFFFFFF
ME = {"uid": os.getuid(), "gid": os.getgid()}


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def make_worker(bench):
    made = []

    def make_worker(**how):
        made.append(Worker(bench, index=len(made), **how))
        return made[-1]

    yield make_worker
    for worker in made:
        worker.close()


@pytest.fixture
def fresh(make_worker):
    return make_worker()


@pytest.fixture
def worker(fresh):
    fresh.begin()
    return fresh


def init(worker, major=7, minor=abi.FUSE_KERNEL_MINOR_VERSION, flags=ALL_FLAGS, flags2=0):
    return worker.call(abi.FUSE_INIT, abi.fuse_init_in.pack(major, minor, 131072, flags, flags2))


def agreed(reply):
    names = ("major", "minor", "readahead", "flags", "background", "congestion", "max_write", "granularity", "max_pages", "map", "flags2")
    return dict(zip(names, abi.fuse_init_out.unpack(reply.body), strict=True))


def entry(body):
    """(nodeid, mode) of a fuse_entry_out."""
    fields = abi.fuse_entry_out.unpack_from(body)
    return fields[0], fields[15]


# --- INIT -----------------------------------------------------------------------------------------------------------


def test_a_session_begins_with_init(fresh):
    assert not fresh.fs.active
    got = agreed(init(fresh))
    assert fresh.fs.active
    assert (got["major"], got["minor"]) == (7, abi.FUSE_KERNEL_MINOR_VERSION)
    assert got["max_write"] == 1 << 20
    assert got["max_pages"] * 4096 == got["max_write"]
    assert got["granularity"] == 1


@pytest.mark.parametrize(("minor", "answered"), [(27, 27), (31, 31), (45, 45), (60, 45)])
def test_the_lower_of_both_versions_is_spoken(fresh, minor, answered):
    assert agreed(init(fresh, minor=minor))["minor"] == answered


@pytest.mark.parametrize(("major", "minor"), [(7, 26), (7, 0), (6, 99), (0, 0)])
def test_a_guest_too_old_is_refused(fresh, major, minor):
    assert init(fresh, major, minor).errno == errno.EPROTO
    assert not fresh.fs.active
    assert "7.27" in fresh.log.errors[0]


def test_a_guest_of_a_later_major_is_told_ours_and_has_no_session_yet(fresh):
    got = agreed(init(fresh, major=8))
    assert (got["major"], got["flags"]) == (7, 0)
    assert not fresh.fs.active


def test_only_what_the_guest_offers_and_vfsd_has_is_agreed(fresh):
    assert agreed(init(fresh, flags=0))["flags"] == 0
    offered = abi.FUSE_ASYNC_READ | abi.FUSE_MAX_PAGES
    assert agreed(init(fresh, flags=offered))["flags"] == offered
    everything = agreed(init(fresh, flags2=ALL_FLAGS))
    only_if_asked = abi.FUSE_EXPORT_SUPPORT | abi.FUSE_WRITEBACK_CACHE | abi.FUSE_POSIX_ACL | abi.FUSE_HANDLE_KILLPRIV_V2
    assert everything["flags"] & only_if_asked == 0
    assert everything["flags2"] << 32 == abi.FUSE_CREATE_SUPP_GROUP | abi.FUSE_ALLOW_IDMAP


@pytest.mark.parametrize("killpriv_v2", [False, True])
@pytest.mark.parametrize("may_map", [False, True])
def test_a_guest_that_tells_no_caller_truncates_by_itself_or_says_what_is_to_go(make_worker, killpriv_v2, may_map):
    worker = make_worker(features=Features(killpriv_v2=killpriv_v2))
    offered = abi.FUSE_INIT_EXT | abi.FUSE_ATOMIC_O_TRUNC | abi.FUSE_HANDLE_KILLPRIV_V2
    got = agreed(init(worker, flags=offered, flags2=may_map * abi.FUSE_ALLOW_IDMAP >> 32))
    maps = bool(got["flags2"] << 32 & abi.FUSE_ALLOW_IDMAP)
    assert maps == (may_map and not killpriv_v2)
    assert bool(got["flags"] & abi.FUSE_ATOMIC_O_TRUNC) == (not maps)


def test_the_flags_of_a_guest_before_7_36_end_where_its_request_ends(fresh):
    body = abi.fuse_init_in.pack(7, 31, 131072, abi.FUSE_ASYNC_READ, 0)[: abi.FUSE_COMPAT_INIT_IN_SIZE]
    assert agreed(fresh.call(abi.FUSE_INIT, body))["flags"] == abi.FUSE_ASYNC_READ


@pytest.mark.parametrize(("cache", "offered"), [("auto", True), ("always", True), ("metadata", True), ("never", False)])
def test_readdirplus_is_agreed_where_the_guest_may_keep_what_it_brings(make_worker, cache, offered):
    plus = abi.FUSE_DO_READDIRPLUS | abi.FUSE_READDIRPLUS_AUTO
    assert agreed(init(make_worker(cache=cache)))["flags"] & plus == (plus if offered else 0)


def test_a_second_init_begins_a_new_session(bench, worker, tmp_path):
    (tmp_path / "file").touch()
    nodeid = worker.lookup(b"file")
    fh = worker.open(nodeid)
    before = worker.broker.session
    worker.begin()
    assert worker.broker.session == before + 1
    assert (len(worker.fs.files), len(bench.share.files), len(bench.share.store)) == (0, 0, 1)
    assert worker.read(nodeid, fh, 0, 1).errno == errno.EBADF
    assert worker.lookup(b"file") != nodeid


def test_destroy_ends_the_session(bench, worker, tmp_path):
    (tmp_path / "file").touch()
    worker.open(worker.lookup(b"file"))
    assert worker.ok(abi.FUSE_DESTROY) == b""
    assert not worker.fs.active
    assert (len(worker.fs.files), len(bench.share.files), len(bench.share.store)) == (0, 0, 1)
    assert worker.call(abi.FUSE_STATFS).errno == errno.EIO
    worker.begin()
    assert worker.call(abi.FUSE_STATFS).errno == 0


# --- FORGET ---------------------------------------------------------------------------------------------------------


def test_forgets_take_back_what_was_counted(bench, worker, tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    nodeids = [worker.lookup(name) for name in (b"a", b"b", b"c")]
    worker.lookup(b"a")
    assert len(bench.share.store) == 4
    assert worker.call(abi.FUSE_FORGET, abi.fuse_forget_in.pack(2), nodeid=nodeids[0]) is None
    assert len(bench.share.store) == 3
    pairs = b"".join(abi.fuse_forget_one.pack(nodeid, 1) for nodeid in nodeids[1:])
    assert worker.call(abi.FUSE_BATCH_FORGET, abi.fuse_batch_forget_in.pack(2) + pairs, nodeid=0) is None
    assert len(bench.share.store) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 2**32 - 1])
def test_a_batch_is_as_long_as_it_is_and_as_it_says(bench, worker, tmp_path, count):
    for name in "ab":
        (tmp_path / name).touch()
    pairs = b"".join(abi.fuse_forget_one.pack(worker.lookup(name), 1) for name in (b"a", b"b"))
    worker.call(abi.FUSE_BATCH_FORGET, abi.fuse_batch_forget_in.pack(count) + pairs + b"half a pair", nodeid=0)
    assert len(bench.share.store) == 3 - min(count, 2)


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_lookup_gives_node_attributes_and_timeouts(worker, tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    fields = abi.fuse_entry_out.unpack(worker.ok(abi.FUSE_LOOKUP, b"file\0"))
    seen = (tmp_path / "file").stat()
    assert fields[0] > 1
    assert fields[1:6] == (0, 1, 1, 0, 0), "generation 0; timeouts of a second"
    assert fields[6:8] == (seen.st_ino, 5)
    assert fields[15:18] == (seen.st_mode, 1, seen.st_uid)
    assert worker.call(abi.FUSE_LOOKUP, b"missing\0").errno == errno.ENOENT


@pytest.mark.parametrize(("name", "expected"), [(b"n" * 256, errno.ENAMETOOLONG), (b"a/b", errno.EINVAL), (b"", errno.ENOENT)])
def test_a_name_that_is_none_is_refused_by_every_operation(worker, name, expected):
    end, two = name + b"\0", name + b"\0ok\0"
    requests = [
        (abi.FUSE_LOOKUP, end), (abi.FUSE_MKNOD, abi.fuse_mknod_in.pack(0o100644, 0, 0) + end), (abi.FUSE_MKDIR, abi.fuse_mkdir_in.pack(0, 0) + end),
        (abi.FUSE_UNLINK, end), (abi.FUSE_RMDIR, end), (abi.FUSE_SYMLINK, two), (abi.FUSE_LINK, abi.fuse_link_in.pack(1) + end),
        (abi.FUSE_RENAME, abi.fuse_rename_in.pack(1) + two), (abi.FUSE_RENAME, abi.fuse_rename_in.pack(1) + b"ok\0" + end),
        (abi.FUSE_RENAME2, abi.fuse_rename2_in.pack(1, 0) + two), (abi.FUSE_CREATE, abi.fuse_create_in.pack(os.O_RDWR, 0o644, 0, 0) + end),
    ]  # fmt: skip
    for opcode, body in requests:
        assert worker.call(opcode, body, **ME).errno == expected, opcode


def test_things_are_made_with_the_callers_umask(worker, tmp_path):
    worker.ok(abi.FUSE_MKDIR, abi.fuse_mkdir_in.pack(0o1777, 0o027) + b"dir\0", **ME)
    worker.ok(abi.FUSE_MKNOD, abi.fuse_mknod_in.pack(stat.S_IFIFO | 0o666, 0, 0o077) + b"fifo\0", **ME)
    worker.ok(abi.FUSE_CREATE, abi.fuse_create_in.pack(os.O_RDWR | os.O_CREAT, 0o100666, 0o027, 0) + b"file\0", **ME)
    modes = {name: stat.S_IMODE(os.lstat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)}
    assert modes == {"dir": 0o1750, "fifo": 0o600, "file": 0o640}


def test_a_created_file_is_open(worker, tmp_path):
    body = worker.ok(abi.FUSE_CREATE, abi.fuse_create_in.pack(os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644, 0, 0) + b"file\0", **ME)
    nodeid, mode = entry(body)
    fh, flags = abi.fuse_open_out.unpack_from(body, abi.fuse_entry_out.size)
    assert (stat.S_ISREG(mode), flags) == (True, 0)
    worker.write(nodeid, fh, 0, b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_links_renames_and_removals(worker, tmp_path):
    worker.ok(abi.FUSE_SYMLINK, b"link\0../target\0", **ME)
    link = worker.lookup(b"link")
    assert worker.ok(abi.FUSE_READLINK, nodeid=link) == b"../target"
    worker.ok(abi.FUSE_LINK, abi.fuse_link_in.pack(link) + b"hard\0")
    worker.ok(abi.FUSE_RENAME, abi.fuse_rename_in.pack(1) + b"hard\0moved\0")
    worker.ok(abi.FUSE_RENAME2, abi.fuse_rename2_in.pack(1, 1) + b"moved\0again\0")
    assert worker.call(abi.FUSE_RENAME2, abi.fuse_rename2_in.pack(1, 1) + b"again\0link\0").errno == errno.EEXIST
    assert sorted(os.listdir(tmp_path)) == ["again", "link"]
    worker.ok(abi.FUSE_UNLINK, b"again\0")
    worker.ok(abi.FUSE_MKDIR, abi.fuse_mkdir_in.pack(0o755, 0) + b"dir\0", **ME)
    worker.ok(abi.FUSE_RMDIR, b"dir\0")
    assert os.listdir(tmp_path) == ["link"]
    assert worker.call(abi.FUSE_SYMLINK, b"x\0" + b"t" * 4096 + b"\0").errno == errno.ENAMETOOLONG


# --- inodes ---------------------------------------------------------------------------------------------------------


def attributes(body):
    """(size, mtime, mode, nlink) of a fuse_attr_out."""
    fields = abi.fuse_attr_out.unpack(body)
    return fields[3], fields[6], fields[11], fields[12]


def getattr_(worker, nodeid, fh=0):
    return worker.call(abi.FUSE_GETATTR, abi.fuse_getattr_in.pack(abi.FUSE_GETATTR_FH if fh else 0, fh), nodeid=nodeid)


def test_attributes_are_asked_for_twice_and_then_known_here(worker, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")
    nodeid = worker.lookup(b"file")
    asked = []
    ask = worker.broker.ask
    monkeypatch.setattr(worker.broker, "ask", lambda message, *how: asked.append(message) or ask(message, *how))
    replies = [getattr_(worker, nodeid) for _ in range(4)]
    assert len(asked) == 2
    assert len(set(replies)) == 1
    assert attributes(replies[0].body)[0] == 5
    (tmp_path / "file").write_bytes(b"longer")
    assert attributes(getattr_(worker, nodeid).body)[0] == 6


def test_attributes_of_a_file_deleted_on_the_host_are_the_brokers_to_say(bench, worker, tmp_path):
    (tmp_path / "file").touch()
    nodeid = worker.lookup(b"file")
    for _ in range(2):
        getattr_(worker, nodeid)
    assert len(worker.fs.nodes) == 1
    (tmp_path / "file").unlink()
    assert attributes(getattr_(worker, nodeid).body)[3] == 0
    worker.call(abi.FUSE_FORGET, abi.fuse_forget_in.pack(1), nodeid=nodeid)
    worker.turn()
    assert len(worker.fs.nodes) == 0, "the descriptor of a forgotten inode is dropped"


def test_attributes_of_an_open_file_come_from_its_descriptor(worker, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")
    nodeid = worker.lookup(b"file")
    fh = worker.open(nodeid)
    monkeypatch.setattr(worker.broker, "ask", None)
    assert attributes(getattr_(worker, nodeid, fh).body)[0] == 5


def test_setattr_changes_what_it_names(worker, tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    nodeid = worker.lookup(b"file")
    before_1970 = 2**64 - 5
    valid = abi.FATTR_SIZE | abi.FATTR_MODE | abi.FATTR_MTIME | abi.FATTR_LOCKOWNER | abi.FATTR_KILL_SUIDGID | abi.FATTR_CTIME
    body = abi.fuse_setattr_in.pack(valid, 0, 3, 1, 0, before_1970, 0, 0, 7, 0, 0o100600, 0, 0)
    size, mtime, mode, _nlink = attributes(worker.ok(abi.FUSE_SETATTR, body, nodeid=nodeid))
    assert (size, mtime, mode) == (3, before_1970, 0o100600)
    assert (tmp_path / "file").stat().st_mtime_ns == -5 * 10**9 + 7


@pytest.mark.parametrize(("size", "nsec"), [(2**63, 0), (2**64 - 1, 0), (0, 10**9), (0, 2**32 - 1)])
def test_a_setattr_no_file_can_have_is_einval(worker, tmp_path, size, nsec):
    body = abi.fuse_setattr_in.pack(abi.FATTR_SIZE | abi.FATTR_MTIME, 0, size, 0, 0, 0, 0, 0, nsec, 0, 0, 0, 0)
    assert worker.call(abi.FUSE_SETATTR, body).errno == errno.EINVAL


def test_the_other_questions_about_an_inode(worker, tmp_path):
    seen = os.statvfs(tmp_path)
    assert abi.fuse_statfs_out.unpack(worker.ok(abi.FUSE_STATFS))[5:] == (seen.f_bsize, seen.f_namemax, seen.f_frsize)
    worker.ok(abi.FUSE_ACCESS, abi.fuse_access_in.pack(os.R_OK | os.X_OK), **ME)
    worker.ok(abi.FUSE_SYNCFS, bytes(8))
    assert worker.call(abi.FUSE_READLINK).errno in (errno.EINVAL, errno.ENOENT)


# --- what the guest may cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "seconds", "open_flags", "opendir_flags"),
    [
        ("auto", 1, 0, 0),
        ("always", 86400, abi.FOPEN_KEEP_CACHE, abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR),
        ("metadata", 86400, abi.FOPEN_DIRECT_IO, abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR),
        ("never", 0, abi.FOPEN_DIRECT_IO, 0),
    ],
)
def test_the_cache_mode_shows_in_timeouts_and_open_flags(make_worker, tmp_path, cache, seconds, open_flags, opendir_flags):
    (tmp_path / "file").touch()
    worker = make_worker(cache=cache)
    worker.begin()
    fields = abi.fuse_entry_out.unpack(worker.ok(abi.FUSE_LOOKUP, b"file\0"))
    assert fields[2:4] == (seconds, seconds)
    assert abi.fuse_attr_out.unpack(getattr_(worker, 1).body)[0] == seconds
    opened = abi.fuse_open_out.unpack(worker.ok(abi.FUSE_OPEN, abi.fuse_open_in.pack(0, 0), nodeid=fields[0]))
    assert opened[1] == open_flags
    assert abi.fuse_open_out.unpack(worker.ok(abi.FUSE_OPENDIR, abi.fuse_open_in.pack(0, 0)))[1] == opendir_flags


def test_every_mode_of_the_command_line_has_a_policy():
    assert set(CACHE_POLICIES) == {"auto", "always", "metadata", "never"}


def test_an_answer_that_should_bring_a_descriptor_and_does_not_is_eio():
    with pytest.raises(OSError, match="donated no descriptor") as caught:
        take_donation(Given([1, 2, 3], None))
    assert caught.value.errno == errno.EIO


def test_a_new_session_drops_all_and_is_acknowledged(worker, tmp_path):
    (tmp_path / "file").touch()
    worker.open(worker.lookup(b"file"))
    told = []
    worker.broker.tell = told.append
    FileSystem.noticed(worker.fs, wire.SessionNotice(worker.broker.session, wire.SESSION_ACTIVE))
    assert len(worker.fs.files) == 0
    assert worker.fs.active
    assert told == [wire.SessionAck(worker.broker.session)]
