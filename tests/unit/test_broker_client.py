"""The worker's end of the broker's socket: few packets, a window of four, descriptors to whom they belong."""

import array
import os
import socket

import pytest

from vfsd.fds import OwnedFd, TempFd
from vfsd.wire import broker_messages as wire
from vfsd.worker.broker_client import BrokerClient, BrokerGone


class Waiting:
    """An Asker that keeps its answer."""

    def __init__(self):
        self.answers = []

    def answered(self, error, fields, donated):
        self.answers.append((error, fields, donated))


class Broker:
    """The other end."""

    def __init__(self):
        self.socket, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.client = BrokerClient(OwnedFd(ours.detach()))
        self.notices = []
        self.client.listen(self.notices.append)
        self.consumed = 0

    def packets(self):
        """What the client has sent: [(session, [message])]."""
        found = []
        while True:
            try:
                data = self.socket.recv(wire.MAX_PACKET_BYTES + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            assert len(data) <= wire.MAX_PACKET_BYTES
            session, requests = wire.decode_requests(data)
            self.consumed += 1
            self.last_ids = [number for _spec, number, _message, _slot in requests]
            self.last_slots = [slot for _spec, _number, _message, slot in requests]
            found.append((session, [message for _spec, _number, message, _slot in requests]))

    def reply(self, *replies, notices=(), fds=()):
        packet = wire.join_replies(self.consumed, list(map(wire.encode_reply, replies)), list(map(wire.encode_notice, notices)))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([packet], rights)
        self.client.receive()  # one packet, since the event loop comes again while there are more

    def close(self):
        self.client._socket.close()
        self.socket.close()


@pytest.fixture
def broker():
    broker = Broker()
    yield broker
    broker.close()


LOOKUP = wire.Lookup(1, b"name")


def test_what_is_asked_in_one_turn_goes_in_one_packet(broker):
    for _ in range(5):
        broker.client.ask(LOOKUP, Waiting())
    broker.client.tell(wire.Release(1, 2))
    assert broker.packets() == []
    broker.client.flush()
    assert broker.packets() == [(0, [LOOKUP] * 5 + [wire.Release(1, 2)])]
    broker.client.flush()
    assert broker.packets() == [], "nothing is sent twice, and no empty packet"


def test_an_answer_goes_to_its_asker_once(broker):
    waiting = [Waiting() for _ in range(3)]
    for each in waiting:
        broker.client.ask(LOOKUP, each)
    broker.client.flush()
    broker.packets()
    first, second, third = broker.last_ids
    broker.reply(wire.Reply(third, 0, 0, [3]), wire.Reply(first, 2, 0, []))
    broker.reply(wire.Reply(second, 0, 0, [2, b"x"]))
    assert [each.answers for each in waiting] == [[(2, [], None)], [(0, [2, b"x"], None)], [(0, [3], None)]]
    assert broker.client._asked == {}


def test_donated_descriptors_go_to_the_answers_that_bring_them(broker):
    waiting = [Waiting() for _ in range(4)]
    for each in waiting:
        broker.client.ask(LOOKUP, each)
    broker.client.flush()
    broker.packets()
    files = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("one", "two")]
    donated = [0, 1, 0, 1]
    broker.reply(*[wire.Reply(number, 0, flag, []) for number, flag in zip(broker.last_ids, donated, strict=True)], fds=files)
    for fd in files:
        os.close(fd)
    got = [each.answers[0][2] for each in waiting]
    assert [type(fd) for fd in got] == [type(None), TempFd, type(None), TempFd]
    for fd, name in ((got[1], "one"), (got[3], "two")):
        with fd:
            assert os.readlink(f"/proc/self/fd/{fd.fileno()}") == f"/memfd:{name} (deleted)"
            assert not os.get_inheritable(fd.fileno())


def test_notices_are_heard_after_the_answers_of_their_packet(broker):
    order = []

    class Ordered:
        def answered(self, *_answer):
            order.append("answer")

    broker.client.listen(order.append)
    broker.client.ask(LOOKUP, Ordered())
    broker.client.flush()
    broker.packets()
    broker.reply(wire.Reply(broker.last_ids[0], 0, 0, []), notices=[wire.DropFile(5), wire.SessionNotice(1, 2)])
    assert order == ["answer", wire.DropFile(5), wire.SessionNotice(1, 2)]


def test_at_most_four_packets_are_outstanding(broker):
    for number in range(7):
        broker.client.ask(wire.GetAttr(number), Waiting())
        broker.client.flush()
    assert [message.nodeid for _session, (message,) in broker.packets()] == [0, 1, 2, 3]
    broker.client.flush()
    assert broker.packets() == []
    broker.consumed = 2
    broker.reply()
    broker.client.flush()
    broker.consumed = 4
    assert [message.nodeid for _session, (message,) in broker.packets()] == [4, 5]
    broker.reply()
    broker.client.flush()
    assert [message.nodeid for _session, (message,) in broker.packets()] == [6]


def test_more_than_a_packet_takes_is_several(broker):
    for number in range(600):
        broker.client.ask(wire.GetAttr(number), Waiting())
    broker.client.flush()
    packets = broker.packets()
    assert [len(messages) for _session, messages in packets] == [256, 256, 88]
    assert [message.nodeid for _session, messages in packets for message in messages] == list(range(600))
    for _ in range(40):
        broker.client.ask(wire.SymLink(1, b"n" * 255, b"t" * 4095, 0, 0), Waiting())
    broker.reply()
    broker.client.flush()
    assert sum(len(messages) for _session, messages in broker.packets()) == 40


