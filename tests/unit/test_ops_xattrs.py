"""The guest's side of extended attributes: sizes, headers of two lengths, and the flags that say which."""

import errno
import os

import pytest

from tests.support.broker import Bench
from tests.support.worker import Worker
from vfsd.config import Features
from vfsd.wire import fuse_abi as abi

WITH_ACLS = abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK | abi.FUSE_SETXATTR_EXT


@pytest.fixture(autouse=True)
def in_proc_self_fd(monkeypatch):
    """As each thread of the broker's pool."""
    monkeypatch.chdir("/proc/self/fd")


@pytest.fixture
def make_worker(request, tmp_path):
    def make_worker(features, offered=abi.FUSE_INIT_EXT):
        bench = Bench(tmp_path, xattr=features.xattr, posix_acl=features.posix_acl != "off")
        request.addfinalizer(bench.close)
        worker = Worker(bench, features=features)
        request.addfinalizer(worker.close)
        body = abi.fuse_init_in.pack(7, 38, 1 << 20, offered & 0xFFFFFFFF, offered >> 32)
        assert worker.call(abi.FUSE_INIT, body).errno == 0
        return worker

    return make_worker


@pytest.fixture
def worker(make_worker):
    return make_worker(Features(xattr=True))


def sized(size, name=b""):
    return abi.fuse_getxattr_in.pack(size) + (name + b"\0" if name else b"")


def test_size_0_asks_for_the_length_and_a_small_one_is_erange(worker, tmp_path):
    os.setxattr(tmp_path, "user.x", b"12345")
    for opcode, name, found in ((abi.FUSE_GETXATTR, b"user.x", b"12345"), (abi.FUSE_LISTXATTR, b"", b"user.x\0")):
        assert worker.ok(opcode, sized(0, name)) == abi.fuse_getxattr_out.pack(len(found))
        assert worker.ok(opcode, sized(len(found), name)) == found
        assert worker.ok(opcode, sized(4000, name)) == found
        assert worker.call(opcode, sized(len(found) - 1, name)).errno == errno.ERANGE


def test_nothing_to_list_is_an_empty_answer(worker):
    assert worker.ok(abi.FUSE_LISTXATTR, sized(100)) == b""
    assert worker.ok(abi.FUSE_LISTXATTR, sized(0)) == abi.fuse_getxattr_out.pack(0)


def test_an_old_guests_header_is_shorter(worker, tmp_path):
    head = abi.fuse_setxattr_in.pack(3, os.XATTR_CREATE, 0)[: abi.FUSE_COMPAT_SETXATTR_IN_SIZE]
    worker.ok(abi.FUSE_SETXATTR, head + b"user.x\0abc")
    assert os.getxattr(tmp_path, "user.x") == b"abc"
    assert worker.call(abi.FUSE_SETXATTR, head + b"user.x\0abc").errno == errno.EEXIST
    worker.ok(abi.FUSE_REMOVEXATTR, b"user.x\0")
    assert os.listxattr(tmp_path) == []


def test_the_longer_header_where_it_was_agreed_on(make_worker, tmp_path):
    worker = make_worker(Features(xattr=True, posix_acl="on"), WITH_ACLS)
    worker.ok(abi.FUSE_SETXATTR, abi.fuse_setxattr_in.pack(3, 0, abi.FUSE_SETXATTR_ACL_KILL_SGID) + b"user.x\0abc")
    assert os.getxattr(tmp_path, "user.x") == b"abc"


@pytest.mark.parametrize(
    ("claimed", "rest", "expected"),
    [
        (2, b"user.x\0abc", errno.EINVAL), (4, b"user.x\0abc", errno.EINVAL), (0xFFFFFFFF, b"user.x\0abc", errno.EINVAL),
        (3, b"user.x", errno.EINVAL), (0, b"", errno.EINVAL), (1, b"n" * 256 + b"\0x", errno.ERANGE),
        (65537, b"user.x\0" + bytes(65537), errno.E2BIG),
    ],
)  # fmt: skip
def test_a_value_is_as_long_as_it_says(worker, tmp_path, claimed, rest, expected):
    head = abi.fuse_setxattr_in.pack(claimed, 0, 0)[: abi.FUSE_COMPAT_SETXATTR_IN_SIZE]
    assert worker.call(abi.FUSE_SETXATTR, head + rest).errno == expected
    assert os.listxattr(tmp_path) == []


def test_a_name_that_is_too_long_is_erange_as_on_a_local_file_system(worker):
    assert worker.call(abi.FUSE_GETXATTR, sized(0, b"user." + b"n" * 251)).errno == errno.ERANGE
    assert worker.call(abi.FUSE_REMOVEXATTR, b"user." + b"n" * 251 + b"\0").errno == errno.ERANGE
    assert worker.call(abi.FUSE_GETXATTR, sized(0, b"user." + b"n" * 250)).errno == errno.ENODATA


def test_without_the_option_the_guest_need_not_ask_again(make_worker, tmp_path):
    worker = make_worker(Features())
    for opcode, body in (
        (abi.FUSE_GETXATTR, sized(0, b"user.x")), (abi.FUSE_LISTXATTR, sized(0)), (abi.FUSE_REMOVEXATTR, b"user.x\0"),
        (abi.FUSE_SETXATTR, bytes(8) + b"user.x\0"),
    ):  # fmt: skip
        assert worker.call(opcode, body).errno == errno.ENOSYS
    assert os.listxattr(tmp_path) == []
