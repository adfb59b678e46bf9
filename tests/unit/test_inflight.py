"""The in-flight table: whenever the worker dies, its successor knows what was taken and what was shown to the driver."""

import os
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.driver import DATA_AT, USED_AT, Driver
from vfsd.errors import FrontendBreach, GuestBreach
from vfsd.fds import OwnedFd, sealed_memfd
from vfsd.wire import inflight
from vfsd.wire.inflight import TABLE_BYTES, TABLE_STRIDE_BYTES, Append, InflightTable
from vfsd.wire.virtio_ring import RING_IDX
from vfsd.worker.inflight_memory import InflightMemory, MappedTable
from vfsd.worker.virtqueue import Chain


class Killed(BaseException):
    """The worker died before a store."""


class Fuse:
    """So many stores are made, then the worker dies."""

    def __init__(self, stores):
        self.left = stores

    def burn(self):
        if self.left == 0:
            raise Killed
        self.left -= 1


class MortalView:
    """A view whose stores burn a fuse."""

    def __init__(self, view, fuse):
        self._view = view
        self._fuse = fuse

    def __setitem__(self, key, value):
        self._fuse.burn()
        self._view[key] = value

    def __getitem__(self, key):
        return self._view[key]

    def __getattr__(self, name):
        return getattr(self._view, name)


class MortalTable(InflightTable):
    def __init__(self, buffer, fuse):
        super().__init__(memoryview(buffer))
        self._bytes, self._halves, self._words = (MortalView(view, fuse) for view in (self._bytes, self._halves, self._words))


class Machine:
    """A driver that offers requests and a device that dies again and again; `ran` is what the device's workers ran."""

    def __init__(self, *, first=0):
        self.driver = Driver(size=8)
        self.driver.set_avail_idx(first)
        self.first = first
        self.table = bytearray(TABLE_BYTES)
        self.free = list(range(8))
        self.shown = []
        self.offered = []
        self.ran = []
        self.seen_used = 0

    def offer(self, count):
        for head in self.free[:count]:
            self.free.remove(head)
            self.driver.offer_simple(head)
            self.offered.append(head)

    def collect(self):
        """What the driver is shown; the heads are free again."""
        while self.seen_used != self.driver.used_idx:
            head, _ = self.driver.used_entry(self.seen_used)
            assert head not in self.free, "a request was completed twice"
            self.free.append(head)
            self.shown.append(head)
            self.seen_used = (self.seen_used + 1) & 0xFFFF

    def start(self, fuse):
        queue = self.driver.queue(last_avail=self.first, inflight=MortalTable(self.table, fuse), start_number=5)
        queue._used = MortalView(queue._used, fuse)
        queue._used_ring = MortalView(queue._used_ring, fuse)
        return queue

    def live(self, fuse, batch):
        """One worker's life: take all, complete in batches; returns when nothing is left to do, or by Killed."""
        queue = self.start(fuse)
        popped = []
        while queue.recovering:
            popped.append(queue.pop_recovered())
        numbers = [chain.number for chain in popped]
        assert numbers == sorted(numbers)
        while (chain := queue.pop()) is not None:
            popped.append(chain)
        while popped:
            for chain in popped[:batch]:
                self.ran.append((chain.head, chain.number))
                queue.push(chain.head, 0)
            del popped[:batch]
            queue.publish()
        assert queue.in_flight == 0

    def close(self):
        self.driver.close()


@given(
    first=st.sampled_from([0, 9, 0xFFFE]),
    rounds=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8), st.lists(st.integers(0, 60), max_size=4)), min_size=1, max_size=6),
)
def test_wherever_workers_die_nothing_is_lost_and_nothing_is_completed_twice(first, rounds):
    machine = Machine(first=first)
    try:
        for count, batch, kills in rounds:
            machine.offer(count)
            for stores in kills:
                try:
                    machine.live(Fuse(stores), batch)
                except Killed:
                    machine.collect()
                    machine.offer(count)
            machine.live(Fuse(10**6), batch)
            machine.collect()
            assert sorted(machine.free) == list(range(8)), "a request was lost"
        assert sorted(machine.shown) == sorted(machine.offered)
        assert len({number for _head, number in machine.ran}) == len(machine.offered), "one taking, one number"
    finally:
        machine.close()


@pytest.mark.parametrize("stores", range(40))
def test_what_the_driver_was_shown_is_not_run_again_by_the_successor(stores):
    """One death, at every store of a worker's life in which it completes two batches."""
    machine = Machine()
    try:
        machine.offer(5)
        try:
            machine.live(Fuse(stores), 3)
        except Killed:
            machine.collect()
            shown = len(machine.shown)
            ran_before = len(machine.ran)
            machine.live(Fuse(10**6), 3)
            assert len(machine.ran) - ran_before == 5 - shown
        machine.collect()
        assert sorted(machine.shown) == [0, 1, 2, 3, 4]
    finally:
        machine.close()


