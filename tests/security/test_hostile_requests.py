"""A confined, hostile worker whose messages are well-formed: what it names is not its own, not there, or not allowed.

Most of it is answered by an errno, as a guest's mistake would be; what no intact worker does costs it its link.
"""

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import msgpack
import pytest

from tests.security.arena import Arena, Link, packet_pair, until
from tests.support.messages import sample
from vfsd.broker.lock_waits import MAX_WAITS
from vfsd.broker.portions import PORTION
from vfsd.broker.share import Settings
from vfsd.broker.worker_link import MAX_QUEUED_FDS
from vfsd.sandbox import filecalls
from vfsd.wire import broker_messages as wire

_U64 = (1 << 64) - 1
BAD_NAMES = {
    "slash": b"/", "absolute": b"/etc/passwd", "below": b"directory/x", "up": b"..", "up-and-out": b"../secret", "here": b".",
    "nul": b"\0", "nul-inside": b"file\0x", "empty": b"", "slash-at-the-end": b"file/",
}  # fmt: skip
ANSWERED = [spec for spec in wire.REQUESTS if spec.in_session and spec.reply is not None]
BY_NODEID = [spec.message for spec in ANSWERED if "nodeid" in spec.message._fields]
BY_FH = [spec.message for spec in ANSWERED if "fh" in spec.message._fields and spec.message is not wire.SetAttr]
NAMES = ("name", "new_name", "names")
# `kind`, `mask` and `valid` say what to do by bits or numbers, as `flags` does.
MODES = ("flags", "mode", "mask", "command", "kind", "valid", "set_id_bits", "rdev")


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    arena = Arena(tmp_path_factory.mktemp("arena"))
    yield arena
    arena.close()


@pytest.fixture
def link(arena):
    link = arena.new_link()
    yield link
    link.close()
    until(lambda: not link_is_served(arena), arena)  # what it sent last is done
    assert arena.broker.breaches == []


def errors(link, arena, *messages, session=None):
    return [reply.errno for reply in link.ask(arena.session if session is None else session, *messages)]


def known(arena):
    """Fields by which a message means something that is there."""
    return {"nodeid": arena.file, "parent": arena.directory, "new_parent": arena.directory, "name": b"made", "new_name": b"made"}


# --- names --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_NAMES)
@pytest.mark.parametrize("kind", [spec.message for spec in ANSWERED if {*NAMES} & {*spec.message._fields}], ids=lambda kind: kind.__name__)
def test_a_name_that_is_no_name(arena, link, kind, bad):
    for field in {*NAMES} & {*kind._fields}:
        name = BAD_NAMES[bad]
        message = sample(kind, **(known(arena) | {field: [name] if field == "names" else name}))
        (reply,) = link.ask(arena.session, message)
        number = reply.fields[0][0] if kind is wire.LookupMany else reply.errno
        if "Xattr" in kind.__name__:
            # Attributes have names of their own: nothing there is a path, and without a prefix nothing is known.
            assert number in (errno.EINVAL, errno.ENODATA, errno.ENOTSUP, errno.ERANGE), os.strerror(number)
        else:
            assert number in (errno.EINVAL, errno.ENOENT), os.strerror(number)
    assert os.listdir(arena.share / "directory") == []
    assert sorted(os.listdir(arena.share)) == ["directory", "file"]


def test_nothing_is_above_the_root(arena, link):
    replies = link.ask(arena.session, wire.Lookup(1, b".."), wire.Lookup(1, b"."))
    assert [reply.fields[0] for reply in replies] == [1, 1]


@pytest.mark.parametrize("length", [256, 4096])
def test_a_name_that_is_too_long_is_a_breach(arena, length):
    with arena.unharmed():
        link = arena.new_link()
        link.send(link.requests(arena.session, wire.Lookup(1, b"x" * length)))
        arena.expect_breach(link, "Lookup: field name")


