"""The file calls that Python lacks, against what Python and the kernel say of the same files."""

import errno
import fcntl
import os
import stat
import struct
import threading

import pytest

from tests.support.broker import path_fd
from vfsd.sandbox import capabilities, filecalls

LAST_OFFSET = (1 << 63) - 1
DIRENT64 = struct.Struct("<QqHB")


@pytest.fixture
def kinds(tmp_path):
    """A path of each kind of inode."""
    (tmp_path / "file").write_bytes(b"x" * 12345)
    (tmp_path / "file").chmod(0o6751)
    os.utime(tmp_path / "file", ns=(-1, 4_000_000_000_123_456_789))
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    return [tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "fifo", "/dev/null", "/proc/self/status"]


def fails(number, call, *arguments):
    with pytest.raises(OSError, match=r".") as caught:
        call(*arguments)
    assert caught.value.errno == number
    assert caught.value.strerror == os.strerror(number)


def times(seen):
    return [getattr(seen, name) * 10**9 + getattr(seen, f"{name}_nsec") for name in ("atime", "mtime", "ctime")]


def test_statx_says_what_stat_says(kinds):
    for path in kinds:
        expected = os.lstat(path)
        with path_fd(path) as fd:
            seen = filecalls.statx(fd.fileno())
        assert (seen.ino, seen.mode, seen.nlink, seen.uid, seen.gid) == expected[1:2] + expected[0:1] + expected[3:6]
        assert (seen.size, seen.blocks, seen.blksize) == (expected.st_size, expected.st_blocks, expected.st_blksize)
        assert times(seen) == [expected.st_atime_ns, expected.st_mtime_ns, expected.st_ctime_ns]
        assert os.makedev(seen.dev_major, seen.dev_minor) == expected.st_dev
        assert os.makedev(seen.rdev_major, seen.rdev_minor) == expected.st_rdev


def test_statx_knows_the_mount(tmp_path):
    with path_fd(tmp_path) as fd, open(f"/proc/self/fdinfo/{fd.fileno()}", encoding="ascii") as info:
        expected = next(int(line.split()[1]) for line in info if line.startswith("mnt_id:"))
        assert filecalls.statx(fd.fileno()).mnt_id == expected


def test_fstat_says_what_stat_says(kinds):
    for path in kinds:
        expected = os.lstat(path)
        with path_fd(path) as fd:
            seen = filecalls.fstat(fd.fileno())
        assert (seen.ino, seen.mode, seen.nlink, seen.uid, seen.gid) == expected[1:2] + expected[0:1] + expected[3:6]
        assert (seen.size, seen.blocks, seen.blksize) == (expected.st_size, expected.st_blocks, expected.st_blksize)
        assert times(seen) == [expected.st_atime_ns, expected.st_mtime_ns, expected.st_ctime_ns]
        assert os.makedev(seen.rdev_major, seen.rdev_minor) == expected.st_rdev


def test_the_mode_alone_is_what_stat_says(kinds):
    for path in kinds:
        with path_fd(path) as fd:
            assert filecalls.mode_of(fd.fileno()) == os.lstat(path).st_mode
    with pytest.raises(OSError, match="Bad file descriptor"):
        filecalls.mode_of(-1)


