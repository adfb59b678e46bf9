"""The vhost-user codec takes every message a correct frontend sends and refuses, by name and reason, what none would send."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import FrontendBreach
from vfsd.wire import vhost_user as vu
from vfsd.wire.vhost_user import ConfigRequest, MemoryRegion, Message, VringAddr, VringState

RAM = MemoryRegion(gpa=0, size=0x4000_0000, uva=0x7F00_0000_0000, mmap_offset=0)
HIGH_RAM = MemoryRegion(gpa=0x1_0000_0000, size=0x1000_0000, uva=0x7F10_0000_0000, mmap_offset=0x4000_0000)


def table(*regions, count=None, tail=b""):
    return (
        struct.pack("<II", len(regions) if count is None else count, 0)
        + b"".join(struct.pack("<QQQQ", *region) for region in regions)
        + tail
    )


def mem_table(payload):
    return vu.decode_memory_table(Message(vu.VHOST_USER_SET_MEM_TABLE, 1, payload))


def config(payload):
    return vu.decode_config(Message(vu.VHOST_USER_GET_CONFIG, 1, payload))


# Headers


def test_a_header_gives_request_flags_and_size():
    assert vu.decode_header(struct.pack("<III", vu.VHOST_USER_SET_FEATURES, 0x9, 8)) == (vu.VHOST_USER_SET_FEATURES, 0x9, 8)


def test_need_reply_is_bit_three():
    assert Message(vu.VHOST_USER_SET_VRING_ENABLE, 0x9, b"").need_reply
    assert not Message(vu.VHOST_USER_SET_VRING_ENABLE, 0x1, b"").need_reply


def test_an_unknown_request_is_decoded_and_named_by_its_number():
    assert vu.decode_header(struct.pack("<III", 4711, 1, 0)) == (4711, 1, 0)
    assert Message(4711, 1, b"").name == "vhost-user request 4711"


def test_a_known_request_is_named_as_in_the_specification():
    assert Message(5, 1, b"").name == "VHOST_USER_SET_MEM_TABLE"
    assert Message(1, 1, b"").name == "VHOST_USER_GET_FEATURES"
    assert Message(43, 1, b"").name == "VHOST_USER_CHECK_DEVICE_STATE"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\x01\x00\x00", "header of 3 bytes"),
        (struct.pack("<III", 1, 0, 0), "VHOST_USER_GET_FEATURES: protocol version 0"),
        (struct.pack("<III", 1, 2, 0), "VHOST_USER_GET_FEATURES: protocol version 2"),
        (struct.pack("<III", 2, 1 | 4, 8), "VHOST_USER_SET_FEATURES: is marked as a reply"),
        (struct.pack("<III", 5, 1, 4097), "VHOST_USER_SET_MEM_TABLE: payload of 4097 bytes"),
        (struct.pack("<III", 5, 1, 0xFFFF_FFFF), "payload of 4294967295 bytes"),
    ],
)
def test_a_bad_header_is_a_breach(header, reason):
    with pytest.raises(FrontendBreach, match=reason):
        vu.decode_header(header)


# Fixed-size payloads


def test_u64():
    assert vu.decode_u64(Message(vu.VHOST_USER_SET_FEATURES, 1, struct.pack("<Q", 0x1_7000_0000))) == 0x1_7000_0000


def test_vring_state():
    message = Message(vu.VHOST_USER_SET_VRING_NUM, 1, struct.pack("<II", 1, 128))
    assert vu.decode_vring_state(message) == VringState(index=1, num=128)


def test_vring_addr_has_used_before_avail():
    message = Message(vu.VHOST_USER_SET_VRING_ADDR, 1, struct.pack("<IIQQQQ", 1, 0, 0x1000, 0x3000, 0x2000, 0))
    assert vu.decode_vring_addr(message) == VringAddr(index=1, flags=0, desc=0x1000, used=0x3000, avail=0x2000, log=0)


def test_vring_fd_bit_eight_means_no_descriptor():
    def decode(value):
        return vu.decode_vring_fd(Message(vu.VHOST_USER_SET_VRING_KICK, 1, struct.pack("<Q", value)))

    assert decode(3) == (3, True)
    assert decode(0x1FF) == (255, False)
    with pytest.raises(FrontendBreach, match="VHOST_USER_SET_VRING_KICK: reserved bits"):
        decode(0x200)


@pytest.mark.parametrize(
    ("decode", "request_number", "size"),
    [
        (vu.decode_empty, vu.VHOST_USER_SET_OWNER, 0),
        (vu.decode_u64, vu.VHOST_USER_SET_FEATURES, 8),
        (vu.decode_vring_state, vu.VHOST_USER_SET_VRING_NUM, 8),
        (vu.decode_vring_addr, vu.VHOST_USER_SET_VRING_ADDR, 40),
        (vu.decode_vring_fd, vu.VHOST_USER_SET_VRING_CALL, 8),
        (vu.decode_single_region, vu.VHOST_USER_ADD_MEM_REG, 40),
    ],
)
def test_a_payload_of_another_size_is_a_breach(decode, request_number, size):
    for wrong in {0, max(size - 1, 0), size + 1, size + 8} - {size}:
        with pytest.raises(FrontendBreach, match=f"{vu.request_name(request_number)}: payload of {wrong} bytes, expected {size}"):
            decode(Message(request_number, 1, bytes(wrong)))


# Memory


def test_a_memory_table_lists_its_regions():
    assert mem_table(table(RAM)) == [RAM]
    assert mem_table(table(RAM, HIGH_RAM)) == [RAM, HIGH_RAM]


def test_the_padded_table_of_user_mode_linux_is_accepted():
    assert mem_table(table(RAM, tail=bytes(32))) == [RAM]
    assert mem_table(table(RAM, tail=b"\xff" * 32)) == [RAM]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "holds no region count"),
        (table(count=0), "0 memory regions"),
        (table(RAM, count=33), "33 memory regions"),
        (table(RAM, count=0xFFFF_FFFF), "4294967295 memory regions"),
        (table(RAM, count=2), "payload of 40 bytes, expected 72"),
        (table(RAM, tail=bytes(31)), "payload of 71 bytes"),
        (table(RAM, HIGH_RAM, tail=bytes(32)), "payload of 104 bytes, expected 72"),
        (table(RAM._replace(size=0)), "empty memory region"),
        (table(RAM._replace(gpa=(1 << 64) - 4096)), "guest address .* wraps"),
        (table(RAM._replace(uva=(1 << 64) - 4096)), "user address .* wraps"),
        (table(RAM._replace(mmap_offset=(1 << 63) - 4096)), "mmap offset .* wraps"),
        (table(RAM._replace(size=(1 << 64) - 1)), "wraps"),
    ],
)
def test_a_bad_memory_table_is_a_breach(payload, reason):
    with pytest.raises(FrontendBreach, match=f"VHOST_USER_SET_MEM_TABLE: .*{reason}"):
        mem_table(payload)


def test_a_region_may_end_at_the_last_address():
    last = MemoryRegion(gpa=(1 << 64) - 4096, size=4096, uva=(1 << 64) - 4096, mmap_offset=0)
    assert mem_table(table(last)) == [last]


def test_a_single_region_follows_eight_bytes_of_padding():
    message = Message(vu.VHOST_USER_ADD_MEM_REG, 9, bytes(8) + struct.pack("<QQQQ", *HIGH_RAM))
    assert vu.decode_single_region(message) == HIGH_RAM
    with pytest.raises(FrontendBreach, match="VHOST_USER_REM_MEM_REG: empty"):
        vu.decode_single_region(Message(vu.VHOST_USER_REM_MEM_REG, 1, bytes(40)))


# Configuration space


def test_a_config_request_is_a_window():
    assert config(struct.pack("<III", 0, 40, 0) + bytes(40)) == ConfigRequest(offset=0, size=40, flags=0)
    assert config(struct.pack("<III", 39, 1, 0) + bytes(1)) == ConfigRequest(offset=39, size=1, flags=0)
    assert config(struct.pack("<III", 256, 0, 0)) == ConfigRequest(offset=256, size=0, flags=0)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (bytes(11), "payload of 11 bytes, expected at least 12"),
        (struct.pack("<III", 0, 40, 0) + bytes(39), "payload of 51 bytes, expected 52"),
        (struct.pack("<III", 0, 257, 0) + bytes(257), "257 bytes at offset 0"),
        (struct.pack("<III", 256, 1, 0) + bytes(1), "1 bytes at offset 256"),
        (struct.pack("<III", 0xFFFF_FFFF, 1, 0) + bytes(1), "1 bytes at offset 4294967295"),
    ],
)
def test_a_bad_config_request_is_a_breach(payload, reason):
    with pytest.raises(FrontendBreach, match=f"VHOST_USER_GET_CONFIG: {reason}"):
        config(payload)


# Replies


def test_a_reply_has_version_and_reply_bit():
    assert vu.encode_u64_reply(vu.VHOST_USER_GET_QUEUE_NUM, 3) == struct.pack("<IIIQ", 17, 0x5, 8, 3)
    assert vu.encode_reply(vu.VHOST_USER_GET_CONFIG, b"") == struct.pack("<III", 24, 0x5, 0)
    assert vu.encode_vring_state_reply(vu.VHOST_USER_GET_VRING_BASE, VringState(1, 77)) == struct.pack("<IIIII", 11, 0x5, 8, 1, 77)


def test_a_config_reply_repeats_the_window():
    assert vu.encode_config_reply(ConfigRequest(4, 3, 0), b"tag") == struct.pack("<IIIIII", 24, 0x5, 15, 4, 3, 0) + b"tag"
    with pytest.raises(ValueError, match="3 bytes for a configuration window of 4"):
        vu.encode_config_reply(ConfigRequest(4, 4, 0), b"tag")


# Whatever comes: a value, or that peer's breach, never another exception

DECODERS = [
    vu.decode_empty,
    vu.decode_u64,
    vu.decode_vring_state,
    vu.decode_vring_addr,
    vu.decode_vring_fd,
    vu.decode_memory_table,
    vu.decode_single_region,
    vu.decode_config,
]


@given(st.sampled_from(DECODERS), st.integers(0, (1 << 32) - 1), st.binary(max_size=200))
def test_any_payload_is_accepted_or_a_breach(decode, request_number, payload):
    try:
        decode(Message(request_number, 1, payload))
    except FrontendBreach as error:
        assert str(error).startswith(vu.request_name(request_number) + ": ")  # noqa: PT017  the claim is about the text of whatever is raised


@given(st.binary(max_size=20))
def test_any_header_is_accepted_or_a_breach(header):
    try:
        _request, flags, size = vu.decode_header(header)
    except FrontendBreach:
        return
    assert flags & 0x7 == 0x1
    assert size <= vu.MAX_PAYLOAD_BYTES
