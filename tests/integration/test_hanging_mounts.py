"""A dead file system inside the share, a real one: requests to it hang in the host's kernel, everything else goes on.

Each test freezes a FUSE file system of its own, waits until that has received what must hang, and thaws it in the end.
"""

import errno
import os
import re
import signal
import stat
from contextlib import ExitStack

import pytest

from tests.support.frontend.checks import assert_same, eventually, eventually_stable
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.fuse_types import Entry
from tests.support.frontend.serving import start
from tests.support.hanging_fs import HangingFs
from vfsd.broker.__main__ import POOL_THREADS
from vfsd.wire import fuse_abi as abi

MORE_THAN_THREADS = POOL_THREADS + 4
HALF = POOL_THREADS // 2
FILES = {b"file": b"of the mount", b"other": b"x" * 5000}

pytestmark = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse")


class Bench:
    """A daemon with two request queues; `mounts` by name, each at share/NAME, and share/home beside them."""

    def __init__(self, served, mounts):
        self.served = served
        self.mounts = mounts
        self.clients = [self.on_queue(1), self.on_queue(2)]
        self.first = self.clients[0]

    def on_queue(self, queue):
        client = FuseClient(self.served.device)
        client.queue = queue
        client._unique = queue << 40
        return client

    def root_of(self, name):
        return self.first.lookup(ROOT, name).nodeid

    def file_in(self, name, file=b"file"):
        return self.first.lookup(self.root_of(name), file).nodeid

    def check_healthy(self):
        """Every kind of request to the healthy part, on both queues."""
        for number, client in enumerate(self.clients):
            name = b"file-%d" % number
            home = client.lookup(ROOT, b"home").nodeid
            assert_same(client.attr(ROOT), self.served.share)
            entry = client.write_file(home, name, b"some data")
            assert client.read_file(entry.nodeid) == b"some data"
            fh = client.open(entry.nodeid, os.O_RDWR).fh
            client.fsync(entry.nodeid, fh)
            assert client.getattr(entry.nodeid, fh).attr.size == 9
            client.release(entry.nodeid, fh)
            client.setattr(entry.nodeid, mode=0o600)
            assert name in [found.name for found in client.list(home, plus=True)]
            assert client.statfs(home).blocks > 0
            client.unlink(home, name)
            client.forget(entry.nodeid)

    def send(self, count, *request, queues=(1, 2)):
        """The same request again and again, in turn on each queue."""
        clients = [self.clients[queue - 1] for queue in queues]
        return [(client, client.send(*request)) for client, _ in zip(clients * count, range(count), strict=False)]


def finish(sent):
    """The replies' bodies."""
    return [client.finish(pending) for client, pending in sent]


def errors_of(sent):
    """The errnos that they were answered with, 0 for none."""
    found = set()
    for client, pending in sent:
        try:
            client.finish(pending)
            found.add(0)
        except OSError as error:
            found.add(error.errno)
    return found


def put_cold(path, data):
    """A file that is not in the page cache, if its file system has one."""
    path.write_bytes(data)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answered(sent):
    """Those that are by now."""
    for client, _pending in sent:
        client.device.rings[client.queue].collect()
    return [(client, pending) for client, pending in sent if pending.submission.done]


@pytest.fixture
def make_bench(tmp_path):
    """Mount file systems of these names and serve them."""
    with ExitStack() as stack:

        def make_bench(*names, **options):
            (tmp_path / "share" / "home").mkdir(parents=True)
            mounts = {}
            for name in names:
                mountpoint = tmp_path / "share" / os.fsdecode(name)
                mountpoint.mkdir(parents=True)
                mounts[name] = HangingFs(mountpoint, FILES)
                stack.callback(mounts[name].close)
            served = start(tmp_path, Options(request_queues=2, **options), queues=3)
            stack.callback(served.close)
            for fs in mounts.values():  # first of all, or nothing of this ends
                stack.callback(fs.disconnect)
            return Bench(served, mounts)

        yield make_bench


@pytest.fixture
def bench(make_bench):
    return make_bench(b"dead")


def name_of(name):
    return name + b"\0"


def reading(opcode, nodeid, fh):
    return opcode, nodeid, abi.fuse_read_in.pack(fh, 0, 4096, 0, 0, 0), 4096


# What hangs: the request to send, given the bench; the operation at which the file system's server then hangs; what is right
# in the end.


def lookup_of_the_mount(_bench):
    return (
        (abi.FUSE_LOOKUP, ROOT, name_of(b"dead"), 128),
        abi.FUSE_GETATTR,
        lambda body: Entry.decode(body).attr.mode == stat.S_IFDIR | 0o755,
    )


