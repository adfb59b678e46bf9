"""Workers killed at any moment under load: what the guest did is there, done once, and nothing else is.

The guest's requests are a fixed program; the moments of the kills are drawn from a fixed seed, but what a worker is at then
depends on the machine: each run tries other ones.
"""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.frontend.checks import NOT_FOUND, raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import REPLACED, worker_pids
from vfsd.wire import fuse_abi as abi

KILLS = 400 if os.environ.get("VFSD_TEST_FULL") else 8
MKDIR = abi.fuse_mkdir_in.pack(0o755, 0)
LEAST_PROGRESS = 8  # requests between two deaths: fewer, and a request is in flight at two of them, and answered EIO


class Killer:
    """Kills whichever worker serves. The test says when a request was answered: that is what time is counted by."""

    def __init__(self, served, seed):
        self.served = served
        self.rng = random.Random(seed)
        self.kills = 0
        self.over = False
        self._answers = 0
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run)

    def answered(self):
        with self._news:
            self._answers += 1
            self._news.notify()

    def _run(self):
        try:
            while self.kills < KILLS and not self.over:
                with self._news:
                    enough = self._answers + LEAST_PROGRESS + self.rng.randrange(8)
                    self._news.wait_for(lambda enough=enough: self._answers >= enough or self.over)
                threading.Event().wait(self.rng.random() * 0.01)  # anywhere in the course of a request
                os.kill(worker_pids(self.served)[0], signal.SIGKILL)
                self.kills += 1
        finally:
            self.over = True

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            with self._news:
                self.over = True
                self._news.notify()
            self._thread.join()


@pytest.fixture
def served(serve):
    served = serve(Options())
    served.expect_log(REPLACED)
    return served


@pytest.fixture
def killer(served, request):
    return Killer(served, seed=len(request.node.name))


def test_names_counts_and_open_files_are_what_the_guest_made_of_them(served, killer):
    client, share = served.client, served.share

    def done(answer):
        killer.answered()
        return answer

    with killer.at_work():
        number = 0
        while not killer.over:
            number += 1
            name = b"%d" % number
            directory = done(client.mkdir(ROOT, name + b".d"))
            entry, opened = done(client.create(ROOT, name, flags=os.O_RDWR | os.O_EXCL))
            data = os.urandom(3000)
            assert done(client.write(entry.nodeid, opened.fh, 0, data)) == 3000
            assert done(client.link(entry.nodeid, ROOT, name + b".l")).nodeid == entry.nodeid
            done(client.rename(ROOT, name, directory.nodeid, b"moved"))
            done(client.unlink(ROOT, name + b".l"))
            again = done(client.open(entry.nodeid, os.O_RDWR))
            assert again.fh == opened.fh + 1, "a file was opened twice"
            assert done(client.read(entry.nodeid, again.fh, 0, 4096)) == data
            done(client.release(entry.nodeid, again.fh))
            done(client.release(entry.nodeid, opened.fh))
            for entry_found in done(client.list(directory.nodeid, plus=True)):
                if entry_found.entry is not None and entry_found.entry.nodeid:
                    done(client.forget(entry_found.entry.nodeid, 1))
            assert done(client.lookup(directory.nodeid, b"moved")).nodeid == entry.nodeid
            done(client.getattr(entry.nodeid))
            done(client.forget(entry.nodeid, 3))  # CREATE, LINK and LOOKUP
            with raises(*NOT_FOUND):
                client.getattr(entry.nodeid)
            assert (share / f"{number}.d" / "moved").read_bytes() == data
            done(client.unlink(directory.nodeid, b"moved"))
            done(client.rmdir(ROOT, name + b".d"))
            done(client.forget(directory.nodeid, 1))
    assert killer.kills == KILLS
    assert list(share.iterdir()) == []
    assert served.unexpected_log() == []


def test_appends_are_made_once(served, killer):
    client = served.client
    entry, opened = client.create(ROOT, b"log", flags=os.O_WRONLY | os.O_APPEND)
    written = []
    with killer.at_work():
        while not killer.over:
            line = b"%d:%s;" % (len(written), os.urandom(40).hex().encode() * (1 + len(written) % 50))
            assert client.write(entry.nodeid, opened.fh, 0, line, open_flags=os.O_WRONLY | os.O_APPEND) == len(line)
            written.append(line)
            killer.answered()
    assert (served.share / "log").read_bytes() == b"".join(written)
    assert killer.kills == KILLS


def test_many_requests_in_flight_are_each_answered_once(served, killer):
    """A ring full of requests at each death. Which of them are run again may die a second time, and are answered EIO then."""
    client = served.client
    (served.share / "file").write_bytes(bytes(range(256)) * 16)
    nodeid = client.lookup(ROOT, b"file").nodeid
    fh = client.open(nodeid, os.O_RDWR).fh
    served.expect_log("is answered EIO")
    with killer.at_work():
        round_ = 0
        while not killer.over:
            round_ += 1
            made = [b"%d.%d" % (round_, number) for number in range(10)]
            pending = [client.send_read(nodeid, fh, 256 * number, 256, kick=False) for number in range(10)]
            making = [client.send(abi.FUSE_MKDIR, ROOT, MKDIR + name + b"\0", abi.fuse_entry_out.size) for name in made]
            client.finish_all(pending + making)
            for one in pending:
                assert client.result(one) == bytes(range(256))
            for one in making:
                client.result(one)
            assert sorted(os.listdir(served.share)) == sorted([*map(bytes.decode, made), "file"])
            for name in made:
                client.rmdir(ROOT, name)
            for _ in range(30):
                killer.answered()
    assert killer.kills == KILLS
