"""Several request queues, a worker process for each: one file system, whichever queue a request takes."""

import os
import threading

import pytest

from tests.support.frontend.checks import NOT_FOUND, assert_same, eventually, raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT, FuseClient
from tests.support.frontend.sequences import QEMU_10
from vfsd.wire import fuse_abi as abi


@pytest.fixture
def served(serve):
    return serve(Options(request_queues=2), queues=3)


def on_queue(served, queue):
    """A client of the same session that uses another queue."""
    client = FuseClient(served.device)
    client.queue = queue
    client._unique = queue << 40
    return client


def test_a_worker_for_each_queue(served):
    roles = [role.split()[0] for role in served.daemon.fd_census()]
    assert roles.count("vfsd.worker") == 2
    assert served.device.queue_num == 3


def test_what_one_queue_opened_every_queue_may_use(served):
    first, second = on_queue(served, 1), on_queue(served, 2)
    entry, opened = first.create(ROOT, b"file")
    second.write(entry.nodeid, opened.fh, 0, b"second")
    assert first.read(entry.nodeid, opened.fh, 0, 10) == b"second"
    assert second.lookup(ROOT, b"file").nodeid == entry.nodeid
    assert_same(second.getattr(entry.nodeid, opened.fh).attr, served.share / "file")
    fh = first.opendir(ROOT).fh
    assert b"file" in [dirent.name for dirent in second.readdir(ROOT, fh)]
    first.releasedir(ROOT, fh)
    second.release(entry.nodeid, opened.fh)
    # RELEASE is answered at once; the other worker hears of it from the broker.
    assert eventually(lambda: errno_of(lambda: first.read(entry.nodeid, opened.fh, 0, 10)) in NOT_FOUND)


def errno_of(operation):
    try:
        operation()
    except OSError as error:
        return error.errno
    return 0


def test_a_release_on_one_queue_closes_the_file_everywhere(served):
    first, second = on_queue(served, 1), on_queue(served, 2)
    entry, opened = first.create(ROOT, b"file")
    for client in (first, second):
        client.write(entry.nodeid, opened.fh, 0, b"x")
    first.unlink(ROOT, b"file")
    first.release(entry.nodeid, opened.fh)
    first.forget(entry.nodeid)
    deleted = "/file (deleted)"
    assert eventually(lambda: not any(deleted in kind for kinds in served.daemon.fd_census().values() for kind in kinds))


def test_init_on_any_queue_wipes_all(served):
    first, second = on_queue(served, 1), on_queue(served, 2)
    entry, opened = first.create(ROOT, b"file")
    second.write(entry.nodeid, opened.fh, 0, b"x")
    second.init()
    for client in (first, second):
        with raises(*NOT_FOUND):
            client.getattr(entry.nodeid)
        with raises(*NOT_FOUND):
            client.read(entry.nodeid, opened.fh, 0, 1)
    assert first.lookup(ROOT, b"file").nodeid != entry.nodeid


def test_both_queues_at_once(served):
    """Reads, writes and names on both queues, all in flight together."""
    clients = [on_queue(served, 1), on_queue(served, 2)]
    files = [client.create(ROOT, b"file-%d" % client.queue) for client in clients]
    for round_number in range(20):
        pending = []
        for client, (entry, opened) in zip(clients, files, strict=True):
            data = bytes([round_number]) * 4096
            pending.append([client.send_write(entry.nodeid, opened.fh, i * 4096, data, kick=False) for i in range(30)])
            client.device.rings[client.queue].kick()
        for client, requests in zip(clients, pending, strict=True):
            client.finish_all(requests)
            assert all(client.result(request) == abi.fuse_write_out.pack(4096) for request in requests)
    for client in clients:
        assert (served.share / f"file-{client.queue}").read_bytes() == bytes([19]) * 4096 * 30


def test_concurrent_first_lookups_of_one_name_give_one_nodeid(served):
    clients = [on_queue(served, 1), on_queue(served, 2)]
    for i in range(50):
        name = b"file-%d" % i
        (served.share / name.decode()).touch()
        pending = [client.send(abi.FUSE_LOOKUP, ROOT, name + b"\0", 128) for client in clients for _ in range(4)]
        clients[0].finish_all(pending)
        nodeids = {clients[0].result(request)[:8] for request in pending}
        assert len(nodeids) == 1
        nodeid = int.from_bytes(nodeids.pop(), "little")
        clients[0].forget(nodeid, len(pending) - 1)
        assert clients[0].attr(nodeid).size == 0  # one lookup is left
        clients[0].forget(nodeid, 1)


def test_threads_on_both_queues_with_names(served):
    """Each queue's driver in a thread of its own, as two CPUs of a guest."""
    failures = []

    def work(queue):
        try:
            client = on_queue(served, queue)
            directory = client.mkdir(ROOT, b"dir-%d" % queue).nodeid
            for i in range(100):
                entry = client.write_file(directory, b"%d" % i, b"x" * i)
                assert client.read_file(entry.nodeid) == b"x" * i
                if i % 3 == 0:
                    client.unlink(directory, b"%d" % i)
        except BaseException as error:  # noqa: BLE001  a thread's failure is the test's
            failures.append(error)

    threads = [threading.Thread(target=work, args=(queue,)) for queue in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for queue in (1, 2):
        assert len(os.listdir(served.share / f"dir-{queue}")) == 66


def test_stop_and_cont_with_two_workers(served):
    for _ in range(3):
        QEMU_10.stop(served.device)
        QEMU_10.cont(served.device)
        for queue in (1, 2):
            assert_same(served.client.attr(ROOT, queue=queue), served.share)
