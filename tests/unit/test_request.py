"""A FUSE request in a chain: however the driver cuts it, the same is read and written, and no length it claims leads astray."""

import errno
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.worker import cut, make_chain, pack_request, randomly_cut
from vfsd.errors import ReplyErrno
from vfsd.wire import fuse_abi as abi
from vfsd.worker import request as module
from vfsd.worker.request import IN_HEADER_BYTES, MAX_ARGUMENT_BYTES, OUT_HEADER_BYTES, Request, advance, iov

WRITE_HEAD = IN_HEADER_BYTES + abi.fuse_write_in.size
SEEDS = st.integers(0, 2**32)


def request_of(data, writable=b"", seed=None):
    rng = random.Random(seed)
    splitting = (lambda part: randomly_cut(bytearray(part), rng)) if seed is not None else (lambda part: cut(bytearray(part), []))
    return Request(make_chain(splitting(data), splitting(writable)))


def decoded(data, seed=None):
    request = request_of(data, seed=seed)
    assert request.has_header
    request.decode()
    return request


def refused(data, seed=None):
    with pytest.raises(ReplyErrno) as caught:
        decoded(data, seed)
    return caught.value.errno


@given(SEEDS, st.integers(0, 2**32 - 1).filter(lambda opcode: opcode != abi.FUSE_WRITE), st.binary(max_size=300), st.binary(max_size=50))
def test_any_cut_of_any_request_is_read_alike(seed, opcode, body, beyond):
    request = decoded(pack_request(opcode, body, nodeid=5, unique=2**64 - 1, uid=10, gid=20) + beyond, seed)
    assert (request.opcode, request.nodeid, request.unique, request.uid, request.gid) == (opcode, 5, 2**64 - 1, 10, 20)
    assert request.body == body, "what the header does not count is not part of it"
    assert request.data == []


@given(SEEDS, st.binary(max_size=500), st.binary(max_size=50))
def test_the_data_of_a_write_is_not_copied(seed, data, beyond):
    arguments = abi.fuse_write_in.pack(1, 2, len(data), 0, 0, 0)
    request = decoded(pack_request(abi.FUSE_WRITE, arguments + data)[:] + beyond, seed)
    assert request.body == arguments
    assert b"".join(request.data) == data
    for view in request.data:
        view[:] = bytes(len(view))
    readable = b"".join(request.chain.readable)
    assert readable[WRITE_HEAD : WRITE_HEAD + len(data)] == bytes(len(data)), "the same memory"
    assert readable[WRITE_HEAD + len(data) :] == beyond


@given(SEEDS, st.integers(0, 2**32 - 1), st.binary(max_size=100))
def test_a_claimed_length_that_does_not_fit_is_einval(seed, length, body):
    data = pack_request(abi.FUSE_LOOKUP, body, length=length)
    if IN_HEADER_BYTES <= length <= len(data):
        assert decoded(data, seed).body == data[IN_HEADER_BYTES:length]
    else:
        assert refused(data, seed) == errno.EINVAL


@given(SEEDS, st.binary(max_size=39))
def test_less_than_a_header_is_none(seed, data):
    assert not request_of(data, seed=seed).has_header


def test_an_empty_chain_has_no_header():
    assert not Request(make_chain([], [])).has_header


@pytest.mark.parametrize("missing", [1, abi.fuse_write_in.size])
def test_a_write_without_its_fixed_part_is_einval(missing):
    body = bytes(abi.fuse_write_in.size - missing)
    assert refused(pack_request(abi.FUSE_WRITE, body)) == errno.EINVAL
    assert refused(pack_request(abi.FUSE_WRITE, body, length=IN_HEADER_BYTES + len(body)) + bytes(100)) == errno.EINVAL


def test_the_longest_arguments_are_taken_and_longer_ones_refused():
    body = bytes(MAX_ARGUMENT_BYTES - IN_HEADER_BYTES)
    assert decoded(pack_request(abi.FUSE_SYMLINK, body), seed=1).body == body
    assert refused(pack_request(abi.FUSE_SYMLINK, body + b"x"), seed=1) == errno.EINVAL
    assert len(b"".join(decoded(pack_request(abi.FUSE_WRITE, body + bytes(500_000)), seed=1).data)) == len(body) + 500_000 - 40