def test_handle_bytes_are_a_name_like_others(arena, link):
    """A real file handle of a file outside the share, wherever bytes may stand: it is no file's name."""
    handle = file_handle(arena.secret)
    for message in (wire.Lookup(1, handle), wire.Unlink(1, handle), wire.Rename(1, handle, 1, b"gotten", 0), wire.GetXattr(1, handle)):
        (number,) = errors(link, arena, message)
        assert number in (errno.ENOENT, errno.EINVAL, errno.ENOTSUP, errno.ENODATA)
    as_number = int.from_bytes(handle[-8:], "little")
    for message in (wire.Open(as_number, 0), wire.Fetch(as_number, as_number), wire.GetAttr(as_number)):
        assert errors(link, arena, message) != [0]


def file_handle(path: Path) -> bytes:
    fd = os.open(path, os.O_PATH)
    try:
        handle = filecalls.name_to_handle_at(fd)
    finally:
        os.close(fd)
    return handle[-1] if isinstance(handle, tuple) else handle


# --- nodeids, fhs, sessions, request ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodeid", [0, 999_999, 1 << 63, _U64])
@pytest.mark.parametrize("kind", BY_NODEID, ids=lambda kind: kind.__name__)
def test_a_nodeid_that_nobody_was_given(arena, link, kind, nodeid):
    (number,) = errors(link, arena, sample(kind, **(known(arena) | {"nodeid": nodeid})))
    assert number != 0


@pytest.mark.parametrize("kind", BY_NODEID, ids=lambda kind: kind.__name__)
def test_a_nodeid_that_was_forgotten(arena, link, kind):
    (arena.share / "short-lived").touch()
    (found,) = link.ask(arena.session, wire.Lookup(1, b"short-lived"))
    forget = link.requests(arena.session, wire.Forget([found.fields[0], 1]))
    assert link.send(forget) == 0
    (number,) = errors(link, arena, sample(kind, **(known(arena) | {"nodeid": found.fields[0]})))
    (arena.share / "short-lived").unlink()
    assert number != 0


@pytest.mark.parametrize("which", ["none", "of-another-file", "closed", "largest"])
@pytest.mark.parametrize("kind", BY_FH, ids=lambda kind: kind.__name__)
def test_an_fh_that_does_not_belong_to_the_nodeid(arena, link, kind, which):
    fh, fd = arena.broker.open(wire.OpenDir(arena.directory) if which == "of-another-file" else wire.Open(arena.file, os.O_RDWR))
    fd.close()
    if which == "closed":
        arena.broker.tell(wire.Release(arena.file, fh))
    named = {"none": 0, "largest": _U64}.get(which, fh)
    (number,) = errors(link, arena, sample(kind, **(known(arena) | {"fh": named, "length": 1})))
    assert number in (errno.EBADF, errno.ENOTTY, errno.EINVAL), os.strerror(number)
    arena.broker.tell(wire.Release(arena.directory if which == "of-another-file" else arena.file, fh))


@pytest.mark.parametrize("difference", [-1, 1, 1 << 40])
@pytest.mark.parametrize("spec", ANSWERED, ids=lambda spec: spec.message.__name__)
def test_a_message_of_another_session_is_stale(arena, link, spec, difference):
    assert errors(link, arena, sample(spec.message, **known(arena)), session=arena.session + difference) == [errno.ESTALE]


def test_request_ids_need_not_differ(arena, link):
    """They are the worker's own: it confuses nobody but itself."""
    twice = [wire.encode_request(7, wire.Lookup(1, b"file")), wire.encode_request(7, wire.StatFs(1))]
    assert link.send(wire.join_requests(arena.session, twice)) == 0
    assert [(reply.request_id, reply.errno) for reply in link.replies(2)] == [(7, 0), (7, 0)]


