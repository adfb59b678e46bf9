"""Open files through the broker: what may be opened, with which flags, who gets descriptors and who must drop them."""

import errno
import fcntl
import os
import stat

import pytest

from tests.support.broker import Bench
from vfsd.broker import answer_files
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.new_files import NEW_FILE
from vfsd.broker.share import Settings
from vfsd.sandbox import filecalls
from vfsd.sandbox.seccomp import load_policy
from vfsd.wire import broker_messages as wire
from vfsd.wire.attr import ATTR


@pytest.fixture(params=["never", pytest.param("mandatory", marks=pytest.mark.root)])
def bench(request, tmp_path):
    bench = Bench(tmp_path, inode_file_handles=request.param)
    yield bench
    bench.close()


@pytest.fixture
def worker(bench):
    worker = bench.add(0)
    bench.begin_session()
    return worker


@pytest.fixture
def file(worker, tmp_path):
    """The nodeid of a file with ten bytes."""
    (tmp_path / "file").write_bytes(b"0123456789")
    return worker.lookup(b"file")


def flags_of(fd):
    return fcntl.fcntl(fd.fileno(), fcntl.F_GETFL)


def create(name, flags=os.O_RDWR, mode=0o640, parent=ROOT_NODEID):
    return wire.Create(parent, name, flags, mode, os.getuid(), os.getgid())


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_an_open_file_is_donated_with_the_access_that_was_asked_for(worker, file, flags):
    _fh, fd = worker.open(file, flags)
    with fd:
        assert flags_of(fd) & os.O_ACCMODE == flags
        assert stat.S_ISREG(os.fstat(fd.fileno()).st_mode)
        if flags != os.O_WRONLY:
            assert os.pread(fd.fileno(), 100, 0) == b"0123456789"


def test_the_brokers_and_the_workers_descriptor_are_of_one_description(bench, worker, file):
    fh, fd = worker.open(file)
    again = worker.ask_ok(wire.Fetch(file, fh))
    with fd, again.fd:
        os.lseek(fd.fileno(), 7, os.SEEK_SET)
        assert os.lseek(again.fd.fileno(), 0, os.SEEK_CUR) == 7
        assert os.lseek(bench.share.files._files[fh].fd.fileno(), 0, os.SEEK_CUR) == 7


def test_two_copies_of_a_directory_do_not_share_a_position(worker, tmp_path):
    for number in range(50):
        (tmp_path / f"entry{number}").touch()
    opened = worker.ask_ok(wire.OpenDir(ROOT_NODEID))
    again = worker.ask_ok(wire.Fetch(ROOT_NODEID, opened.fields[0]))
    with opened.fd, again.fd:
        os.lseek(opened.fd.fileno(), 1, os.SEEK_SET)
        assert os.lseek(again.fd.fileno(), 0, os.SEEK_CUR) == 0
        assert len(os.listdir(again.fd.fileno())) == 50


@pytest.mark.parametrize(
    "flags",
    [os.O_APPEND, os.O_DIRECT, os.O_NOATIME, os.O_PATH, os.O_NONBLOCK, os.O_ASYNC, os.O_NOFOLLOW, 1 << 31],
)
def test_flags_that_are_nobodys_business_do_not_reach_the_host(worker, file, flags):
    _fh, fd = worker.open(file, os.O_RDWR | flags)
    with fd:
        assert flags_of(fd) & ~os.O_RDWR & ~0o100000 == 0  # O_LARGEFILE as the kernel shows it


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC])
def test_flags_that_matter_to_the_host_reach_it(worker, file, flags):
    _fh, fd = worker.open(file, os.O_RDWR | flags)
    with fd:
        assert flags_of(fd) & flags == flags


def test_truncation_is_part_of_opening(worker, file, tmp_path):
    _fh, fd = worker.open(file, os.O_WRONLY | os.O_TRUNC)
    fd.close()
    assert (tmp_path / "file").stat().st_size == 0


@pytest.mark.parametrize("flags", [os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TMPFILE | os.O_RDWR, os.O_TMPFILE & ~os.O_DIRECTORY])
def test_opening_does_not_create(worker, file, flags):
    assert worker.errno_of(wire.Open(file, flags)) == errno.EINVAL
    assert worker.errno_of(wire.Open(ROOT_NODEID, flags)) == errno.EINVAL