def test_forgets_are_gathered_into_one_message(broker):
    for nodeid in range(2, 102):
        broker.client.forget([nodeid, nodeid * 2], wire.Slot(1 << 16 | nodeid, 1000 + nodeid), Waiting())
    broker.client.ask(LOOKUP, Waiting())
    broker.client.flush()
    ((_session, messages),) = broker.packets()
    (forget,) = [message for message in messages if isinstance(message, wire.Forget)]
    assert forget.pairs == [number for nodeid in range(2, 102) for number in (nodeid, nodeid * 2)]
    assert forget.requests == [number for nodeid in range(2, 102) for number in (1 << 16 | nodeid, 1000 + nodeid, 0, 1)]


@pytest.mark.parametrize("count", [wire.MAX_FORGETS - 1, wire.MAX_FORGETS, wire.MAX_FORGETS + 1, 3 * wire.MAX_FORGETS + 5])
def test_any_number_of_forgets_fits_the_protocol(broker, count):
    for _ in range(count):
        broker.client.forget([2**64 - 1, 2**64 - 1], wire.Slot(255 << 16 | 32767, 2**64 - 1), Waiting())
    broker.client.flush()
    seen = 0
    while packets := broker.packets():
        seen += sum(len(message.pairs) // 2 for _session, messages in packets for message in messages)
        broker.reply()
        broker.client.flush()
    assert seen == count


@pytest.mark.parametrize("before", [0, 1, wire.MAX_FORGETS - 1])
def test_one_long_request_to_forget_is_cut_and_says_which_part_is_where(broker, before):
    for number in range(before):
        broker.client.forget([7, 1], wire.Slot(number, 1), Waiting())
    teller = Waiting()
    pairs = [number for nodeid in range(5000) for number in (nodeid, 1)]
    broker.client.forget(pairs, wire.Slot(9000, 5), teller)
    assert teller.answers == []
    broker.client.flush()
    assert teller.answers == [(0, [], None)]
    forgets = [message for _session, messages in broker.packets() for message in messages]
    assert [number for message in forgets for number in message.pairs] == [7, 1] * before + pairs
    parts = [message.requests[start : start + 4] for message in forgets for start in range(0, len(message.requests), 4)]
    ours = [(first, count) for place, number, first, count in parts if (place, number) == (9000, 5)]
    assert [first for first, _count in ours] == [sum(count for _first, count in ours[:number]) for number in range(len(ours))]
    assert sum(count for _first, count in ours) == 5000


def test_a_teller_hears_when_its_message_is_sent_and_not_before(broker):
    for _ in range(wire.MAX_OUTSTANDING_PACKETS):
        broker.client.ask(LOOKUP, Waiting())
        broker.client.flush()
    teller = Waiting()
    broker.client.tell(wire.Release(1, 2), teller)
    broker.client.flush()
    assert teller.answers == []
    broker.packets()
    broker.reply()
    broker.client.flush()
    assert teller.answers == [(0, [], None)]
    assert broker.packets() == [(0, [wire.Release(1, 2)])]


def test_a_question_carries_its_slot(broker):
    broker.client.ask(wire.Unlink(1, b"name"), Waiting(), wire.Slot(1 << 16 | 2, 3))
    broker.client.ask(LOOKUP, Waiting())
    broker.client.flush()
    broker.packets()
    assert broker.last_slots == [(1 << 16 | 2, 3), None]


def test_what_was_gathered_before_a_session_belongs_to_the_one_before(broker):
    broker.client.ask(LOOKUP, Waiting())
    broker.client.forget([5, 1], wire.Slot(1, 2), Waiting())
    broker.client.begin_session(9)
    broker.client.tell(wire.SessionAck(9))
    broker.client.flush()
    assert broker.packets() == [(0, [LOOKUP, wire.Forget([5, 1], [1, 2, 0, 1])]), (9, [wire.SessionAck(9)])]


def test_a_full_socket_blocks_nothing_and_what_waits_goes_later(broker):
    broker.client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for _ in range(4):
        broker.client.ask(wire.LookupMany(1, [b"n" * 255] * 10), Waiting())
        broker.client.seal()
    broker.client.flush()
    assert broker.client.blocked
    seen = len(broker.packets())
    assert 1 <= seen < 4
    while seen < 4:
        broker.client.flush()
        seen += len(broker.packets())
    assert not broker.client.blocked


def test_a_broker_that_is_gone_is_noticed_in_both_directions(broker):
    broker.socket.close()
    with pytest.raises(BrokerGone):
        broker.client.receive()
    broker.client.ask(LOOKUP, Waiting())
    with pytest.raises(BrokerGone):
        broker.client.flush()


def test_a_broker_that_died_with_packets_unread_is_gone(broker):
    broker.client.ask(LOOKUP, Waiting())
    broker.client.flush()
    broker.socket.close()
    with pytest.raises(BrokerGone):
        broker.client.receive()


def test_there_is_nothing_to_receive_at_first(broker):
    broker.client.receive()
    assert broker.notices == []
