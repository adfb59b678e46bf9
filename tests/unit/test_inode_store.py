"""The inode store: what is found again, what is never confused, what a forget frees and when."""

import errno
import stat
import threading
import tracemalloc
from collections import Counter

import pytest

from vfsd.broker.inode_store import ROOT_NODEID, Identity, InodeStore
from vfsd.broker.inode_table import PAGE_ROWS, SLOT_MASK
from vfsd.errors import ReplyErrno

NO_FD = -1


def identity(number, *, handle=True, mount=7, kind=stat.S_IFREG):
    key = b"handle-%d" % number if handle else None
    return Identity(key, b"ids-%d" % number, mount, 99, kind)


class Owner:
    """Who gets what freed inodes leave behind."""

    def __init__(self):
        self.lock = threading.Lock()
        self.released = []

    def take(self, released):
        assert not self.lock.locked(), "called under the lock"
        self.released += released

    def store(self, **limits):
        store = InodeStore(self.lock, self.take, **limits)
        store.insert_root(identity(0, kind=stat.S_IFDIR), fd=100, held_mount=True)
        return store


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def store(owner):
    return owner.store()


def by_handle(store, number, session=0):
    nodeid, inserted = store.insert(identity(number), session, fd=NO_FD, held_mount=True)
    assert inserted
    return nodeid


def by_fd(store, number, fd, session=0):
    nodeid, inserted = store.insert(identity(number, handle=False), session, fd=fd, held_mount=False)
    assert inserted
    return nodeid


def known(store, nodeid, session=0):
    try:
        with store.pin(nodeid, session):
            return True
    except ReplyErrno as error:
        if error.errno != errno.EBADF:
            raise
        return False


def fails(number, call, *arguments, **keywords):
    with pytest.raises(ReplyErrno) as caught:
        call(*arguments, **keywords)
    assert caught.value.errno == number


# --- finding --------------------------------------------------------------------------------------------------------


def test_an_inode_is_found_by_its_handle(store):
    nodeid = by_handle(store, 1)
    assert store.count_lookup(identity(1), 0) == nodeid
    assert store.count_lookup(identity(2), 0) is None


def test_an_inode_with_a_descriptor_is_found_by_its_numbers(store):
    nodeid = by_fd(store, 1, fd=5)
    assert store.count_lookup(identity(1, handle=False), 0) == nodeid
    assert store.count_lookup(identity(1), 0) == nodeid, "also by one that has a handle as well"


def test_an_inode_without_a_descriptor_is_never_found_by_its_numbers(store):
    """It may have been deleted on the host, and its number given to another file."""
    by_handle(store, 1)
    stranger = identity(1)._replace(handle_key=b"another handle")
    assert store.count_lookup(stranger, 0) is None
    assert store.count_lookup(identity(1, handle=False), 0) is None


def test_a_hit_by_handle_wins_over_one_by_numbers(store):
    other = by_fd(store, 1, fd=5)
    nodeid = by_handle(store, 2)
    assert store.count_lookup(identity(2)._replace(ids_key=b"ids-1"), 0) == nodeid != other


def test_the_root_is_found_both_ways(store):
    assert store.count_lookup(identity(0), 0) == ROOT_NODEID
    assert store.count_lookup(identity(0, handle=False), 0) == ROOT_NODEID


def test_an_insert_of_what_is_known_counts_a_lookup_and_takes_nothing(store, owner):
    nodeid = by_handle(store, 1)
    assert store.insert(identity(1), 0, fd=55, held_mount=True) == (nodeid, False)
    store.forget([nodeid, 1], 0)
    assert known(store, nodeid)
    store.forget([nodeid, 1], 0)
    assert [released.fd for released in owner.released] == [NO_FD]


def test_property_35_of_racing_inserts_one_makes_the_inode_and_all_count(store):
    threads, rounds = 8, 200
    start = threading.Barrier(threads)
    results = [[] for _ in range(threads)]

    def insert(mine):
        start.wait()
        for number in range(1, rounds + 1):
            mine.append(store.insert(identity(number), 0, fd=NO_FD, held_mount=True))

    running = [threading.Thread(target=insert, args=(mine,)) for mine in results]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(store) == 1 + rounds
    for answers in zip(*results, strict=True):
        assert len({nodeid for nodeid, _inserted in answers}) == 1
        assert [inserted for _nodeid, inserted in answers].count(True) == 1
        nodeid = answers[0][0]
        store.forget([nodeid, threads - 1], 0)
        assert known(store, nodeid)
        store.forget([nodeid, 1], 0)
        assert not known(store, nodeid)


