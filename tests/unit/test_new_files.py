"""Security labels of new files: there from the beginning, or the file is not made."""

import errno
import os
import stat

import pytest

from tests.support.broker import Bench
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.wire import broker_messages as wire

ME = os.getuid(), os.getgid()
BY_NAME = ":prefix:all:security.:user.virtiofs.: :ok:all:::"
LABEL = ([], b"security.selinux", b"system_u:object_r:etc_t:s0\0")
MAKING = {
    "mkdir": lambda label: wire.MkDir(ROOT_NODEID, b"new", 0o755, *ME, 0, *label),
    "mknod": lambda label: wire.MkNod(ROOT_NODEID, b"new", stat.S_IFREG | 0o640, 0, *ME, 0, *label),
    "create": lambda label: wire.Create(ROOT_NODEID, b"new", os.O_RDWR, 0o640, *ME, 0, *label),
    "fifo": lambda label: wire.MkNod(ROOT_NODEID, b"new", stat.S_IFIFO | 0o640, 0, *ME, 0, *label),
    "symlink": lambda label: wire.SymLink(ROOT_NODEID, b"new", b"target", *ME, 0, *label),
}
UNNAMED = wire.TmpFile(ROOT_NODEID, os.O_RDWR, 0o640, *ME, 0, *LABEL)


@pytest.fixture(autouse=True)
def in_proc_self_fd(monkeypatch):
    """As each thread of the broker's pool."""
    monkeypatch.chdir("/proc/self/fd")


@pytest.fixture(params=["never", pytest.param("mandatory", marks=pytest.mark.root)])
def make_worker(request, tmp_path):
    """A worker of a broker with these settings, in a session."""

    def make_worker(**settings):
        bench = Bench(tmp_path, inode_file_handles=request.param, xattr=True, **settings)
        request.addfinalizer(bench.close)
        worker = bench.add(0)
        bench.begin_session()
        return worker

    return make_worker


def label_of(worker, nodeid):
    return worker.ask_ok(wire.GetXattr(nodeid, LABEL[1])).fields[0]


@pytest.mark.parametrize("unnamed_files", [True, False], ids=["O_TMPFILE", "without O_TMPFILE"])
@pytest.mark.parametrize("how", ["mkdir", "mknod", "create"])
def test_a_new_file_has_its_label(make_worker, tmp_path, monkeypatch, how, unnamed_files):
    worker = make_worker(xattrmap=BY_NAME)
    if not unnamed_files:
        _without_tmpfile(monkeypatch)
    got = worker.ask_ok(MAKING[how](LABEL))
    if got.fd is not None:
        assert os.pwrite(got.fd.fileno(), b"x", 0) == 1
        got.fd.close()
    assert label_of(worker, got.fields[0]) == LABEL[2]
    assert os.getxattr(tmp_path / "new", "user.virtiofs.security.selinux") == LABEL[2]
    assert worker.lookup(b"new") == got.fields[0]
    assert os.listdir(tmp_path) == ["new"]
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == (0o755 if how == "mkdir" else 0o640)


@pytest.mark.root
@pytest.mark.parametrize("how", ["fifo", "symlink"])
def test_a_special_file_has_its_label_where_the_host_can_keep_it(make_worker, tmp_path, how):
    worker = make_worker(xattrmap=":prefix:all:security.:trusted.virtiofs.: :ok:all:::")
    worker.ask_ok(MAKING[how](LABEL))
    assert os.getxattr(tmp_path / "new", "trusted.virtiofs.security.selinux", follow_symlinks=False) == LABEL[2]


def _without_tmpfile(monkeypatch):
    """As a file system that has no unnamed files."""
    really_open = os.open

    def open_(path, flags, mode=0o777, **how):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no unnamed files")
        return really_open(path, flags, mode, **how)

    monkeypatch.setattr(os, "open", open_)


@pytest.mark.parametrize("unnamed_files", [True, False], ids=["O_TMPFILE", "without O_TMPFILE"])
@pytest.mark.parametrize("how", MAKING)
def test_what_cannot_have_its_label_is_not_made(make_worker, tmp_path, monkeypatch, how, unnamed_files):
    """ENOTSUP, not EPERM, whether the rules say so, the host's kernel, or the lack of a privilege."""
    worker = make_worker(xattrmap=":prefix:all:security.selinux:user.virtiofs.: :bad:all:security.bad:: :ok:all:::")
    if not unnamed_files:
        _without_tmpfile(monkeypatch)
    labels = [([], b"security.bad", b"x"), ([], b"system.nonsense", b"x")]
    if how in ("fifo", "symlink"):
        labels.append(LABEL)
    for label in labels:
        assert worker.errno_of(MAKING[how](label)) == errno.ENOTSUP, label
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", MAKING)
def test_a_name_that_is_taken_stays_as_it_is(make_worker, tmp_path, how):
    (tmp_path / "new").write_bytes(b"old")
    worker = make_worker(xattrmap=BY_NAME)
    message = MAKING[how](LABEL)
    if how == "create":
        message = message._replace(flags=os.O_RDWR | os.O_EXCL)
    assert worker.errno_of(message) == errno.EEXIST
    assert (tmp_path / "new").read_bytes() == b"old"
    assert os.listxattr(tmp_path / "new") == []
    if how == "create":  # without O_EXCL it is opened, with the label it has
        got = worker.ask_ok(MAKING[how](LABEL))
        assert os.pread(got.fd.fileno(), 10, 0) == b"old"
        got.fd.close()
        assert os.listxattr(tmp_path / "new") == []


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_a_labelled_file_is_opened_with_the_access_that_was_asked_for(make_worker, access):
    """Also where the new file's own mode would not allow it."""
    worker = make_worker(xattrmap=BY_NAME)
    got = worker.ask_ok(wire.Create(ROOT_NODEID, b"new", access, 0, *ME, 0, *LABEL))
    with open(f"/proc/self/fdinfo/{got.fd.fileno()}", encoding="ascii") as info:
        (flags,) = [int(line.split()[1], 8) for line in info if line.startswith("flags:")]
    got.fd.close()
    assert flags & os.O_ACCMODE == access


def test_an_unnamed_file_has_its_label(make_worker):
    worker = make_worker(xattrmap=BY_NAME)
    got = worker.ask_ok(UNNAMED)
    assert os.getxattr(got.fd.fileno(), "user.virtiofs.security.selinux") == LABEL[2]
    got.fd.close()
    assert worker.errno_of(UNNAMED._replace(label_name=b"system.nonsense")) == errno.EOPNOTSUPP
