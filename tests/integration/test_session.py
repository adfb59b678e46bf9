"""INIT, DESTROY and INIT again: versions, flags, what is refused before, and what is gone afterwards."""

import errno
import os

import pytest

from tests.support.frontend.checks import NOT_FOUND, assert_same, permits, raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import LINUX_INIT_FLAGS, ROOT
from tests.support.frontend.serving import own_directory
from vfsd.wire import fuse_abi as abi


@pytest.fixture
def client(plain_fs):
    return plain_fs.client


@pytest.mark.parametrize(("guest", "answer"), [(27, 27), (31, 31), (36, 36), (38, 38), (45, 45), (46, 45), (0xFFFF_FFFF, 45)])
def test_the_lower_minor_is_announced(plain_fs, client, guest, answer):
    reply = client.init(minor=guest)
    assert (reply.major, reply.minor) == (7, answer)
    assert_same(client.attr(ROOT), plain_fs.served.share)


def test_a_guest_that_is_too_old_is_refused(plain_fs, client):
    plain_fs.served.expect_log(r"the guest speaks FUSE (6|7)\.")
    for version in ({"minor": 26}, {"minor": 0}, {"major": 6}):
        with raises(errno.EPROTO):
            client.init(**version)
    client.init()


def test_a_guest_of_a_higher_major_is_told_ours_and_tries_again(client):
    assert client.init(major=8, minor=0).major == 7
    assert client.init().major == 7


def test_sizes_are_those_of_the_issue(client):
    reply = client.init()
    assert reply.max_write == 1 << 20
    assert reply.max_pages == 256
    assert reply.time_gran == 1
    assert reply.max_readahead <= 1 << 20


@pytest.mark.parametrize("offered", [0, abi.FUSE_INIT_EXT, LINUX_INIT_FLAGS, LINUX_INIT_FLAGS & ~abi.FUSE_INIT_EXT, (1 << 64) - 1])
def test_only_offered_flags_are_taken(client, offered):
    assert client.init(flags=offered).flags & ~offered == 0


def test_the_flags_that_save_round_trips_are_taken(client):
    wanted = (
        abi.FUSE_ASYNC_READ
        | abi.FUSE_BIG_WRITES
        | abi.FUSE_AUTO_INVAL_DATA
        | abi.FUSE_DO_READDIRPLUS
        | abi.FUSE_READDIRPLUS_AUTO
        | abi.FUSE_PARALLEL_DIROPS
        | abi.FUSE_MAX_PAGES
        | abi.FUSE_ATOMIC_O_TRUNC
        | abi.FUSE_SUBMOUNTS
    )
    assert client.init().flags & wanted == wanted


def test_flags_that_are_not_implemented_are_not_taken(client):
    refused = abi.FUSE_POSIX_ACL | abi.FUSE_SECURITY_CTX | abi.FUSE_HANDLE_KILLPRIV
    refused |= abi.FUSE_WRITEBACK_CACHE | abi.FUSE_DONT_MASK | abi.FUSE_SETXATTR_EXT | abi.FUSE_EXPORT_SUPPORT | abi.FUSE_HAS_INODE_DAX
    assert client.init(flags=(1 << 64) - 1).flags & refused == 0


@pytest.mark.parametrize("opcode", [abi.FUSE_LOOKUP, abi.FUSE_GETATTR, abi.FUSE_OPEN, abi.FUSE_STATFS, abi.FUSE_DESTROY, abi.FUSE_CREATE])
def test_requests_outside_a_session_are_eio(client, opcode):
    client.destroy()
    with raises(errno.EIO):
        client.request(opcode, ROOT, b"name\0" + bytes(60), 200)
    client.forget(ROOT)
    client.init()


def test_the_first_request_of_all_must_be_init(serve):
    served = serve(init=False)
    with raises(errno.EIO):
        served.client.getattr(ROOT)
    served.client.forget(ROOT)
    served.client.init()
    assert_same(served.client.attr(ROOT), served.share)


@pytest.mark.parametrize("ending", ["DESTROY and INIT", "INIT alone"])
def test_a_new_session_knows_nothing_of_the_old_one(fs, ending):
    client = fs.client
    fs.put("file", b"content")
    nodeid = fs.lookup(b"file")
    fh, dir_fh = client.open(nodeid).fh, client.opendir(fs.dir).fh
    if ending == "DESTROY and INIT":
        client.destroy()
    client.init()
    for operation in (lambda: client.getattr(nodeid), lambda: client.getattr(fs.dir), lambda: client.lookup(fs.dir, b"file")):
        with raises(*NOT_FOUND):
            operation()
    for operation in (lambda: client.read(nodeid, fh, 0, 10), lambda: client.readdir(fs.dir, dir_fh)):
        with raises(*NOT_FOUND):
            operation()
    assert fs.enter()
    assert client.read_file(fs.lookup(b"file")) == b"content"


def test_a_new_session_gives_all_descriptors_back(fs):
    """Forgets that never come do no harm: the guest stops sending them at unmount."""
    baseline = fs.served.baseline
    for i in range(100):
        fs.put(f"file-{i}")
    for i in range(100):
        nodeid = fs.lookup(b"file-%d" % i)
        fs.client.open(nodeid)
    fs.client.init()
    fs.served.daemon.wait_for_census(baseline)


def test_init_with_requests_in_flight(fs):
    fs.put("file", bytes(1 << 20))
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid).fh
    reads = [fs.client.send_read(nodeid, fh, 0, 65536) for _ in range(30)]
    fs.client.init()
    fs.client.finish_all(reads)
    for read in reads:
        with permits(*NOT_FOUND):  # if INIT overtook it
            assert fs.client.result(read) == bytes(65536)
    assert fs.enter()


def test_many_sessions_one_after_another(plain_fs):
    for _ in range(50):
        plain_fs.enter()
        plain_fs.client.write_file(plain_fs.dir, b"file", b"x")
        plain_fs.client.init()


def test_readonly_refuses_what_would_change_the_share(pool):
    with own_directory(pool, "readonly", Options(readonly=True)) as fs:
        client = fs.client
        fs.put("file", b"content")
        nodeid = fs.lookup(b"file")
        assert client.read_file(nodeid) == b"content"
        for operation in (
            lambda: client.create(fs.dir, b"new"),
            lambda: client.mkdir(fs.dir, b"new"),
            lambda: client.symlink(fs.dir, b"new", b"x"),
            lambda: client.mknod(fs.dir, b"new", 0o100600),
            lambda: client.link(nodeid, fs.dir, b"new"),
            lambda: client.unlink(fs.dir, b"file"),
            lambda: client.rename(fs.dir, b"file", fs.dir, b"new"),
            lambda: client.setattr(nodeid, mode=0o600),
            lambda: client.setattr(nodeid, size=0),
            lambda: client.open(nodeid, os.O_RDWR),
            lambda: client.open(nodeid, os.O_RDONLY | os.O_TRUNC),
            lambda: client.access(nodeid, os.W_OK),
        ):
            with raises(errno.EROFS, errno.EINVAL):
                operation()
        assert os.listdir(fs.host) == ["file"]
        assert fs.get("file") == b"content"
