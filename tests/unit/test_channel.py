"""Internal channels: what the codec accepts, what the I/O does with descriptors and with peers that misbehave."""

import contextlib
import os
import socket

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.channel import Channel, ChannelClosed
from vfsd.errors import ChildBreach
from vfsd.fds import OwnedFd
from vfsd.wire import channel as wire

MESSAGES = [
    (wire.Stop(), wire.SUPERVISOR_TO_CHILD),
    (wire.AddWorker(3), wire.SUPERVISOR_TO_CHILD),
    (wire.Connection(), wire.SUPERVISOR_TO_CHILD),
    (wire.AreYouWell(), wire.SUPERVISOR_TO_CHILD),
    (wire.InflightGiven(), wire.SUPERVISOR_TO_CHILD),
    (wire.KillWorker(1, b"hangs"), wire.CONTROL_TO_SUPERVISOR),
    (wire.NeedInflight(), wire.CONTROL_TO_SUPERVISOR),
    (wire.Counted(3, 0, 1), wire.WORKER_TO_SUPERVISOR),
    (wire.Ready(), wire.WORKER_TO_SUPERVISOR),
    (wire.Log(5, b"x" * 1000), wire.BROKER_TO_SUPERVISOR),
    (wire.Failed(b"no such thing"), wire.CONTROL_TO_SUPERVISOR),
    (wire.NeedWorker(1), wire.CONTROL_TO_SUPERVISOR),
    (wire.FrontendGone(b"", True), wire.CONTROL_TO_SUPERVISOR),
    (wire.Breach(2, b"bad tag"), wire.BROKER_TO_SUPERVISOR),
    (wire.Silent(2, b"does not read"), wire.BROKER_TO_SUPERVISOR),
    (wire.IAmWell(), wire.BROKER_TO_SUPERVISOR),
    (wire.Ping(), wire.SUPERVISOR_TO_CHILD),
    (wire.Alive(), wire.WORKER_TO_SUPERVISOR),
    (wire.Completed(), wire.WORKER_TO_SUPERVISOR),
    (wire.MemoryClear(1), wire.CONTROL_TO_WORKER),
    (wire.MemoryAdd(2, 0, 2**64 - 1, 2**63, 4096), wire.CONTROL_TO_WORKER),
    (wire.MemoryRemove(3, 0, 4096, 8192), wire.CONTROL_TO_WORKER),
    (wire.RingStart(4, 1, 128, 65535, 16, 32, 64, True, True, False, True, 7), wire.CONTROL_TO_WORKER),
    (wire.RingStart(4, 1, 128, 65535, 16, 32, 64, True, False, False, False, 7, 2**63 - 1, True, True), wire.CONTROL_TO_WORKER),
    (wire.RingKick(5, 255, True), wire.CONTROL_TO_WORKER),
    (wire.RingCall(6, 0, False), wire.CONTROL_TO_WORKER),
    (wire.RingErr(7, 0, True), wire.CONTROL_TO_WORKER),
    (wire.RingStop(2**32 - 1, 0), wire.CONTROL_TO_WORKER),
    (wire.Done(8, 65535), wire.WORKER_TO_CONTROL),
    (wire.Refused(9, b"no"), wire.WORKER_TO_CONTROL),
    (wire.RingBroken(1, b"loop"), wire.WORKER_TO_CONTROL),
]
TABLES = [
    wire.SUPERVISOR_TO_CHILD,
    wire.BROKER_TO_SUPERVISOR,
    wire.CONTROL_TO_SUPERVISOR,
    wire.WORKER_TO_SUPERVISOR,
    wire.CONTROL_TO_WORKER,
    wire.WORKER_TO_CONTROL,
]


@pytest.mark.parametrize(("message", "table"), MESSAGES)
def test_every_message_survives_the_wire(message, table):
    decoded = wire.decode_message(wire.encode_message(message), message.fd_count(), table)
    assert type(decoded) is type(message)
    assert decoded == message


def test_the_examples_name_every_message_of_every_table():
    assert {type(message) for message, _ in MESSAGES} == {row.message for table in TABLES for row in table.values()}


@pytest.mark.parametrize(("message", "table"), MESSAGES)
def test_another_number_of_descriptors_is_a_breach(message, table):
    with pytest.raises(ChildBreach, match="descriptors"):
        wire.decode_message(wire.encode_message(message), message.fd_count() + 1, table)


def test_a_worker_may_not_say_what_only_control_may():
    with pytest.raises(ChildBreach, match="not permitted"):
        wire.decode_message(wire.encode_message(wire.NeedWorker(1)), 0, wire.WORKER_TO_SUPERVISOR)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb([16]) + b"\0",
        msgpack.packb({16: 1}),
        msgpack.packb([True]),
        msgpack.packb([16, 0]),
        msgpack.packb([17, 1]),
        msgpack.packb([17, True, b"x"]),
        msgpack.packb([17, 6, b"x"]),
        msgpack.packb([17, -1, b"x"]),
        msgpack.packb([17, 1, "text"]),
        msgpack.packb([17, 1, b"x" * 1001]),
        msgpack.packb([20, b"", 1]),
        msgpack.packb([msgpack.ExtType(5, b"x")]),
        b"\xc4" + b"\0" * 5000,
        b"\x91" * 3000,
    ],
)
def test_what_is_not_in_the_table_is_a_breach(packet):
    with pytest.raises(ChildBreach):
        wire.decode_message(packet, 0, wire.CONTROL_TO_SUPERVISOR)


