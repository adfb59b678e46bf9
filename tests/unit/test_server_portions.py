"""One worker's packet against the others' patience, and copies that a worker does not take against everybody's descriptors."""

import errno
import os

import pytest

from tests.support.broker import Bench
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.portions import PORTION
from vfsd.broker.share import COPIES_BESIDE_BUDGET
from vfsd.broker.worker_link import MAX_QUEUED_FDS
from vfsd.wire import broker_messages as wire

STATFS = wire.StatFs(ROOT_NODEID)
LISTING = wire.LookupMany(ROOT_NODEID, [b"missing"] * wire.MAX_NAMES_PER_LOOKUP)


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def workers(bench):
    workers = [bench.add(0), bench.add(1)]
    bench.begin_session()
    return workers


def next_turn(bench):
    """Who is served next, and with how many requests."""
    tasks = bench.server.next_turn()
    who = (tasks[0].link.index, len(tasks))
    for task in tasks:
        bench.server.run(task)(False)
    bench.server.finish_turn()
    return who


@pytest.mark.parametrize(
    ("packet", "portion"),
    [
        ([STATFS] * wire.MAX_REQUESTS_PER_PACKET, PORTION),
        ([LISTING] * 4, 1),
        ([wire.Forget([1 << 40, 1] * wire.MAX_FORGETS)] * 4, 1),
    ],
    ids=["requests", "listings", "forgets"],
)
def test_a_large_packet_is_done_in_portions_between_which_others_are_served(bench, workers, packet, portion):
    greedy, modest = workers
    greedy.send(*packet)
    assert next_turn(bench) == (0, portion)
    for _ in range(2):
        modest.send(STATFS)
        assert next_turn(bench) == (1, 1)
        assert next_turn(bench) == (0, portion)
    bench.pump()
    greedy.read()
    assert len(greedy.replies) == (0 if packet[0] is not STATFS and packet[0] is not LISTING else len(packet))


def test_a_second_packet_waits_for_the_rest_of_the_first(bench, workers):
    greedy, _ = workers
    ids = greedy.send(*[STATFS] * (PORTION + 1))
    (last,) = greedy.send(STATFS)
    bench.pump()
    greedy.read()
    assert list(greedy.replies) == [*ids, last]


def test_the_rest_of_a_packet_ends_with_its_worker(bench, workers):
    greedy, modest = workers
    greedy.send(*[STATFS] * (PORTION + 1))
    assert next_turn(bench) == (0, PORTION)
    link = bench.server.links.by_index[0]
    bench.server._condemn(link, "for the test")
    bench.pump()
    assert not link.rest
    assert modest.errno_of(STATFS) == 0


@pytest.fixture
def opened(bench, workers, tmp_path):
    (tmp_path / "file").touch()
    nodeid = workers[0].lookup(b"file")
    fh, fd = workers[0].open(nodeid)
    fd.close()
    return nodeid, fh


def stop_reading(bench, worker, message):
    """Have the broker answer until it goes on only when the worker reads. Its link."""
    link = bench.server.links.by_index[worker.index]
    while not link.rest:
        worker.send(*[message] * wire.MAX_REQUESTS_PER_PACKET)
        bench.pump()
    return link


def test_a_worker_that_does_not_take_its_copies_gets_a_bounded_number_and_the_rest_when_it_reads(bench, workers, opened):
    worker = workers[0]
    link = stop_reading(bench, worker, wire.Fetch(*opened))
    assert MAX_QUEUED_FDS < link.queued_fds <= MAX_QUEUED_FDS + PORTION
    bench.pump()
    assert link.rest, "it goes on by itself"
    while link.rest or link.has_queue:
        worker.read()
        bench.pump()
    worker.read()
    assert {got.errno for got in worker.replies.values()} == {0}


def test_a_worker_that_dies_with_the_rest_of_a_packet_waiting_leaves_nothing(bench, workers, opened):
    stop_reading(bench, workers[0], wire.Fetch(*opened))
    workers[0].socket.close()
    bench.pump()
    assert list(bench.server.links.by_index) == [1]
    assert bench.breaches == []


def test_copies_that_wait_for_a_worker_count_as_the_guests(request, tmp_path):
    """Otherwise workers that do not read would leave the broker without a descriptor for anybody."""
    (tmp_path / "file").touch()
    bench = Bench(tmp_path, most_guest_fds=MAX_QUEUED_FDS)
    request.addfinalizer(bench.close)
    deaf, other = bench.add(0), bench.add(1)
    bench.begin_session()
    nodeid = other.lookup(b"file")
    fh, fd = other.open(nodeid)
    fd.close()
    stop_reading(bench, deaf, wire.Fetch(nodeid, fh))
    assert bench.share.queued_copies() >= COPIES_BESIDE_BUDGET
    assert other.errno_of(wire.Open(nodeid, os.O_RDONLY)) == errno.ENFILE
    assert other.errno_of(wire.Fetch(nodeid, fh)) == errno.ENFILE
    for _ in range(3):
        assert other.ask(wire.GetAttr(nodeid)).fd is None  # its answer needs none
    while bench.share.queued_copies():
        deaf.read()
        bench.pump()
    assert other.errno_of(wire.Open(nodeid, os.O_RDONLY)) == 0
    assert other.errno_of(wire.Fetch(nodeid, fh)) == 0
