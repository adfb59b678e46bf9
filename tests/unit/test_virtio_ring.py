"""The chain walk against every byte pattern a guest may lay out: the right chain, or GuestBreach, never another exception."""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfsd.errors import GuestBreach
from vfsd.wire import virtio_ring
from vfsd.wire.virtio_ring import (
    DESCRIPTOR_BYTES,
    MAX_QUEUE_SIZE,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    need_event,
    walk_chain,
)

NEXT, WRITE, INDIRECT = VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, VIRTQ_DESC_F_INDIRECT
INDIRECT_AT = 0x9000


def table_of(*descriptors):
    return b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors)


def no_indirect(address, length):
    raise AssertionError(f"indirect table asked for at {address:#x}, {length}")


def walk(table, *, head=0, budget=1024, indirect=no_indirect):
    return walk_chain(table, len(table) // DESCRIPTOR_BYTES, head, budget, indirect)


def indirect_table(table):
    """The only place an indirect table may be read from."""

    def open_indirect(address, length):
        assert (address, length) == (INDIRECT_AT, len(table))
        return table

    return open_indirect


def test_a_chain_of_one():
    assert walk(table_of((0x1000, 40, 0, 77))) == [(0x1000, 40, 0, 77)]


def test_a_chain_is_followed_by_next_whatever_the_order_in_the_table():
    third, head, second = (3, 16, WRITE, 9), (1, 40, NEXT, 2), (2, 4096, NEXT | WRITE, 0)
    assert walk(table_of(third, head, second), head=1) == [head, second, third]


def test_unknown_flags_are_ignored():
    assert walk(table_of((1, 40, 0xFFF8, 5))) == [(1, 40, 0xFFF8, 5)]


def test_an_indirect_table_replaces_its_descriptor():
    inner = [(1, 40, NEXT, 1), (2, 16, WRITE, 0)]
    table = table_of((INDIRECT_AT, 32, INDIRECT, 0))
    assert walk(table, indirect=indirect_table(table_of(*inner))) == inner


def test_an_indirect_table_may_end_a_direct_chain_and_its_write_flag_is_ignored():
    first, inner = (1, 40, NEXT, 1), (2, 8, 0, 0)
    table = table_of(first, (INDIRECT_AT, 16, INDIRECT | WRITE, 0))
    assert walk(table, indirect=indirect_table(table_of(inner))) == [first, inner]


def test_an_indirect_table_may_be_longer_than_the_queue():
    inner = [(0x1000 * n, 4096, NEXT, n + 1) for n in range(299)] + [(0, 16, WRITE, 0)]
    table = table_of((INDIRECT_AT, 300 * 16, INDIRECT, 0))
    assert walk(table, indirect=indirect_table(table_of(*inner))) == inner


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (table_of((1, 40, NEXT, 0)), "loops or has more than"),
        (table_of((1, 40, NEXT, 1), (2, 40, NEXT, 0)), "loops or has more than"),
        (table_of((1, 40, NEXT, 1)), "descriptor 1 lies outside a table of 1"),
        (table_of((1, 40, NEXT, 0xFFFF)), "descriptor 65535 lies outside"),
        (table_of((1, 0, 0, 0)), "zero bytes"),
        (table_of((1, 40, NEXT, 1), (2, 0, WRITE, 0)), "zero bytes"),
        (table_of((1, 40, NEXT | WRITE, 1), (2, 40, 0, 0)), "device-readable descriptor after"),
        (table_of((INDIRECT_AT, 16, INDIRECT | NEXT, 0)), "indirect descriptor with a next"),
        (table_of((INDIRECT_AT, 0, INDIRECT, 0)), "indirect table of 0 bytes"),
        (table_of((INDIRECT_AT, 24, INDIRECT, 0)), "indirect table of 24 bytes"),
        (table_of((INDIRECT_AT, 15, INDIRECT, 0)), "indirect table of 15 bytes"),
        (table_of((INDIRECT_AT, 16 * (MAX_QUEUE_SIZE + 1), INDIRECT, 0)), "indirect table of 32769 descriptors"),
        (table_of((INDIRECT_AT, 0xFFFFFFF0, INDIRECT, 0)), "indirect table of 268435455 descriptors"),
    ],
)
def test_a_chain_no_driver_makes_is_a_breach(table, message):
    with pytest.raises(GuestBreach, match=message):
        walk(table)


