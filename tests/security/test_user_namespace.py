"""The daemon of an ordinary user: what its processes may do in the user namespace, and what not outside of it."""

import os
import select
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.security.sandbox import SUPERVISOR_CAPABILITIES, Sandbox, broker, control, worker
from tests.support.as_user import User, command_as
from tests.support.frontend.daemon import Options, vfsd
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start
from vfsd.sandbox.census import take_census

BROKER_CAPABILITIES = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID", "MKNOD", "SETFCAP"}
OWN_NAMESPACES = ("mnt", "pid", "net", "ipc", "uts")
USER = User(groups=(4800,), subuid="vfsd-test:100000:65536\n", subgid="vfsd-test:200000:65536\n")
RANGE_MAPS = (f"--uid-map=:0:{USER.uid}:1:", "--uid-map=:1:100000:65536:", f"--gid-map=:0:{USER.gid}:1:", "--gid-map=:1:200000:65536:")
POWERLESS = {"worker": worker, "control": control}


def start_as_user(maps, request_queues=1):
    folder = Path(tempfile.mkdtemp(prefix="user-", dir="/var/tmp"))
    (folder / "share").mkdir()
    for each in (folder, folder / "share"):
        os.chown(each, USER.uid, USER.gid)
    options = Options(handles="never", request_queues=request_queues, extra=maps)
    return start(folder, options, queues=request_queues + 1, command=lambda *arguments: command_as(USER, vfsd(*arguments)))


