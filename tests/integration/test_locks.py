"""Locks of the guest are locks on the host: between owners, between daemons, and with programs of the host."""

import errno
import os
from contextlib import ExitStack

import pytest

from tests.support.frontend.checks import eventually, raises
from tests.support.frontend.daemon import Daemon, Options
from tests.support.frontend.device import Device
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.fuse_locks import LAST, READ, UNLOCK, WRITE, Found, Locker, held_by_host, host_can
from tests.support.frontend.sequences import QEMU_10
from vfsd.wire import fuse_abi as abi

TRY_LOCKF = "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, {length}, {start})"
TRY_FLOCK = "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"


def locker(client, nodeid, owner, flags=os.O_RDWR):
    return Locker(client, nodeid, client.open(nodeid, flags).fh, owner)


def locker_in(fs, owner, flags=os.O_RDWR):
    if not os.path.exists(fs.path("file")):
        fs.put("file", bytes(100))
    return locker(fs.client, fs.lookup(b"file"), owner, flags)


@pytest.fixture
def two(fs):
    """Two processes of the guest, each with the file open."""
    return locker_in(fs, 1), locker_in(fs, 2)


def still_waits(pending, client):
    """Requests that came later have been answered meanwhile."""
    for _ in range(3):
        client.getattr(ROOT)
    return not pending.submission.done


# POSIX locks


def test_two_owners_exclude_each_other_where_their_ranges_meet(two):
    first, second = two
    first.lock(WRITE, 10, 19)
    with raises(errno.EAGAIN):
        second.lock(WRITE, 19, 30)
    with raises(errno.EAGAIN):
        second.lock(READ, 0, LAST)
    second.lock(WRITE, 20, LAST)
    second.lock(READ, 0, 9)
    first.unlock(10, 14)
    second.lock(WRITE, 10, 14)
    first.lock(WRITE, 15, 19)  # its own


def test_readers_share(two):
    first, second = two
    first.lock(READ)
    second.lock(READ)
    with raises(errno.EAGAIN):
        second.lock(WRITE)
    first.unlock()
    second.lock(WRITE)


def test_what_is_in_the_way_is_told_and_ones_own_lock_is_not(two):
    first, second = two
    assert first.test(WRITE) == Found(0, LAST, UNLOCK, 0)
    first.lock(WRITE, 10, 19)
    assert second.test(READ) == Found(10, 19, WRITE, 0)
    assert second.test(READ, 20, 30).kind == UNLOCK
    assert first.test(WRITE).kind == UNLOCK
    second.lock(READ, 50, LAST)
    assert first.test(WRITE) == Found(50, LAST, READ, 0)


def test_a_close_drops_all_locks_of_its_owner_and_no_other(fs, two):
    first, second = two
    again = locker_in(fs, first.owner)
    first.lock(WRITE, 0, 9)
    again.lock(WRITE, 10, 19)
    second.lock(WRITE, 20, 29)
    again.flush()
    second.lock(WRITE, 0, 19)
    assert first.test(READ) == Found(0, 29, WRITE, 0)


def test_locks_that_no_close_dropped_go_with_the_open_file(fs, two):
    """As those that F_OFD_SETLK took in the guest: their owner is the open file."""
    first, second = two
    first.lock(WRITE)
    first.release()
    assert eventually(lambda: second.test(WRITE).kind == UNLOCK)
    second.lock(WRITE)


def test_forgetting_the_inode_drops_its_locks(fs, two):
    first, _second = two
    first.lock(WRITE)
    fs.client.forget(first.nodeid, 2)
    assert eventually(lambda: host_can(fs.path("file"), TRY_LOCKF.format(start=0, length=0)))


def test_the_session_ends_with_all_its_locks(fs, two):
    first, second = two
    first.lock(WRITE, 0, 9)
    second.lock(WRITE, flock=True)
    fs.client.destroy()
    assert host_can(fs.path("file"), TRY_LOCKF.format(start=0, length=0))
    assert host_can(fs.path("file"), TRY_FLOCK)
    fs.client.init()