def test_two_waits_for_a_lock_by_one_id_are_not_had(arena, link):
    fh, fd = arena.broker.open(wire.Open(arena.file, os.O_RDWR))
    fd.close()
    assert arena.broker.errno_of(wire.SetLock(arena.file, fh, 1, 0, 9, fcntl.F_WRLCK, 1, 0)) == 0
    theirs = link.ask(arena.session, wire.Open(arena.file, os.O_RDWR))[0].fields[0]
    wait = wire.encode_request(7, wire.SetLock(arena.file, theirs, 2, 0, 9, fcntl.F_WRLCK, 1, 1))
    assert link.send(wire.join_requests(arena.session, [wait, wait])) == 0
    assert [reply.errno for reply in link.replies(1)] == [errno.EINVAL]
    arena.broker.tell(wire.Release(arena.file, fh))
    assert [reply.errno for reply in link.replies(1)] == [0]
    link.send(link.requests(arena.session, wire.Release(arena.file, theirs)))


@pytest.mark.parametrize(
    "message",
    [wire.SessionAck(0), wire.SessionAck(_U64), wire.LocksAck(0), wire.LocksAck(_U64), wire.CancelLock(0), wire.CancelLock(_U64)],
    ids=str,
)
def test_an_acknowledgement_of_what_was_not_asked_does_nothing(arena, link, message):
    before = arena.session
    link.send(link.requests(arena.session, message, *[message] * 20))
    assert errors(link, arena, wire.Lookup(1, b"file")) == [0]
    assert arena.session == before


# --- flags --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field"),
    [(spec.message, field) for spec in ANSWERED for field in spec.message._fields if field in MODES],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_any_bit_and_all_bits_of_what_says_how_leave_the_broker_alive(arena, link, kind, field):
    """It dies of a system call with a flag that its filter does not list: none may get that far."""
    spec = wire.SPEC_OF[kind]
    limit = spec.fields[kind._fields.index(field)].limit
    values = {1 << bit for bit in range(32)} | {limit, limit ^ 1, 0o177777, 0o160000}
    fh, fd = arena.broker.open(wire.Open(arena.file, os.O_RDWR))
    fd.close()
    for value in sorted(value for value in values if value <= limit):
        fields = known(arena) | {"fh": fh, "length": 4096, "name": b"user.x" if "Xattr" in kind.__name__ else b"made", field: value}
        (reply,) = link.ask(arena.session, sample(kind, **fields))
        if reply.donated and kind in (wire.Open, wire.Create, wire.TmpFile):
            opened = reply.fields[:1] if kind is wire.Open else reply.fields[2:3]
            link.send(link.requests(arena.session, wire.Release(arena.file if kind is wire.Open else reply.fields[0], *opened)))
        arena.check_service()
    for made in (arena.share / "directory").iterdir():
        made.rmdir() if made.is_dir() and not made.is_symlink() else made.unlink()
    arena.broker.tell(wire.Release(arena.file, fh))
    os.chmod(arena.share / "file", 0o644)


ALLOWED_STATUS_FLAGS = (
    Settings("never", False, False, 0, 0, allow_direct_io=True, preserve_noatime=True).open_flags | 0o100000
)  # O_LARGEFILE


@pytest.mark.parametrize("bit", range(32))
def test_a_donated_descriptor_has_no_flag_that_is_not_listed(arena, bit):
    got = arena.broker.ask(wire.Open(arena.file, os.O_RDWR | 1 << bit))
    if got.fd is not None:
        with got.fd as fd:
            assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & ~ALLOWED_STATUS_FLAGS == 0
        arena.broker.tell(wire.Release(arena.file, got.fields[0]))
    else:
        assert got.errno == errno.EINVAL


# --- packets and sockets ------------------------------------------------------------------------------------------------------


def ask_file(arena: Arena) -> bytes:
    return wire.join_requests(arena.session, [wire.encode_request(1, wire.Lookup(1, b"file"))])