@pytest.fixture(params=["fifo", "socket", "link", "character device"])
def special(request, tmp_path):
    path = tmp_path / "special"
    if request.param == "link":
        path.symlink_to("file")
    elif request.param == "character device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making a device needs CAP_MKNOD")
    else:
        os.mknod(path, (stat.S_IFIFO if request.param == "fifo" else stat.S_IFSOCK) | 0o666)
    return path


def test_what_is_neither_file_nor_directory_is_never_opened(worker, special, monkeypatch):
    nodeid = worker.lookup(b"special")
    opened = []
    real, real_by_handle = os.open, filecalls.open_by_handle_at
    monkeypatch.setattr(os, "open", lambda path, flags, *rest, **more: opened.append(flags) or real(path, flags, *rest, **more))
    monkeypatch.setattr(filecalls, "open_by_handle_at", lambda fd, key, flags: opened.append(flags) or real_by_handle(fd, key, flags))
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
        assert worker.errno_of(wire.Open(nodeid, flags)) == errno.EBADF
    assert worker.errno_of(wire.OpenDir(nodeid)) == errno.ENOTDIR
    assert worker.errno_of(create(b"special")) == errno.EBADF
    assert worker.errno_of(wire.SyncFs(nodeid)) == errno.EBADF
    assert all(flags & os.O_PATH or flags & os.O_EXCL for flags in opened), "O_EXCL fails on what exists"


def test_an_open_that_fails_after_its_lookup_counts_none(bench, worker, special):
    before = len(bench.share.store)
    assert worker.errno_of(create(b"special")) == errno.EBADF
    assert len(bench.share.store) == before


def mistake_type(bench, nodeid, file_type):
    """Let the store be wrong about an inode."""
    page, row = bench.share.store._table.locate(nodeid)
    page.types[row] = file_type


def test_the_kernels_answer_about_the_type_is_checked(bench, worker, file, tmp_path):
    """A file system that opens something else than it said must not get a worker a device."""
    mistake_type(bench, file, stat.S_IFDIR)
    assert worker.errno_of(wire.OpenDir(file)) in (errno.ENOTDIR, errno.EBADF)
    directory = worker.ask_ok(wire.MkDir(ROOT_NODEID, b"directory", 0o755, os.getuid(), os.getgid())).fields[0]
    mistake_type(bench, directory, stat.S_IFREG)
    assert worker.errno_of(wire.Open(directory, os.O_RDONLY)) == errno.EBADF


def test_a_directory_is_opened_for_reading_only(worker):
    for flags in (os.O_WRONLY, os.O_RDWR):
        assert worker.errno_of(wire.Open(ROOT_NODEID, flags)) == errno.EISDIR
    got = worker.ask_ok(wire.Open(ROOT_NODEID, os.O_RDONLY))
    with got.fd:
        assert flags_of(got.fd) & os.O_ACCMODE == os.O_RDONLY


def test_a_file_is_no_directory(worker, file):
    assert worker.errno_of(wire.OpenDir(file)) == errno.ENOTDIR


@pytest.mark.parametrize("ask", [wire.FSync, wire.Flush, wire.Fetch, wire.FAllocate])
def test_fh_and_nodeid_must_belong_together(worker, file, tmp_path, ask):
    (tmp_path / "other").touch()
    other = worker.lookup(b"other")
    fh, fd = worker.open(file)
    other_fh, other_fd = worker.open(other)
    extra = {wire.FSync: (0,), wire.FAllocate: (0, 0, 1)}.get(ask, ())
    with fd, other_fd:
        for nodeid, number in ((file, other_fh), (other, fh), (ROOT_NODEID, fh), (file, 0), (file, 2**64 - 1), (2**64 - 1, fh)):
            assert worker.errno_of(ask(nodeid, number, *extra)) == errno.EBADF
        assert worker.errno_of(ask(file, fh, *extra)) == 0
        setattr_ = wire.SetAttr(file, other_fh, 1 << 3, 0, 0, 0, 0, 0, 0, 0, 0)
        assert worker.errno_of(setattr_) == errno.EBADF
    assert (tmp_path / "file").stat().st_size == 10


def test_release_closes_and_a_second_one_is_harmless(bench, worker, file):
    fh, fd = worker.open(file)
    fd.close()
    worker.send(wire.Release(ROOT_NODEID, fh))
    bench.pump()
    assert worker.errno_of(wire.FSync(file, fh, 0)) == 0, "another inode's release is not this one's"
    for _ in range(2):
        worker.send(wire.Release(file, fh))
        bench.pump()
    assert worker.errno_of(wire.FSync(file, fh, 0)) == errno.EBADF
    assert len(bench.share.files) == 0


