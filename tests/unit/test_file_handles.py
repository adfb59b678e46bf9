"""When an inode is kept as a file handle: which errors fall back, which go to the guest, what is said and how often."""

import errno
import os
import stat

import pytest

from tests.support.broker import ImmediateCloser, RecordingLog, path_fd, proc_self_fd
from vfsd.broker.file_handles import FileHandles, device_of, handle_in, handle_key, ids_key
from vfsd.broker.mount_fds import MountFds
from vfsd.errors import ConfigError
from vfsd.sandbox import filecalls

MODES = ["never", "prefer", "mandatory"]


@pytest.fixture
def log():
    return RecordingLog()


@pytest.fixture
def handles(log):
    """Make a FileHandles of a mode."""
    with proc_self_fd() as proc:
        yield lambda mode: FileHandles(mode, MountFds(proc.fileno(), ImmediateCloser()), log)


@pytest.fixture
def inode(tmp_path):
    """A directory's O_PATH descriptor and what statx says of it."""
    with path_fd(tmp_path) as fd:
        yield fd.fileno(), filecalls.statx(fd.fileno())


def failing(number):
    def call(*_arguments):
        raise OSError(number, os.strerror(number))

    return call


def test_keys_hold_what_they_are_made_of(inode):
    fd, seen = inode
    handle = filecalls.name_to_handle_at(fd)
    assert handle_in(handle_key(seen.mnt_id, handle)) == handle
    assert handle_key(seen.mnt_id, handle) != handle_key(seen.mnt_id + 1, handle)
    for change in ({"ino": 1}, {"dev_major": 300}, {"dev_minor": 300}, {"mnt_id": 1}):
        assert ids_key(seen._replace(**change)) != ids_key(seen)
    assert os.makedev(*divmod(device_of(seen), 2**32)) == os.fstat(fd).st_dev


def test_never_makes_no_handle(handles, inode, monkeypatch):
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(errno.ENOMEM))
    fd, seen = inode
    found = handles("never").identify(fd, seen)
    assert found == (None, ids_key(seen), seen.mnt_id, device_of(seen), stat.S_IFDIR)


@pytest.mark.parametrize("mode", ["prefer", "mandatory"])
def test_an_inode_is_known_by_its_mount_and_handle(handles, inode, mode, log):
    fd, seen = inode
    found = handles(mode).identify(fd, seen)
    assert found.handle_key == handle_key(seen.mnt_id, filecalls.name_to_handle_at(fd))
    assert log.lines == []


def test_two_names_of_a_file_are_one_and_two_files_are_two(handles, tmp_path):
    (tmp_path / "one").touch()
    (tmp_path / "other").touch()
    os.link(tmp_path / "one", tmp_path / "same")
    found = []
    for name in ("one", "same", "other"):
        with path_fd(tmp_path / name) as fd:
            found.append(handles("prefer").identify(fd.fileno(), filecalls.statx(fd.fileno())))
    assert found[0] == found[1]
    assert found[0].handle_key != found[2].handle_key


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EOVERFLOW])
def test_prefer_falls_back_where_there_are_no_handles_and_says_so_once_per_mount(handles, inode, log, monkeypatch, number):
    fd, seen = inode
    chosen = handles("prefer")
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(number))
    for mount in (5, 5, 6, 5, 6):
        found = chosen.identify(fd, seen._replace(mnt_id=mount))
        assert found.handle_key is None
        assert found.ids_key == ids_key(seen._replace(mnt_id=mount))
    assert [text.split(":")[0] for text in log.warnings] == ["mount 5", "mount 6"]
    assert "descriptors" in log.warnings[0]
    assert chosen.mode == "prefer", "other mounts may have handles"


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EOVERFLOW])
def test_mandatory_fails_where_there_are_no_handles(handles, inode, log, monkeypatch, number):
    fd, seen = inode
    chosen = handles("mandatory")
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(number))
    for _ in range(3):
        with pytest.raises(OSError, match="not supported") as caught:
            chosen.identify(fd, seen)
        assert caught.value.errno == errno.EOPNOTSUPP
    assert len(log.warnings) == 1
    assert "requests to it fail" in log.warnings[0]


@pytest.mark.parametrize("mode", ["prefer", "mandatory"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO, errno.EACCES, errno.ESTALE, errno.EINVAL, errno.ENOSYS])
def test_any_other_error_is_the_guests(handles, inode, log, monkeypatch, mode, number):
    """Falling back by chance would make a second inode of a file that is known by its handle."""
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(number))
    with pytest.raises(OSError, match=r".") as caught:
        handles(mode).identify(*inode)
    assert caught.value.errno == number
    assert log.lines == []


def test_never_tries_nothing_at_the_start(handles, inode, log, monkeypatch):
    monkeypatch.setattr(filecalls, "name_to_handle_at", failing(errno.EIO))
    monkeypatch.setattr(filecalls, "open_by_handle_at", failing(errno.EIO))
    assert handles("never").settle(inode[0]).handle_key is None
    assert log.lines == []


@pytest.mark.parametrize("broken", ["name_to_handle_at", "open_by_handle_at"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ESTALE, errno.ENOSYS])
def test_prefer_becomes_never_where_the_root_cannot_be_opened(handles, inode, log, monkeypatch, broken, number):
    monkeypatch.setattr(filecalls, broken, failing(number))
    chosen = handles("prefer")
    assert chosen.settle(inode[0]).handle_key is None
    assert chosen.mode == "never"
    (warning,) = log.warnings
    assert "--inode-file-handles=prefer" in warning
    assert ("CAP_DAC_READ_SEARCH" in warning) == (number == errno.EPERM)


@pytest.mark.parametrize("broken", ["name_to_handle_at", "open_by_handle_at"])
def test_mandatory_ends_where_the_root_cannot_be_opened(handles, inode, log, monkeypatch, broken):
    monkeypatch.setattr(filecalls, broken, failing(errno.EPERM))
    with pytest.raises(ConfigError, match=r"--inode-file-handles=mandatory: .*CAP_DAC_READ_SEARCH.*; use prefer or never"):
        handles("mandatory").settle(inode[0])
    assert log.warnings == []


@pytest.mark.root
@pytest.mark.parametrize("mode", MODES)
def test_where_handles_work_the_mode_stays_as_asked(handles, inode, log, mode):
    chosen = handles(mode)
    assert (chosen.settle(inode[0]).handle_key is not None) == (mode != "never")
    assert chosen.mode == mode
    assert log.lines == []
    assert len(chosen._mounts) == 0, "the test of the root holds nothing afterwards"


@pytest.mark.root
def test_an_inode_is_opened_by_the_handle_in_its_key(handles, tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    chosen = handles("mandatory")
    with path_fd(tmp_path / "file") as fd:
        seen = filecalls.statx(fd.fileno())
        found = chosen.identify(fd.fileno(), seen)
    with path_fd(tmp_path) as fd:  # by the file it would hold the file itself, also when deleted
        assert chosen._mounts.acquire(seen.mnt_id, fd.fileno(), stat.S_IFDIR)
    opened = chosen.open(found.handle_key, os.O_RDONLY)
    assert os.read(opened, 100) == b"content"
    assert not os.get_inheritable(opened)
    os.close(opened)
    os.unlink(tmp_path / "file")
    with pytest.raises(OSError, match="Stale") as caught:
        chosen.open(found.handle_key, os.O_RDONLY)
    assert caught.value.errno == errno.ESTALE
    chosen._mounts.release(seen.mnt_id)