@pytest.fixture(scope="module", params=[(), RANGE_MAPS], ids=["own-id", "ranges"])
def running(request):
    """(whether there are ranges, role -> censuses, pid -> uid_map) of a daemon that serves two queues and has a file open."""
    served = start_as_user(request.param, request_queues=2)
    entry = served.client.write_file(ROOT, b"file", b"x")
    served.client.open(entry.nodeid)
    censuses = {"supervisor": [], "vfsd.broker": [], "vfsd.worker.control": [], "vfsd.worker": []}
    maps = {}
    for pid in served.daemon.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        role = "supervisor" if pid == served.daemon.pid else words[words.index(b"-m") + 1].decode()
        censuses[role].append(take_census(pid))
        maps[pid] = [[int(word) for word in line.split()] for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
    yield bool(request.param), censuses, maps
    served.close()
    shutil.rmtree(served.share.parent)


def test_all_are_in_one_user_namespace_with_the_map_that_was_asked_for(running):
    ranges, censuses, maps = running
    everyone = [process for found in censuses.values() for process in found]
    assert len(everyone) == len(maps) == 5
    assert len({process.namespaces["user"] for process in everyone}) == 1
    assert everyone[0].namespaces["user"] != os.readlink("/proc/self/ns/user")
    expected = [[0, USER.uid, 1], [1, 100000, 65536]] if ranges else [[USER.uid, USER.uid, 1]]
    assert all(each == expected for each in maps.values())


@pytest.mark.parametrize("role", ["vfsd.worker.control", "vfsd.worker"])
def test_what_parses_guest_bytes_has_nothing(running, role):
    ranges, censuses, _maps = running
    for process in censuses[role]:
        for thread in process.threads:
            assert thread.has_no_capability, (process.pid, thread)
            # nobody of the namespace where there is one; else the ids of the user are all there is
            assert set(thread.uids) == ({100000 + 65533} if ranges else {USER.uid})
            assert set(thread.gids) == ({200000 + 65533} if ranges else {USER.gid})
            assert thread.groups == (() if ranges else USER.groups)
            assert thread.no_new_privs
            assert (thread.seccomp_mode, thread.seccomp_filters) == (2, 2)
        assert process.root_entries == ()


def test_the_broker_has_its_capabilities_in_the_user_namespace_and_no_other(running):
    _ranges, censuses, _maps = running
    (process,) = censuses["vfsd.broker"]
    for thread in process.threads:
        assert set(thread.permitted) == set(thread.effective) == BROKER_CAPABILITIES
        assert thread.inheritable == thread.bounding == thread.ambient == ()
        assert set(thread.uids) == {USER.uid}
        assert thread.no_new_privs
        assert (thread.seccomp_mode, thread.seccomp_filters) == (2, 1)
    assert process.root_entries == ("file",)


def test_the_supervisor_keeps_what_starting_workers_takes(running):
    _ranges, censuses, _maps = running
    (process,) = censuses["supervisor"]
    for thread in process.threads:
        for capabilities in (thread.permitted, thread.effective, thread.bounding):
            assert set(capabilities) == set(SUPERVISOR_CAPABILITIES)
        assert set(thread.inheritable) == set(thread.ambient) <= set(SUPERVISOR_CAPABILITIES)
        assert thread.seccomp_mode == 2


def test_broker_control_and_workers_have_namespaces_of_their_own(running):
    _ranges, censuses, _maps = running
    (supervisor,) = censuses["supervisor"]
    confined = [process for role, found in censuses.items() if role != "supervisor" for process in found]
    for kind in OWN_NAMESPACES:
        assert len({process.namespaces[kind] for process in (*confined, supervisor)}) == len(confined) + 1, kind


# --- what the namespace alone keeps from a process without its other fences -----------------------------------------------------


@pytest.mark.parametrize("role", POWERLESS)
def test_control_and_workers_reach_no_file_of_the_host(sandbox: Sandbox, role):
    spec = POWERLESS[role](uid=None, start_uid=USER.uid, user_namespace=True, landlock=False)
    expression = (
        "[os.listdir('/'), errno_of(os.open, '/etc/passwd', 0), errno_of(os.mkdir, '/new'), errno_of(os.chroot, '/'), "
        "errno_of(os.listdir, '/..'), os.listdir('/..'), libc.unshare(0x00020000), libc.sethostname(b'x', 1)]"
    )
    listed, opened, made, chroot, above, above_entries, unshared, named = sandbox.evaluate(spec, expression, filtered=False)
    assert listed == above_entries == []
    assert above == 0
    assert (opened, made, chroot) == (2, 30, 1)  # ENOENT, EROFS, EPERM
    assert unshared == named == -1


@pytest.mark.parametrize("role", POWERLESS)
def test_control_and_workers_die_of_a_path(sandbox: Sandbox, role):
    spec = POWERLESS[role](uid=None, start_uid=USER.uid, user_namespace=True, expression="os.open('/', 0)")
    assert sandbox.run(spec).killed_by_filter


def test_the_broker_sees_the_share_and_nothing_else_and_cannot_mount(sandbox: Sandbox):
    folder = Path(tempfile.mkdtemp(prefix="user-", dir="/var/tmp"))
    folder.chmod(0o755)
    (folder / "file").touch()
    spec = broker(str(folder), start_uid=USER.uid, user_namespace=True, readonly=True)
    expression = "[os.listdir('/'), os.listdir('/..'), errno_of(os.mkdir, '/new'), libc.mount(b'none', b'/', b'tmpfs', 0, None)]"
    assert sandbox.evaluate(spec, expression, filtered=False) == [["file"], ["file"], 30, -1]
    shutil.rmtree(folder)


def test_children_of_an_ordinary_users_supervisor_die_with_it(running):
    """PR_SET_PDEATHSIG needs the right to kill: the supervisor has CAP_KILL in the namespace, where workers have other ids."""
    ranges, _censuses, _maps = running
    served = start_as_user(RANGE_MAPS if ranges else ())
    children = [os.pidfd_open(pid) for pid in served.daemon.pids() if pid != served.daemon.pid]
    assert len(children) == 3
    served.daemon.process.kill()
    for pidfd in children:
        assert wait_for_death(pidfd)
        os.close(pidfd)
    served.close()
    shutil.rmtree(served.share.parent)


def wait_for_death(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(5000))
