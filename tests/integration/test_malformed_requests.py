"""Requests that no kernel sends: each one owed a reply gets an errno, and the daemon goes on."""

import errno
import random
import struct

import pytest

from tests.support.frontend.checks import MALFORMED, NOT_FOUND, assert_same
from tests.support.frontend.fuse_client import ROOT, with_length
from tests.support.frontend.ring import Layout, at
from vfsd.wire import fuse_abi as abi

# Opcodes that a guest may send and that this version answers with ENOSYS: the guest's kernel then does without.
NOT_THERE = {
    abi.FUSE_BMAP,
    abi.FUSE_POLL,
    abi.FUSE_SETUPMAPPING,
    abi.FUSE_REMOVEMAPPING,
}
IMPLEMENTED = {
    abi.FUSE_LOOKUP: b"name\0",
    abi.FUSE_GETATTR: bytes(16),
    abi.FUSE_SETATTR: bytes(88),
    abi.FUSE_SYMLINK: b"name\0target\0",
    abi.FUSE_MKNOD: bytes(16) + b"name\0",
    abi.FUSE_MKDIR: bytes(8) + b"name\0",
    abi.FUSE_UNLINK: b"name\0",
    abi.FUSE_RMDIR: b"name\0",
    abi.FUSE_RENAME: bytes(8) + b"old\0new\0",
    abi.FUSE_RENAME2: bytes(16) + b"old\0new\0",
    abi.FUSE_LINK: bytes(8) + b"name\0",
    abi.FUSE_OPEN: bytes(8),
    abi.FUSE_READ: bytes(40),
    abi.FUSE_WRITE: bytes(40),
    abi.FUSE_RELEASE: bytes(24),
    abi.FUSE_FSYNC: bytes(16),
    abi.FUSE_FLUSH: bytes(24),
    abi.FUSE_OPENDIR: bytes(8),
    abi.FUSE_READDIR: bytes(40),
    abi.FUSE_READDIRPLUS: bytes(40),
    abi.FUSE_RELEASEDIR: bytes(24),
    abi.FUSE_FSYNCDIR: bytes(16),
    abi.FUSE_ACCESS: bytes(8),
    abi.FUSE_CREATE: bytes(16) + b"name\0",
    abi.FUSE_FALLOCATE: bytes(32),
    abi.FUSE_LSEEK: bytes(24),
    abi.FUSE_COPY_FILE_RANGE: bytes(56),
    abi.FUSE_SYNCFS: bytes(8),
    abi.FUSE_GETLK: bytes(48),
    abi.FUSE_SETLK: bytes(48),
    abi.FUSE_SETLKW: bytes(48),
}
NAMED = [opcode for opcode, body in IMPLEMENTED.items() if body.endswith((b"e\0", b"t\0", b"w\0"))]


@pytest.fixture
def fs(plain_fs):
    yield plain_fs
    # Whatever the test sent: the next request is served.
    assert_same(plain_fs.client.attr(ROOT), plain_fs.served.share)


def ask(fs, opcode, body, nodeid=None, **how):
    """(errno or 0, body), or None, for a request with a correct header."""
    return fs.client.raw(fs.client.header(opcode, fs.dir if nodeid is None else nodeid, len(body)) + body, **how)


# Opcodes


@pytest.mark.parametrize("opcode", sorted(NOT_THERE))
def test_an_opcode_that_is_not_implemented_is_enosys(fs, opcode):
    assert ask(fs, opcode, b"user.x\0" + bytes(100)) == (errno.ENOSYS, b"")


@pytest.mark.parametrize("opcode", [0, 7, 19, 54, 55, 255, 256, 4096, 1048576, 436207616, 0xFFFF_FFFF])
def test_an_unknown_opcode_is_enosys(fs, opcode):
    assert ask(fs, opcode, bytes(100)) == (errno.ENOSYS, b"")


# Headers and lengths


@pytest.mark.parametrize("size", [1, 4, 8, 16, 39])
def test_property_46_a_message_shorter_than_a_header(fs, size):
    reply = fs.client.raw(fs.client.header(abi.FUSE_GETATTR, ROOT, 0)[:size])
    assert reply is None or (reply[0] in MALFORMED and not reply[1])