def test_threads_do_not_see_each_others_answers(kinds):
    wrong = []
    start = threading.Barrier(4)

    def ask(path):
        ino = os.lstat(path).st_ino
        with path_fd(path) as fd:
            start.wait()
            wrong.extend(1 for _ in range(2000) if filecalls.statx(fd.fileno()).ino != ino or filecalls.fstat(fd.fileno()).ino != ino)

    running = [threading.Thread(target=ask, args=(path,)) for path in kinds[:4]]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "call",
    [
        filecalls.statx, filecalls.fstat, filecalls.name_to_handle_at, filecalls.syncfs, filecalls.file_system_type,
        lambda fd: filecalls.getdents64(fd, 1000), lambda fd: filecalls.fallocate(fd, 0, 0, 1), lambda fd: filecalls.fchownat(fd, 0, 0),
        lambda fd: filecalls.renameat2(fd, b"a", fd, b"b", 0), lambda fd: filecalls.utimensat(fd, b"a", (0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_an_error_is_the_kernels(call):
    fails(errno.EBADF, call, -1)


def test_getdents_gives_every_entry(tmp_path):
    names = {b"file%d" % number for number in range(500)} | {b"n" * 255, b"\xff"}
    for name in names:
        os.close(os.open(os.path.join(os.fsencode(tmp_path), name), os.O_CREAT))
    fd = os.open(tmp_path, os.O_RDONLY)
    seen = []
    while raw := filecalls.getdents64(fd, 600):
        assert len(raw) <= 600
        position = 0
        while position < len(raw):
            ino, _offset, length, kind = DIRENT64.unpack_from(raw, position)
            name = raw[position + DIRENT64.size : position + length].split(b"\0")[0]
            assert kind == (stat.S_IFDIR if name in (b".", b"..") else stat.S_IFREG) >> 12
            assert ino == os.lstat(os.path.join(os.fsencode(tmp_path), name)).st_ino
            seen.append(name)
            position += length
    os.lseek(fd, 0, os.SEEK_SET)
    fails(errno.EINVAL, filecalls.getdents64, fd, 0)
    os.close(fd)
    assert sorted(seen) == sorted(names | {b".", b".."})


def test_getdents_of_what_is_no_directory_fails(tmp_path):
    (tmp_path / "file").touch()
    with open(tmp_path / "file", encoding="ascii") as file:
        fails(errno.ENOTDIR, filecalls.getdents64, file.fileno(), 1000)


def test_a_handle_names_an_inode(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).touch()
    os.link(tmp_path / "one", tmp_path / "same")
    handles = {}
    for name in ("one", "same", "two"):
        with path_fd(tmp_path / name) as fd:
            handles[name] = filecalls.name_to_handle_at(fd.fileno())
    assert handles["one"] == handles["same"] != handles["two"]
    length, _kind = struct.unpack_from("<Ii", handles["one"])
    assert len(handles["one"]) == 8 + length <= 8 + filecalls.HANDLE_BYTES_MAX


def test_procfs_has_no_handles():
    with path_fd("/proc/self/status") as fd:
        fails(errno.EOPNOTSUPP, filecalls.name_to_handle_at, fd.fileno())


@pytest.mark.root
def test_a_handle_opens_its_inode_until_it_is_deleted(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    mount = os.open(tmp_path, os.O_RDONLY)
    with path_fd(tmp_path / "file") as fd:
        handle = filecalls.name_to_handle_at(fd.fileno())
    opened = filecalls.open_by_handle_at(mount, handle, os.O_RDONLY)
    assert os.read(opened, 100) == b"content"
    assert not os.get_inheritable(opened)
    os.close(opened)
    os.unlink(tmp_path / "file")
    fails(errno.ESTALE, filecalls.open_by_handle_at, mount, handle, os.O_RDONLY)
    os.close(mount)


def test_allocating(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        filecalls.fallocate(file.fileno(), 0, 100, 2**33)
        assert os.fstat(file.fileno()).st_size == 100 + 2**33
        fails(errno.EINVAL, filecalls.fallocate, file.fileno(), 0, 0, 0)


def test_renaming_with_flags(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with path_fd(tmp_path) as fd:
        number = fd.fileno()
        fails(errno.EEXIST, filecalls.renameat2, number, b"a", number, b"b", 1)
        filecalls.renameat2(number, b"a", number, b"b", 2)
        assert (tmp_path / "a").read_text() == "b"
        filecalls.renameat2(number, b"a", number, b"c", 0)
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_an_owner_is_changed_on_the_inode_itself(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with path_fd(tmp_path / "link") as fd:
        filecalls.fchownat(fd.fileno(), os.getuid(), os.getgid())
        before = os.lstat(tmp_path / "link")
        filecalls.fchownat(fd.fileno(), 0xFFFFFFFF, 0xFFFFFFFF)
    after = os.lstat(tmp_path / "link")
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


@pytest.mark.root
def test_one_side_of_an_owner_is_changed_alone(tmp_path):
    with path_fd(tmp_path) as fd:
        filecalls.fchownat(fd.fileno(), 1234, 0xFFFFFFFF)
        filecalls.fchownat(fd.fileno(), -1, 4_000_000_000)
    assert (tmp_path.stat().st_uid, tmp_path.stat().st_gid) == (1234, 4_000_000_000)


def test_times_are_set_and_left(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with path_fd(tmp_path) as fd:
        filecalls.utimensat(fd.fileno(), b"file", (-5, 7, 2**33, 999_999_999))
        assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (-5 * 10**9 + 7, 2**33 * 10**9 + 999_999_999)
        filecalls.utimensat(fd.fileno(), b"file", (0, filecalls.UTIME_OMIT, 0, filecalls.UTIME_NOW))
    assert path.stat().st_atime_ns == -5 * 10**9 + 7
    assert path.stat().st_mtime_ns < 2**33 * 10**9


def test_a_file_system_has_a_type(tmp_path):
    with path_fd(tmp_path) as here, path_fd("/proc") as proc:
        assert filecalls.file_system_type(proc.fileno()) == 0x9FA0
        assert filecalls.file_system_type(here.fileno()) not in (0, 0x9FA0)


def test_syncing_a_file_system(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    filecalls.syncfs(fd)
    os.close(fd)


def on_a_thread(call):
    """What `call` returns on a thread of its own, which keeps what it does to its credentials to itself."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def ids():
    with open("/proc/thread-self/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    return [fields[name].split() for name in ("Uid", "Gid")], int(fields["CapEff"], 16), int(fields["CapPrm"], 16)


@pytest.mark.root
def test_ids_change_for_one_thread_only():
    before = ids()

    def switch():
        filecalls.set_thread_gid(1234)
        filecalls.set_thread_uid(4321)
        return ids()

    (uids, gids), _effective, permitted = on_a_thread(switch)
    assert uids == ["0", "4321", "0", "4321"]
    assert gids == ["0", "1234", "0", "1234"]
    assert permitted == before[2]
    assert ids() == before


@pytest.mark.root
def test_capabilities_change_for_one_thread_only():
    before = ids()
    permitted = capabilities.permitted()

    def limit():
        filecalls.set_thread_effective_capabilities(permitted & 0b10, permitted)
        return ids()

    assert on_a_thread(limit)[1:] == (permitted & 0b10, permitted)
    assert ids() == before


def test_locks_are_of_the_description_and_not_waited_for(tmp_path):
    path = tmp_path / "file"
    path.touch()
    first, second = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    filecalls.set_lock(first, fcntl.F_WRLCK, 10, 19)
    with pytest.raises(BlockingIOError):
        filecalls.set_lock(second, fcntl.F_RDLCK, 19, LAST_OFFSET)
    assert filecalls.conflicting_lock(second, fcntl.F_RDLCK, 0, LAST_OFFSET) == (10, 19, fcntl.F_WRLCK)
    assert filecalls.conflicting_lock(first, fcntl.F_RDLCK, 0, LAST_OFFSET)[2] == fcntl.F_UNLCK
    filecalls.set_lock(second, fcntl.F_WRLCK, 20, LAST_OFFSET)
    assert filecalls.conflicting_lock(first, fcntl.F_RDLCK, 5, LAST_OFFSET) == (20, LAST_OFFSET, fcntl.F_WRLCK)
    filecalls.set_lock(first, fcntl.F_UNLCK, 10, 14)
    assert filecalls.conflicting_lock(second, fcntl.F_WRLCK, 10, 19) == (15, 19, fcntl.F_WRLCK)
    os.close(first)
    os.close(second)


def test_flock_is_not_waited_for(tmp_path):
    path = tmp_path / "file"
    path.touch()
    first, second = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    filecalls.flock(first, fcntl.F_RDLCK)
    filecalls.flock(second, fcntl.F_RDLCK)
    with pytest.raises(BlockingIOError):
        filecalls.flock(second, fcntl.F_WRLCK)
    filecalls.flock(first, fcntl.F_UNLCK)
    filecalls.flock(second, fcntl.F_WRLCK)
    os.close(first)
    os.close(second)