@given(st.binary(max_size=200), st.integers(0, 3), st.sampled_from(TABLES))
def test_any_bytes_are_accepted_or_a_breach(packet, fds, table):
    with contextlib.suppress(ChildBreach):
        wire.decode_message(packet, fds, table)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=20) | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(st.integers(0, 60), st.lists(_VALUES, max_size=12), st.integers(0, 3), st.sampled_from(TABLES))
def test_any_array_is_accepted_or_a_breach(tag, values, fds, table):
    packet = msgpack.packb([tag, *values])
    try:
        message = wire.decode_message(packet, fds, table)
    except ChildBreach:
        return
    assert wire.decode_message(wire.encode_message(message), fds, table) == message


def test_encoding_refuses_our_own_mistakes():
    with pytest.raises(ValueError, match=r"Log\.text"):
        wire.encode_message(wire.Log(1, b"x" * 1001))


def test_bounded_cuts_and_accepts_lone_surrogates():
    assert wire.bounded("ab\udcff", 20) == b"ab\\udcff"
    assert len(wire.bounded("ä" * 2000)) == wire.MAX_LOG_TEXT


@pytest.fixture
def pair():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        yield here, there


def test_descriptors_arrive_with_their_message(pair):
    sender, receiver = Channel(pair[0], wire.WORKER_TO_CONTROL), Channel(pair[1], wire.CONTROL_TO_WORKER)
    read_end, write_end = os.pipe()
    with OwnedFd(read_end), OwnedFd(write_end) as given:
        assert sender.send(wire.MemoryAdd(1, 0, 4096, 0, 0), [given])
        assert sender.send(wire.MemoryClear(2))
        received = receiver.receive()
        assert received.message == wire.MemoryAdd(1, 0, 4096, 0, 0)
        with received.fds[0] as copy:
            assert not os.get_inheritable(copy.fileno())
            os.write(copy.fileno(), b"same pipe")
        assert os.read(read_end, 20) == b"same pipe"
        assert receiver.receive().message == wire.MemoryClear(2)
        assert receiver.receive() is None


def test_a_breach_closes_the_descriptors_that_came_with_it(pair):
    receiver = Channel(pair[1], wire.CONTROL_TO_WORKER)
    read_end, write_end = os.pipe()
    with OwnedFd(read_end):
        socket.send_fds(pair[0], [wire.encode_message(wire.MemoryClear(1))], [write_end])
        os.close(write_end)
        with pytest.raises(ChildBreach, match="MemoryClear: 1 descriptors where 0 belong"):
            receiver.receive()
        assert os.read(read_end, 1) == b""  # no writer is left


def test_more_descriptors_than_any_message_has_are_a_breach_and_closed(pair):
    receiver = Channel(pair[1], wire.CONTROL_TO_WORKER)
    read_end, write_end = os.pipe()
    with OwnedFd(read_end):
        socket.send_fds(pair[0], [wire.encode_message(wire.MemoryClear(1))], [write_end] * 9)
        os.close(write_end)
        with pytest.raises(ChildBreach):
            receiver.receive()
        assert os.read(read_end, 1) == b""


def test_a_channel_that_takes_no_descriptors_treats_any_as_a_breach(pair):
    receiver = Channel(pair[1], wire.WORKER_TO_SUPERVISOR)
    socket.send_fds(pair[0], [wire.encode_message(wire.Ready())], [0])
    with pytest.raises(ChildBreach):
        receiver.receive()


def test_a_packet_longer_than_any_message_is_a_breach(pair):
    receiver = Channel(pair[1], wire.WORKER_TO_SUPERVISOR)
    pair[0].send(wire.encode_message(wire.Ready()) + bytes(5000))
    with pytest.raises(ChildBreach):
        receiver.receive()


def test_send_says_when_the_peer_does_not_read(pair):
    sender = Channel(pair[0], wire.SUPERVISOR_TO_CHILD)
    while sender.send(wire.Log(1, b"x" * 1000)):
        pass


def test_what_a_dead_peer_sent_is_still_heard(pair):
    """The reset for our own unread packet comes before the peer's packets: it is not the end."""
    here = Channel(pair[0], wire.WORKER_TO_SUPERVISOR)
    here.send(wire.Stop())
    pair[1].send(wire.encode_message(wire.Failed(b"last words")))
    pair[1].close()
    assert here.receive().message == wire.Failed(b"last words")
    with pytest.raises(ChannelClosed):
        here.receive()
    with pytest.raises(ChannelClosed):
        here.send(wire.Stop())


def test_sending_a_wrong_number_of_descriptors_is_our_own_mistake(pair):
    with pytest.raises(ValueError, match="takes 1 descriptors"):
        Channel(pair[0], wire.WORKER_TO_CONTROL).send(wire.AddWorker(1))