def headed(count: int, row: bytes) -> bytes:
    return b"\x92\x00\xdc" + count.to_bytes(2, "big") + row * count


PACKETS = {
    "empty": b"",
    "one-zero": b"\0",
    "no-msgpack": b"\xc1",
    "not-an-array": msgpack.packb(1),
    "no-requests": msgpack.packb([0, []]),
    "requests-no-list": msgpack.packb([0, 1]),
    "three-parts": msgpack.packb([0, [[1, 1, 1]], []]),
    "session-negative": msgpack.packb([-1, [[1, 1, 1]]]),
    "session-true": msgpack.packb([True, [[1, 1, 1]]]),
    "unknown-tag": msgpack.packb([0, [[99, 1]]]),
    "tag-true": msgpack.packb([0, [[True, 1, 1]]]),
    "row-no-list": msgpack.packb([0, [1]]),
    "too-many-requests": headed(wire.MAX_REQUESTS_PER_PACKET + 1, msgpack.packb([1, 1, 1])),
    "thousands-of-requests": headed(20_000, msgpack.packb([3, 1])),
    "a-bad-one-behind-good-ones": headed(200, msgpack.packb([3, 1]))[:-1] + b"\xc0",
    "deeply-nested": b"\x91" * 100_000 + b"\x90",
    "array-of-four-billion": b"\xdd\xff\xff\xff\xff",
    "bytes-of-four-billion": b"\x92\x00\xc6\xff\xff\xff\xff",
    "map-of-four-billion": b"\xdf\xff\xff\xff\xff",
    "oversized": bytes(wire.MAX_PACKET_BYTES + 1),
    "twice-oversized": bytes(2 * wire.MAX_PACKET_BYTES),
    "a-reply": msgpack.packb([1, [[1, 0, 0, []]], []]),
    "a-reply-that-donates": msgpack.packb([1, [[1, 0, 1, [1, 0, 1]]], []]),
    "a-notice": msgpack.packb([1, [], [[1, 1, 1]]]),
    "a-log-line-for-the-supervisor": msgpack.packb([17, 2, b"text"]),
    "an-answer-for-control": msgpack.packb([48, 1, 1]),
}


@pytest.mark.parametrize("what", PACKETS)
def test_a_packet_that_is_none(arena, what):
    with arena.unharmed():
        link = arena.new_link()
        assert link.send(PACKETS[what]) == 0
        arena.expect_breach(link, "")


@pytest.mark.parametrize("message", [wire.GetAttr(1), wire.SessionStart(0), wire.SessionAck(0), wire.LocksAck(1)], ids=str)
def test_a_first_message_that_is_not_hello(arena, message):
    with arena.unharmed():
        link = arena.new_link(greet=False)
        link.send(link.requests(arena.session, message))
        arena.expect_breach(link, "Hello")


@pytest.mark.parametrize("count", [1, 64, 253])
@pytest.mark.parametrize("kind", ["file", "socket", "pidfd", "itself"])
def test_descriptors_are_not_taken(arena, count, kind):
    ours, theirs = packet_pair()
    file, pidfd = os.open(os.devnull, os.O_RDWR), os.pidfd_open(os.getpid())
    with arena.unharmed(), ours, theirs:
        link = arena.new_link()
        given = link.fd if kind == "itself" else arena.hostile.give({"file": file, "socket": theirs.fileno(), "pidfd": pidfd}[kind])
        assert link.send(ask_file(arena), [given] * count) == 0
        arena.expect_breach(link, "file descriptors")
        if kind != "itself":
            arena.hostile.order("close", given)
    os.close(file)
    os.close(pidfd)


def test_a_flood_of_descriptors_is_not_taken(arena):
    with arena.unharmed():
        link = arena.new_link()
        assert link.flood(ask_file(arena), 1000, [link.fd] * 253) >= 1
        arena.expect_breach(link, "file descriptors")


