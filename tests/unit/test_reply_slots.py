"""What a dead worker had done is not done again for its successor: a real Server and Share, workers that are sockets."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.broker import Bench
from vfsd.broker import reply_slots
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.reply_slots import MOST_SLOTS, ReplySlots
from vfsd.broker.requests import HANDLERS
from vfsd.wire import broker_messages as wire
from vfsd.wire.attr import SET_SIZE

ME = (os.getuid(), os.getgid())
SLOT = (1 << 16 | 5, 77)  # place, number


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    bench.add(0)
    bench.begin_session()
    yield bench
    bench.close()


def replaced(bench, worker):
    """The worker dies and has a successor."""
    worker.read()
    worker.close()
    bench.workers.remove(worker)
    bench.pump()
    return bench.add(worker.index)


@pytest.fixture
def ask_twice(bench):
    """Ask for the same request as a worker and as its successor: both answers, and the successor."""

    def ask_twice(message, slot=SLOT):
        first = bench.workers[0]
        before = first.ask_once(message, *slot)
        if before.fd is not None:
            before.fd.close()
        successor = replaced(bench, first)
        after = successor.ask_once(message, *slot)
        return before, after, successor

    return ask_twice


@pytest.mark.parametrize(
    ("message", "there"),
    [
        (wire.MkDir(ROOT_NODEID, b"new", 0o755, *ME), ["directory", "file", "new"]),
        (wire.MkNod(ROOT_NODEID, b"new", 0o100644, 0, *ME), ["directory", "file", "new"]),
        (wire.SymLink(ROOT_NODEID, b"new", b"target", *ME), ["directory", "file", "new"]),
        (wire.Unlink(ROOT_NODEID, b"file"), ["directory"]),
        (wire.RmDir(ROOT_NODEID, b"directory"), ["file"]),
        (wire.Rename(ROOT_NODEID, b"file", ROOT_NODEID, b"other", 0), ["directory", "other"]),
        (wire.Rename(ROOT_NODEID, b"file", ROOT_NODEID, b"directory", 2), ["directory", "file"]),  # exchanged, not twice
    ],
)
def test_what_changes_names_is_done_once_and_answered_twice_alike(ask_twice, tmp_path, message, there):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    before, after, _ = ask_twice(message)
    assert before == after
    assert before.errno == 0
    assert sorted(os.listdir(tmp_path)) == there
    if message == wire.Rename(ROOT_NODEID, b"file", ROOT_NODEID, b"directory", 2):
        assert (tmp_path / "file").is_dir()


def test_a_link_is_made_once_and_counted_once(bench, ask_twice, tmp_path):
    (tmp_path / "file").touch()
    nodeid = bench.workers[0].lookup(b"file")
    before, after, successor = ask_twice(wire.Link(nodeid, ROOT_NODEID, b"other"))
    assert before == after
    assert os.stat(tmp_path / "file").st_nlink == 2
    successor.send(wire.Forget([nodeid, 2]))
    assert successor.errno_of(wire.GetAttr(nodeid)) == errno.EBADF


def test_a_failure_is_answered_again_although_it_would_succeed_now(bench, ask_twice, tmp_path):
    (tmp_path / "in the way").touch()
    first = bench.workers[0]
    message = wire.MkDir(ROOT_NODEID, b"in the way", 0o755, *ME)
    assert first.ask_once(message, *SLOT).errno == errno.EEXIST
    (tmp_path / "in the way").unlink()
    assert replaced(bench, first).ask_once(message, *SLOT).errno == errno.EEXIST


def test_a_lookup_is_counted_once(ask_twice, tmp_path):
    (tmp_path / "file").touch()
    before, after, successor = ask_twice(wire.Lookup(ROOT_NODEID, b"file"))
    assert before == after
    nodeid = after.fields[0]
    successor.send(wire.Forget([nodeid, 1]))
    assert successor.errno_of(wire.GetAttr(nodeid)) == errno.EBADF


def test_the_lookups_of_a_listing_are_taken_back_and_made_again(bench, tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    first = bench.workers[0]
    counted = [first.ask_once(wire.LookupMany(ROOT_NODEID, names), *SLOT).fields for names in ([b"a"], [b"b", b"missing"])]
    nodeids = [nodeid for fields in counted for _error, nodeid, _attr in fields if nodeid]
    assert len(nodeids) == 2
    successor = replaced(bench, first)
    again = successor.ask_once(wire.LookupMany(ROOT_NODEID, [b"b", b"c"]), *SLOT).fields
    assert successor.errno_of(wire.GetAttr(nodeids[0])) == errno.EBADF
    for _error, nodeid, _attr in again:
        assert successor.errno_of(wire.GetAttr(nodeid)) == 0
        successor.send(wire.Forget([nodeid, 1]))
        assert successor.errno_of(wire.GetAttr(nodeid)) == errno.EBADF


@pytest.mark.parametrize("kind", ["open", "opendir", "create", "tmpfile"])
def test_an_open_file_is_the_same_and_its_descriptor_comes_again(bench, ask_twice, tmp_path, kind):
    (tmp_path / "file").write_bytes(b"content")
    first = bench.workers[0]
    message = {
        "open": lambda: wire.Open(first.lookup(b"file"), os.O_RDWR),
        "opendir": lambda: wire.OpenDir(ROOT_NODEID),
        "create": lambda: wire.Create(ROOT_NODEID, b"new", os.O_RDWR | os.O_EXCL, 0o644, *ME),
        "tmpfile": lambda: wire.TmpFile(ROOT_NODEID, os.O_RDWR, 0o644, *ME),
    }[kind]()
    before, after, _ = ask_twice(message)
    assert after.errno == 0
    assert before.fields == after.fields
    assert len(bench.share.files) == 1
    with after.fd as fd:
        if kind == "open":
            assert os.pread(fd.fileno(), 10, 0) == b"content"
        if kind == "opendir":
            assert "file" in os.listdir(fd.fileno())
        if kind == "create":
            assert os.path.samestat(os.fstat(fd.fileno()), os.stat(tmp_path / "new"))


def test_a_truncating_open_truncates_once(bench, tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    first = bench.workers[0]
    message = wire.Open(first.lookup(b"file"), os.O_RDWR | os.O_TRUNC)
    first.ask_once(message, *SLOT).fd.close()
    (tmp_path / "file").write_bytes(b"after")
    with replaced(bench, first).ask_once(message, *SLOT).fd as fd:
        assert os.pread(fd.fileno(), 10, 0) == b"after"


def test_an_open_file_that_was_released_meanwhile_is_not_invented(bench, tmp_path):
    first = bench.workers[0]
    message = wire.Create(ROOT_NODEID, b"new", os.O_RDWR, 0o644, *ME)
    got = first.ask_once(message, *SLOT)
    got.fd.close()
    nodeid, _attr, fh, *_ = got.fields
    first.send(wire.Release(nodeid, fh))
    assert replaced(bench, first).ask_once(message, *SLOT).errno == errno.EBADF


def test_a_change_of_size_is_made_once(bench, tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    first = bench.workers[0]
    values = dict.fromkeys(wire.SetAttr._fields, 0) | {"nodeid": first.lookup(b"file"), "valid": SET_SIZE}
    assert first.ask_once(wire.SetAttr(**values), *SLOT).errno == 0
    (tmp_path / "file").write_bytes(b"after")
    assert replaced(bench, first).ask_once(wire.SetAttr(**values), *SLOT).errno == 0
    assert (tmp_path / "file").read_bytes() == b"after"


def test_another_number_is_another_request(bench, tmp_path):
    first = bench.workers[0]
    message = wire.MkDir(ROOT_NODEID, b"new", 0o755, *ME)
    assert first.ask_once(message, 1 << 16 | 5, 77).errno == 0
    assert first.ask_once(message, 1 << 16 | 5, 78).errno == errno.EEXIST
    assert first.ask_once(message, 1 << 16 | 6, 77).errno == errno.EEXIST
    assert first.ask_once(message, 2 << 16 | 5, 77).errno == errno.EEXIST


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (wire.Unlink(ROOT_NODEID, b"a"), wire.Unlink(ROOT_NODEID, b"b")),
        (wire.Unlink(ROOT_NODEID, b"d"), wire.RmDir(ROOT_NODEID, b"d")),  # alike but for their kind
        (wire.SetXattr(ROOT_NODEID, b"user.x", b"1", 0, 0), wire.SetXattr(ROOT_NODEID, b"user.x", b"2", 0, 0)),
        (wire.MkDir(ROOT_NODEID, b"d", 0, 0, 0, 0, [*range(999)]), wire.MkDir(ROOT_NODEID, b"d", 0, 0, 0, 0, [*range(1, 1000)])),
    ],
)
def test_another_message_by_the_same_number_is_not_given_the_stored_answer(bench, monkeypatch, one, other):
    ran = []
    for message in (type(one), type(other)):
        monkeypatch.setitem(HANDLERS, message, HANDLERS[message]._replace(handler=lambda _share, _call, asked: ran.append(asked)))
    first = bench.workers[0]
    first.send_once(one, *SLOT)
    bench.pump()
    successor = replaced(bench, first)
    successor.send_once(other, *SLOT)
    bench.pump()
    assert ran == [one, other]


def test_workers_do_not_reach_each_others_slots(bench):
    first, second = bench.workers[0], bench.add(1)
    message = wire.MkDir(ROOT_NODEID, b"new", 0o755, *ME)
    assert first.ask_once(message, *SLOT).errno == 0
    assert second.ask_once(message, *SLOT).errno == errno.EEXIST


def test_what_is_still_being_done_is_waited_for(bench, monkeypatch, tmp_path):
    """The worker dies while the broker is in the system call; its successor asks before that returns."""
    row = HANDLERS[wire.MkDir]
    first = bench.workers[0]
    seen = []

    def slow(share, call, message):
        first.close()
        bench.workers.remove(first)
        bench.server.remove(bench.server.links.by_index[0])
        successor = bench.add(0)
        seen.append((successor, successor.send_once(message, *SLOT)))
        bench.pump()
        successor.read()
        assert successor.replies == {}
        return row.handler(share, call, message)

    monkeypatch.setitem(HANDLERS, wire.MkDir, row._replace(handler=slow))
    first.send_once(wire.MkDir(ROOT_NODEID, b"new", 0o755, *ME), *SLOT)
    bench.pump()
    ((successor, number),) = seen
    successor.read()
    assert successor.replies.pop(number).errno == 0
    assert os.listdir(tmp_path) == ["new"]


def test_a_listing_that_is_still_being_looked_up_is_taken_back_when_it_is_done(bench, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    row = HANDLERS[wire.LookupMany]
    first = bench.workers[0]
    message = wire.LookupMany(ROOT_NODEID, [b"file"])
    seen = []

    def slow(share, call, asked):
        if not seen:
            seen.append(first)
            first.close()
            bench.workers.remove(first)
            bench.server.remove(bench.server.links.by_index[0])
            successor = bench.add(0)
            seen[:] = [(successor, successor.ask_once(message, *SLOT))]
        return row.handler(share, call, asked)

    monkeypatch.setitem(HANDLERS, wire.LookupMany, row._replace(handler=slow))
    first.send_once(message, *SLOT)
    bench.pump()
    ((successor, got),) = seen
    ((_errno, nodeid, _attr),) = got.fields
    successor.send(wire.Forget([nodeid, 1]))
    assert successor.errno_of(wire.GetAttr(nodeid)) == errno.EBADF


def test_a_forget_takes_back_once(bench, tmp_path):
    (tmp_path / "file").touch()
    first = bench.workers[0]
    nodeid, *_ = [first.lookup(b"file") for _ in range(5)]
    forget = wire.Forget([nodeid, 2], [5, 77, 0, 1])
    first.send(forget)
    bench.pump()
    successor = replaced(bench, first)
    successor.send(forget)
    assert successor.errno_of(wire.GetAttr(nodeid)) == 0
    successor.send(wire.Forget([nodeid, 2], [5, 78, 0, 1]))
    assert successor.errno_of(wire.GetAttr(nodeid)) == 0
    successor.send(wire.Forget([nodeid, 1], [5, 79, 0, 1]))
    assert successor.errno_of(wire.GetAttr(nodeid)) == errno.EBADF


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), cuts=st.lists(st.integers(1, 5), min_size=1), died_after=st.integers(0, 60)
)
def test_however_forgets_are_cut_each_pair_is_forgotten_once(lengths, cuts, died_after):
    """One worker sends all pairs in parts and dies after some of them; its successor sends all again, cut otherwise."""
    slots = ReplySlots()
    pairs = {head: [(1000 * head + number, 1) for number in range(length)] for head, length in enumerate(lengths)}

    def send(cuts, limit):
        """As a worker gathers them: messages of so many pairs; what the broker forgets."""
        flat = [(head, number) for head, each in pairs.items() for number in range(len(each))]
        forgotten, position, turn = [], 0, 0
        while position < min(len(flat), limit):
            part = flat[position : position + cuts[turn % len(cuts)]]
            position += len(part)
            turn += 1
            heads = list(dict.fromkeys(head for head, _ in part))
            told = []
            for head in heads:
                numbers = [number for each, number in part if each == head]
                told += (head, 7, numbers[0], len(numbers))
            message = wire.Forget([value for head, number in part for value in pairs[head][number]], told)
            forgotten += slots.not_yet_forgotten(0, message)[::2]
        return forgotten

    forgotten = send(cuts, died_after) + send([*cuts[::-1], 3], 10**6)
    assert sorted(forgotten) == sorted(nodeid for each in pairs.values() for nodeid, _count in each)


def test_a_forget_that_does_not_add_up_harms_nothing():
    slots = ReplySlots()
    assert slots.not_yet_forgotten(0, wire.Forget([1, 1, 2, 1], [0, 1, 0, 5])) == [1, 1, 2, 1]
    assert slots.not_yet_forgotten(0, wire.Forget([1, 1], [1, 1, 0, 2**63, 2, 1, 2**63, 1])) == [1, 1]


def test_slots_are_bounded_and_the_oldest_answer_goes_first(bench, monkeypatch):
    monkeypatch.setattr(reply_slots, "MOST_SLOTS", 3)
    first = bench.workers[0]
    for head in range(5):
        assert first.ask_once(wire.MkDir(ROOT_NODEID, b"%d" % head, 0o755, *ME), head, 1).errno == 0
    successor = replaced(bench, first)
    for head in (4, 3, 2):
        assert successor.ask_once(wire.MkDir(ROOT_NODEID, b"%d" % head, 0o755, *ME), head, 1).errno == 0
    for head in (0, 1):
        assert successor.ask_once(wire.MkDir(ROOT_NODEID, b"%d" % head, 0o755, *ME), head, 1).errno == errno.EEXIST
        successor.send(wire.Forget([ROOT_NODEID, 1], [head, 1, 0, 1]))
    successor.send(wire.Forget([ROOT_NODEID, 1] * 6, [value for head in range(6) for value in (head, 9, 0, 1)]))
    bench.pump()
    assert len(bench.share.reply_slots) <= 6
    assert MOST_SLOTS >= 4096


def counted_by(bench, worker):
    return [len(slot.counted or ()) for slot in bench.share.reply_slots._slots[worker].values()]


def test_a_listing_without_end_is_counted_up_to_a_bound(bench, monkeypatch, tmp_path):
    """A worker in hostile hands goes on with one listing for ever: the broker keeps no more of it, and answers as before."""
    monkeypatch.setattr(reply_slots, "MOST_COUNTED_OF_LISTING", 8)
    (tmp_path / "file").touch()
    worker = bench.workers[0]
    for _ in range(10):
        assert len(worker.ask_once(wire.LookupMany(ROOT_NODEID, [b"file"] * 3), *SLOT).fields) == 3
    assert counted_by(bench, 0) == [6]


def test_listings_of_one_worker_are_counted_up_to_a_bound(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(reply_slots, "MOST_COUNTED_OF_WORKER", 8)
    (tmp_path / "file").touch()
    first, other = bench.workers[0], bench.add(1)
    other.ask_once(wire.LookupMany(ROOT_NODEID, [b"file"]), *SLOT)
    for head in range(9):
        first.ask_once(wire.LookupMany(ROOT_NODEID, [b"file"]), head, 1)
        assert sum(counted_by(bench, 0)) <= 8
    assert counted_by(bench, 0)[-1] == 2, "the newest is known"
    assert counted_by(bench, 1) == [2], "nobody else's are lost for it"


def test_a_new_session_leaves_no_slot(bench):
    first = bench.workers[0]
    first.ask_once(wire.MkDir(ROOT_NODEID, b"a", 0o755, *ME), *SLOT)
    first.send(wire.Forget([9, 1], [0, 1, 0, 1]))
    bench.pump()
    assert len(bench.share.reply_slots) == 2
    bench.begin_session()
    assert len(bench.share.reply_slots) == 0
    assert first.ask_once(wire.MkDir(ROOT_NODEID, b"a", 0o755, *ME), *SLOT).errno == errno.EEXIST


def test_a_request_of_an_old_session_takes_no_slot(bench):
    first = bench.workers[0]
    old = first.session
    bench.begin_session()
    first.session = old
    assert first.ask_once(wire.MkDir(ROOT_NODEID, b"a", 0o755, *ME), *SLOT).errno == errno.ESTALE
    assert len(bench.share.reply_slots) == 0


def test_long_messages_are_not_kept_whole_and_yet_recognised(bench):
    first = bench.workers[0]
    long = wire.MkDir(ROOT_NODEID, b"new", 0o755, *ME, 0, [*range(4096)], b"", b"")
    names = [b"n%d" % number for number in range(200)]
    assert first.ask_once(long, 1, 1).errno == 0
    first.ask_once(wire.LookupMany(ROOT_NODEID, names), 2, 1)
    (slots,) = bench.share.reply_slots._slots.values()
    assert (len(slots[1].message.groups), slots[2].message.names) == (8, [])
    assert replaced(bench, first).ask_once(long, 1, 1).errno == 0