@pytest.mark.parametrize(
    ("kind", "start", "end", "number"),
    [(3, 0, 9, errno.EINVAL), (1 << 31, 0, 9, errno.EINVAL), (WRITE, 9, 8, errno.EINVAL), (WRITE, 0, 1 << 63, errno.EINVAL)],
)
def test_a_range_or_kind_that_is_none(two, kind, start, end, number):
    for ask in (two[0].lock, two[0].test, lambda *lock: two[0].client.finish(two[0].send(*lock))):
        with raises(number):
            ask(kind, start, end)


def test_asking_who_holds_a_flock(two):
    body = two[0]._body(WRITE, 0, LAST, flock=True)
    with raises(errno.EINVAL):
        two[0].client.request(abi.FUSE_GETLK, two[0].nodeid, body, abi.fuse_lk_out.size)


def test_locks_of_a_file_that_is_not_open(two):
    first, _second = two
    for flock in (False, True):
        with raises(errno.EBADF):
            Locker(first.client, first.nodeid, first.fh + 1000, 1).lock(WRITE, flock=flock)


# flock


def test_flock_belongs_to_the_open_file(fs, two):
    first, second = two
    first.lock(WRITE, flock=True)
    with raises(errno.EAGAIN):
        second.lock(READ, flock=True)
    assert not host_can(fs.path("file"), TRY_FLOCK)
    second.lock(WRITE)  # the other kind
    first.flush()
    with raises(errno.EAGAIN):
        second.lock(READ, flock=True)
    first.release()
    assert eventually(lambda: _gets(second, READ, flock=True))


def _gets(one, kind, **how):
    try:
        one.lock(kind, **how)
    except BlockingIOError:
        return False
    return True


def test_flock_is_shared_by_readers_and_converted(two):
    first, second = two
    first.lock(READ, flock=True)
    second.lock(READ, flock=True)
    with raises(errno.EAGAIN):
        first.lock(WRITE, flock=True)
    second.unlock(flock=True)
    first.lock(WRITE, flock=True)


# With the host


@pytest.mark.parametrize("how", ["lockf", "flock"])
def test_a_lock_of_the_host_stops_the_guest(fs, two, how):
    first, _second = two
    flock = how == "flock"
    with held_by_host(fs.path("file"), how):
        with raises(errno.EAGAIN):
            first.lock(READ, flock=flock)
        if not flock:
            assert first.test(READ) == Found(5, 14, WRITE, 0)
            first.lock(WRITE, 15, 20)
    first.lock(WRITE, flock=flock)


def test_a_lock_of_the_guest_stops_the_host(fs, two):
    first, second = two
    first.lock(WRITE, 10, 19)
    assert not host_can(fs.path("file"), TRY_LOCKF.format(start=19, length=1))
    assert host_can(fs.path("file"), TRY_LOCKF.format(start=20, length=1))
    second.lock(READ, flock=True)
    assert not host_can(fs.path("file"), TRY_FLOCK)
    first.unlock()
    second.unlock(flock=True)
    assert host_can(fs.path("file"), TRY_LOCKF.format(start=0, length=0))
    assert host_can(fs.path("file"), TRY_FLOCK)


# Waiting


@pytest.mark.parametrize(("how", "flock"), [("unlock", False), ("unlock", True), ("flush", False), ("release", False), ("release", True)])
def test_who_waits_gets_the_lock_when_it_is_free(two, how, flock):
    first, second = two
    first.lock(WRITE, flock=flock)
    pending = second.send(WRITE, flock=flock)
    assert still_waits(pending, first.client)
    first.unlock(flock=flock) if how == "unlock" else getattr(first, how)()
    second.client.finish(pending)
    if how != "release":
        with raises(errno.EAGAIN):
            first.lock(READ, flock=flock)


@pytest.mark.parametrize("how", ["lockf", "flock"])
def test_who_waits_for_the_host_gets_the_lock(fs, two, how):
    flock = how == "flock"
    with held_by_host(fs.path("file"), how):
        pending = two[0].send(WRITE, flock=flock)
        assert still_waits(pending, fs.client)
    fs.client.finish(pending)
    assert not host_can(fs.path("file"), TRY_FLOCK if flock else TRY_LOCKF.format(start=0, length=1))


