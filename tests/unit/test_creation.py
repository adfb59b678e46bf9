"""What stands behind the names of a creation: security contexts and groups, as two generations of kernels send them."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import ReplyErrno
from vfsd.wire import broker_messages as wire
from vfsd.wire import fuse_abi as abi
from vfsd.worker.creation import Label, decode_extensions

NAME, VALUE = b"security.selinux", b"system_u:object_r:etc_t:s0\0"


def padded(data):
    return data.ljust(abi.FUSE_REC_ALIGN(len(data)), b"\0")


def contexts(*labels, count=None, size=None):
    """A struct fuse_secctx_header and its contexts, as get_security_context() of fs/fuse/dir.c lays them out."""
    body = b"".join(padded(abi.fuse_secctx.pack(len(value)) + name + b"\0" + value) for name, value in labels)
    total = abi.fuse_secctx_header.size + len(body)
    return abi.fuse_secctx_header.pack(total if size is None else size, len(labels) if count is None else count) + body


def groups(*gids, count=None):
    """A struct fuse_supp_groups behind its header, as get_create_supp_group() of Linux 6.3 and later."""
    body = struct.pack(f"<I{len(gids)}I", len(gids) if count is None else count, *gids)
    total = abi.FUSE_REC_ALIGN(abi.fuse_ext_header.size + len(body))
    return padded(abi.fuse_ext_header.pack(total, abi.FUSE_EXT_GROUPS) + body)


def test_linux_6_1_sends_one_context_or_a_header_that_says_none():
    assert decode_extensions(b"") == ([], Label())
    assert decode_extensions(contexts((NAME, VALUE))) == ([], Label(NAME, VALUE))
    assert decode_extensions(contexts()) == ([], Label())


def test_linux_6_3_sends_a_list_of_extensions():
    assert decode_extensions(contexts((NAME, VALUE)) + groups(27)) == ([27], Label(NAME, VALUE))
    assert decode_extensions(contexts() + groups(27)) == ([27], Label())
    assert decode_extensions(groups(27)) == ([27], Label())
    assert decode_extensions(groups(0, 1, 2**32 - 1)) == ([0, 1, 2**32 - 1], Label())


@pytest.mark.parametrize("length", range(1, 18))
def test_values_of_any_length_are_found_behind_their_name(length):
    label = Label(b"security." + b"n" * (length % 5), b"v" * length)
    assert decode_extensions(contexts(label) + groups(5)) == ([5], label)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\0", errno.EINVAL),
        (bytes(7), errno.EINVAL),
        (bytes(8), errno.EINVAL),  # smaller than its own header
        (contexts((NAME, VALUE))[:-8], errno.EINVAL),
        (contexts((NAME, VALUE), size=7), errno.EINVAL),
        (contexts((NAME, VALUE), size=0xFFFFFFFF), errno.EINVAL),
        (contexts((NAME, VALUE), (NAME, VALUE)), errno.EINVAL),
        (contexts((NAME, VALUE), count=31), errno.EINVAL),
        (contexts(count=1), errno.EINVAL),
        (contexts((b"", VALUE)), errno.EINVAL),
        (contexts((NAME, b"")), errno.EINVAL),
        (abi.fuse_secctx_header.pack(32, 1) + abi.fuse_secctx.pack(4) + b"n" * 16, errno.EINVAL),  # no NUL
        (abi.fuse_secctx_header.pack(24, 1) + abi.fuse_secctx.pack(400) + b"n\0" + bytes(6), errno.EINVAL),
        (contexts((b"n" * (wire.MAX_NAME_BYTES + 1), VALUE)), errno.E2BIG),
        (contexts((NAME, b"v" * (wire.MAX_LABEL_BYTES + 1))), errno.E2BIG),
        (groups(1, count=2**32 - 1), errno.EINVAL),
        (groups(count=4), errno.EINVAL),
        (abi.fuse_ext_header.pack(8, abi.FUSE_EXT_GROUPS), errno.EINVAL),
        (abi.fuse_ext_header.pack(8, 33), errno.EINVAL),
        (abi.fuse_ext_header.pack(8, 0xFFFFFFFF), errno.EINVAL),
    ],
)
def test_what_does_not_add_up_is_refused(data, expected):
    with pytest.raises(ReplyErrno) as raised:
        decode_extensions(data)
    assert raised.value.errno == expected


@given(st.one_of(st.binary(max_size=80), st.builds(lambda size, kind, rest: struct.pack("<II", size, kind) + rest, st.integers(0, 60), st.integers(0, 34), st.binary(max_size=60))))  # fmt: skip
def test_any_bytes_are_extensions_or_refused(data):
    try:
        found, label = decode_extensions(data)
    except ReplyErrno:
        return
    assert len(label.name) <= wire.MAX_NAME_BYTES
    assert len(label.value) <= wire.MAX_LABEL_BYTES
    assert len(found) <= wire.MAX_GROUPS


@pytest.mark.parametrize(("count", "fits"), [(wire.MAX_GROUPS, True), (wire.MAX_GROUPS + 1, False)])
def test_as_many_groups_as_a_message_to_the_broker_takes(count, fits):
    """One more in that message would be this worker's breach, and its end."""
    body = struct.pack("<I", count) + bytes(4 * count)
    data = struct.pack("<II", 8 + len(body), 32) + body
    if fits:
        assert len(decode_extensions(data).groups) == count
    else:
        with pytest.raises(ReplyErrno) as raised:
            decode_extensions(data)
        assert raised.value.errno == errno.EINVAL
