"""What each known frontend sends makes the device work, and go on working through stop, continue, reset and changes at run time."""

import os
import struct
import time

import pytest

from tests.support.frontend.checks import NOT_FOUND, assert_same, eventually, eventually_stable, raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.device import DEFAULT_FEATURES
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.guest_memory import MIB
from tests.support.frontend.ring import Descriptor
from tests.support.frontend.sequences import CLOUD_HYPERVISOR, FRONTENDS, QEMU_7_2, QEMU_10, USER_MODE_LINUX
from tests.support.frontend.vhost_user_client import Feature, ProtocolFeature, Request, u64, vring_state
from vfsd.wire import fuse_abi as abi

BASE_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


def tagged(frontend):
    return Options(tag="files") if frontend is USER_MODE_LINUX else Options()


@pytest.fixture(params=FRONTENDS, ids=lambda frontend: frontend.name)
def frontend(request):
    return request.param


def use(client, share):
    entry = client.write_file(ROOT, b"file", b"content")
    assert (share / "file").read_bytes() == b"content"
    assert client.read_file(entry.nodeid) == b"content"
    client.unlink(ROOT, b"file")


# Negotiation


def test_what_is_offered(unattached):
    _, device = unattached(Options(request_queues=2))
    assert device.get_features() == DEFAULT_FEATURES
    offered = device.client.call_u64(Request.GET_PROTOCOL_FEATURES)
    assert offered & BASE_PROTOCOL == BASE_PROTOCOL
    assert offered & ProtocolFeature.INFLIGHT_SHMFD
    unsupported = ProtocolFeature.CONFIG | ProtocolFeature.STATUS | ProtocolFeature.DEVICE_STATE
    assert offered & (unsupported | ProtocolFeature.LOG_SHMFD) == 0
    device.negotiate_protocol(BASE_PROTOCOL)
    assert device.get_queue_num() == 3
    assert device.client.call_u64(Request.GET_MAX_MEM_SLOTS) >= 8


def test_the_tag_is_in_the_configuration_space(unattached):
    _, device = unattached(Options(tag="my files", request_queues=2))
    device.get_features()
    assert ProtocolFeature.CONFIG in device.negotiate_protocol(BASE_PROTOCOL | ProtocolFeature.CONFIG)
    space = b"my files".ljust(36, b"\0") + struct.pack("<I", 2)
    assert device.get_config(0, 40) == space
    for offset in range(40):
        assert device.get_config(offset, 1) == space[offset : offset + 1]
    assert device.get_config(36, 4) == space[36:]
    assert device.get_config(3, 20) == space[3:23]
    beyond = device.get_config(0, 60)  # a newer driver's larger structure
    assert beyond in (b"", space + bytes(20))
    assert device.client.call_u64(Request.GET_FEATURES) == DEFAULT_FEATURES


def test_a_tag_of_the_greatest_length(unattached):
    _, device = unattached(Options(tag="t" * 36))
    device.get_features()
    device.negotiate_protocol(BASE_PROTOCOL | ProtocolFeature.CONFIG)
    assert device.get_config(0, 36) == b"t" * 36


# Sequences


def test_the_sequence_of_each_frontend(serve, frontend):
    served = serve(tagged(frontend), frontend=frontend)
    use(served.client, served.share)
    for _ in range(3):
        frontend.stop(served.device)
        frontend.cont(served.device)
        use(served.client, served.share)
    served.device.close()
    assert served.daemon.wait() == 0
    assert served.unexpected_log() == []


def test_a_guest_that_reboots(serve, frontend):
    """Stop, rings from the start, start: a new INIT, while the old session's files are still open."""
    served = serve(tagged(frontend), frontend=frontend)
    client, device = served.client, served.device
    baseline = None
    for _ in range(4):
        nodeid = client.create(ROOT, b"file")[0].nodeid
        client.open(nodeid)
        frontend.stop(device)
        if isinstance(frontend, type(QEMU_10)):
            frontend.reset_device(device)
        device.reset_rings()
        frontend.cont(device)
        client.init()
        if baseline:
            served.daemon.wait_for_census(baseline)
        baseline = baseline or served.daemon.fd_census()
    use(client, served.share)


