"""When descriptors, memory or processes run short: an errno, one line in the log, and service again when the shortage ends."""

import errno
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from tests.support.as_user import User, command_as, folder_of
from tests.support.frontend.checks import eventually
from tests.support.frontend.daemon import Options, vfsd
from tests.support.frontend.faults import SPOKEN, add_fault, clear_faults
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.mortality import REPLACED, worker_pids
from tests.support.frontend.ring import DeviceGone
from tests.support.frontend.serving import start
from vfsd.wire import fuse_abi as abi

WITH_FAULTS = ("--fault-rules", "/dev/null")
MANY = 10_000
AT_ONCE = 40


def errno_of(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
    return 0


def errnos_of_many(client, names, opcode=abi.FUSE_LOOKUP):
    """Of one request for each name, sent many at a time."""
    found = set()
    for first in range(0, len(names), AT_ONCE):
        pending = [client.send(opcode, ROOT, name + b"\0", 128, kick=False) for name in names[first : first + AT_ONCE]]
        client.device.rings[client.queue].kick()
        client.finish_all(pending)
        for one in pending:
            try:
                client.result(one)
                found.add(0)
            except OSError as error:
                found.add(error.errno)
    return found


def process_of(daemon, module):
    return next(pid for pid in daemon.pids() if module in Path(f"/proc/{pid}/cmdline").read_bytes())


def lines(served, pattern):
    return [line for line in served.new_log() if re.search(pattern, line)]


@pytest.mark.parametrize(("number", "call"), [(errno.ENFILE, "openat"), (errno.EMFILE, "openat"), (errno.ENOMEM, "statx")])
def test_ten_thousand_failures_of_one_kind_are_one_line(faulty, number, call):
    name = errno.errorcode[number]
    faulty.expect_log(f"a request fails with {name}")
    add_fault(faulty, f"broker.{call}:error={name}")
    assert errnos_of_many(faulty.client, [b"file"] * MANY) == {number}
    assert len(lines(faulty, f"fails with {name}")) == 1
    clear_faults(faulty)
    assert faulty.client.lookup(ROOT, b"file").nodeid, "the shortage is over, and nothing of it is left"
    assert faulty.unexpected_log() == []


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    served = start(tmp_path_factory.mktemp("exhaustion"), Options(extra=WITH_FAULTS))
    (served.share / "file").touch()
    served.expect_log(SPOKEN)
    yield served
    served.close()


def test_a_broker_whose_memory_is_bounded_answers_enomem_or_says_why_it_ends(serve):
    """Not a page more, while the guest looks up file after file: a request is refused, or there is not even memory for that."""
    served = serve(Options(handles="mandatory"))
    served.expect_log("fails with ENOMEM|no memory is left")
    names = [b"%0200d" % number for number in range(MANY)]
    for name in names:
        (served.share / os.fsdecode(name)).touch()
    served.client.lookup(ROOT, names[0])
    broker = process_of(served.daemon, b"vfsd.broker")
    pages = int(Path(f"/proc/{broker}/statm").read_text().split()[0])
    _soft, hard = resource.prlimit(broker, resource.RLIMIT_AS)
    resource.prlimit(broker, resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
    try:
        assert errnos_of_many(served.client, names) == {0, errno.ENOMEM}
    except DeviceGone:
        assert served.daemon.wait() == 1
        assert served.daemon.log[-1].endswith("broker cannot go on: no memory is left, of the host or within the limits of its process")
    else:
        resource.prlimit(broker, resource.RLIMIT_AS, (hard, hard))
        assert errnos_of_many(served.client, names) == {0}
    assert len(lines(served, "ENOMEM")) <= 1
    assert served.unexpected_log() == []


USER = User()


@pytest.fixture
def folder_of_user():
    with folder_of(USER) as path:
        yield path


def set_most_processes(pid, limits):
    """As that user, whose limits they are."""
    command = ["prlimit", f"--pid={pid}", f"--nproc={limits}"]
    subprocess.run(command, check=True, user=USER.uid, group=USER.gid, extra_groups=[])


def test_a_worker_that_cannot_be_started_for_want_of_processes_is_started_later(folder_of_user):
    """The limit does not hold for root. The guest's request waits, and is answered when there is a worker again."""
    served = start(folder_of_user, command=lambda *what: command_as(USER, vfsd(*what)))
    try:
        served.client.getattr(ROOT)
        served.expect_log("by file handle|of the guest cannot be set")
        supervisor = process_of(served.daemon, b"--shared-dir")
        set_most_processes(supervisor, "1:")
        (worker,) = worker_pids(served)
        served.expect_log(REPLACED)
        os.kill(worker, 9)
        served.wait_for_new_log("worker 0 cannot be started, trying again for 30 s: .*Resource temporarily unavailable")
        pending = served.client.send(abi.FUSE_GETATTR, ROOT, bytes(16), 104)
        assert served.daemon.running
        most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        set_most_processes(supervisor, "unlimited:" if most == resource.RLIM_INFINITY else f"{most}:")
        served.client.finish(pending)
        served.wait_for_new_log("worker 0 could be started now")
        assert len(lines(served, "cannot be started")) == 1
        assert eventually(lambda: worker_pids(served) not in ([], [worker]))
        assert served.unexpected_log() == []
    finally:
        print(served.daemon.describe())
        served.close()