def test_the_other_holders_are_told_to_drop_what_was_released(bench, worker, file):
    second, third = bench.add(1), bench.add(2)
    second.session = third.session = worker.session
    fh, fd = worker.open(file)
    copy = second.ask_ok(wire.Fetch(file, fh)).fd
    worker.send(wire.Release(file, fh))
    bench.pump()
    for each in (worker, second, third):
        each.read()
    assert second.notices == [wire.DropFile(fh)]
    assert third.notices == []
    assert wire.DropFile(fh) not in worker.notices, "who released it knows"
    fd.close()
    copy.close()


def test_an_inode_that_is_forgotten_is_dropped_by_its_holders(bench, worker, file):
    got = [worker.ask_ok(wire.GetAttr(file)) for _ in range(2)]
    assert got[0].fd is None
    with got[1].fd as fd:
        with pytest.raises(OSError, match="Bad file"):
            os.read(fd.fileno(), 1)
        assert os.fstat(fd.fileno()).st_size == 10
        worker.send(wire.Forget([file, 1]))
        bench.pump()
        worker.read()
        assert worker.notices[-1] == wire.DropNode(file)
    assert worker.errno_of(wire.GetAttr(file)) == errno.EBADF


def test_creating_makes_opens_and_counts(bench, worker, tmp_path):
    got = worker.ask_ok(create(b"new", os.O_RDWR | os.O_CREAT, 0o640))
    nodeid, record, fh, _traits, _mount = got.fields
    with got.fd as fd:
        os.write(fd.fileno(), b"content")
    made = (tmp_path / "new").stat()
    assert made.st_mode == stat.S_IFREG | 0o640
    assert ATTR.unpack(record)[0] == made.st_ino
    assert worker.errno_of(wire.FSync(nodeid, fh, 1)) == 0
    assert worker.lookup(b"new") == nodeid
    worker.send(wire.Release(nodeid, fh), wire.Forget([nodeid, 2]))
    bench.pump()
    assert len(bench.share.store) == 1
    assert (tmp_path / "new").read_bytes() == b"content"


def test_creating_what_exists_opens_it(worker, file, tmp_path):
    got = worker.ask_ok(create(b"file", os.O_RDWR | os.O_CREAT))
    with got.fd as fd:
        assert got.fields[0] == file
        assert os.pread(fd.fileno(), 100, 0) == b"0123456789"
    assert worker.errno_of(create(b"file", os.O_RDWR | os.O_CREAT | os.O_EXCL)) == errno.EEXIST
    worker.ask_ok(create(b"file", os.O_RDWR | os.O_CREAT | os.O_TRUNC)).fd.close()
    assert (tmp_path / "file").stat().st_size == 0


def test_creating_through_a_symlink_makes_nothing(worker, tmp_path):
    (tmp_path / "link").symlink_to("target")
    assert worker.errno_of(create(b"link", os.O_RDWR | os.O_CREAT)) == errno.EBADF
    assert not (tmp_path / "target").exists()


def test_allocating_and_its_modes(worker, file, tmp_path):
    fh, fd = worker.open(file)
    fd.close()
    assert worker.errno_of(wire.FAllocate(file, fh, 0, 0, 5000)) == 0
    assert (tmp_path / "file").stat().st_size == 5000
    assert worker.errno_of(wire.FAllocate(file, fh, 1, 0, 10000)) == 0
    assert (tmp_path / "file").stat().st_size == 5000
    assert worker.errno_of(wire.FAllocate(file, fh, 0x80, 0, 1)) == errno.EOPNOTSUPP
    assert worker.errno_of(wire.FAllocate(file, fh, 0, 0, 0)) == errno.EINVAL


def test_the_filter_allows_every_fallocate_mode_that_is_tried():
    """A mode that the handler passes on but the filter does not would be a way to kill the broker."""
    policy = load_policy().roles["broker"]
    for mode in (*(1 << bit for bit in range(32)), answer_files._FALLOCATE_MODES):
        allowed = policy.verdict("fallocate", (3, mode, 0, 4096, 0, 0), "x86_64") == "allow"
        assert allowed == (not mode & ~answer_files._FALLOCATE_MODES), hex(mode)


