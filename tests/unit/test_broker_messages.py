"""The broker protocol: what the table says passes, and everything else a worker could send is a breach and nothing but."""

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import WorkerBreach
from vfsd.wire import broker_messages as wire
from vfsd.wire.attr import ATTR_BYTES, SET_ALL
from vfsd.wire.broker_messages import Bin, Int64, ListOf, Uint

U64 = 2**64 - 1
SPECS = [pytest.param(spec, id=spec.message.__name__) for spec in wire.REQUESTS]


def values_of(field):
    """Everything a field accepts."""
    match field:
        case Uint(limit):
            return st.integers(0, limit)
        case Int64():
            return st.integers(-(2**63) + 1, 2**63 - 1)
        case Bin(least, most):
            return st.binary(min_size=least, max_size=min(most, least + 300))
        case ListOf(item, least, most, step):
            lists = st.lists(values_of(item), min_size=least, max_size=min(most, 8 * step))
            return lists.map(lambda values: values[: len(values) - len(values) % step])
    raise AssertionError(field)


def any_message():
    return st.sampled_from(wire.REQUESTS).flatmap(lambda spec: st.tuples(*map(values_of, spec.fields)).map(spec.message._make))


def extremes(field):
    """The longest value a field accepts."""
    match field:
        case Uint(limit):
            return limit
        case Int64():
            return -(2**63) + 1
        case Bin(_least, most):
            return b"n" * most
        case ListOf(item, _least, most, _step):
            return [extremes(item)] * most
    raise AssertionError(field)


def pack(*rows, session=1):
    return msgpack.packb([session, list(rows)])


def refused(packet):
    with pytest.raises(WorkerBreach) as caught:
        wire.decode_requests(packet)
    return str(caught.value)


@given(st.integers(0, U64), st.lists(st.tuples(st.integers(0, U64), any_message()), min_size=1, max_size=20))
def test_what_is_encoded_is_decoded(session, asked):
    packet = wire.join_requests(session, [wire.encode_request(number, message) for number, message in asked])
    got_session, got = wire.decode_requests(packet)
    assert got_session == session
    assert [(number, message) for _spec, number, message, _slot in got] == asked
    assert all(type(message) is spec.message and slot is None for spec, _number, message, slot in got)


@pytest.mark.parametrize("spec", SPECS)
def test_the_longest_message_of_each_kind_passes_in_one_packet(spec):
    message = spec.message._make(map(extremes, spec.fields))
    packet = wire.join_requests(U64, [wire.encode_request(U64, message)])
    assert len(packet) <= wire.MAX_PACKET_BYTES
    assert wire.decode_requests(packet) == (U64, [(spec, U64, message, None)])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_packet_or_a_breach(packet):
    with contextlib.suppress(WorkerBreach):
        wire.decode_requests(packet)


OBJECTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), U64)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**32), st.integers(0, 999)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.integers(0, 9) | st.text(max_size=2), inner, max_size=3),
    max_leaves=20,
)


@given(OBJECTS)
def test_any_msgpack_object_is_a_packet_or_a_breach(thing):
    with contextlib.suppress(WorkerBreach):
        wire.decode_requests(msgpack.packb(thing))


@given(st.sampled_from(wire.REQUESTS), st.lists(OBJECTS, max_size=12), OBJECTS)
def test_any_fields_behind_a_real_tag_are_a_message_or_a_breach(spec, fields, number):
    with contextlib.suppress(WorkerBreach):
        _session, ((_spec, _number, message, _slot),) = wire.decode_requests(pack([spec.tag, number, *fields]))
        assert all(field.accepts(value) for field, value in zip(spec.fields, message, strict=True))


@given(st.integers(0, U64), st.integers(0, 255), st.integers(0, 32767), st.integers(0, U64))
def test_a_slot_is_decoded_as_it_was_encoded(request_id, queue, head, number):
    slot, message = wire.Slot(wire.place_of(queue, head), number), wire.Unlink(1, b"name")
    packet = wire.join_requests(1, [wire.encode_request(request_id, message, slot)])
    assert wire.decode_requests(packet) == (1, [(wire.SPEC_OF[wire.Unlink], request_id, message, slot)])