def test_a_driver_that_is_unbound_and_bound_again(serve, frontend):
    """DESTROY, the rings stopped with nobody to start them for a while, and all from the start again."""
    served = serve(tagged(frontend), frontend=frontend)
    client, device = served.client, served.device
    before = None
    for _ in range(3):
        entry, _opened = client.create(ROOT, b"file")
        client.destroy()
        frontend.stop(device)
        if isinstance(frontend, type(QEMU_10)):
            frontend.reset_device(device)
        if before:
            served.daemon.wait_for_census(before)
        before = before or eventually_stable(served.daemon.fd_census)
        device.reset_rings()
        frontend.cont(device)
        client.init()
        with raises(*NOT_FOUND):
            client.getattr(entry.nodeid)
    use(client, served.share)


def test_the_session_survives_stop_and_cont(serve):
    served = serve()
    client, device = served.client, served.device
    entry, opened = client.create(ROOT, b"file")
    client.write(entry.nodeid, opened.fh, 0, b"before")
    QEMU_10.stop(device)
    time.sleep(0.2)
    QEMU_10.cont(device)
    assert client.read(entry.nodeid, opened.fh, 0, 10) == b"before"


def test_one_worker_for_a_frontend_that_uses_one_queue(serve):
    served = serve(Options(request_queues=2), queues=2)
    assert sum("vfsd.worker " in role for role in served.daemon.fd_census()) == 1
    use(served.client, served.share)


def test_the_daemon_ends_with_its_frontend(serve):
    served = serve()
    pids = served.daemon.pids()
    served.device.close()
    assert served.daemon.wait() == 0
    served.daemon.wait_for_log("Client disconnected, shutting down")
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids[1:]))


# Stopping with requests in flight


def test_get_vring_base_drains_what_was_taken(serve):
    served = serve()
    client, device = served.client, served.device
    (served.share / "file").write_bytes(bytes(MIB))
    nodeid = client.lookup(ROOT, b"file").nodeid
    fh = client.open(nodeid).fh
    for _ in range(10):
        reads = [client.send_read(nodeid, fh, 0, 65536, kick=False) for _ in range(50)]
        device.rings[1].kick()
        QEMU_10.stop(device)
        # Everything before the base is completed, nothing after it was touched.
        assert device.bases[1] == device.rings[1].used_idx
        QEMU_10.cont(device)
        client.finish_all(reads)
        assert all(client.result(read) == bytes(65536) for read in reads)


def test_a_stopped_ring_is_left_alone(serve):
    served = serve()
    ring = served.device.rings[1]
    QEMU_10.stop(served.device)
    request = served.client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104)
    ring.force_kick()
    time.sleep(0.3)
    assert ring.used_idx == served.device.bases[1]
    QEMU_10.cont(served.device)
    assert served.client.finish(request)


def test_a_disabled_ring_is_left_alone_and_goes_on_when_enabled(serve):
    served = serve()
    device, ring = served.device, served.device.rings[1]
    device.enable(ring, on=False, need=True)
    request = served.client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104)
    ring.force_kick()
    time.sleep(0.3)
    assert not ring.collect()
    device.enable(ring, need=True)
    assert served.client.finish(request)


# Kicks and calls


