"""Properties of semantics.md that need a kernel that fails, or a worker that lies: the broker on real files, in this process."""

import ctypes
import errno
import os
import stat
import struct

import pytest

from tests.support.broker import Bench, attributes
from tests.support.messages import sample
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.requests import HANDLERS
from vfsd.errors import ReplyErrno
from vfsd.fds import OwnedFd, TempFd
from vfsd.sandbox import filecalls
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.creation import decode_extensions

pytestmark = pytest.mark.root  # handles are opened


@pytest.fixture
def serve(tmp_path):
    """Make a broker of a handle mode, and a worker in a session."""
    benches = []

    def serve(mode):
        benches.append(Bench(tmp_path, inode_file_handles=mode))
        worker = benches[-1].add(0)
        benches[-1].begin_session()
        return benches[-1], worker

    yield serve
    for bench in benches:
        bench.close()


def failing(number):
    def call(*_arguments):
        raise OSError(number, os.strerror(number))

    return call


def lookup_errno(worker, name):
    return worker.errno_of(wire.Lookup(ROOT_NODEID, name))


def delete_and_make_again(path):
    """Another file of the same name; on ext4 with the same inode number."""
    path.unlink()
    path.write_bytes(b"another")


# --- finding inodes again ---------------------------------------------------------------------------------------------