def lookup_inside(bench):
    return (
        (abi.FUSE_LOOKUP, bench.root_of(b"dead"), name_of(b"other"), 128),
        abi.FUSE_LOOKUP,
        lambda body: Entry.decode(body).attr.size == 5000,
    )


def getattr_(bench):
    request = abi.FUSE_GETATTR, bench.file_in(b"dead"), abi.fuse_getattr_in.pack(0, 0), abi.fuse_attr_out.size
    return request, abi.FUSE_GETATTR, lambda body: abi.fuse_attr_out.unpack(body)[3] == len(FILES[b"file"])


def getattr_of_an_open_file(bench):
    nodeid = bench.file_in(b"dead")
    fh = bench.first.open(nodeid).fh
    request = abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(abi.FUSE_GETATTR_FH, fh), abi.fuse_attr_out.size
    return request, abi.FUSE_GETATTR, lambda body: abi.fuse_attr_out.unpack(body)[3] == len(FILES[b"file"])


def setattr_(bench):
    body = abi.fuse_setattr_in.pack(abi.FATTR_SIZE, 0, 4, *[0] * 10)
    return (
        (abi.FUSE_SETATTR, bench.file_in(b"dead"), body, abi.fuse_attr_out.size),
        abi.FUSE_SETATTR,
        lambda body: abi.fuse_attr_out.unpack(body)[3] == 4,
    )


def statfs(bench):
    return (
        (abi.FUSE_STATFS, bench.root_of(b"dead"), b"", abi.fuse_statfs_out.size),
        abi.FUSE_STATFS,
        lambda body: body[:8] == (1000).to_bytes(8, "little"),
    )


def open_(bench):
    return (abi.FUSE_OPEN, bench.file_in(b"dead"), abi.fuse_open_in.pack(os.O_RDWR, 0), 16), abi.FUSE_OPEN, lambda body: len(body) == 16


def opendir(bench):
    return (abi.FUSE_OPENDIR, bench.root_of(b"dead"), abi.fuse_open_in.pack(0, 0), 16), abi.FUSE_OPENDIR, lambda body: len(body) == 16


def read(bench):
    nodeid = bench.file_in(b"dead")
    return reading(abi.FUSE_READ, nodeid, bench.first.open(nodeid).fh), abi.FUSE_READ, lambda body: body == FILES[b"file"]


def readdir(bench):
    nodeid = bench.root_of(b"dead")
    return reading(abi.FUSE_READDIR, nodeid, bench.first.opendir(nodeid).fh), abi.FUSE_READDIR, lambda body: b"other" in body


def readdirplus(bench):
    nodeid = bench.root_of(b"dead")
    return reading(abi.FUSE_READDIRPLUS, nodeid, bench.first.opendir(nodeid).fh), abi.FUSE_READDIR, lambda body: b"other" in body


def write(bench):
    nodeid = bench.file_in(b"dead")
    fh = bench.first.open(nodeid, os.O_RDWR).fh
    body = abi.fuse_write_in.pack(fh, 0, 4, 0, 0, 0) + b"data"
    return (abi.FUSE_WRITE, nodeid, body, 8), abi.FUSE_WRITE, lambda body: body == abi.fuse_write_out.pack(4)


def fsync(bench):
    nodeid = bench.file_in(b"dead")
    fh = bench.first.open(nodeid, os.O_RDWR).fh
    return (abi.FUSE_FSYNC, nodeid, abi.fuse_fsync_in.pack(fh, 0)), abi.FUSE_FSYNC, lambda body: body == b""


def flush(bench):
    nodeid = bench.file_in(b"dead")
    fh = bench.first.open(nodeid, os.O_RDWR).fh
    return (abi.FUSE_FLUSH, nodeid, abi.fuse_flush_in.pack(fh, 0)), abi.FUSE_FLUSH, lambda body: body == b""


HANGS = [
    lookup_of_the_mount, lookup_inside, getattr_, getattr_of_an_open_file, setattr_, statfs, open_, opendir, read, readdir, readdirplus,
    write, fsync, flush,
]  # fmt: skip


@pytest.mark.parametrize("make", HANGS)
def test_everything_else_goes_on_and_the_rest_once_it_answers(bench, make):
    request, opcode, is_right = make(bench)
    dead = bench.mounts[b"dead"]
    dead.freeze(opcode)
    sent = bench.send(MORE_THAN_THREADS, *request)
    dead.wait_held(opcode)
    bench.check_healthy()
    closing = int(opcode == abi.FUSE_FLUSH)  # the copy that went to the worker is being closed too
    assert 1 <= dead.held(opcode) <= HALF + closing
    assert answered(sent) == []
    dead.thaw()
    assert all(is_right(body) for body in finish(sent))
    assert bench.served.unexpected_log() == []


