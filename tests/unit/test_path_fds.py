"""Descriptors lent for one operation: an inode's own, a remembered directory's, or one opened for this once."""

import errno
import os
import stat
import threading

import pytest

from vfsd.broker.inode_store import Identity, InodeStore
from vfsd.broker.path_fds import IDLE_SECONDS, PathFds


class Handles:
    """In place of FileHandles, whose opening needs root: the "handle" is a path."""

    def __init__(self):
        self.opened = []

    def open(self, key, flags):
        self.opened.append(key)
        return os.open(key, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


class Inodes:
    """A store of inodes that are known by path, with the PathFds over it."""

    def __init__(self, budget):
        self.handles = Handles()
        self.paths = PathFds(self.handles, budget)
        self.store = InodeStore(threading.Lock(), self._released)

    def _released(self, released):
        for inode in released:
            self.paths.drop(inode.nodeid)

    def add(self, path, *, fd=-1):
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        handle = os.fsencode(path) if fd < 0 else None
        return self.store.insert(Identity(handle, os.fsencode(path), 1, 1, kind), 0, fd=fd, held_mount=False)[0]

    def pin(self, nodeid):
        return self.store.pin(nodeid, 0)


@pytest.fixture
def make_inodes():
    made = []

    def make_inodes(budget=4):
        made.append(Inodes(budget))
        return made[-1]

    yield make_inodes
    for inodes in made:
        inodes.paths.sweep(float("inf"))
        assert len(inodes.paths) == 0


@pytest.fixture
def inodes(make_inodes):
    return make_inodes()


@pytest.fixture
def directories(tmp_path):
    made = [tmp_path / f"directory{number}" for number in range(8)]
    for path in made:
        path.mkdir()
    return made


def same(fd, path):
    return os.path.samestat(os.fstat(fd), os.lstat(path))


def is_open(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


def use(inodes, nodeid):
    with inodes.pin(nodeid) as inode, inodes.paths.of(inode) as path:
        return path.fd


def test_an_inode_with_a_descriptor_lends_that_and_keeps_it(inodes, tmp_path):
    own = os.open(tmp_path, os.O_PATH)
    nodeid = inodes.add(tmp_path, fd=own)
    assert use(inodes, nodeid) == own
    assert is_open(own)
    assert inodes.handles.opened == []
    assert len(inodes.paths) == 0
    os.close(own)


@pytest.mark.parametrize("kind", ["file", "link", "fifo"])
def test_anything_but_a_directory_is_opened_for_this_once(inodes, tmp_path, kind):
    path = tmp_path / kind
    {"file": path.touch, "link": lambda: path.symlink_to("nowhere"), "fifo": lambda: os.mkfifo(path)}[kind]()
    nodeid = inodes.add(path)
    for _ in range(2):
        with inodes.pin(nodeid) as inode, inodes.paths.of(inode) as lent:
            assert same(lent.fd, path)
            assert lent.statx().ino == os.lstat(path).st_ino
        assert not is_open(lent.fd)
    assert len(inodes.handles.opened) == 2
    assert len(inodes.paths) == 0


def test_a_directory_is_opened_once_and_remembered(inodes, directories):
    nodeid = inodes.add(directories[0])
    first = use(inodes, nodeid)
    assert use(inodes, nodeid) == first
    assert same(first, directories[0])
    assert len(inodes.handles.opened) == 1


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_no_more_are_remembered_than_the_budget_says(make_inodes, directories, budget):
    inodes = make_inodes(budget)
    fds = [use(inodes, inodes.add(path)) for path in directories]
    assert len(inodes.paths) == budget
    assert len({fd for fd in fds if is_open(fd)}) <= budget + 1  # numbers are used again


def test_the_least_recently_used_goes_first(make_inodes, directories):
    inodes = make_inodes(2)
    first, second, third = (inodes.add(path) for path in directories[:3])
    for nodeid in (first, second, first, third):
        use(inodes, nodeid)
    inodes.handles.opened.clear()
    use(inodes, first)
    assert inodes.handles.opened == []
    use(inodes, second)
    assert len(inodes.handles.opened) == 1


def test_one_that_is_in_use_stays_open_whatever_pushes_it_out(make_inodes, directories):
    inodes = make_inodes(1)
    nodeid = inodes.add(directories[0])
    with inodes.pin(nodeid) as inode, inodes.paths.of(inode) as held:
        for path in directories[1:]:
            use(inodes, inodes.add(path))
        assert same(held.fd, directories[0])
    assert not is_open(held.fd)


def test_a_forgotten_directory_is_closed(inodes, directories):
    nodeid = inodes.add(directories[0])
    fd = use(inodes, nodeid)
    inodes.store.forget([nodeid, 1], 0)
    assert not is_open(fd)
    assert len(inodes.paths) == 0


def test_a_directory_forgotten_in_use_is_closed_after_its_use(inodes, directories):
    nodeid = inodes.add(directories[0])
    with inodes.pin(nodeid) as inode, inodes.paths.of(inode) as held:
        inodes.store.forget([nodeid, 1], 0)
        assert same(held.fd, directories[0])
    assert not is_open(held.fd)


def test_what_nobody_used_for_a_moment_is_closed(inodes, directories):
    fd = use(inodes, inodes.add(directories[0]))
    (cached,) = inodes.paths._recent.values()
    inodes.paths.sweep(cached.used_at + IDLE_SECONDS * 0.99)
    assert is_open(fd)
    inodes.paths.sweep(cached.used_at + IDLE_SECONDS)
    assert not is_open(fd)


def test_a_sweep_leaves_what_is_in_use(inodes, directories):
    with inodes.pin(inodes.add(directories[0])) as inode, inodes.paths.of(inode) as held:
        inodes.paths.sweep(float("inf"))
        assert same(held.fd, directories[0])


def test_one_that_hangs_in_use_does_not_keep_idle_ones_open(inodes, directories):
    """A dead mount holds its directory for ever; the idle descriptors of others would keep the host from unmounting."""
    with inodes.pin(inodes.add(directories[0])) as inode, inodes.paths.of(inode):
        idle = use(inodes, inodes.add(directories[1]))
        inodes.paths.sweep(float("inf"))
        assert not is_open(idle)


def test_a_remembered_directory_that_was_deleted_is_stale(inodes, directories):
    nodeid = inodes.add(directories[0])
    use(inodes, nodeid)
    directories[0].rmdir()
    for ask in ("statx", "refuse_deleted"):
        with inodes.pin(nodeid) as inode, inodes.paths.of(inode) as held:
            with pytest.raises(OSError, match="Stale") as caught:
                getattr(held, ask)()
            assert caught.value.errno == errno.ESTALE
        assert not is_open(held.fd)
        with pytest.raises(FileNotFoundError):  # asked by handle, the kernel would say ESTALE; here the handle is a path
            use(inodes, nodeid)
        directories[0].mkdir()
        use(inodes, nodeid)
        directories[0].rmdir()


def test_an_inode_with_a_descriptor_is_not_stale_when_deleted(inodes, directories):
    """It is what the guest holds on to: an open but deleted directory still has attributes."""
    own = os.open(directories[0], os.O_PATH)
    nodeid = inodes.add(directories[0], fd=own)
    directories[0].rmdir()
    with inodes.pin(nodeid) as inode, inodes.paths.of(inode) as lent:
        lent.refuse_deleted()
        assert lent.statx().nlink == 0
    os.close(own)


def test_a_deleted_directory_stays_open_for_its_other_user(inodes, directories):
    nodeid = inodes.add(directories[0])
    with inodes.pin(nodeid) as inode, inodes.paths.of(inode) as other:
        directories[0].rmdir()
        with inodes.paths.of(inode) as held, pytest.raises(OSError, match="Stale"):
            held.statx()
        os.fstat(other.fd)
    assert not is_open(other.fd)


def test_all_can_be_dropped_at_once_and_one_in_use_goes_with_its_user(inodes, directories):
    idle, used = inodes.add(directories[0]), inodes.add(directories[1])
    with inodes.pin(idle) as inode, inodes.paths.of(inode) as lent:
        idle_fd = lent.fd
    with inodes.pin(used) as inode, inodes.paths.of(inode) as lent:
        inodes.paths.drop_all()
        assert len(inodes.paths) == 0
        assert is_open(lent.fd)
        assert not is_open(idle_fd)
    assert not is_open(lent.fd)


def test_an_error_of_the_opening_passes(inodes, directories):
    nodeid = inodes.add(directories[0])
    directories[0].rmdir()
    with inodes.pin(nodeid) as inode, pytest.raises(FileNotFoundError):
        inodes.paths.of(inode)


def test_threads_may_use_push_out_and_forget_at_once(make_inodes, directories):
    inodes = make_inodes(2)
    nodeids = [inodes.add(path) for path in directories]
    wrong = []
    start = threading.Barrier(4)

    def work(seed):
        start.wait()
        for step in range(400):
            number = (step * (2 * seed + 1) + seed) % len(nodeids)
            with inodes.pin(nodeids[number]) as inode, inodes.paths.of(inode) as lent:
                if not same(lent.fd, directories[number]):
                    wrong.append(number)
            if step % 50 == 0:
                inodes.paths.drop(nodeids[number])
                inodes.paths.sweep(float("inf"))

    running = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == []
    assert len(inodes.paths) <= 2
