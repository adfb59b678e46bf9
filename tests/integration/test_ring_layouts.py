"""Any layout of descriptors that a driver may choose carries a request; completions are announced exactly as asked for."""

import os
import random
import time

import pytest

from tests.support.frontend.checks import assert_same
from tests.support.frontend.daemon import Options
from tests.support.frontend.device import DEFAULT_FEATURES
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.ring import JOINED, LINUX, VIRTQ_AVAIL_F_NO_INTERRUPT, Layout, at, pieces, randomly
from tests.support.frontend.serving import start
from tests.support.frontend.vhost_user_client import Feature
from vfsd.wire import fuse_abi as abi

RING_SIZE = 256
LAYOUTS = {
    "joined": JOINED,
    "as Linux": LINUX,
    "header cut in two": Layout(at(20), at(8)),
    "header joined with a part of the arguments": Layout(at(44, 60), at(20, 40)),
    "each name byte alone": Layout(at(40, *range(41, 60)), at(16)),
    "7 bytes each": Layout(pieces(7), pieces(7)),
}
EVENT_IDX = {"event_idx": DEFAULT_FEATURES, "no event_idx": DEFAULT_FEATURES & ~Feature.EVENT_IDX}


@pytest.fixture(scope="module", params=EVENT_IDX)
def served(request, tmp_path_factory):
    """A daemon of this module's own, with a larger ring."""
    features = EVENT_IDX[request.param]
    served = start(tmp_path_factory.mktemp("rings"), Options(), device_options={"features": features, "ring_size": RING_SIZE})
    yield served
    served.close()
    assert served.unexpected_log() == []


@pytest.fixture
def client(served):
    served.new_session()
    return served.client


def exercise(client, share):
    """Requests of every shape: names, data both ways, long and short replies. Small enough for any layout of one ring."""
    entry = client.write_file(ROOT, b"file", b"0123456789" * 20)
    assert (share / "file").read_bytes() == b"0123456789" * 20
    assert client.read_file(entry.nodeid, chunk=200) == b"0123456789" * 20
    assert_same(client.attr(entry.nodeid), share / "file")
    assert b"file" in [dirent.name for dirent in client.list(ROOT, size=500)]
    assert b"file" in [dirent.name for dirent in client.list(ROOT, size=700, plus=True)]
    client.rename(ROOT, b"file", ROOT, b"other")
    client.forget(entry.nodeid)
    client.unlink(ROOT, b"other")


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_carries_every_request(served, client, layout, indirect):
    layout = Layout(LAYOUTS[layout].readable, LAYOUTS[layout].writable, indirect)
    with client.laid_out(layout):
        exercise(client, served.share)


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_one_byte_for_each_descriptor(client, indirect):
    with client.laid_out(Layout(pieces(1), pieces(1), indirect)):
        assert client.attr(ROOT).nlink >= 2  # 56 bytes one way, 120 the other
        assert client.lookup(ROOT, b"..").nodeid == ROOT


@pytest.mark.parametrize("seed", range(5))
def test_random_layouts(served, client, seed):
    rng = random.Random(seed)
    for _ in range(5):
        with client.laid_out(Layout(randomly(rng), randomly(rng), indirect=rng.random() < 0.5)):
            exercise(client, served.share)


def test_data_of_a_mebibyte_over_many_descriptors(served, client):
    data = os.urandom(1 << 20)
    for layout in (LINUX, Layout(pieces(8192), pieces(8192)), Layout(pieces(5000), pieces(5000), indirect=True)):
        with client.laid_out(layout):
            entry = client.write_file(ROOT, b"big", data)
            assert (served.share / "big").read_bytes() == data
            assert client.read_file(entry.nodeid) == data
            client.unlink(ROOT, b"big")


def test_every_ring_slot_in_use_at_once(client):
    ring = client.device.rings[1]
    requests = [client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104, kick=False) for _ in range(RING_SIZE // 2)]
    assert ring.free_descriptors == 0
    ring.kick()
    client.finish_all(requests)
    assert len({client.result(request)[16:24] for request in requests}) == 1


def test_the_ring_indexes_wrap_round(client):
    """65536 requests and more, the 16-bit indexes run over."""
    ring = client.device.rings[1]
    for _ in range(66_000 // 120):
        requests = [client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104, kick=False) for _ in range(120)]
        ring.kick()
        client.finish_all(requests)
    assert ring.avail_idx == ring.used_idx
    assert client.attr(ROOT).nlink >= 2


def test_a_batch_published_at_once_needs_one_kick(client):
    ring = client.device.rings[1]
    submissions = [ring.lay_out(client.header(abi.FUSE_GETATTR, ROOT, 16) + bytes(16), 120) for _ in range(50)]
    kicks, calls = ring.kicks, ring.calls
    ring.publish([submission.head for submission in submissions])
    ring.kick()
    ring.wait(submissions)
    assert ring.kicks - kicks <= 1
    assert ring.calls - calls <= 50


def test_no_call_is_lost_over_many_single_requests(client):
    """Each wait sleeps on the call eventfd only: a missing notification would be a timeout."""
    for _ in range(2000):
        client.getattr(ROOT)


def test_no_kick_is_suppressed_that_is_needed(client):
    """Pauses of many lengths, so that the daemon is met in every state between busy and asleep."""
    rng = random.Random(5)
    for _ in range(300):
        time.sleep(rng.random() ** 4 * 0.01)
        client.getattr(ROOT)


@pytest.mark.parametrize("served", ["no event_idx"], indirect=True)
def test_a_driver_that_wants_no_calls_gets_none(served, client):
    ring = client.device.rings[1]
    ring.drain_calls()
    ring.write_avail_flags(VIRTQ_AVAIL_F_NO_INTERRUPT)
    before = ring.calls
    request = client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104)
    while not request.submission.done:
        ring.collect()
    ring.drain_calls()
    assert ring.calls == before
    ring.write_avail_flags(0)
    client.getattr(ROOT)


@pytest.mark.parametrize("served", ["event_idx"], indirect=True)
def test_with_event_idx_calls_come_only_for_the_entry_asked_for(served, client):
    """used_event far ahead: the driver polls, and must not be interrupted."""
    ring = client.device.rings[1]
    ring.drain_calls()
    ring.memory.write(ring.avail + 4 + 2 * ring.size, ((ring.last_used + 1000) & 0xFFFF).to_bytes(2, "little"))
    before = ring.calls
    requests = [client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104) for _ in range(20)]
    while not all(request.submission.done for request in requests):
        ring.collect()
    ring.drain_calls()
    assert ring.calls == before
    client.getattr(ROOT)


def test_replies_never_touch_memory_behind_their_length(client):
    """The rest of a buffer keeps what was in it (the ring driver checks what lies behind each descriptor)."""
    request = client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 4000)
    client.finish(request)
    assert request.submission.written == 16 + 104