def test_the_guest_may_change_its_memory_and_we_have_our_copy():
    memory = bytearray(pack_request(abi.FUSE_LOOKUP, b"name\0"))
    request = Request(make_chain(cut(memory, [7, 20]), []))
    request.decode()
    memory[:] = b"\xff" * len(memory)
    assert (request.opcode, request.name()) == (abi.FUSE_LOOKUP, b"name")


# --- arguments and names --------------------------------------------------------------------------------------------


def test_arguments_are_as_long_as_they_must_be():
    request = decoded(pack_request(abi.FUSE_OPEN, bytes(8)))
    assert request.arguments(8) == bytes(8)
    with pytest.raises(ReplyErrno) as caught:
        request.arguments(9)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("body", "start", "count", "names"),
    [
        (b"name\0", 0, 1, [b"name"]),
        (b"1234name\0", 4, 1, [b"name"]),
        (b"one\0two\0", 0, 2, [b"one", b"two"]),
        (b"\0\0", 0, 2, [b"", b""]),
        (b"name\0and a security context", 0, 1, [b"name"]),
        (b"name", 0, 1, None),
        (b"", 0, 1, None),
        (b"one\0two", 0, 2, None),
        (b"12", 4, 1, None),
    ],
)
def test_names_end_with_a_nul(body, start, count, names):
    request = decoded(pack_request(abi.FUSE_RENAME, body))
    if names is None:
        with pytest.raises(ReplyErrno) as caught:
            request.names(start, count)
        assert caught.value.errno == errno.EINVAL
    else:
        assert request.names(start, count) == names


# --- the reply ------------------------------------------------------------------------------------------------------


@given(SEEDS, st.binary(max_size=300), st.integers(0, 400), st.sampled_from([0, errno.ENOENT]))
def test_any_cut_of_the_room_is_written_alike(seed, body, room, error):
    request = request_of(pack_request(abi.FUSE_LOOKUP), b"\xee" * room, seed)
    request.unique = 77
    written = request.reply(error, body)
    memory = b"".join(request.chain.writable)
    if room < OUT_HEADER_BYTES:
        assert written == 0
    elif room < OUT_HEADER_BYTES + len(body):
        assert memory[:written] == abi.fuse_out_header.pack(OUT_HEADER_BYTES, -errno.E2BIG, 77)
    else:
        assert memory[:written] == abi.fuse_out_header.pack(OUT_HEADER_BYTES + len(body), -error, 77) + body
    assert memory[written:] == b"\xee" * (room - written)


@given(SEEDS, st.integers(0, 400), st.integers(0, 400))
def test_data_is_placed_behind_the_reply_header(seed, room, most):
    request = request_of(pack_request(abi.FUSE_READ), b"\xee" * room, seed)
    views = request.room(most)
    size = max(0, min(most, room - OUT_HEADER_BYTES))
    assert sum(map(len, views)) == size
    for view in views:
        view[:] = b"d" * len(view)
    written = request.reply(0, placed=size)
    assert written == (OUT_HEADER_BYTES + size if room >= OUT_HEADER_BYTES else 0)
    memory = b"".join(request.chain.writable)
    assert memory[OUT_HEADER_BYTES:written] == b"d" * size
    assert memory[max(written, 0) :] == b"\xee" * (room - written)


def test_more_placed_than_there_is_room_is_e2big():
    request = request_of(pack_request(abi.FUSE_READ), bytes(OUT_HEADER_BYTES + 5))
    assert request.reply(0, placed=6) == OUT_HEADER_BYTES
    assert abi.fuse_out_header.unpack(bytes(request.chain.writable[0][:16]))[1] == -errno.E2BIG


@given(SEEDS, st.binary(min_size=1, max_size=300), st.data())
def test_advancing_leaves_the_rest(seed, data, drawn):
    views = randomly_cut(bytearray(data), random.Random(seed))
    done = drawn.draw(st.integers(0, len(data)))
    assert b"".join(advance(views, done)) == data[done:]


def test_one_system_call_takes_a_thousand_views():
    views = cut(bytearray(3000), [1] * 2999)
    assert iov(views) == views[: module.IOV_MAX]
    assert iov(views[:1024]) == views[:1024]