def test_the_name_of_a_dead_mount_costs_one_thread(make_bench, handles):
    bench = make_bench(b"dead", handles=handles)
    dead = bench.mounts[b"dead"]
    dead.freeze(abi.FUSE_GETATTR)
    sent = bench.send(3 * POOL_THREADS, abi.FUSE_LOOKUP, ROOT, name_of(b"dead"), 128)
    dead.wait_held(abi.FUSE_GETATTR)
    bench.check_healthy()
    assert dead.held(abi.FUSE_GETATTR) == 1
    dead.thaw()
    assert len({Entry.decode(body).nodeid for body in finish(sent)}) == 1


def test_a_listing_leaves_out_what_is_known_to_hang(bench):
    client, dead = bench.first, bench.mounts[b"dead"]
    fh = client.opendir(ROOT).fh
    dead.freeze(abi.FUSE_GETATTR)
    hanging = bench.send(1, *reading(abi.FUSE_READDIRPLUS, ROOT, fh))
    dead.wait_held(abi.FUSE_GETATTR)
    bench.check_healthy()
    for other in bench.clients:
        listed = {found.name: found for found in other.readdir(ROOT, fh, plus=True)}
        assert listed[b"dead"].entry is None or listed[b"dead"].entry.nodeid == 0
        assert listed[b"home"].entry.nodeid == client.lookup(ROOT, b"home").nodeid
    dead.thaw()
    finish(hanging)
    assert {found.name: found for found in client.readdir(ROOT, fh, plus=True)}[b"dead"].entry.nodeid


def test_two_dead_mounts_and_more_requests_than_threads(make_bench):
    bench = make_bench(b"dead", b"deader")
    requests = []
    for name in bench.mounts:
        nodeid, root = bench.file_in(name), bench.root_of(name)
        fh = bench.first.open(nodeid, os.O_RDWR).fh
        requests.append((abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(0, 0), abi.fuse_attr_out.size))
        requests.append(reading(abi.FUSE_READ, nodeid, fh))
        requests.append((abi.FUSE_LOOKUP, root, name_of(b"other"), 128))
    for number in range(2):
        put_cold(bench.served.share / f"cold-{number}", b"x" * 100_000)
    for dead in bench.mounts.values():
        dead.freeze()
    sent = [one for request in requests for one in bench.send(POOL_THREADS, *request)]
    for dead in bench.mounts.values():
        dead.wait_held(abi.FUSE_GETATTR)
        dead.wait_held(abi.FUSE_READ)
    bench.check_healthy()
    for number, client in enumerate(bench.clients):
        assert client.read_file(client.lookup(ROOT, b"cold-%d" % number).nodeid) == b"x" * 100_000, "an I/O thread is left for it"
    assert (
        sum(dead.held(opcode) for dead in bench.mounts.values() for opcode in (abi.FUSE_GETATTR, abi.FUSE_LOOKUP)) <= POOL_THREADS * 3 // 4
    )
    for dead in bench.mounts.values():
        dead.thaw()
    finish(sent)
    bench.check_healthy()


def test_more_dead_mounts_in_one_directory_than_half_of_the_threads(make_bench):
    names = [b"mounts/%d" % number for number in range(HALF + 1)]
    bench = make_bench(*names)
    directory = bench.first.lookup(ROOT, b"mounts").nodeid
    alive = bench.mounts.pop(names[-1])
    for dead in bench.mounts.values():
        dead.freeze(abi.FUSE_GETATTR)
    sent = []
    for name, dead in bench.mounts.items():
        sent += bench.send(4, abi.FUSE_LOOKUP, directory, name_of(name.removeprefix(b"mounts/")), 128)
        dead.wait_held(abi.FUSE_GETATTR)
    bench.check_healthy()
    assert bench.first.attr(directory).mode == stat.S_IFDIR | 0o755
    for dead in bench.mounts.values():
        dead.thaw()
    assert len({Entry.decode(body).nodeid for body in finish(sent)}) == HALF
    assert bench.first.lookup(directory, b"%d" % HALF).attr.mode == stat.S_IFDIR | 0o755
    assert alive.seen[abi.FUSE_GETATTR]