def test_a_kick_before_enable_is_not_lost(unattached):
    daemon, device = unattached()
    QEMU_10.realize(device)
    device.set_features()
    for region in device.ram.regions:
        device.add_region(region)
    client = FuseClient(device)
    body = abi.fuse_init_in.pack(7, 38, 1 << 20, abi.FUSE_INIT_EXT, 0)
    for ring in device.rings:
        device.set_num(ring)
        device.set_base(ring)
        device.set_addr(ring)
        device.set_kick(ring)
    request = client.send(abi.FUSE_INIT, 0, body, abi.fuse_init_out.size)
    device.rings[1].force_kick()
    time.sleep(0.2)
    for ring in device.rings:
        device.enable(ring, need=True)
    assert client.finish(request)
    assert daemon.running


def test_a_request_before_enable_is_served_without_any_kick(unattached):
    _, device = unattached()
    QEMU_10.realize(device)
    client = FuseClient(device)
    request = client.send(abi.FUSE_INIT, 0, abi.fuse_init_in.pack(7, 38, 1 << 20, 0, 0), abi.fuse_init_out.size, kick=False)
    QEMU_10.start(device)
    assert client.finish(request)


def test_call_and_kick_descriptors_replaced_at_run_time(serve):
    served = serve()
    client, device = served.client, served.device
    for _ in range(20):
        for ring in device.rings:
            device.replace_call(ring)
        client.getattr(ROOT)
        for ring in device.rings:
            device.replace_kick(ring)
        client.getattr(ROOT)
        client.forget(0x7777)
    use(client, served.share)


def test_a_call_descriptor_replaced_with_requests_in_flight(serve):
    served = serve()
    client, device = served.client, served.device
    for _ in range(30):
        requests = [client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104) for _ in range(20)]
        device.replace_call(device.rings[1])
        # Completions announced on the old descriptor are for the driver to find by itself, as QEMU's irqfd switch does.
        device.rings[1].collect()
        client.finish_all(requests)


def test_a_ring_without_call_descriptor_is_served_for_a_driver_that_polls(serve):
    served = serve()
    device, ring = served.device, served.device.rings[1]
    device.set_fd(Request.SET_VRING_CALL, ring, None, need=True)
    request = served.client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104)
    assert eventually(ring.collect)
    assert request.submission.done
    device.set_call(ring, need=True)
    served.client.getattr(ROOT)


def test_repeated_descriptors_do_not_pile_up(serve):
    served = serve()
    device = served.device
    before = served.daemon.fd_census()
    for _ in range(200):
        for ring in device.rings:
            device.set_call(ring)
            device.set_err(ring)
            device.set_kick(ring)
    served.client.getattr(ROOT)
    device.set_call(device.rings[0], need=True)
    served.daemon.wait_for_census(before)


# Features


def test_a_ring_without_event_idx_or_indirect(serve):
    features = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES
    served = serve(frontend=QEMU_7_2, device_options={"features": features})
    use(served.client, served.share)


@pytest.mark.parametrize("size", [16, 1024])
def test_rings_of_other_sizes(serve, size):
    served = serve(device_options={"ring_size": size})
    use(served.client, served.share)


# Memory