def test_a_head_outside_the_table_is_a_breach():
    with pytest.raises(GuestBreach, match="descriptor 2 lies outside a table of 2"):
        walk(table_of((1, 1, 0, 0), (1, 1, 0, 0)), head=2)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (table_of((INDIRECT_AT, 16, INDIRECT, 0)), "inside an indirect table"),
        (table_of((1, 8, NEXT, 1)), "descriptor 1 lies outside a table of 1"),
        (table_of((1, 8, NEXT, 0)), "loops or has more than"),
        (table_of((1, 0, 0, 0)), "zero bytes"),
    ],
)
def test_an_indirect_table_no_driver_makes_is_a_breach(inner, message):
    with pytest.raises(GuestBreach, match=message):
        walk(table_of((INDIRECT_AT, len(inner), INDIRECT, 0)), indirect=indirect_table(inner))


def test_the_order_of_directions_holds_across_the_indirect_table():
    table = table_of((1, 8, NEXT | WRITE, 1), (INDIRECT_AT, 16, INDIRECT, 0))
    with pytest.raises(GuestBreach, match="device-readable descriptor after"):
        walk(table, indirect=indirect_table(table_of((2, 8, 0, 0))))


def test_the_budget_counts_buffers_of_direct_and_indirect_parts():
    inner = table_of((2, 8, NEXT, 1), (3, 8, 0, 0))
    table = table_of((1, 8, NEXT, 1), (INDIRECT_AT, 32, INDIRECT, 0))
    assert len(walk(table, budget=3, indirect=indirect_table(inner))) == 3
    with pytest.raises(GuestBreach, match="more than 2 descriptors"):
        walk(table, budget=2, indirect=indirect_table(inner))


def test_a_breach_of_the_memory_passes_through():
    def outside(address, length):
        raise GuestBreach("not in guest memory")

    with pytest.raises(GuestBreach, match="not in guest memory"):
        walk(table_of((INDIRECT_AT, 16, INDIRECT, 0)), indirect=outside)


# Random bytes seldom make a chain; these fields are biased to where the decisions are.
fields = st.tuples(
    st.integers(0, 2**64 - 1),
    st.one_of(st.integers(0, 96), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 7), st.integers(0, 2**16 - 1)),
    st.one_of(st.integers(0, 8), st.integers(0, 2**16 - 1)),
)
tables = st.lists(fields, min_size=1, max_size=8)


@given(direct=tables, indirect=tables, head=st.integers(0, 9), budget=st.integers(1, 12))
@example(direct=[(2**64 - 8, 16, 0, 0)], indirect=[(0, 1, 0, 0)], head=0, budget=1)
def test_any_table_gives_a_chain_that_keeps_the_rules_or_a_breach(direct, indirect, head, budget):
    def open_indirect(address, length):
        if length > len(indirect) * DESCRIPTOR_BYTES:
            raise GuestBreach("outside")
        return table_of(*indirect)[:length]

    try:
        chain = walk_chain(table_of(*direct), len(direct), head, budget, open_indirect)
    except GuestBreach:
        return
    assert 1 <= len(chain) <= budget
    assert all(length > 0 and not flags & INDIRECT for _, length, flags, _ in chain)
    assert all(flags & NEXT for _, _, flags, _ in chain[:-1])
    assert not chain[-1][2] & NEXT
    writable = [bool(flags & WRITE) for _, _, flags, _ in chain]
    assert writable == sorted(writable)
    # Follow the guest's own pointers once more, over the table they point into.
    where, index = direct, head
    for descriptor in chain:
        if where[index][2] & INDIRECT:
            where, index = indirect, 0
        assert where[index] == descriptor
        index = descriptor[3]