@pytest.fixture
def table():
    table = InflightTable(memoryview(bytearray(TABLE_BYTES)))
    yield table
    table.close()


def test_the_layout_is_that_of_vhost_user():
    buffer = bytearray(TABLE_BYTES)
    table = InflightTable(memoryview(buffer))
    table.begin(1, 16, used_idx=3, last_avail=3)
    table.take(2, 100)
    table.take(5, 101)
    assert struct.unpack_from("<QHHHH", buffer) == (0, 1, 16, 0, 3)
    assert struct.unpack_from("<B5xHQ", buffer, 16 + 16 * 2) == (1, 0, 100)
    table.link([2, 5])
    table.clear([2, 5], 5)
    assert struct.unpack_from("<QHHHH", buffer) == (0, 1, 16, 5, 5)
    assert struct.unpack_from("<B5xHQ", buffer, 16 + 16 * 5) == (0, 2, 101)


def test_another_start_or_size_is_no_continuation(table):
    assert not table.continues(1, 8)
    table.begin(1, 8, 0, 0)
    assert table.continues(1, 8)
    assert not table.continues(2, 8)
    assert not table.continues(1, 16)


def test_deaths_are_counted_for_one_taking_of_a_head(table):
    table.begin(1, 8, 0, 0)
    table.take(3, 10)
    assert [table.count_death(3), table.count_death(3)] == [1, 2]
    table.take(3, 11)
    assert table.count_death(3) == 1


def test_only_a_death_while_a_worker_is_at_the_request_counts(table):
    table.begin(1, 8, 0, 0)
    table.take(3, 100)
    for answered in (False, False, True):
        chain = Chain(3, 100, table, table.count_death(3))
        assert chain.deaths == 1
        chain.runs(False)  # it waits for the broker
        if answered:
            chain.runs(True)  # the broker has answered
    assert table.count_death(3) == 2


def test_deaths_stop_being_counted_and_do_not_wrap(table):
    table.begin(1, 8, 0, 0)
    table.take(3, 10)
    assert [table.count_death(3) for _ in range(300)][-1] == 0xFF


def test_a_journalled_append_belongs_to_one_taking_of_a_head(table):
    table.begin(1, 8, 0, 0)
    table.take(3, 10)
    assert table.journalled(3) is None
    table.journal(3, Append(7, 2**40, 4096))
    assert table.journalled(3) == Append(7, 2**40, 4096)
    assert table.journalled(2) is None
    table.take(3, 11)
    assert table.journalled(3) is None


def test_a_used_index_that_no_worker_left_is_a_breach(table):
    table.begin(1, 8, used_idx=0, last_avail=0)
    with pytest.raises(GuestBreach, match=r"used\.idx is 9"):
        table.recover(9, 8, 1)


@given(content=st.lists(st.integers(0, 0xFFFF), min_size=8 * 9, max_size=8 * 9), used_idx=st.integers(0, 0xFFFF))
def test_whatever_stands_in_the_table_recovery_is_bounded(content, used_idx):
    buffer = bytearray(TABLE_BYTES)
    struct.pack_into(f"<{len(content)}H", buffer, 0, *content)
    struct.pack_into("<H", buffer, 10, 8)  # the size was compared before
    table = InflightTable(memoryview(buffer))
    try:
        heads, last_avail = table.recover(used_idx, 8, 1)
    except GuestBreach:
        return
    assert len(set(heads)) == len(heads)
    assert set(heads) <= set(range(8))
    assert 0 <= last_avail <= 0xFFFF


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # each example fills a table of 1.5 MB
@given(
    header=st.tuples(
        st.integers(0, 2**64 - 1), st.sampled_from([1, 0, 2]), st.sampled_from([8, 0, 65535]), st.integers(0, 65535), st.integers(0, 20)
    ),
    entries=st.lists(
        st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 65535), st.integers(0, 2**64 - 1)), min_size=8, max_size=8
    ),
    skew=st.integers(0, 2**64 - 1),
    offered=st.integers(0, 8),
)
def test_whatever_stands_in_a_frontends_table_its_ring_is_served_or_broken(header, entries, skew, offered):
    """Every field of it, for a ring that a driver lays out well: each head is run at most once, and all that is offered or nothing."""
    driver = Driver(size=8)
    table = bytearray(TABLE_BYTES)
    struct.pack_into("<QHHHH", table, 0, *header)
    for head, (flag, deaths, follower, number) in enumerate(entries):
        struct.pack_into("<BB4xHQ", table, inflight.HEADER_BYTES + inflight.ENTRY_BYTES * head, flag, deaths, follower, number)
        driver.describe(head, DATA_AT + 64 * head, 64)
    struct.pack_into("<Q", table, 8 * inflight._SKEW, skew)
    driver.offer(*range(offered))
    queue, ran = None, []
    try:
        queue = driver.queue(last_avail=0, inflight=InflightTable(memoryview(table)), start_number=5, adopted=True)
        while queue.recovering:
            ran.append(queue.pop_recovered().head)
        while (chain := queue.pop()) is not None:
            ran.append(chain.head)
        for head in ran:
            queue.push(head, 0)
        queue.publish()
        assert sorted(set(ran)) == sorted(ran)
        assert driver.used_idx == len(ran)
    except GuestBreach:
        pass
    finally:
        if queue is not None:
            queue.close()
        driver.close()