def test_a_lock_that_is_free_is_not_waited_for(two):
    two[0].client.finish(two[0].send(WRITE))
    two[1].client.finish(two[1].send(WRITE, flock=True))


def test_the_session_ends_what_waits(fs, two):
    first, second = two
    first.lock(WRITE)
    pending = second.send(WRITE)
    assert still_waits(pending, fs.client)
    fs.client.destroy()
    with raises(errno.ESTALE):
        fs.client.finish(pending)
    fs.client.init()


def test_a_quarter_of_the_queue_may_wait_and_nothing_else_is_stopped(serve):
    served = serve(device_options={"ring_size": 1024})
    client = served.client
    (served.share / "file").write_bytes(bytes(100))
    nodeid = client.lookup(ROOT, b"file").nodeid
    holder = locker(client, nodeid, 0)
    holder.lock(WRITE)
    waiters = [Locker(client, nodeid, holder.fh, owner) for owner in range(1, 258)]
    pending = [waiter.send(READ) for waiter in waiters]
    with raises(errno.ENOLCK):
        client.finish(pending[-1])
    assert not any(one.submission.done for one in pending[:-1])
    for number in range(50):
        client.write_file(ROOT, b"%d" % number, b"data")
    assert not any(one.submission.done for one in pending[:-1])
    holder.unlock()
    client.finish_all(pending[:-1])
    for one in pending[:-1]:
        client.result(one)
    with raises(errno.EAGAIN):
        holder.lock(WRITE)
    for waiter in waiters[:-1]:
        waiter.flush()
    holder.lock(WRITE)


@pytest.mark.parametrize("flock", [False, True], ids=["posix", "flock"])
def test_a_queue_that_is_stopped_waits_for_no_lock(serve, flock):
    """And nobody gets the lock afterwards."""
    served = serve()
    (served.share / "file").write_bytes(bytes(100))
    nodeid = served.client.lookup(ROOT, b"file").nodeid
    first, second = locker(served.client, nodeid, 1), locker(served.client, nodeid, 2)
    first.lock(WRITE, flock=flock)
    pending = [second.send(WRITE, flock=flock) for _ in range(5)]
    assert still_waits(pending[0], served.client)
    QEMU_10.stop(served.device)
    served.device.rings[1].collect()
    for one in pending:
        with raises(errno.EAGAIN):
            served.client.result(one)
    QEMU_10.cont(served.device)
    first.unlock(flock=flock)
    locker(served.client, nodeid, 3).lock(WRITE, flock=flock)


# Several queues, several daemons


def on_queue(served, queue):
    client = FuseClient(served.device)
    client.queue = queue
    client._unique = queue << 40
    return client


def test_a_close_through_another_queue_drops_the_locks(serve):
    served = serve(Options(request_queues=2), queues=3)
    (served.share / "file").write_bytes(bytes(100))
    nodeid = served.client.lookup(ROOT, b"file").nodeid
    for queue in (1, 2, 1):
        first, second = locker(on_queue(served, queue), nodeid, 1), locker(served.client, nodeid, 2)
        first.client.read(nodeid, first.fh, 0, 10)
        served.client.read(nodeid, first.fh, 0, 10)  # both workers have the file open
        first.lock(WRITE)
        first.flush(queue=3 - queue)
        second.lock(WRITE)
        second.flush(queue=3 - queue)
        first.release()


def test_a_flock_ends_with_the_file_though_another_worker_has_a_copy(serve):
    served = serve(Options(request_queues=2), queues=3)
    (served.share / "file").write_bytes(bytes(100))
    nodeid = served.client.lookup(ROOT, b"file").nodeid
    first = locker(on_queue(served, 1), nodeid, 1)
    on_queue(served, 2).read(nodeid, first.fh, 0, 10)
    first.lock(WRITE, flock=True)
    first.release()
    assert eventually(lambda: host_can(served.share / "file", TRY_FLOCK))


@pytest.fixture
def other_guest(serve, tmp_path):
    """Two daemons on one directory, a guest at each."""
    one = serve()
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(one.share, tmp_path / "other.sock"))
        device = stack.enter_context(Device(str(daemon.socket)))
        device.attach(QEMU_10)
        client = FuseClient(device)
        client.init()
        yield one, client


