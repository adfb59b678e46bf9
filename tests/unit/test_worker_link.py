"""The broker's end of a worker's socket: bounds in both directions, and no descriptor left behind on any path."""

import array
import errno
import os
import socket
import threading

import pytest

from vfsd.broker import worker_link
from vfsd.broker.answers import Answer, Granted
from vfsd.broker.worker_link import MAX_QUEUED_BYTES, MAX_UNANSWERED, UNREAD_SECONDS, Outcome, WorkerLink
from vfsd.errors import WorkerBreach
from vfsd.fds import OwnedFd
from vfsd.wire import broker_messages as wire

FD_ROOM = socket.CMSG_SPACE(253 * 4)


def donation():
    return OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


def plain(number, *fields):
    return Outcome(number, 0, Answer(list(fields)))


def granting(number, granted_id, granted=Granted.FILE):
    return Outcome(number, 0, Answer([number], donation(), granted, granted_id))


class Pair:
    """A link and the worker's end of its socket. `alive`: the fhs and nodeids whose grants are still good."""

    def __init__(self, sock=None):
        self.worker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.lock = threading.Lock()
        self.alive = set(range(1000))
        self.granted = []
        self.link = WorkerLink(3, sock(theirs) if sock else theirs, self.lock, self._still_granted)
        self.fds = []

    def _still_granted(self, worker, outcome):
        assert self.lock.locked(), "asked without the share's lock"
        self.granted.append((worker, outcome.answer.granted_id))
        return outcome.answer.granted_id in self.alive

    def packets(self):
        """All that has come: [(packet, number of descriptors)]."""
        found = []
        while True:
            try:
                data, ancillary, flags, _ = self.worker.recvmsg(wire.MAX_PACKET_BYTES, FD_ROOM, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            fds = array.array("i")
            for _level, _kind, data_ in ancillary:
                fds.frombytes(data_)
            self.fds += [OwnedFd(fd) for fd in fds]
            found.append((wire.decode_replies(data), len(fds)))

    def fill(self):
        """Post until the socket takes no more; how many replies."""
        count = 0
        while not self.link.has_queue:
            self.link.post([plain(count, bytes(4000))], [])
            count += 1
        return count

    def close(self):
        self.link.close()
        self.worker.close()
        for fd in self.fds:
            fd.close()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.close()


# --- receiving ------------------------------------------------------------------------------------------------------


def test_packets_come_one_by_one_and_are_counted(pair):
    assert pair.link.receive() is None
    pair.worker.send(b"one")
    pair.worker.send(b"two")
    assert [pair.link.receive(), pair.link.receive(), pair.link.receive()] == [b"one", b"two", None]
    assert pair.link.consumed == 2


def test_the_longest_packet_is_taken_and_a_longer_one_is_a_breach(pair):
    pair.worker.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    pair.worker.send(bytes(wire.MAX_PACKET_BYTES))
    assert pair.link.receive() == bytes(wire.MAX_PACKET_BYTES)
    pair.worker.send(bytes(wire.MAX_PACKET_BYTES + 1))
    with pytest.raises(WorkerBreach, match="over 131072 bytes"):
        pair.link.receive()


@pytest.mark.parametrize("count", [1, 253])
def test_descriptors_are_a_breach_and_are_not_received(pair, count):
    with donation() as fd:
        rights = array.array("i", [fd.fileno()] * count)
        pair.worker.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(WorkerBreach, match="descriptors"):
            pair.link.receive()
        assert len(os.listdir("/proc/self/fd")) == before


def test_an_empty_packet_is_a_breach_and_not_the_end(pair):
    pair.worker.send(b"")
    with pytest.raises(WorkerBreach, match="empty"):
        pair.link.receive()


def test_a_worker_that_is_gone_is_the_end(pair):
    pair.worker.close()
    assert pair.link.receive() == b""


def test_what_a_worker_sent_before_it_died_is_still_received(pair):
    """With replies unread, the kernel says ECONNRESET first: that is not yet the end. Its FORGETs must not be lost."""
    pair.link.post([plain(1)], [])
    pair.worker.send(b"last words")
    pair.worker.close()
    assert pair.link.receive() == b"last words"
    assert pair.link.receive() == b""


def test_a_link_that_was_just_closed_receives_nothing(pair):
    """The watchdog may close it between the leader's poll and the leader's receive, which must survive that."""
    pair.link.close()
    assert not pair.link.receive()


# --- sending --------------------------------------------------------------------------------------------------------


def test_answers_and_notices_go_in_one_packet_with_the_count_of_consumed_ones(pair):
    pair.worker.send(b"x")
    pair.link.receive()
    pair.link.expect(2)
    pair.link.post([plain(7, 1, b"a"), Outcome(8, errno.ENOENT, None)], [wire.DropFile(5)])
    ((packet, fds),) = pair.packets()
    assert packet.consumed == 1
    assert packet.replies == [wire.Reply(7, 0, 0, [1, b"a"]), wire.Reply(8, errno.ENOENT, 0, [])]
    assert packet.notices == [wire.DropFile(5)]
    assert fds == 0


def test_packets_without_answers_must_be_acknowledged(pair):
    for count in range(1, wire.MAX_OUTSTANDING_PACKETS + 1):
        pair.worker.send(b"x")
        pair.link.receive()
        assert pair.link.owes_acknowledgement == (count >= 2)
    pair.link.post([], [])
    assert not pair.link.owes_acknowledgement
    assert pair.packets()[0][0].consumed == wire.MAX_OUTSTANDING_PACKETS


def test_a_grant_brings_its_descriptor_and_is_entered(pair):
    outcomes = [granting(1, 11), plain(2), granting(3, 12, Granted.NODE)]
    pair.link.post(outcomes, [])
    ((packet, fds),) = pair.packets()
    assert [reply.donated for reply in packet.replies] == [1, 0, 1]
    assert fds == 2
    assert pair.granted == [(3, 11), (3, 12)]
    assert all(outcome.answer.donation.closed for outcome in outcomes if outcome.answer.donation)


def test_a_grant_whose_file_was_released_is_ebadf(pair):
    outcome = granting(1, 5000)
    pair.link.post([outcome], [])
    ((packet, fds),) = pair.packets()
    assert packet.replies == [wire.Reply(1, errno.EBADF, 0, [])]
    assert fds == 0
    assert outcome.answer.donation.closed


def test_attributes_are_right_also_when_their_inode_was_forgotten(pair):
    outcome = granting(1, 5000, Granted.NODE)
    pair.link.post([outcome], [])
    ((packet, fds),) = pair.packets()
    assert packet.replies == [wire.Reply(1, 0, 0, [1])]
    assert fds == 0
    assert outcome.answer.donation.closed


def test_a_drop_never_overtakes_the_grant_it_revokes(pair):
    """Grants are checked and queued under the lock under which a file is released; the notice comes after that."""
    rounds = 300

    def revoke():
        for fh in range(rounds):
            with pair.lock:
                pair.alive.discard(fh)
            pair.link.post([], [wire.DropFile(fh)])

    revoking = threading.Thread(target=revoke)
    revoking.start()
    seen = []
    for fh in range(rounds):
        pair.link.post([granting(fh, fh)], [])
        seen += pair.packets()
    revoking.join()
    seen += pair.packets()
    dropped = set()
    for packet, _fds in seen:
        for reply in packet.replies:
            assert not (reply.donated and reply.request_id in dropped)
        dropped |= {notice.fh for notice in packet.notices}
    assert dropped == set(range(rounds))


@pytest.mark.parametrize("count", [wire.MAX_FDS_PER_PACKET, wire.MAX_FDS_PER_PACKET + 1, 200])
def test_more_descriptors_than_a_packet_takes_are_split(pair, count):
    pair.link.post([granting(number, number) for number in range(count)], [wire.DropFile(1)])
    seen = pair.packets()
    assert [fds for _packet, fds in seen] == [64] * (count // 64) + ([count % 64] if count % 64 else [])
    for packet, fds in seen:
        assert sum(reply.donated for reply in packet.replies) == fds
    assert [reply.request_id for packet, _ in seen for reply in packet.replies] == list(range(count))
    assert [packet.notices for packet, _ in seen][-1] == [wire.DropFile(1)]


def test_descriptors_keep_to_their_replies_when_split(pair):
    outcomes = []
    for number in range(150):
        fd = OwnedFd(os.memfd_create(f"file{number}", os.MFD_CLOEXEC))
        outcomes += [plain(1000 + number), Outcome(number, 0, Answer([], fd, Granted.FILE, number))]
    pair.link.post(outcomes, [])
    granted = [reply.request_id for packet, _fds in pair.packets() for reply in packet.replies if reply.donated]
    names = [os.readlink(f"/proc/self/fd/{fd.fileno()}") for fd in pair.fds]
    assert names == [f"/memfd:file{number} (deleted)" for number in granted]
    assert granted == list(range(150))


def test_more_bytes_than_a_packet_takes_are_split(pair):
    entry = [0, 2**64 - 1, bytes(88)]
    largest = [entry] * wire.MAX_NAMES_PER_LOOKUP
    pair.link.post([plain(number, *largest) for number in range(6)], [])
    packets = pair.packets()
    assert [reply.request_id for packet, _ in packets for reply in packet.replies] == list(range(6))
    assert len(packets) > 1


# --- a worker that does not read ------------------------------------------------------------------------------------


def test_what_the_socket_does_not_take_waits_in_order(pair):
    count = pair.fill()
    pair.link.post([plain(count)], [wire.DropNode(9)])
    assert pair.link.has_queue
    seen = pair.packets()
    while pair.link.has_queue:
        pair.link.flush()
        seen += pair.packets()
    assert [reply.request_id for packet, _ in seen for reply in packet.replies] == list(range(count + 1))
    assert seen[-1][0].notices == [wire.DropNode(9)]


def test_descriptors_that_wait_are_closed_when_sent(pair):
    pair.fill()
    outcome = granting(1, 1)
    pair.link.post([outcome], [])
    assert not outcome.answer.donation.closed
    while pair.link.has_queue:
        pair.packets()
        pair.link.flush()
    assert outcome.answer.donation.closed


def test_too_much_that_waits_makes_it_congested_until_it_is_read(pair):
    pair.fill()
    assert not pair.link.congested
    while not pair.link.congested:
        pair.link.post([plain(1, bytes(4000))], [])
        assert pair.link._queued_bytes <= MAX_QUEUED_BYTES + 5000
    while pair.link.has_queue:
        pair.packets()
        pair.link.flush()
    assert not pair.link.congested
    assert pair.link._queued_bytes == 0


def test_more_than_64_descriptors_that_wait_make_it_congested(pair):
    pair.fill()
    pair.link.post([granting(number, number) for number in range(64)], [])
    assert not pair.link.congested
    pair.link.post([granting(64, 64)], [])
    assert pair.link.congested


def test_too_many_unanswered_requests_make_it_congested(pair):
    pair.link.expect(MAX_UNANSWERED)
    assert not pair.link.congested
    pair.link.expect(1)
    assert pair.link.congested
    pair.link.settle()
    assert not pair.link.congested


def test_the_time_it_has_not_read_is_counted_from_the_first_refusal(pair, monkeypatch):
    monkeypatch.setattr(worker_link.time, "monotonic", lambda: 100.0)
    assert pair.link.unread_for(1e9) == 0.0
    pair.fill()
    monkeypatch.setattr(worker_link.time, "monotonic", lambda: 105.0)
    pair.link.post([plain(1)], [])
    assert pair.link.unread_for(100.0 + UNREAD_SECONDS) == UNREAD_SECONDS
    pair.packets()
    pair.link.flush()
    assert pair.link.unread_for(1e9) == 0.0


def test_a_worker_that_lets_descriptors_pile_up_does_not_read_either():
    """ETOOMANYREFS: its socket holds more descriptors than the limit. The socket still counts as writable."""

    class Refusing(socket.socket):
        def __init__(self, original):
            super().__init__(original.family, original.type, 0, fileno=original.detach())

        def sendmsg(self, *_arguments):
            raise OSError(errno.ETOOMANYREFS, "too many references")

    pair = Pair(Refusing)
    pair.link.post([granting(1, 1)], [])
    try:
        assert pair.link.has_queue
        assert pair.link.unread_for(1e12) > UNREAD_SECONDS
    finally:
        pair.close()


# --- the end --------------------------------------------------------------------------------------------------------


def test_closing_drops_what_waits_and_its_descriptors(pair):
    pair.fill()
    outcomes = [granting(number, number) for number in range(3)]
    pair.link.post(outcomes, [])
    pair.link.close()
    assert all(outcome.answer.donation.closed for outcome in outcomes)
    assert not pair.link.has_queue


def test_a_worker_that_is_gone_takes_its_answers_with_it(pair):
    pair.worker.close()
    outcome = granting(1, 1)
    pair.link.post([outcome], [])
    assert outcome.answer.donation.closed
    assert not pair.link.has_queue


def test_an_answer_that_comes_after_the_link_was_closed_leaves_no_descriptor(pair):
    """A late thread, or the rest of the turn in which the worker was found in breach."""
    pair.link.close()
    outcome = granting(1, 1)
    pair.link.post([outcome], [])
    try:
        assert outcome.answer.donation.closed
    finally:
        outcome.answer.donation.close()