def test_property_03_numbers_find_an_inode_only_while_a_descriptor_holds_it(serve, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    bench, worker = serve("prefer")
    by_handle = worker.lookup(b"file")
    assert worker.lookup(b"file") == by_handle, "a hit by handle"
    with monkeypatch.context() as patch:
        patch.setattr(filecalls, "name_to_handle_at", failing(errno.EOPNOTSUPP))
        by_numbers = worker.lookup(b"file")
        assert by_numbers != by_handle, "same numbers, but nothing holds them: it might be another file"
        assert worker.lookup(b"file") == by_numbers, "a descriptor holds them"
    assert worker.lookup(b"file") == by_handle, "the handle wins over the numbers"
    assert bench.share.store.fd_count == 2  # the root's, and the one


def test_property_04_an_inode_first_met_without_handle_is_found_with_one(serve, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    _, worker = serve("prefer")
    with monkeypatch.context() as patch:
        patch.setattr(filecalls, "name_to_handle_at", failing(errno.EOPNOTSUPP))
        nodeid = worker.lookup(b"file")
    assert worker.lookup(b"file") == nodeid


@pytest.mark.parametrize("mode", ["prefer", "mandatory"])
def test_property_05_a_handle_that_cannot_be_made_by_chance_makes_no_second_inode(serve, tmp_path, monkeypatch, mode):
    (tmp_path / "file").touch()
    os.link(tmp_path / "file", tmp_path / "link")
    bench, worker = serve(mode)
    nodeid = worker.lookup(b"file")
    inodes = len(bench.share.store)
    with monkeypatch.context() as patch:
        patch.setattr(filecalls, "name_to_handle_at", failing(errno.ENOMEM))
        assert lookup_errno(worker, b"link") == errno.ENOMEM
    assert len(bench.share.store) == inodes
    assert worker.lookup(b"link") == nodeid


def test_property_05_without_handles_all_at_once_the_old_inode_is_never_meant(serve, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    _, worker = serve("prefer")
    old = worker.lookup(b"file")
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(errno.EOPNOTSUPP))
    delete_and_make_again(tmp_path / "file")
    new = worker.lookup(b"file")
    assert new != old
    assert attributes(worker.ask_ok(wire.GetAttr(new)).fields[0])["size"] == len(b"another")
    assert worker.errno_of(wire.GetAttr(old)) == errno.ESTALE


def test_property_06_where_there_are_no_handles_descriptors_are_kept_and_it_is_said_once(serve, tmp_path, monkeypatch):
    names = [b"one", b"two", b"three"]
    for name in names:
        (tmp_path / name.decode()).touch()
    bench, worker = serve("prefer")
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(errno.EOPNOTSUPP))
    before = bench.share.store.fd_count
    for name in names:
        worker.lookup(name)
    assert bench.share.store.fd_count == before + 3
    assert len(bench.log.warnings) == 1


def test_property_06_mandatory_refuses_where_there_are_no_handles(serve, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    bench, worker = serve("mandatory")
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(errno.EOPNOTSUPP))
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert lookup_errno(worker, b"file") == errno.EOPNOTSUPP
    assert len(os.listdir("/proc/self/fd")) == fds
    assert len(bench.log.warnings) == 1


class _Libc:
    """libc with a name_to_handle_at(2) that says EOVERFLOW and how many bytes it would need."""

    def __init__(self, real, needed):
        self._real = real
        self._needed = needed

    def __getattr__(self, name):
        return getattr(self._real, name)

    def name_to_handle_at(self, _fd, _name, handle, _mount_id, _flags):
        ctypes.c_uint.from_buffer(handle).value = self._needed
        ctypes.set_errno(errno.EOVERFLOW)
        return -1


@pytest.mark.parametrize("needed", [0, filecalls.HANDLE_BYTES_MAX, filecalls.HANDLE_BYTES_MAX + 1, 2**32 - 1])
def test_property_07_a_handle_that_is_too_long_or_impossible_is_none(serve, tmp_path, monkeypatch, needed):
    (tmp_path / "file").write_bytes(b"content")
    _, worker = serve("prefer")
    monkeypatch.setattr(filecalls, "_libc", _Libc(filecalls._libc, needed))
    nodeid = worker.lookup(b"file")
    assert worker.lookup(b"file") == nodeid
    _, fd = worker.open(nodeid)
    with fd:
        assert os.read(fd.fileno(), 10) == b"content"


# --- what is opened ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["never", "mandatory"])
def test_property_13_a_name_that_becomes_a_fifo_leads_to_no_fifo(serve, tmp_path, mode):
    (tmp_path / "name").write_bytes(b"file")
    _, worker = serve(mode)
    nodeid = worker.lookup(b"name")
    (tmp_path / "name").unlink()
    os.mkfifo(tmp_path / "name")
    got = worker.ask(wire.Open(nodeid, os.O_RDWR))
    if mode == "mandatory":
        assert got.errno == errno.ESTALE
    else:
        with got.fd:
            assert stat.S_ISREG(os.fstat(got.fd.fileno()).st_mode)
    fifo = worker.lookup(b"name")
    assert fifo != nodeid
    assert worker.errno_of(wire.Open(fifo, os.O_RDWR)) == errno.EBADF


def test_property_13_a_kernel_that_opens_another_type_gives_a_worker_nothing(serve, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    _, worker = serve("mandatory")
    nodeid = worker.lookup(b"file")
    opened = []

    def open_a_fifo(_mount, _handle, _flags):
        opened.append(os.open(tmp_path / "fifo", os.O_RDWR | os.O_CLOEXEC))
        return opened[-1]

    monkeypatch.setattr(filecalls, "open_by_handle_at", open_a_fifo)
    assert worker.errno_of(wire.Open(nodeid, os.O_RDWR)) == errno.EBADF
    assert len(opened) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


# --- who owns a descriptor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OwnedFd, TempFd])
def test_property_27_an_owned_descriptor_is_closed_once_and_given_away_whole(kind):
    number = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    owned = kind(number)
    assert owned.detach() == number, "given away without a copy"
    owned.close()
    again = kind(number)
    again.close()
    assert os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) == number
    again.close()
    os.close(number)  # still open: a second close touched nothing
    with pytest.raises(ValueError, match="closed or given away"):
        again.fileno()


@pytest.mark.parametrize("mode", ["never", "mandatory"])
def test_property_27_a_borrowed_descriptor_is_never_closed_by_its_borrower(serve, tmp_path, mode):
    (tmp_path / "dir").mkdir()
    bench, worker = serve(mode)
    nodeid = worker.lookup(b"dir")
    with bench.share.store.pin(nodeid, bench.share.session) as pin:
        with bench.share.path_of(pin) as first, bench.share.path_of(pin) as second:
            assert first.fd == second.fd
        with bench.share.path_of(pin) as third:
            assert os.fstat(third.fd).st_ino == (tmp_path / "dir").stat().st_ino


def test_property_27_taking_a_borrowed_descriptor_makes_a_copy_or_fails_whole(serve, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    bench, worker = serve("mandatory")
    nodeid = worker.lookup(b"file")
    fh, fd = worker.open(nodeid)
    fd.close()
    copy = worker.ask_ok(wire.Fetch(nodeid, fh)).fd
    with bench.share.files.pin(nodeid, fh, bench.share.session) as opened:
        assert opened.fd.fileno() != copy.fileno()
        assert os.path.samestat(os.fstat(opened.fd.fileno()), os.fstat(copy.fileno()))
    copy.close()
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", failing(errno.EMFILE))
        assert worker.errno_of(wire.Fetch(nodeid, fh)) == errno.EMFILE
    assert len(os.listdir("/proc/self/fd")) == before
    assert worker.errno_of(wire.Fetch(nodeid, fh)) == 0, "the borrowed one is as it was"


# --- a worker that lies ---------------------------------------------------------------------------------------------------


def test_property_29_no_message_has_room_for_a_handle(serve, tmp_path):
    """Inodes are numbers; bytes are names, a link's target, labels, attributes' and ioctls' values."""
    bytes_fields = {
        name for spec in wire.REQUESTS for name, field in zip(spec.message._fields, spec.fields, strict=True) if isinstance(field, wire.Bin)
    }
    assert bytes_fields == {"name", "new_name", "target", "label_name", "label", "value", "argument"}
    outside = tmp_path.parent / "outside"
    outside.write_bytes(b"secret")
    fd = os.open(outside, os.O_PATH)
    handle = filecalls.name_to_handle_at(fd)
    os.close(fd)
    _, worker = serve("mandatory")
    assert lookup_errno(worker, handle) in (errno.ENOENT, errno.EINVAL)


@pytest.mark.parametrize("kind", [kind for kind in HANDLERS if {"nodeid", "parent"} & set(kind._fields)])
def test_property_29_a_nodeid_that_was_never_given_names_nothing(serve, tmp_path, kind):
    """Numbers of inodes and of slots that exist, with another generation: nobody."""
    (tmp_path / "file").touch()
    bench, worker = serve("mandatory")
    known = worker.lookup(b"file")
    for forged in (0, known + 1, known + (1 << 24), known ^ (1 << 63), (tmp_path / "file").stat().st_ino << 24, 2**64 - 1):
        message = sample(
            kind, nodeid=forged, parent=forged, new_parent=forged, names=[b"x"], name=b"x", new_name=b"y", fh=1, mask=4, flock=1
        )
        if wire.SPEC_OF[kind].reply is None:
            worker.send(message)
            bench.pump()
        else:
            assert worker.errno_of(message) not in (0, errno.EIO), (kind, forged)
    assert os.listdir(tmp_path) == ["file"]
    assert worker.errno_of(wire.GetAttr(known)) == 0


@pytest.mark.parametrize("flags", [os.O_CREAT, os.O_CREAT | os.O_EXCL | os.O_RDWR, os.O_TMPFILE | os.O_RDWR])
def test_property_29_an_open_makes_nothing_whatever_its_flags(serve, tmp_path, flags):
    _, worker = serve("mandatory")
    assert worker.errno_of(wire.Open(ROOT_NODEID, flags)) == errno.EINVAL
    (tmp_path / "file").touch()
    assert worker.errno_of(wire.Open(worker.lookup(b"file"), flags)) == errno.EINVAL


# --- a worker that dies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["never", "mandatory"])
def test_property_31_a_worker_that_dies_takes_nothing_of_the_session_with_it(serve, tmp_path, mode):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"content")
    bench, survivor = serve(mode)
    dying = bench.add(1)
    nodeid = dying.lookup(b"one")
    fh, copy = dying.open(nodeid)
    held = len(bench.share.store)
    dying.send(wire.Lookup(ROOT_NODEID, b"one"), wire.Open(nodeid, os.O_RDWR), wire.GetAttr(nodeid))  # never answered
    dying.socket.close()
    copy.close()
    bench.pump()
    assert bench.breaches == []
    with survivor.ask_ok(wire.Fetch(nodeid, fh)).fd as fd:
        assert os.pread(fd.fileno(), 10, 0) == b"content"
    assert survivor.lookup(b"two")
    survivor.send(wire.Release(nodeid, fh))
    survivor.send(wire.Forget([nodeid, 2]))  # also the lookup whose answer nobody read is the session's
    bench.pump()
    assert survivor.errno_of(wire.GetAttr(nodeid)) == errno.EBADF
    assert len(bench.share.store) == held  # "two" instead of "one"


def test_property_31_a_worker_that_dies_in_a_request_holds_up_nobody(serve, tmp_path):
    (tmp_path / "file").touch()
    bench, survivor = serve("never")
    dying = bench.add(1)
    dying.send(wire.Lookup(ROOT_NODEID, b"file"))
    tasks = bench.server.next_turn()
    dying.socket.close()  # while its request runs
    delivered = [bench.server.run(task) for task in tasks]
    for deliver in delivered:
        deliver(True)
    bench.server.finish_turn()
    assert survivor.lookup(b"file")
    assert bench.log.bugs == []


# --- a guest that lies ------------------------------------------------------------------------------------------------------


def extension(kind, body, size=None):
    return abi.fuse_ext_header.pack(abi.fuse_ext_header.size + len(body) if size is None else size, kind) + body


LABEL = abi.fuse_secctx.pack(5) + b"security.x\0value"


@pytest.mark.parametrize(
    "data",
    [
        b"\0", extension(1, LABEL)[:-1], extension(1, LABEL, size=7), extension(1, LABEL, size=2**32 - 1), extension(2, LABEL),
        extension(31, LABEL), extension(33, LABEL), extension(1, b""), extension(1, abi.fuse_secctx.pack(5) + b"no end of the name"),
        extension(1, abi.fuse_secctx.pack(6) + b"security.x\0value"), extension(1, abi.fuse_secctx.pack(0) + b"security.x\0"),
        extension(1, abi.fuse_secctx.pack(5) + b"\0value"), extension(abi.FUSE_EXT_GROUPS, b""),
        extension(abi.FUSE_EXT_GROUPS, struct.pack("<II", 2, 0)), extension(abi.FUSE_EXT_GROUPS, struct.pack("<I", 2**32 - 1)),
    ],
)  # fmt: skip
def test_property_46_labels_and_groups_that_do_not_add_up_are_einval(data):
    with pytest.raises(ReplyErrno) as refused:
        decode_extensions(data)
    assert refused.value.errno == errno.EINVAL
    assert decode_extensions(extension(1, LABEL)).label == (b"security.x", b"value")