def test_a_breach_ends_what_the_same_worker_sent_behind_it(arena):
    with arena.unharmed():
        link = arena.new_link()
        os.kill(arena.broker.pid, signal.SIGSTOP)
        link.send(b"\xc1")
        link.send(link.requests(arena.session, wire.MkDir(arena.directory, b"late", 0o755, 0, 0)))
        os.kill(arena.broker.pid, signal.SIGCONT)
        arena.expect_breach(link, "")
    assert os.listdir(arena.share / "directory") == []


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR], ids=["reading", "writing", "both"])
def test_half_a_connection(arena, how):
    """A confined worker cannot: its filter has no shutdown(2). Here the test does it for one that can."""
    with arena.unharmed():
        ours, theirs = packet_pair()
        arena.broker.introduce(251, ours)
        theirs.send(wire.join_requests(0, [wire.encode_request(1, wire.Hello(wire.PROTOCOL_VERSION))]))
        assert theirs.recv(1 << 17)
        theirs.send(ask_file(arena))
        theirs.shutdown(how)
        arena.check_service()
        theirs.close()
        until(lambda: not link_is_served(arena), arena)


def test_a_link_that_says_nothing_and_one_that_goes_at_once(arena):
    with arena.unharmed():
        silent, gone = arena.new_link(greet=False), arena.new_link(greet=False)
        gone.close()
        arena.check_service()
        silent.close()
        until(lambda: not link_is_served(arena), arena)


# --- floods -------------------------------------------------------------------------------------------------------------------


