"""vhost-user messages that no frontend sends: the connection is closed, the log names message and reason, vfsd ends; it never crashes."""

import os
import random
import re
import struct

import pytest

from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import FuseClient
from tests.support.frontend.sequences import QEMU_10
from tests.support.frontend.vhost_user_client import BackendClosed, Request, memory_table, single_region, u64, vring_state


def header(request, size, flags=1):
    return struct.pack("<III", request, flags, size)


def message(request, payload=b""):
    return header(request, len(payload)) + payload


def region(gpa=0, size=4096, uva=0x1000, offset=0):
    return struct.pack("<QQQQ", gpa, size, uva, offset)


# Each: the bytes, how many descriptors come along, and what the log must say of it
AT_THE_START = {
    "an unknown request": (message(4711), 0, r"4711"),
    "request 0": (message(0), 0, r"request 0"),
    "a request for another kind of device": (message(19, u64(0)), 0, r"SEND_RARP"),
    "in-flight tables of no queue": (message(31, bytes(24)), 0, r"GET_INFLIGHT_FD: in-flight tables of 0 queues"),
    "in-flight tables without a descriptor": (message(32, bytes(24)), 0, r"SET_INFLIGHT_FD: 0 descriptors"),
    "a feature that is not offered: migration": (message(6, bytes(16)), 1, r"SET_LOG_BASE"),
    "a wrong version": (header(Request.GET_FEATURES, 0, flags=2), 0, r"GET_FEATURES.*version"),
    "a reply nobody asked for": (header(Request.GET_FEATURES, 0, flags=5), 0, r"GET_FEATURES.*reply"),
    "a payload too long to be true": (header(Request.SET_FEATURES, 0x7FFF_FFFF), 0, r"SET_FEATURES.*2147483647"),
    "a payload of the wrong length": (message(Request.SET_FEATURES, b"1234567"), 0, r"SET_FEATURES.*7 bytes"),
    "a payload where there is none": (message(Request.GET_FEATURES, u64(0)), 0, r"GET_FEATURES.*8 bytes"),
    "a feature bit that was not offered": (message(Request.SET_FEATURES, u64(1 << 34)), 0, r"SET_FEATURES"),
}

AFTER_REALIZE = {
    "a descriptor where none belongs": (message(Request.SET_VRING_NUM, vring_state(1, 128)), 1, r"SET_VRING_NUM.*descriptor"),
    "no descriptor where one belongs": (message(Request.SET_VRING_KICK, u64(1)), 0, r"SET_VRING_KICK.*descriptor"),
    "a queue that does not exist": (message(Request.SET_VRING_NUM, vring_state(77, 128)), 0, r"SET_VRING_NUM.*77"),
    "a ring size that is no power of two": (message(Request.SET_VRING_NUM, vring_state(1, 100)), 0, r"SET_VRING_NUM.*100"),
    "a ring of no entries": (message(Request.SET_VRING_NUM, vring_state(1, 0)), 0, r"SET_VRING_NUM.*0"),
    "a ring that is too large": (message(Request.SET_VRING_NUM, vring_state(1, 65536)), 0, r"SET_VRING_NUM.*65536"),
    "a memory table of too many regions": (message(Request.SET_MEM_TABLE, struct.pack("<II", 500, 0)), 1, r"SET_MEM_TABLE.*500"),
    "a memory table without descriptors": (message(Request.SET_MEM_TABLE, struct.pack("<II", 1, 0) + region()), 0, r"SET_MEM_TABLE"),
    "an empty region": (message(Request.ADD_MEM_REG, bytes(8) + region(size=0)), 1, r"ADD_MEM_REG.*empty"),
    "a region that wraps round": (
        message(Request.ADD_MEM_REG, bytes(8) + region(gpa=(1 << 64) - 4096, size=8192)),
        1,
        r"ADD_MEM_REG.*wraps",
    ),
    "a region that nobody added": (message(Request.REM_MEM_REG, bytes(8) + region()), 0, r"REM_MEM_REG"),
    "more descriptors than any message has": (message(Request.SET_VRING_CALL, u64(1)), 40, r"descriptors"),
}


@pytest.fixture
def spare_fds():
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(40)]
    yield fds
    for fd in fds:
        os.close(fd)


def assert_ended_with(daemon, device, reason):
    assert device.client.is_closed(), f"the connection stays open; {daemon.describe()}"
    assert daemon.wait() == 1
    errors = [line for line in daemon.log if "ERROR" in line]
    assert any(re.search(reason, line) for line in errors), daemon.log
    assert not any("bug" in line or "Traceback" in line or "SIG" in line for line in daemon.log), daemon.log