# --- forgetting -----------------------------------------------------------------------------------------------------


def test_the_last_forget_frees_and_hands_back(store, owner):
    first, second = by_fd(store, 1, fd=5), by_handle(store, 2)
    store.forget([first, 1, second, 1], 0)
    assert owner.released == [(first, 5, 7, False), (second, NO_FD, 7, True)]
    assert len(store) == 1
    assert store.count_lookup(identity(1, handle=False), 0) is None
    assert store.count_lookup(identity(2), 0) is None


def test_property_32_forgetting_more_than_was_counted_is_forgetting_all(store, owner):
    nodeid = by_handle(store, 1)
    store.forget([nodeid, 2**64 - 1], 0)
    assert not known(store, nodeid)
    store.forget([nodeid, 1, nodeid, 1], 0)
    assert len(owner.released) == 1


@pytest.mark.parametrize("nodeid", [0, 2, 3, 1 << 24, (1 << 24) | 1, 2**63, 2**64 - 1, (1 << 24) - 1])
def test_property_32_a_nodeid_that_was_never_given_is_nobody(store, owner, nodeid):
    store.forget([nodeid, 5], 0)
    fails(errno.EBADF, store.pin, nodeid, 0)
    assert store.mount_of(nodeid) == 0
    assert not store.alive(nodeid)
    assert owner.released == []


def test_property_32_the_root_is_never_forgotten(store, owner):
    store.forget([ROOT_NODEID, 2**64 - 1], 0)
    assert known(store, ROOT_NODEID)
    store.begin_session(1)
    assert known(store, ROOT_NODEID, 1)
    assert owner.released == []


def test_property_33_a_nodeid_never_means_another_inode(store):
    seen = set()
    for number in range(1, 500):
        nodeid = by_handle(store, number)
        assert nodeid not in seen
        seen.add(nodeid)
        store.forget([nodeid, 1], 0)
    assert {nodeid & SLOT_MASK for nodeid in seen} == {2}, "one slot served them all"
    assert not any(known(store, nodeid) for nodeid in seen)


# --- pins -----------------------------------------------------------------------------------------------------------


def test_a_pinned_inode_outlives_its_forget_but_is_found_no_more(store, owner):
    nodeid = by_fd(store, 1, fd=5)
    with store.pin(nodeid, 0) as pin, store.pin(nodeid, 0):
        store.forget([nodeid, 1], 0)
        assert owner.released == []
        assert pin.fd == 5
        fails(errno.EBADF, store.pin, nodeid, 0)
        assert store.count_lookup(identity(1, handle=False), 0) is None
        assert not store.alive(nodeid)
    assert [released.nodeid for released in owner.released] == [nodeid]


def test_property_34_removal_is_by_identity(store, owner):
    """While the old inode waits for its pin, the same file comes back as a new one: the old one's end must not unlist it."""
    old = by_fd(store, 1, fd=5)
    with store.pin(old, 0):
        store.forget([old, 1], 0)
        young = by_fd(store, 1, fd=6)
        assert young != old
    assert [released.fd for released in owner.released] == [5]
    assert store.count_lookup(identity(1, handle=False), 0) == young


def test_a_pin_shows_the_inode_as_it_was_inserted(store):
    directory = store.insert(identity(1, kind=stat.S_IFDIR), 0, fd=NO_FD, held_mount=True)[0]
    with store.pin(directory, 0) as pin:
        assert (pin.nodeid, pin.fd, pin.handle_key, pin.mount_id, pin.device) == (directory, NO_FD, b"handle-1", 7, 99)
        assert pin.is_directory
        assert pin.may_be_opened


@pytest.mark.parametrize(
    ("kind", "may"),
    [
        (stat.S_IFREG, True), (stat.S_IFDIR, True), (stat.S_IFLNK, False), (stat.S_IFIFO, False),
        (stat.S_IFSOCK, False), (stat.S_IFCHR, False), (stat.S_IFBLK, False),
    ],
)  # fmt: skip
def test_only_files_and_directories_may_be_opened(store, kind, may):
    nodeid = store.insert(identity(1, kind=kind), 0, fd=5, held_mount=False)[0]
    with store.pin(nodeid, 0) as pin:
        assert pin.may_be_opened is may


