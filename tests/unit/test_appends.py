"""Appends that a worker died of: made once, or answered EIO, but never made twice."""

import errno
import os
import threading

import pytest

from tests.support.broker import Bench
from tests.support.worker import Worker, pack_request
from vfsd.sandbox import filecalls
from vfsd.wire import fuse_abi as abi
from vfsd.wire.inflight import TABLE_BYTES, InflightTable

BEFORE, DATA = b"what stood there;", b"what is appended" * 400


class Died(BaseException):
    """The worker was killed."""


class Scene:
    """A worker that dies while it appends, and what its successor makes of that."""

    def __init__(self, path, flags):
        self.path = path / "file"
        self.path.write_bytes(BEFORE)
        self.bench = Bench(path)
        self.worker = Worker(self.bench)
        self.worker.begin()
        self.worker.inflight = InflightTable(memoryview(bytearray(TABLE_BYTES)))
        self.worker.inflight.begin(1, 64, 0, 0)
        self.nodeid = self.worker.lookup(b"file")
        self.fh = self.worker.open(self.nodeid, flags | os.O_APPEND)

    def request(self, data=DATA, fh=None):
        head = abi.fuse_write_in.pack(self.fh if fh is None else fh, 0, len(data), 0, 0, os.O_APPEND)
        return pack_request(abi.FUSE_WRITE, head + data, nodeid=self.nodeid)

    def die(self, monkeypatch, written):
        """Append until the worker dies in pwritev2, after so many bytes; the head."""
        real = os.pwritev

        def dying(fd, views, offset, flags=0):
            data = b"".join(views)[:written]
            if data:
                real(fd, [data], offset, flags)
            raise Died

        monkeypatch.setattr(os, "pwritev", dying)
        with pytest.raises(Died):
            self.worker.submit(self.request())
        monkeypatch.undo()
        head = self.worker._next_head
        self.worker.queue.chains.pop(head).release()
        return head

    def again(self, head, **changed):
        """The successor's answer, by another descriptor of the file."""
        self.worker.fs.files.clear()
        return self.worker.finish(self.worker.submit_again(head, self.request(**changed)))

    def close(self):
        assert len(self.bench.share.files) == 1, "what was opened to find out is closed"
        self.worker.close()
        self.worker.inflight.close()
        self.bench.close()


@pytest.fixture(params=[os.O_WRONLY, os.O_RDWR], ids=["for writing only", "for both"])
def scene(request, tmp_path):
    scene = Scene(tmp_path, request.param)
    yield scene
    scene.close()


def written(reply):
    assert reply.errno == 0, errno.errorcode[reply.errno]
    return abi.fuse_write_out.unpack(reply.body)[0]


@pytest.mark.parametrize("length", [0, 1, 4096, len(DATA) - 1, len(DATA)])
def test_an_append_is_completed_whatever_part_of_it_was_made(scene, monkeypatch, length):
    head = scene.die(monkeypatch, length)
    assert scene.path.read_bytes() == BEFORE + DATA[:length]
    assert written(scene.again(head)) == len(DATA)
    assert scene.path.read_bytes() == BEFORE + DATA


def test_what_others_appended_behind_it_stays(scene, monkeypatch):
    head = scene.die(monkeypatch, len(DATA))
    with scene.path.open("ab") as file:
        file.write(b"of others")
    assert written(scene.again(head)) == len(DATA)
    assert scene.path.read_bytes() == BEFORE + DATA + b"of others"


@pytest.mark.parametrize(("length", "others"), [(0, b"of others"), (100, b"of others"), (0, DATA[:-1] + b"!")])
def test_an_append_is_not_guessed_at_when_others_appended(scene, monkeypatch, length, others):
    head = scene.die(monkeypatch, length)
    with scene.path.open("ab") as file:
        file.write(others)
    there = scene.path.read_bytes()
    assert scene.again(head).errno == errno.EIO
    assert scene.path.read_bytes() == there
    assert any("whether it was made cannot be told: others have written" in line for line in scene.worker.log.errors)


def test_a_file_that_was_cut_meanwhile_cannot_tell(scene, monkeypatch):
    head = scene.die(monkeypatch, 100)
    os.truncate(scene.path, 3)
    assert scene.again(head).errno == errno.EIO
    assert scene.path.read_bytes() == BEFORE[:3]


def test_a_request_that_the_guest_has_changed_is_not_made(scene, monkeypatch):
    head = scene.die(monkeypatch, 100)
    assert scene.again(head, data=DATA + b"more").errno == errno.EIO
    assert scene.path.read_bytes() == BEFORE + DATA[:100]


def test_the_ring_thread_does_not_wait_for_what_is_read_to_find_out(scene, monkeypatch):
    """Nor is the file left open that was opened for it: see Scene.close."""
    threads = []

    def failing(*_args):
        threads.append(threading.current_thread())
        raise OSError(errno.EUCLEAN, "a bad block")

    head = scene.die(monkeypatch, 100)
    monkeypatch.setattr(os, "preadv", failing)
    assert scene.again(head).errno == errno.EUCLEAN
    assert threads
    assert threading.current_thread() not in threads


def test_a_worker_that_died_before_it_could_append_leaves_it_to_the_next(scene, monkeypatch):
    def dying(_fd):
        raise Died

    monkeypatch.setattr(filecalls, "fstat", dying)
    with pytest.raises(Died):
        scene.worker.submit(scene.request())
    monkeypatch.undo()
    head = scene.worker._next_head
    scene.worker.queue.chains.pop(head).release()
    assert written(scene.again(head)) == len(DATA)
    assert scene.path.read_bytes() == BEFORE + DATA


def test_an_append_that_nobody_died_of_is_made_as_ever(scene):
    for _ in range(2):
        assert written(scene.worker.finish(scene.worker.submit(scene.request()))) == len(DATA)
    assert scene.path.read_bytes() == BEFORE + DATA + DATA
