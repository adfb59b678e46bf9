"""The vhost-user connection: messages in pieces, several at once, and descriptors that belong to one of them."""

import array
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.channel import close_all
from vfsd.errors import FrontendBreach
from vfsd.fds import OwnedFd
from vfsd.wire.vhost_user import HEADER, VHOST_USER_NEED_REPLY_MASK, VHOST_USER_SET_FEATURES, VHOST_USER_VERSION, Message
from vfsd.worker.frontend_stream import MAX_FDS, FrontendClosed, FrontendStream


def message(payload=b"", request=VHOST_USER_SET_FEATURES, flags=VHOST_USER_VERSION):
    return HEADER.pack(request, flags, len(payload)) + payload


def connected():
    frontend, backend = socket.socketpair()
    return frontend, FrontendStream(OwnedFd(backend.detach()))


@pytest.fixture
def pair():
    frontend, stream = connected()
    with frontend:
        yield frontend, stream
    stream.close()


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.integers(1, 30))
def test_messages_arrive_whole_however_they_are_cut(payloads, piece_bytes):
    frontend, stream = connected()
    data = b"".join(message(payload) for payload in payloads)
    arrived = []
    with frontend:
        for start in range(0, len(data), piece_bytes):
            frontend.send(data[start : start + piece_bytes])
            while (received := stream.receive()) is not None:
                arrived.append(received[0])
    stream.close()
    assert arrived == [Message(VHOST_USER_SET_FEATURES, VHOST_USER_VERSION, payload) for payload in payloads]


def test_descriptors_belong_to_the_message_that_they_were_sent_with(pair):
    frontend, stream = pair
    ends = [os.pipe() for _ in range(2)]
    frontend.send(message(b"none"))
    for number, (_, write_end) in enumerate(ends):
        socket.send_fds(frontend, [message(b"%d" % number)], [write_end])
        os.close(write_end)
    assert stream.receive() == (Message(VHOST_USER_SET_FEATURES, VHOST_USER_VERSION, b"none"), [])
    for number, (read_end, _) in enumerate(ends):
        received, fds = stream.receive()
        assert received.payload == b"%d" % number
        with fds[0] as fd:
            os.write(fd.fileno(), received.payload)
            assert not os.get_inheritable(fd.fileno())
        assert os.read(read_end, 5) == received.payload
        assert os.read(read_end, 1) == b""
        os.close(read_end)


def test_flags_reach_the_message(pair):
    frontend, stream = pair
    frontend.send(message(flags=VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK))
    received, _ = stream.receive()
    assert received.need_reply


@pytest.mark.parametrize("sent", [message(flags=0), message(flags=VHOST_USER_VERSION | 4), HEADER.pack(2, 1, 2**31)])
def test_a_header_that_cannot_be_is_a_breach(pair, sent):
    frontend, stream = pair
    frontend.send(sent)
    with pytest.raises(FrontendBreach, match="VHOST_USER_SET_FEATURES"):
        stream.receive()


def _send_with_fds(frontend, data, count):
    read_end, write_end = os.pipe()
    frontend.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end] * count))])
    os.close(write_end)
    return read_end


def test_more_descriptors_than_fit_are_a_breach_and_closed(pair):
    frontend, stream = pair
    read_end = _send_with_fds(frontend, message(), MAX_FDS + 1)
    with pytest.raises(FrontendBreach, match="more descriptors"):
        stream.receive()
    stream.close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_descriptors_dribbled_in_byte_by_byte_are_bounded_too(pair):
    frontend, stream = pair
    data = message(bytes(8))
    with pytest.raises(FrontendBreach, match="more descriptors"):  # noqa: PT012  # the loop is the misbehaviour
        for position in range(len(data)):
            os.close(_send_with_fds(frontend, data[position : position + 1], 8))
            stream.receive()


def test_descriptors_of_an_unfinished_message_are_closed_with_the_stream(pair):
    frontend, stream = pair
    read_end = _send_with_fds(frontend, message(bytes(8))[:5], 1)
    assert stream.receive() is None
    stream.close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_the_end_is_told_apart_from_an_end_in_the_middle(pair):
    frontend, stream = pair
    frontend.send(message(b"whole"))
    frontend.close()
    close_all(stream.receive()[1])
    with pytest.raises(FrontendClosed) as end:
        stream.receive()
    assert str(end.value) == ""


def test_half_a_message_and_then_nothing(pair):
    frontend, stream = pair
    frontend.send(message(b"whole")[:-1])
    frontend.close()
    with pytest.raises(FrontendClosed, match="in the middle of a message"):
        stream.receive()


def test_a_reset_is_an_end(pair):
    frontend, stream = pair
    stream.send(b"a reply that nobody reads")
    frontend.close()
    with pytest.raises(FrontendClosed):
        stream.receive()
    with pytest.raises(FrontendClosed):
        stream.send(b"more")


def test_a_frontend_that_does_not_read_its_replies_is_a_breach(pair):
    _, stream = pair
    with pytest.raises(FrontendBreach, match="does not read"):  # noqa: PT012
        for _ in range(100_000):
            stream.send(bytes(512))