@pytest.mark.parametrize(
    ("how", "flock"),
    [("unlock", False), ("unlock", True), ("flush", False), ("release", False), ("release", True), ("destroy", False), ("destroy", True)],
)
def test_guests_of_two_daemons_wait_for_each_other(other_guest, how, flock):
    served, client = other_guest
    (served.share / "file").write_bytes(bytes(100))
    first = locker(served.client, served.client.lookup(ROOT, b"file").nodeid, 1)
    second = locker(client, client.lookup(ROOT, b"file").nodeid, 1)
    first.lock(WRITE, 0, LAST, flock=flock)
    with raises(errno.EAGAIN):
        second.lock(READ, flock=flock)
    pending = second.send(WRITE, flock=flock)
    assert still_waits(pending, client)
    {"unlock": lambda: first.unlock(flock=flock), "flush": first.flush, "release": first.release, "destroy": served.client.destroy}[how]()
    client.finish(pending)


# Options, kinds of files


@pytest.mark.parametrize(("option", "flock"), [("--no-posix-lock", False), ("--no-flock", True)])
def test_a_kind_of_lock_that_is_switched_off_is_refused(serve, option, flock):
    """Its INIT flag is agreed on all the same: the guest would lock by itself, and nobody else would see it."""
    served = serve(Options(extra=(option,)))
    agreed = served.client.init().flags
    assert agreed & (abi.FUSE_POSIX_LOCKS | abi.FUSE_FLOCK_LOCKS) == abi.FUSE_POSIX_LOCKS | abi.FUSE_FLOCK_LOCKS
    (served.share / "file").write_bytes(bytes(100))
    one = locker(served.client, served.client.lookup(ROOT, b"file").nodeid, 1)
    with raises(errno.ENOLCK):
        one.lock(WRITE, flock=flock)
    with raises(errno.ENOLCK):
        one.client.finish(one.send(WRITE, flock=flock))
    if not flock:
        with raises(errno.ENOLCK):
            one.test(WRITE)
    one.lock(WRITE, flock=not flock)


def test_a_read_only_share_takes_read_locks(serve):
    served = serve(Options(readonly=True))
    (served.share / "file").write_bytes(bytes(100))
    nodeid = served.client.lookup(ROOT, b"file").nodeid
    first, second = locker(served.client, nodeid, 1, os.O_RDONLY), locker(served.client, nodeid, 2, os.O_RDONLY)
    first.lock(READ)
    second.lock(READ)
    assert not host_can(served.share / "file", TRY_LOCKF.format(start=0, length=1))
    with raises(errno.EBADF):
        first.lock(WRITE)
    first.lock(WRITE, flock=True)


def test_a_file_that_is_being_executed_takes_read_locks(fs):
    path = fs.put("program", mode=0o755)
    with open("/bin/sleep", "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    pid = os.posix_spawn(path, [b"sleep", b"600"], {})
    try:
        one = locker(fs.client, fs.lookup(b"program"), 1, os.O_RDONLY)
        one.lock(READ)
        assert locker(fs.client, one.nodeid, 2, os.O_RDONLY).test(WRITE) == Found(0, LAST, READ, 0)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_descriptors_of_lock_owners_count_as_the_guests(serve):
    """And a guest that takes too many hears it, and goes on."""
    served = serve(Options(extra=("--rlimit-nofile=256",)))
    (served.share / "file").write_bytes(bytes(100))
    nodeid = served.client.lookup(ROOT, b"file").nodeid
    fh = served.client.open(nodeid, os.O_RDWR).fh
    owners = [Locker(served.client, nodeid, fh, number) for number in range(200)]
    taken = []
    for owner in owners:
        try:
            owner.lock(READ)
        except OSError as error:
            assert error.errno == errno.ENOLCK  # noqa: PT017  # the loop goes on
            break
        taken.append(owner)
    assert 10 < len(taken) < len(owners)
    with raises(errno.ENFILE):
        served.client.open(nodeid)
    for owner in taken:
        owner.flush()
    for owner in owners[:10]:
        owner.lock(READ)