def test_release_and_forget_never_wait(make_bench):
    """Closing runs the flush method, in the broker and in the worker: neither holds up a guest, nor the files of another mount."""
    bench = make_bench(b"dead", b"alive")
    dead, alive = bench.mounts[b"dead"], bench.mounts[b"alive"]
    nodeid, other = bench.file_in(b"dead"), bench.file_in(b"alive")
    opened = [bench.first.open(nodeid, os.O_RDWR).fh for _ in range(MORE_THAN_THREADS)]
    for client in bench.clients:
        for fh in opened:
            assert client.read(nodeid, fh, 0, 100) == FILES[b"file"]
    dead.freeze()
    for fh in opened:
        bench.first.release(nodeid, fh)
    dead.wait_held(abi.FUSE_FLUSH)
    bench.first.forget(nodeid)
    bench.check_healthy()
    for client in bench.clients:
        before = alive.seen[abi.FUSE_RELEASE]
        fh = client.open(other).fh
        assert client.read(other, fh, 0, 100) == FILES[b"file"]
        client.release(other, fh)
        assert eventually(lambda before=before: alive.seen[abi.FUSE_RELEASE] > before), (
            "closed everywhere, though another mount's closes hang"
        )
    dead.thaw()
    assert eventually(lambda: dead.seen[abi.FUSE_RELEASE] == len(opened)), "every copy of each of them was closed"


def test_a_new_session_begins_while_requests_hang(bench):
    client, dead = bench.first, bench.mounts[b"dead"]
    client.read_file(bench.file_in(b"dead"))
    client.init()
    before = eventually_stable(bench.served.daemon.fd_census)
    nodeid, root = bench.file_in(b"dead"), bench.root_of(b"dead")
    opened = [client.open(nodeid, os.O_RDWR).fh for _ in range(4)]
    dead.freeze()
    sent = bench.send(MORE_THAN_THREADS, abi.FUSE_OPEN, nodeid, abi.fuse_open_in.pack(os.O_RDWR, 0), 16)
    sent += bench.send(4, abi.FUSE_LOOKUP, ROOT, name_of(b"dead"), 128)
    sent += bench.send(4, *reading(abi.FUSE_READ, nodeid, opened[0]))
    sent += bench.send(4, *reading(abi.FUSE_READDIRPLUS, root, 0))
    dead.wait_held(abi.FUSE_OPEN)
    dead.wait_held(abi.FUSE_READ)
    client.init()
    bench.check_healthy()
    dead.wait_held(abi.FUSE_FLUSH)  # the old session's files are being closed
    bench.clients[1].init()
    bench.check_healthy()
    dead.thaw()
    assert errors_of(sent) - {0} <= {errno.ESTALE, errno.EBADF}
    assert client.read_file(bench.file_in(b"dead")) == FILES[b"file"]
    client.init()
    bench.served.daemon.wait_for_census(before)
    assert bench.served.unexpected_log() == []


def test_what_waits_for_a_dead_mount_is_answered_when_its_session_ends(bench):
    nodeid, dead = bench.file_in(b"dead"), bench.mounts[b"dead"]
    dead.freeze(abi.FUSE_STATFS)
    sent = bench.send(MORE_THAN_THREADS, abi.FUSE_STATFS, nodeid, b"", abi.fuse_statfs_out.size)
    dead.wait_held(abi.FUSE_STATFS, HALF)
    bench.check_healthy()
    assert answered(sent) == []
    bench.first.init()
    assert eventually(lambda: len(answered(sent)) == MORE_THAN_THREADS - HALF)
    assert errors_of(answered(sent)) == {errno.ESTALE}
    assert dead.held(abi.FUSE_STATFS) == HALF


@pytest.mark.parametrize("end", ["SIGTERM", "the frontend goes"])
def test_vfsd_ends_in_time_though_requests_hang(bench, end):
    nodeid, dead = bench.file_in(b"dead"), bench.mounts[b"dead"]
    fh = bench.first.open(nodeid).fh
    dead.freeze()
    bench.send(4, abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(0, 0), abi.fuse_attr_out.size)
    bench.send(4, *reading(abi.FUSE_READ, nodeid, fh))
    dead.wait_held(abi.FUSE_GETATTR)
    dead.wait_held(abi.FUSE_READ)
    daemon = bench.served.daemon
    if end == "SIGTERM":
        daemon.process.send_signal(signal.SIGTERM)
    else:
        bench.served.device.close()
    assert daemon.wait() == 0
    assert dead.held(abi.FUSE_GETATTR), "it did not end because the mount answered"
    assert [line for line in daemon.log if re.search(r"broker \(pid \d+\) does not die: it waits in a call of the host's kernel", line)]