def test_several_regions(serve, frontend):
    """The first is too small for more than the rings: buffers lie in the others."""
    served = serve(tagged(frontend), frontend=frontend, device_options={"ram": (MIB // 8, MIB, 32 * MIB)})
    use(served.client, served.share)
    entry = served.client.write_file(ROOT, b"big", os.urandom(4 * MIB))
    assert served.client.read_file(entry.nodeid) == (served.share / "big").read_bytes()


def test_regions_added_and_removed_at_run_time(serve):
    served = serve()
    device, ram = served.device, served.device.ram
    before = served.daemon.fd_census()
    for _ in range(5):
        region = ram.add_region(4 * MIB, 0x40_0000_0000, mmap_offset=8192)
        device.add_region(region)
        ram.prefer = region
        entry = served.client.write_file(ROOT, b"file", b"from the new region")
        assert served.client.read_file(entry.nodeid, chunk=65536) == b"from the new region"
        served.client.unlink(ROOT, b"file")
        served.client.forget(entry.nodeid)
        ram.prefer = None
        device.remove_region(region)
        ram.remove_region(region)
        assert_same(served.client.attr(ROOT), served.share)
    served.daemon.wait_for_census(before)


def test_a_buffer_in_a_removed_region_is_outside_memory(serve):
    served = serve()
    device, ram = served.device, served.device.ram
    region = ram.add_region(MIB, 0x40_0000_0000)
    device.add_region(region)
    device.remove_region(region)
    device.rings[1].submit_raw({0: Descriptor(region.gpa, 56)}, 0)
    assert device.rings[1].error_signalled()
    served.client.forget(0x7777)
    assert served.daemon.running


def test_a_new_memory_table_replaces_the_old_one(serve):
    """Memory hotplug: the table grows while the rings run."""
    served = serve(frontend=CLOUD_HYPERVISOR)
    device, ram = served.device, served.device.ram
    ram.add_region(32 * MIB, 0x40_0000_0000)
    device.set_mem_table(need=True)
    ram.prefer = ram.regions[-1]
    use(served.client, served.share)


def test_a_request_may_lie_over_two_adjacent_regions(serve):
    served = serve()
    device, ram = served.device, served.device.ram
    first = ram.add_region(MIB, 0x40_0000_0000)
    second = ram.add_region(MIB, first.end)
    for region in (first, second):
        device.add_region(region)
    message = served.client.header(abi.FUSE_GETATTR, ROOT, 16) + bytes(16)
    ram.write(first.end - 20, message)
    reply = second.end - 200
    device.rings[1].submit_raw({0: Descriptor(first.end - 20, len(message), 1, 1), 1: Descriptor(reply, 120, 2)}, 0)
    assert eventually(lambda: device.rings[1].used_idx == device.rings[1].avail_idx)
    assert struct.unpack("<Ii", ram.read(reply, 8)) == (120, 0)


# Requests in any order


def test_set_vring_messages_in_another_order(unattached):
    _, device = unattached()
    QEMU_10.realize(device)
    device.set_features()
    for ring in device.rings:
        device.enable(ring)  # before all that it needs
        device.set_kick(ring)
        device.set_base(ring)
        device.set_num(ring)
    for region in device.ram.regions:
        device.add_region(region)
    for ring in device.rings:
        device.set_addr(ring, need=True)
    client = FuseClient(device)
    client.init()
    client.getattr(ROOT)


def test_reset_device_stops_the_rings_and_they_can_be_started_again(serve):
    served = serve()
    device = served.device
    device.client.acked(Request.RESET_DEVICE)
    request = served.client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104)
    device.rings[1].force_kick()
    time.sleep(0.3)
    assert not request.submission.ring.collect()
    device.reset_rings()
    QEMU_10.cont(device)
    served.client.init()
    use(served.client, served.share)


def test_a_frontend_that_sends_one_byte_at_a_time(unattached):
    _, device = unattached()
    for byte in struct.pack("<III", Request.GET_FEATURES, 1, 0):
        device.client.raw(bytes([byte]))
        time.sleep(0.002)
    assert struct.unpack("<Q", device.client.receive().payload)[0] == DEFAULT_FEATURES


def test_messages_sent_all_at_once(unattached):
    _, device = unattached()
    header = struct.Struct("<III")
    ask = header.pack(Request.GET_FEATURES, 1, 0)
    tell = header.pack(Request.SET_FEATURES, 1, 8) + u64(DEFAULT_FEATURES)
    device.client.raw(ask + header.pack(Request.SET_OWNER, 1, 0) + tell + ask)
    for _ in range(2):
        assert struct.unpack("<Q", device.client.receive().payload)[0] == DEFAULT_FEATURES


def test_a_queue_that_was_never_described_can_be_asked_for_its_base(unattached):
    _, device = unattached()
    QEMU_10.realize(device)
    assert device.client.call(Request.GET_VRING_BASE, vring_state(1, 0)) == vring_state(1, 0)