@pytest.mark.parametrize("breach", AT_THE_START)
def test_a_breach_at_the_start_ends_the_connection(unattached, spare_fds, breach):
    daemon, device = unattached()
    data, fds, reason = AT_THE_START[breach]
    device.client.raw(data, spare_fds[:fds])
    assert_ended_with(daemon, device, reason)


@pytest.mark.parametrize("breach", AFTER_REALIZE)
def test_a_breach_after_the_features_ends_the_connection(unattached, spare_fds, breach):
    daemon, device = unattached()
    QEMU_10.realize(device)
    data, fds, reason = AFTER_REALIZE[breach]
    device.client.raw(data, spare_fds[:fds])
    assert_ended_with(daemon, device, reason)


def test_a_message_that_ends_too_early(unattached):
    """The frontend may have been killed while it sent: that is its end, not a breach."""
    daemon, device = unattached()
    device.client.raw(header(Request.SET_FEATURES, 8) + b"123")
    device.client.close()
    assert daemon.wait() in (0, 1)
    assert not any("bug" in line or "Traceback" in line for line in daemon.log)


def test_a_ring_address_outside_memory(unattached):
    daemon, device = unattached()
    QEMU_10.realize(device)
    device.set_features()
    for one in device.ram.regions:
        device.add_region(one)
    ring = device.rings[1]
    device.set_num(ring)
    device.set_base(ring)
    device.client.tell(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 1, 0, 0x1000, 0x2000, 0x3000, 0))
    device.set_kick(ring)
    device.enable(ring)
    assert_ended_with(daemon, device, r"(SET_VRING_ADDR|ENABLE|ring|memory)")


def test_guest_ram_that_is_not_shared_is_said_so_with_the_remedy(unattached):
    """QEMU without share=on sends an empty memory table, or none at all: rings without memory."""
    daemon, device = unattached()
    QEMU_10.realize(device)
    device.set_features()
    for ring in device.rings:
        device.set_num(ring)
        device.set_base(ring)
        device.set_addr(ring)
        device.set_kick(ring)
    for ring in device.rings:
        device.enable(ring)
    assert_ended_with(daemon, device, r"shared.*share=on")


def test_memory_that_cannot_be_mapped(unattached, spare_fds):
    daemon, device = unattached()
    QEMU_10.realize(device)
    device.client.tell(Request.ADD_MEM_REG, single_region(device.ram.regions[0]), [spare_fds[0]])
    assert_ended_with(daemon, device, r"ADD_MEM_REG|memory")


def test_a_region_larger_than_its_file_never_kills_silently(unattached):
    """Its missing pages would be SIGBUS in whoever touches them."""
    daemon, device = unattached()
    QEMU_10.realize(device)
    real = device.ram.regions[0]
    payload = bytes(8) + struct.pack("<QQQQ", real.gpa, real.size * 4, real.uva, 0)
    device.client.tell(Request.ADD_MEM_REG, payload, [real.fd])
    assert_ended_with(daemon, device, r"ADD_MEM_REG|memory")


def test_overlapping_regions(unattached):
    daemon, device = unattached()
    QEMU_10.realize(device)
    real = device.ram.regions[0]
    device.client.tell(Request.SET_MEM_TABLE, memory_table([real, real]), [real.fd, real.fd])
    assert_ended_with(daemon, device, r"SET_MEM_TABLE|memory")


def test_a_breach_while_the_rings_run_ends_all_of_it(serve):
    served = serve(Options())
    pids = served.daemon.pids()
    served.device.client.raw(message(4711))
    assert_ended_with(served.daemon, served.device, r"4711")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("seed", range(6))
def test_noise_never_crashes_it(unattached, spare_fds, seed):
    """Well-formed headers of known requests with random payloads and descriptors: served or refused, with a log line."""
    daemon, device = unattached()
    rng = random.Random(seed)
    if seed % 2:
        QEMU_10.realize(device)
    try:
        for _ in range(300):
            request = rng.choice(list(Request))
            size = rng.choice([0, 8, 8, 8, 40, 72, rng.randrange(300)])
            payload = rng.randbytes(size) if rng.random() < 0.3 else bytes([rng.randrange(3)]).ljust(size, b"\0")[:size]
            device.client.tell(request, payload, spare_fds[: rng.randrange(3)])
    except (BackendClosed, BrokenPipeError, ConnectionResetError):
        pass
    assert_ended_with(daemon, device, r"vhost|VHOST")


def test_a_second_frontend_is_not_let_in(serve):
    served = serve()
    with pytest.raises(OSError, match=r"refused|No such file"):
        type(served.device)(str(served.daemon.socket))
    assert FuseClient(served.device).getattr(1)