def test_a_frontends_table_is_gone_on_with_by_another_start_but_not_after_a_reset_of_the_ring(table):
    table.begin(1, 8, used_idx=3, last_avail=3)
    assert not table.continues(2, 8)
    assert table.continues(2, 8, adopted_at=3)
    assert table.continues(2, 8, adopted_at=11)
    assert not table.continues(2, 8, adopted_at=12)
    assert not table.continues(2, 8, adopted_at=0)
    assert not table.continues(2, 16, adopted_at=3)


def test_of_the_frontends_memory_each_queue_has_its_own_part_adopted_once_in_a_connection():
    memory = InflightMemory(3)
    try:
        memory.adopt(sealed_memfd("tables", 2 * TABLE_STRIDE_BYTES), 0, 2 * TABLE_STRIDE_BYTES, 2)
        first = memory.start(1)
        assert (first.offset, first.adopted) == (TABLE_STRIDE_BYTES, True)
        assert memory.start(1).adopted is False
        assert memory.start(2).fd is memory.of(2)
        MappedTable(first.fd.fileno(), first.offset).close()
        for offset in (2 * TABLE_STRIDE_BYTES, 1 << 62, (1 << 63) - 1):
            with pytest.raises(FrontendBreach):
                MappedTable(first.fd.fileno(), offset)
        memory.forget_frontend()
        assert memory.start(0).fd is memory.of(0)
    finally:
        memory.close()


def test_a_driver_that_moves_the_used_index_meanwhile_breaks_its_ring():
    machine = Machine()
    try:
        machine.offer(3)
        with pytest.raises(Killed):
            machine.live(Fuse(9), 1)
        machine.driver.set_used_idx(500)
        with pytest.raises(GuestBreach):
            machine.start(Fuse(10**6))
    finally:
        machine.close()


def test_a_recovered_head_that_is_offered_again_is_a_breach():
    machine = Machine()
    try:
        machine.offer(1)
        queue = machine.start(Fuse(10**6))
        queue.pop()
        successor = machine.start(Fuse(10**6))
        machine.driver.offer(0)
        with pytest.raises(GuestBreach, match="while it was in flight"):
            successor.pop()
    finally:
        machine.close()


def test_the_memory_can_be_neither_grown_nor_shrunk_and_each_start_has_a_number_of_its_own():
    memory = InflightMemory(2)
    try:
        for size in (TABLE_BYTES - 1, TABLE_BYTES + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.of(1).fileno(), size)
        assert memory.next_start() != memory.next_start()
        table = MappedTable(memory.of(1).fileno())
        table.begin(1, 8, 0, 0)
        table.take(1, 77)
        table.close()
        again = MappedTable(memory.of(1).fileno())
        assert again.recover(0, 8, 1).heads == [1]
        again.close()
    finally:
        memory.close()


def test_a_file_that_is_no_table_is_not_mapped():
    with OwnedFd(os.memfd_create("short")) as short:
        os.ftruncate(short.fileno(), TABLE_BYTES - 1)
        with pytest.raises(FrontendBreach, match="too short"):
            MappedTable(short.fileno())


def test_places_in_the_used_ring_are_where_the_layout_says():
    """The proxies of this file stand where the stores really go."""
    machine = Machine()
    try:
        machine.offer(1)
        queue = machine.start(Fuse(10**6))
        queue.push(queue.pop().head, 0)
        queue.publish()
        assert queue._used[RING_IDX] == machine.driver.get(USED_AT + 2) == 1
        assert inflight.HEADER_BYTES == inflight.ENTRY_BYTES == 16
    finally:
        machine.close()