@given(data=st.binary(min_size=16, max_size=16 * 16), head=st.integers(0, 0xFFFF), budget=st.integers(1, 64))
def test_any_bytes_give_a_chain_or_a_breach(data, head, budget):
    try:
        walk_chain(data, len(data) // DESCRIPTOR_BYTES, head, budget, lambda address, length: bytes(length))
    except GuestBreach:
        return


@given(data=st.data(), readable=st.integers(0, 5), writable=st.integers(0, 5), direct=st.integers(0, 10))
def test_every_legal_layout_is_taken_as_it_stands(data, readable, writable, direct):
    """Buffers put anywhere in the table, the tail of the chain in an indirect table or not."""
    count = readable + writable
    if count == 0:
        return
    direct = min(direct, count)
    size = 16
    places = data.draw(st.permutations(range(size)))
    table = [(0, 0, 0xFFFF, 0xFFFF)] * size
    flags = [0] * readable + [WRITE] * writable
    chain, inner = [], []
    for n in range(count):
        last = n == count - 1
        if n < direct:
            following = 0 if last else places[n + 1]
            table[places[n]] = (0x1000 * n, n + 1, flags[n] | (0 if last else NEXT), following)
            chain.append(table[places[n]])
        else:
            inner.append((0x1000 * n, n + 1, flags[n] | (0 if last else NEXT), 0 if last else n - direct + 1))
    if inner:
        table[places[direct]] = (INDIRECT_AT, len(inner) * DESCRIPTOR_BYTES, INDIRECT, 0)
    assert walk(table_of(*table), head=places[0], indirect=indirect_table(table_of(*inner))) == chain + inner


@pytest.mark.parametrize("size", [1, 2, 128, 1024, 32768])
def test_queue_sizes(size):
    assert virtio_ring.is_queue_size(size)


@pytest.mark.parametrize("size", [-2, -1, 0, 3, 127, 32767, 32769, 65536])
def test_what_is_not_a_queue_size(size):
    assert not virtio_ring.is_queue_size(size)


def test_layout_sizes():
    """The figures of virtio 1.2, 2.7: 16 * size; 6 + 2 * size and 6 + 8 * size, the last two bytes of both being the event."""
    assert virtio_ring.table_bytes(256) == 4096
    assert virtio_ring.avail_bytes(256, event_idx=True) == 6 + 512
    assert virtio_ring.avail_bytes(256, event_idx=False) == 4 + 512
    assert virtio_ring.used_bytes(256, event_idx=True) == 6 + 2048
    assert virtio_ring.used_bytes(256, event_idx=False) == 4 + 2048
    assert virtio_ring.avail_event_position(256) * 2 == 4 + 512
    assert virtio_ring.used_event_position(256) * 2 == 4 + 2048


@pytest.mark.parametrize(
    ("event", "new", "old", "expected"),
    [
        (0, 1, 0, True),
        (1, 1, 0, False),
        (0, 2, 1, False),
        (4, 6, 3, True),
        (0xFFFF, 0, 0xFFFF, True),
        (0xFFFE, 0, 0xFFFF, False),
        (0, 3, 0xFFFE, True),
        (3, 3, 0xFFFE, False),
        (5, 5, 5, False),
    ],
)
def test_need_event_table(event, new, old, expected):
    assert need_event(event, new, old) is expected


@given(event=st.integers(0, 0xFFFF), old=st.integers(0, 0xFFFF), step=st.integers(0, MAX_QUEUE_SIZE))
def test_need_event_is_whether_the_step_passed_the_event(event, old, step):
    passed = any((old + n) & 0xFFFF == event for n in range(step)) if step < 300 else (event - old) & 0xFFFF < step
    assert need_event(event, (old + step) & 0xFFFF, old) is passed