def test_the_filter_allows_every_flag_that_a_worker_may_open_with():
    """As the modes of fallocate; with what the broker itself adds to an open."""
    every_flag = Settings("never", False, False, 1, 1, allow_direct_io=True, preserve_noatime=True).open_flags
    policy = load_policy().roles["broker"]
    own = os.O_CLOEXEC | os.O_NOCTTY | os.O_DIRECTORY
    for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        flags = every_flag & ~os.O_ACCMODE | access | own
        assert policy.verdict("openat", (3, 0, flags, 0, 0, 0), "x86_64") == "allow"
        assert policy.verdict("open_by_handle_at", (3, 0, flags, 0, 0, 0), "x86_64") == "allow"
        assert policy.verdict("openat", (3, 0, flags | NEW_FILE, 0o7777, 0, 0), "x86_64") == "allow"


def test_open_files_are_budgeted_and_room_comes_back(request, tmp_path):
    """Without descriptors of its own left the broker could not go on."""
    (tmp_path / "file").touch()
    bench = Bench(tmp_path, most_guest_fds=3, inode_file_handles="never")
    request.addfinalizer(bench.close)
    worker = bench.add(0)
    bench.begin_session()
    nodeid = worker.lookup(b"file")  # an inode without a handle is a descriptor, and so is the root
    fh, fd = worker.open(nodeid, os.O_RDONLY)
    fd.close()
    assert worker.errno_of(wire.Open(nodeid, os.O_RDONLY)) == errno.ENFILE
    worker.send(wire.Release(nodeid, fh))
    bench.pump()
    assert worker.errno_of(wire.Open(nodeid, os.O_RDONLY)) == 0


def test_without_room_nothing_is_truncated_or_made(request, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    bench = Bench(tmp_path, most_guest_fds=2, inode_file_handles="never")
    request.addfinalizer(bench.close)
    worker = bench.add(0)
    bench.begin_session()
    nodeid = worker.lookup(b"file")
    assert worker.errno_of(wire.Open(nodeid, os.O_WRONLY | os.O_TRUNC)) == errno.ENFILE
    assert worker.errno_of(create(b"new")) == errno.ENFILE
    assert worker.errno_of(wire.TmpFile(ROOT_NODEID, os.O_RDWR, 0o600, os.getuid(), os.getgid())) == errno.ENFILE
    assert (tmp_path / "file").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["file"]


# --- set-id bits ----------------------------------------------------------------------------------------------------


def test_a_file_whose_mode_cannot_be_seen_is_not_opened(bench, worker, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    nodeid = worker.lookup(b"file")

    def stale(*_arguments):
        raise OSError(errno.ESTALE, "gone from its server")

    monkeypatch.setattr(bench.share.files.set_id, "learn", stale)
    assert worker.errno_of(wire.Open(nodeid, os.O_RDWR)) == errno.ESTALE
    assert len(bench.share.files) == 0
    worker.open(nodeid, os.O_RDONLY)[1].close()  # nothing is written through it, so nothing is asked


def test_bits_come_back_only_by_an_open_file_that_may_be_written(bench, worker, tmp_path):
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o6755)
    nodeid = worker.lookup(b"file")
    for flags, expected in ((os.O_RDONLY, 0o755), (os.O_WRONLY, 0o6755), (os.O_RDWR, 0o6755)):
        path.chmod(0o6755)
        fh, fd = worker.open(nodeid, flags)
        path.chmod(0o755)
        worker.ask_ok(wire.AfterWrite(nodeid, fh, 0o6000))
        assert path.stat().st_mode & 0o7777 == expected
        fd.close()
        worker.send(wire.Release(nodeid, fh))
        bench.pump()
    assert len(bench.share.files.set_id) == 0
    assert worker.errno_of(wire.AfterWrite(nodeid, fh, 0o6000)) == errno.EBADF


@pytest.mark.root
def test_an_operation_that_fails_takes_no_bits_and_forgets_none(bench, worker, tmp_path):
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o4755)
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid, os.O_RDWR)
    fd.close()
    assert worker.errno_of(wire.FAllocate(nodeid, fh, 0, 0, 0, 1)) == errno.EINVAL
    assert path.stat().st_mode & 0o7777 == 0o4755
    path.chmod(0o755)  # as a worker's write does
    worker.ask_ok(wire.AfterWrite(nodeid, fh, 0o4000))
    assert path.stat().st_mode & 0o7777 == 0o4755


def test_no_record_of_set_id_bits_outlives_its_session(bench, worker, tmp_path):
    (tmp_path / "file").touch()
    _fh, fd = worker.open(worker.lookup(b"file"), os.O_RDWR)
    fd.close()
    assert len(bench.share.files.set_id) == 1
    bench.begin_session()
    assert len(bench.share.files.set_id) == 0