@pytest.mark.parametrize("length", [0, 1, 39, 57, 4096, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_property_46_a_length_that_is_not_the_messages(fs, length):
    message = fs.client.header(abi.FUSE_GETATTR, ROOT, 16) + bytes(16)
    error, _ = fs.client.raw(with_length(message, length))
    assert error in MALFORMED


@pytest.mark.parametrize("opcode", IMPLEMENTED)
def test_property_46_arguments_that_end_too_early(fs, opcode):
    body = IMPLEMENTED[opcode]
    for size in {0, 1, len(body) // 2, len(body) - 1} - {len(body)}:
        if opcode in (abi.FUSE_SYNCFS, abi.FUSE_GETATTR):
            continue  # their arguments may be ignored: padding, and an fh that is not needed
        error, _ = ask(fs, opcode, body[:size])
        assert error in MALFORMED | NOT_FOUND, f"{size} of {len(body)} bytes"
        assert error in MALFORMED or opcode not in NAMED


@pytest.mark.parametrize("opcode", IMPLEMENTED)
def test_arguments_of_noise(fs, opcode):
    rng = random.Random(opcode)
    for size in (8, 40, 56, 88, 300, 5000):
        reply = ask(fs, opcode, rng.randbytes(size))
        assert reply is not None


@pytest.mark.parametrize("opcode", IMPLEMENTED)
def test_nodeids_that_were_never_given(fs, opcode):
    for nodeid in (0, fs.dir + 1_000_000, (1 << 63) + 5, (1 << 64) - 1):
        error, _ = ask(fs, opcode, IMPLEMENTED[opcode], nodeid)
        assert error or opcode in (abi.FUSE_RELEASE, abi.FUSE_RELEASEDIR)  # which cannot fail for the guest


@pytest.mark.parametrize("opcode", NAMED)
def test_property_46_names_without_an_end(fs, opcode):
    body = IMPLEMENTED[opcode].rstrip(b"\0")
    assert ask(fs, opcode, body)[0] in MALFORMED
    assert ask(fs, opcode, body + b"x" * 5000)[0] in MALFORMED | {errno.ENAMETOOLONG}


@pytest.mark.parametrize("opcode", [abi.FUSE_RENAME, abi.FUSE_RENAME2, abi.FUSE_SYMLINK])
def test_one_name_where_there_must_be_two(fs, opcode):
    body = IMPLEMENTED[opcode]
    first_name = body[: body.rindex(b"\0", 0, len(body) - 1) + 1]
    assert ask(fs, opcode, first_name)[0] in MALFORMED


# Sizes


def open_file(fs, flags=2):
    fs.put("file", b"content")
    nodeid = fs.lookup(b"file")
    return nodeid, fs.client.open(nodeid, flags).fh


@pytest.mark.parametrize("size", [(1 << 20) + 1, 1 << 24, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_a_read_of_more_than_the_agreed_maximum(fs, size):
    nodeid, fh = open_file(fs)
    reply = ask(fs, abi.FUSE_READ, abi.fuse_read_in.pack(fh, 0, size, 0, 0, 0), nodeid)
    assert reply in [(error, b"") for error in (*MALFORMED, errno.E2BIG)] + [(0, b"content")]
    assert ask(fs, abi.FUSE_READDIR, abi.fuse_read_in.pack(fh, 0, size, 0, 0, 0), nodeid)[0]


def test_a_reply_that_does_not_fit_is_an_error(fs):
    nodeid, fh = open_file(fs)
    assert ask(fs, abi.FUSE_LOOKUP, b"file\0", writable=16 + 100)[0]
    assert ask(fs, abi.FUSE_GETATTR, bytes(16), writable=16)[0]
    error, body = ask(fs, abi.FUSE_READ, abi.fuse_read_in.pack(fh, 0, 4096, 0, 0, 0), nodeid, writable=16 + 3)
    assert error or body == b"con"
    assert fs.client.init()  # also with a header's room only


def test_no_room_even_for_a_header(fs):
    for writable in (0, 1, 15):
        message = fs.client.header(abi.FUSE_GETATTR, ROOT, 16) + bytes(16)
        submission = fs.client.device.rings[1].submit(message, writable)
        fs.client.device.rings[1].kick()
        fs.client.device.rings[1].wait([submission])
        assert submission.written == 0


@pytest.mark.parametrize(("claimed", "sent"), [(10, 9), (9, 10), (0, 5), (5, 0), (0xFFFF_FFFF, 5), ((1 << 20) + 1, (1 << 20) + 1)])
def test_a_write_whose_size_is_not_its_datas(fs, claimed, sent):
    nodeid, fh = open_file(fs)
    reply = ask(fs, abi.FUSE_WRITE, abi.fuse_write_in.pack(fh, 0, claimed, 0, 0, 0) + b"x" * sent, nodeid)
    assert reply[0] in MALFORMED
    assert fs.get("file") == b"content"


@pytest.mark.parametrize("offset", [(1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_offsets_beyond_what_a_file_can_have(fs, offset):
    nodeid, fh = open_file(fs)
    client = fs.client
    for body, opcode in (
        (abi.fuse_read_in.pack(fh, offset, 4096, 0, 0, 0), abi.FUSE_READ),
        (abi.fuse_write_in.pack(fh, offset, 5, 0, 0, 0) + b"xxxxx", abi.FUSE_WRITE),
        (abi.fuse_lseek_in.pack(fh, offset, 3), abi.FUSE_LSEEK),
        (abi.fuse_fallocate_in.pack(fh, offset, offset, 0), abi.FUSE_FALLOCATE),
        (abi.fuse_copy_file_range_in.pack(fh, offset, nodeid, fh, offset, offset, 0), abi.FUSE_COPY_FILE_RANGE),
    ):
        reply = client.raw(client.header(opcode, nodeid, len(body)) + body)
        assert reply is not None
        assert reply[0] or opcode == abi.FUSE_READ
    assert fs.get("file") == b"content"


def test_a_directory_offset_that_was_never_given(fs):
    fs.put("file")
    fh = fs.client.opendir(fs.dir).fh
    for offset in (12345, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        reply = ask(fs, abi.FUSE_READDIR, abi.fuse_read_in.pack(fh, offset, 4096, 0, 0, 0))
        assert reply is not None


def test_a_setattr_with_every_bit_and_noise(fs):
    nodeid, _ = open_file(fs)
    rng = random.Random(3)
    for _ in range(100):
        ask(fs, abi.FUSE_SETATTR, rng.randbytes(88), nodeid)


# Requests without reply


def test_property_46_forgets_with_broken_arguments(fs):
    for opcode, body in (
        (abi.FUSE_FORGET, b""),
        (abi.FUSE_FORGET, bytes(7)),
        (abi.FUSE_FORGET, bytes(4000)),
        (abi.FUSE_BATCH_FORGET, b""),
        (abi.FUSE_BATCH_FORGET, struct.pack("<II", 0xFFFF_FFFF, 0)),
        (abi.FUSE_BATCH_FORGET, struct.pack("<II", 3, 0) + struct.pack("<QQ", 0x7777, 1)),
        (abi.FUSE_BATCH_FORGET, struct.pack("<II", 1, 0) + bytes(15)),
        (abi.FUSE_INTERRUPT, b""),
        (abi.FUSE_INTERRUPT, bytes(100)),
    ):
        for queue in (0, 1):
            assert ask(fs, opcode, body, writable=0, queue=queue) is None


def test_an_interrupt_has_no_reply_and_ends_nothing(fs):
    nodeid, fh = open_file(fs)
    read = fs.client.send_read(nodeid, fh, 0, 100)
    fs.client.interrupt(read.unique)
    fs.client.interrupt(0x7777)
    assert fs.client.finish(read) == b"content"


# Many in a row, in pieces


def test_noise_in_any_descriptor_layout(fs):
    """Random messages with a correct header, cut anywhere: every one is answered."""
    rng = random.Random(4)
    opcodes = [opcode for opcode in IMPLEMENTED if opcode not in (abi.FUSE_WRITE, abi.FUSE_SETATTR)]
    for _ in range(500):
        opcode, body = rng.choice(opcodes), rng.randbytes(rng.randrange(120))
        if body and rng.random() < 0.5:
            body += b"name\0"
        layout = Layout(at(*rng.sample(range(1, 160), 4)), at(*rng.sample(range(1, 200), 3)), indirect=rng.random() < 0.5)
        assert ask(fs, opcode, body, rng.choice([ROOT, fs.dir, 0, 99]), layout=layout) is not None