def test_a_pin_is_given_back_also_when_its_block_fails(store, owner):
    nodeid = by_handle(store, 1)

    def fail():
        with store.pin(nodeid, 0):
            store.forget([nodeid, 1], 0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(owner.released) == 1


# --- sessions, limits -----------------------------------------------------------------------------------------------


def wiped(store):
    """All that ended sessions left, fetched as the share does: how many inodes, their descriptors, references per mount."""
    inodes, fds, mounts = 0, [], Counter()
    while (some := store.take_wiped()) is not None:
        assert some.inodes <= PAGE_ROWS
        inodes += some.inodes
        fds += some.fds
        mounts += some.mounts
        store.settle_wiped(some)
    return inodes, sorted(fds), dict(mounts)


def test_a_new_session_knows_only_the_root_and_what_was_known_is_fetched(store, owner):
    by_handle(store, 1)
    by_fd(store, 2, fd=5)
    store.insert(identity(3, mount=8), 0, fd=NO_FD, held_mount=True)
    store.count_lookup(identity(1), 0)
    store.begin_session(1)
    assert len(store) == 1
    assert store.count_lookup(identity(1), 1) is None
    assert store.count_lookup(identity(2, handle=False), 1) is None
    assert store.count_lookup(identity(0), 1) == ROOT_NODEID
    assert wiped(store) == (3, [5], {7: 1, 8: 1})
    assert wiped(store) == (0, [], {})
    assert owner.released == []


def test_what_an_ended_session_left_counts_until_it_is_settled(store):
    by_fd(store, 1, fd=5)
    by_handle(store, 2)
    store.begin_session(1)
    assert (store.held, store.fd_count) == (3, 2)
    some = store.take_wiped()
    assert (store.held, store.fd_count) == (3, 2), "not closed yet"
    store.settle_wiped(some)
    assert (store.held, store.fd_count) == (1, 1)
    assert store.wiped_tables == 1
    wiped(store)
    assert store.wiped_tables == 0


@pytest.mark.parametrize("fetched_first", [False, True])
def test_an_inode_that_is_pinned_outlives_its_session(store, owner, fetched_first):
    """Its descriptor and mount reference stay until the last pin goes, whenever the rest is fetched, and go once."""
    neighbour, pinned, forgotten = by_fd(store, 1, fd=5), by_fd(store, 2, fd=6), by_handle(store, 3)
    assert len({neighbour, pinned, forgotten}) == 3
    with store.pin(pinned, 0) as pin, store.pin(pinned, 0), store.pin(forgotten, 0):
        store.forget([forgotten, 1], 0)
        store.begin_session(1)
        fails(errno.EBADF, store.pin, pinned, 1)
        assert not store.alive(pinned)
        if fetched_first:
            assert wiped(store) == (1, [5], {})
            assert owner.released == []
            assert (store.held, store.fd_count) == (3, 2)
        assert pin.fd == 6
    left = [(released.nodeid, released.fd, released.held_mount) for released in owner.released]
    if fetched_first:
        assert left == [(forgotten, NO_FD, True), (pinned, 6, False)]
    else:
        assert left == [(forgotten, NO_FD, True)]
        assert wiped(store) == (2, [5, 6], {})
    assert (store.held, store.fd_count) == (1, 1)


def test_the_root_stays_through_sessions_also_while_it_is_pinned(store, owner):
    with store.pin(ROOT_NODEID, 0) as before:
        by_handle(store, 1)
        store.begin_session(1)
        assert wiped(store) == (1, [], {7: 1}), "the root's own reference is not among them"
        with store.pin(ROOT_NODEID, 1) as after:
            assert (before.fd, after.fd) == (100, 100)
            assert (after.handle_key, after.mount_id, after.device, after.is_directory) == (b"handle-0", 7, 99, True)
    assert owner.released == []
    assert store.count_lookup(identity(0, handle=False), 1) == ROOT_NODEID


def test_property_33_a_nodeid_never_means_another_inode_in_a_later_session(store):
    seen = set()
    for session in range(5):
        for number in range(1, 4):
            for _ in range(session):
                store.forget([by_handle(store, number, session), 1], session)
            nodeid = by_handle(store, number, session)
            assert nodeid not in seen
            seen.add(nodeid)
        store.begin_session(session + 1)
        assert not any(known(store, nodeid, session + 1) for nodeid in seen)
        if session % 2:
            wiped(store)


def test_sessions_end_faster_than_they_are_freed(store):
    """Several may wait; each leaves what it held, once."""
    for session in range(4):
        by_fd(store, session + 1, fd=10 + session, session=session)
        store.begin_session(session + 1)
    store.begin_session(5)
    assert store.wiped_tables == 4, "a session that held nothing leaves nothing"
    assert wiped(store) == (4, [10, 11, 12, 13], {})


def test_a_session_of_many_pages_is_freed_a_page_at_a_time(store):
    count = 3 * PAGE_ROWS
    nodeids = [by_handle(store, number) for number in range(1, count + 1)]
    gone = nodeids[::7]
    store.forget([number for nodeid in gone for number in (nodeid, 1)], 0)
    assert all(known(store, nodeid) for nodeid in nodeids if nodeid not in set(gone))
    store.begin_session(1)
    first = store.take_wiped()
    assert 0 < first.inodes <= PAGE_ROWS
    store.settle_wiped(first)
    assert wiped(store)[0] == count - len(gone) - first.inodes
    assert store.held == 1


def test_another_session_is_stale(store):
    nodeid = by_handle(store, 1)
    for session in (1, 2**64 - 1):
        fails(errno.ESTALE, store.pin, nodeid, session)
        fails(errno.ESTALE, store.count_lookup, identity(1), session)
        fails(errno.ESTALE, store.insert, identity(2), session, fd=NO_FD, held_mount=True)
    store.forget([nodeid, 1], 1)
    assert known(store, nodeid), "a forget of another session is not ours"


def test_a_full_store_says_enfile_until_something_is_forgotten(owner):
    store = owner.store(max_inodes=3)
    nodeid = by_handle(store, 1)
    by_handle(store, 2)
    fails(errno.ENFILE, store.insert, identity(3), 0, fd=NO_FD, held_mount=True)
    assert store.insert(identity(1), 0, fd=NO_FD, held_mount=True) == (nodeid, False), "what is known needs no room"
    store.forget([nodeid, 2], 0)
    by_handle(store, 3)
    fails(errno.ENFILE, store.insert, identity(4), 0, fd=NO_FD, held_mount=True)


def test_inodes_of_an_ended_session_take_room_until_they_are_freed(owner):
    store = owner.store(max_inodes=3)
    by_handle(store, 1)
    by_handle(store, 2)
    store.begin_session(1)
    assert store.full
    fails(errno.ENFILE, store.insert, identity(3), 1, fd=NO_FD, held_mount=True)
    wiped(store)
    assert not store.full
    by_handle(store, 3, session=1)


def test_a_descriptor_counts_until_its_owner_has_closed_it(owner):
    """Otherwise a thread that looks up while another forgets would open more than there is room for."""
    seen = []
    store = InodeStore(owner.lock, lambda _released: seen.append(store.fd_count))
    nodeid = by_fd(store, 1, fd=5)
    store.forget([nodeid, 1], 0)
    assert (seen, store.fd_count) == ([1], 0)


def test_mount_of_is_the_mount(store):
    nodeid = store.insert(identity(1, mount=2**40), 0, fd=NO_FD, held_mount=True)[0]
    assert store.mount_of(nodeid) == 2**40
    store.forget([nodeid, 1], 0)
    assert store.mount_of(nodeid) == 0


def test_nothing_grows_in_one_piece(store):
    """A dictionary of all inodes would be copied whenever it grows, while every request waits."""
    count = 50 * PAGE_ROWS - 1
    for number in range(1, count):
        store.insert(identity(number, handle=number % 2 == 0), 0, fd=NO_FD if number % 2 == 0 else 5, held_mount=False)
    table = store._table
    assert len(table.pages) == 50
    for index in (table._by_handle, table._by_ids):
        sizes = [len(shard) for shard in index._shards]
        assert sum(sizes) >= count // 2
        assert max(sizes) < 100


@pytest.mark.parametrize("with_descriptor", [False, True])
def test_a_hundred_thousand_inodes_take_at_most_300_bytes_each(owner, with_descriptor):
    count = 100_000
    store = owner.store()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            # as long as ext4's: mount id, header, inode number and generation; (ino, dev, mount id)
            handle = None if with_descriptor else number.to_bytes(24, "little")
            numbers = number.to_bytes(24, "little")
            store.insert(Identity(handle, numbers, 7, 99, stat.S_IFREG), 0, fd=5 if with_descriptor else NO_FD, held_mount=False)
        each = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert each <= 300, f"{each:.0f} bytes for each inode"