@pytest.mark.parametrize(
    "slot", [[], [1], [1, 2], [1, 2, 3, 4], [1, 1 << 24, 0], [1, -1, 0], [1, 0, -1], [1, True, 0], [1, 0, True], [1, 0, b"0"], [True, 0, 0]]
)
def test_a_bad_slot_is_a_breach(slot):
    assert "Unlink: bad" in refused(pack([19, slot, 1, b"name"]))


@pytest.mark.parametrize("spec", SPECS)
def test_only_what_is_to_be_done_once_may_have_a_slot(spec):
    message = spec.message._make(map(extremes, spec.fields))
    packet = wire.join_requests(1, [wire.encode_request(1, message, wire.Slot(0, 0))])
    if spec.message in wire.ONCE:
        assert wire.decode_requests(packet)[1][0][3] == (0, 0)
    else:
        assert refused(packet) == f"{spec.message.__name__}: has no slot"


@given(any_message(), st.data())
def test_a_packet_cut_or_prolonged_anywhere_is_a_breach(message, data):
    packet = wire.join_requests(1, [wire.encode_request(1, message)])
    refused(packet[: data.draw(st.integers(0, len(packet) - 1))])
    refused(packet + data.draw(st.binary(min_size=1, max_size=4)))


@pytest.mark.parametrize("spec", SPECS)
def test_one_field_too_few_or_too_many_is_a_breach(spec):
    fields = list(map(extremes, spec.fields))
    assert "fields for" in refused(pack([spec.tag, 1, *fields, 0]))
    if fields:
        assert "fields for" in refused(pack([spec.tag, 1, *fields[:-1]]))


@pytest.mark.parametrize("spec", SPECS)
def test_a_field_of_another_type_is_a_breach(spec):
    for position, field in enumerate(spec.fields):
        fields = list(map(extremes, spec.fields))
        for wrong in (None, True, False, 1.0, "text", "", {}, [], [[]], msgpack.Timestamp(1), b"" if isinstance(field, ListOf) else [b"n"]):
            fields[position] = wrong
            if not (wrong == [] and isinstance(field, ListOf) and field.least == 0):
                refused(pack([spec.tag, 1, *fields]))


@pytest.mark.parametrize("spec", SPECS)
def test_a_field_just_out_of_its_bounds_is_a_breach(spec):
    for position, field in enumerate(spec.fields):
        fields = list(map(extremes, spec.fields))
        match field:
            case Uint(limit):
                outside = [-1] if limit == U64 else [-1, limit + 1]
            case Int64():
                outside = [-(2**63), 2**63]
            case Bin(least, most):
                outside = [bytes(most + 1)] + ([bytes(least - 1)] if least else [])
            case ListOf(item, least, most, step):
                outside = [[extremes(item)] * (most + step)] + ([[extremes(item)] * (least - 1)] if least else [])
        for wrong in outside:
            fields[position] = wrong
            message = refused(pack([spec.tag, 1, *fields]))
            assert spec.message._fields[position] in message or "within bounds" in message


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="a byte that msgpack never uses"),
        pytest.param(msgpack.packb(1), id="no list"),
        pytest.param(msgpack.packb([1]), id="no requests"),
        pytest.param(msgpack.packb([1, []]), id="an empty list of requests"),
        pytest.param(msgpack.packb([1, [[10, 1, 1, b"n"]], 0]), id="a third element"),
        pytest.param(msgpack.packb({1: [[10, 1, 1, b"n"]]}), id="a map"),
        pytest.param(msgpack.packb([{}, [[10, 1, 1, b"n"]]]), id="an empty map for the session"),
        pytest.param(msgpack.packb([True, [[10, 1, 1, b"n"]]]), id="True for the session"),
        pytest.param(msgpack.packb([-1, [[10, 1, 1, b"n"]]]), id="a negative session"),
        pytest.param(pack([True, 1, 1]), id="True for a tag (1 is Hello)"),
        pytest.param(pack([1.0, 1, 1]), id="a float for a tag"),
        pytest.param(pack([b"", 1, 1]), id="bytes for a tag"),
        pytest.param(pack([10, True, 1, b"n"]), id="True for a request id"),
        pytest.param(pack([10, -1, 1, b"n"]), id="a negative request id"),
        pytest.param(pack([0, 1]), id="tag 0"),
        pytest.param(pack([255, 1]), id="an unknown tag"),
        pytest.param(pack([-1, 1]), id="a negative tag"),
        pytest.param(pack([10]), id="no request id"),
        pytest.param(pack([]), id="an empty request"),
        pytest.param(pack(10), id="a request that is no list"),
        pytest.param(pack([10, 1, 1, "n"]), id="a str for a name"),
        pytest.param(pack([10, 1, 1, ""]), id="an empty str for a name"),
        pytest.param(pack([10, 1, 1, msgpack.ExtType(1, b"n")]), id="an extension type"),
        pytest.param(pack([10, 1, 1, msgpack.ExtType(1, b"")]), id="an empty extension type"),
        pytest.param(pack([10, 1, msgpack.Timestamp(1), b"n"]), id="a timestamp"),
        pytest.param(pack([12, 1, [1]]), id="a Forget of half a pair"),
        pytest.param(pack([12, 1, [1, 1, 1]]), id="a Forget of one pair and a half"),
        pytest.param(pack([12, 1, [1, True]]), id="a Forget that counts True"),
        pytest.param(pack([11, 1, 1, [b"n", "n"]]), id="a str among names"),
        pytest.param(b"\x91" * 5000, id="lists within lists"),
        pytest.param(b"\x92\x01\xdd\xff\xff\xff\xff", id="a list that claims 2^32 requests"),
        pytest.param(b"\x92\x01\x91\x94\x0a\x01\x01\xc6\xff\xff\xff\xff", id="a name that claims 4 GiB"),
        pytest.param(b"\x92\x01\x91\x94\x0a\x01\x01\xd9\xff" + bytes(255), id="a long str"),
    ],
)
def test_what_no_worker_sends_is_a_breach(packet):
    refused(packet)