def memory_of(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Long names: what is still in the socket when the worker leaves is done nevertheless, and should not be much.
LONG_NAME = b"long" * 60
LISTING = wire.LookupMany(1, [LONG_NAME] * wire.MAX_NAMES_PER_LOOKUP)


@pytest.fixture
def long_name(arena):
    path = arena.share / LONG_NAME.decode()
    path.touch()
    yield
    path.unlink()


def test_packed_lookups_hold_up_nobody(arena):
    """While the broker is stopped both send, the hostile worker four packets of thousands of names each, and first."""
    link = arena.new_link()
    names = [b"", b"file"] * (wire.MAX_NAMES_PER_LOOKUP // 2)
    packet = link.requests(arena.session, *[wire.LookupMany(1, names)] * 140)
    assert len(packet) > wire.MAX_PACKET_BYTES * 3 // 4
    os.kill(arena.broker.pid, signal.SIGSTOP)
    assert link.flood(packet, 4) == 4
    marker = link.requests(arena.session, wire.MkDir(1, b"when-all-is-done", 0o755, 0, 0))
    assert link.send(marker) == 0
    os.kill(arena.broker.pid, signal.SIGCONT)
    for _ in range(20):
        assert arena.broker.ask(wire.Lookup(1, b"when-all-is-done")).errno == errno.ENOENT, "it came after what the hostile worker sent"
    link.close()
    until(lambda: not link_is_served(arena), arena)
    arena.check_service()
    for leftover in arena.share.glob("when-all-is-done"):
        leftover.rmdir()


def link_is_served(arena: Arena) -> bool:
    """Whether the broker still has a socket besides its channel and the honest worker's."""
    return sum(target.startswith("socket:") for target in arena.broker_fds().values()) > 2


def ask_without_reading(arena: Arena, link: Link) -> None:
    """Until the broker reads no more."""
    packet = link.requests(arena.session, LISTING, LISTING)
    while link.flood(packet, 1000):
        for _ in range(20):
            arena.check_service()


@pytest.mark.usefixtures("long_name")
def test_a_worker_that_never_reads_is_not_waited_for_and_does_not_make_the_broker_grow(arena):
    """Until it is in breach after ten seconds; here it leaves before."""
    with arena.unharmed():
        before = memory_of(arena.broker.pid)
        link = arena.new_link()
        ask_without_reading(arena, link)
        assert memory_of(arena.broker.pid) - before < 16 << 20
        link.close()
        until(lambda: not link_is_served(arena), arena)


def test_a_worker_that_takes_no_descriptors_costs_the_broker_a_bounded_number(arena):
    """Those that its socket does not take: the kernel allows as many in flight as the limit of open files."""
    with arena.unharmed():
        fh, fd = arena.broker.open(wire.Open(arena.file, os.O_RDWR))
        fd.close()
        before = len(arena.broker_fds())
        link = arena.new_link()
        packet = link.requests(arena.session, *[wire.Fetch(arena.file, fh)] * wire.MAX_REQUESTS_PER_PACKET)
        assert link.flood(packet, 32) == 32
        until(lambda: len(arena.broker_fds()) - before > MAX_QUEUED_FDS, arena)
        for _ in range(20):
            arena.check_service()
        assert len(arena.broker_fds()) - before <= MAX_QUEUED_FDS + PORTION + 32
        link.close()
        arena.broker.tell(wire.Release(arena.file, fh))
        until(lambda: not link_is_served(arena), arena)


@pytest.mark.usefixtures("long_name")
def test_a_worker_that_does_not_read_for_ten_seconds_is_reported(arena):
    with arena.unharmed():
        link = arena.new_link()
        ask_without_reading(arena, link)
        assert "has not read" in arena.broker.wait_for_breach(link.index)
        arena.expect_report(link, "has not read")


def test_a_flood_of_lock_waits_is_bounded_and_leaves_others_their_locks(arena, link):
    fh, fd = arena.broker.open(wire.Open(arena.file, os.O_RDWR))
    fd.close()
    assert arena.broker.errno_of(wire.SetLock(arena.file, fh, 1, 0, 9, fcntl.F_WRLCK, 1, 0)) == 0
    theirs = link.ask(arena.session, wire.Open(arena.file, os.O_RDWR))[0].fields[0]
    wait = wire.SetLock(arena.file, theirs, 2, 0, 9, fcntl.F_WRLCK, 1, 1)
    for _ in range(8):
        link.send(link.requests(arena.session, *[wait] * wire.MAX_REQUESTS_PER_PACKET))
    refused = link.replies(8 * wire.MAX_REQUESTS_PER_PACKET - MAX_WAITS)
    assert {reply.errno for reply in refused} == {errno.ENOLCK}
    assert arena.broker.errno_of(wire.SetLock(arena.file, fh, 1, 0, 9, fcntl.F_UNLCK, 1, 0)) == 0
    assert [reply.errno for reply in link.replies(1)] == [0]
    arena.broker.tell(wire.Release(arena.file, fh))
    link.send(link.requests(arena.session, *[wire.CancelLock(number) for number in range(200)], wire.Release(arena.file, theirs)))


def test_sessions_begun_without_end_are_every_guests_right_and_the_broker_keeps_up(tmp_path):
    """A worker may begin a session: the honest one hears of it, and of nothing that was of the session before."""
    arena = Arena(tmp_path)
    try:
        link = arena.new_link()
        for _ in range(30):
            link.send(link.requests(0, *[wire.SessionStart(0)] * 10))
            link.send(link.requests(0, *[wire.SessionEnd()] * 5))
        link.close()
        while arena.broker.ask(wire.Lookup(1, b"file")).errno:
            pass
        assert arena.session >= 400
        assert arena.broker.errno_of(wire.GetAttr(arena.broker.lookup(b"file"))) == 0
        assert arena.broker.breaches == []
    finally:
        arena.close()


def test_a_new_session_does_not_wait_for_a_worker_that_does_not_acknowledge(tmp_path):
    arena = Arena(tmp_path)
    try:
        link = arena.new_link()
        before = arena.session
        assert arena.broker.ask(wire.SessionStart(0)).errno == 0
        assert arena.session == before + 1
        arena.expect_report(link, "not acknowledged")
        assert arena.broker.lookup(b"file")
    finally:
        arena.close()