def test_a_packet_has_at_most_so_many_requests():
    encoded = [wire.encode_request(1, wire.SessionEnd())] * wire.MAX_REQUESTS_PER_PACKET
    assert len(wire.decode_requests(wire.join_requests(0, encoded))[1]) == wire.MAX_REQUESTS_PER_PACKET
    assert "257 requests" in refused(wire.join_requests(0, [*encoded, encoded[0]]))


def test_one_bad_request_among_good_ones_spoils_the_packet():
    good = [10, 1, 1, b"n"]
    assert "Lookup: field name" in refused(pack(good, good, [10, 2, 1, 7], good))


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_of_the_table_describes_its_message(spec):
    assert len(spec.fields) == len(spec.message._fields)
    assert spec.donates <= 1
    assert wire.SPEC_OF[spec.message] is spec


def test_no_two_messages_share_a_tag():
    assert len({spec.tag for spec in wire.REQUESTS}) == len(wire.REQUESTS)
    assert len({spec.message for spec in wire.REQUESTS}) == len(wire.REQUESTS)


def test_what_setattr_may_change_is_a_closed_set():
    fields = dict(zip(wire.SetAttr._fields, wire.SPEC_OF[wire.SetAttr].fields, strict=True))
    assert fields["valid"].accepts(SET_ALL)
    assert not fields["valid"].accepts(SET_ALL + 1)


REPLIES = st.builds(
    wire.Reply,
    st.integers(0, U64),
    st.integers(0, 4095),
    st.integers(0, 1),
    st.lists(st.integers(0, U64) | st.binary(max_size=ATTR_BYTES) | st.lists(st.integers(0, U64), max_size=3), max_size=5),
)
NOTICES = st.builds(wire.SessionNotice, st.integers(0, U64), st.integers(0, U64)) | st.one_of(
    st.builds(wire.DropFile, st.integers(0, U64)), st.builds(wire.DropNode, st.integers(0, U64))
)


@given(st.integers(0, U64), st.lists(REPLIES, max_size=5), st.lists(NOTICES, max_size=5))
def test_replies_and_notices_survive_the_wire(consumed, replies, notices):
    packet = wire.join_replies(consumed, list(map(wire.encode_reply, replies)), list(map(wire.encode_notice, notices)))
    got = wire.decode_replies(packet)
    assert got == (consumed, replies, notices)
    assert [type(notice) for notice in got.notices] == [type(notice) for notice in notices]


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        (wire.U32, "u32"),
        (wire.U64, "u64"),
        (wire.BOOL, "0…1"),
        (Int64(), "i64"),
        (wire.NAME, "bytes(0…255)"),
        (wire.ATTR_RECORD, "bytes(88)"),
        (ListOf(wire.U64, 2, 4, 2), "list(2…4) of u64"),
    ],
)
def test_a_field_is_shown_as_the_documentation_writes_it(field, shown):
    assert str(field) == shown
