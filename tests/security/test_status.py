"""`vfsdctl status` of daemons that run: all that docs/census.md expects is seen, in each mode it tells what is weaker, and what is wrong is found."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.support.as_user import User, command_as, folder_of
from tests.support.frontend.checks import eventually
from tests.support.frontend.daemon import Daemon, Options, vfsd
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start
from vfsd.sandbox.fd_census import Fd, UnixSocket
from vfsd.sandbox.seccomp import POLICY_FILE
from vfsd.tools import check_surroundings, sockets
from vfsd.tools.daemon import examine
from vfsd.tools.expectations import EXPECTATIONS, judge
from vfsd.tools.fd_purposes import TOLD_BY, purposes
from vfsd.tools.sockets import Sockets
from vfsd.tools.vfsdctl import run

pytestmark = pytest.mark.root

QUEUES = 3
USER = User(groups=(4800,), subuid="vfsd-test:100000:65536\n", subgid="vfsd-test:200000:65536\n")
RANGE_MAPS = (f"--uid-map=:0:{USER.uid}:1:", "--uid-map=:1:100000:65536:", f"--gid-map=:0:{USER.gid}:1:", "--gid-map=:1:200000:65536:")
# Options -> what is weaker by them, as (process, expectation).
MODES = {
    (): set(),
    ("--inode-file-handles=never", "--rlimit-nofile=2000"): set(),
    ("--modcaps=-mknod:+kill:+sys_chroot:-sys_chroot",): {("broker", "capabilities")},
    ("--modcaps=-mknod", "--readonly", f"--seccomp-policy={POLICY_FILE}"): set(),
    (f"--seccomp-policy={POLICY_FILE}", "--allow-weak-policy"): {
        (role, "seccomp policy") for role in ("supervisor", "broker", "control", "worker")
    },
    ("--seccomp=trap",): {(role, "what seccomp does") for role in ("supervisor", "broker", "control", "worker")},
    ("--seccomp=log",): {(role, "what seccomp does") for role in ("supervisor", "broker", "control", "worker")},
    ("--seccomp=none",): {
        (role, what)
        for role in ("supervisor", "broker", "control", "worker")
        for what in ("seccomp", "what seccomp does", "seccomp policy")
    },
    ("--fault-rules=/dev/null",): {(role, "fault injection") for role in ("broker", "control", "worker")},
    ("--sandbox=chroot",): {
        (role, what) for role in ("broker", "control", "worker") for what in ("namespaces", "root directory", "working directory")
    },
    ("--sandbox=none",): {(role, what) for role in ("broker", "control", "worker") for what in ("namespaces", "root directory")},
}


@contextmanager
def serving(folder, *extra, command=None):
    """A daemon with a frontend on three request queues, a file open through each."""
    served = start(folder, Options(request_queues=QUEUES, extra=extra), queues=QUEUES + 1, command=command)
    try:
        (served.share / "file").write_bytes(bytes(4096))
        entry = served.client.lookup(ROOT, b"file")
        for queue in range(1, QUEUES + 1):
            served.client.queue = queue
            opened = served.client.open(entry.nodeid)
            assert len(served.client.read(entry.nodeid, opened.fh, 0, 4096)) == 4096
        yield served
    finally:
        served.close()


@contextmanager
def load(served):
    """Requests of all kinds on all queues, meanwhile; of root and of another user."""
    over = threading.Event()
    failures = []

    def work():
        number = 0
        try:
            while not over.is_set():
                number += 1
                served.client.queue = 1 + number % QUEUES
                with served.client.acting_as(1000 * (number % 2), 1000 * (number % 2)):
                    entry = served.client.write_file(ROOT, b"f%d" % (number % 50), bytes(100), 0o666)
                served.client.read_file(entry.nodeid)
                served.client.list(ROOT, plus=True)
        except Exception as error:  # noqa: BLE001  # told to the thread that asked
            failures.append(error)

    thread = threading.Thread(target=work)
    served.client.setattr(ROOT, mode=0o777)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert failures == []


def not_met(daemon):
    return [(subject.process.name, each.expectation.what, each.seen) for subject, each in findings(daemon) if each.state != "met"]


def findings(daemon):
    return [(subject, finding) for subject, found in judge(daemon) for finding in found]


def status(capsys, *arguments):
    """(exit status, the data)"""
    code = run(["status", *arguments, "--security", "--json"])
    return code, json.loads(capsys.readouterr().out)


def states(data, *wanted):
    return {(each["role"], finding["what"]) for each in data["processes"] for finding in each["expectations"] if finding["state"] in wanted}


@pytest.mark.parametrize("extra", MODES, ids=lambda extra: "default" if extra == () else " ".join(extra))
def test_status_tells_the_truth_about_each_mode(tmp_path, capsys, extra):
    with serving(tmp_path, *extra) as served:
        code, data = status(capsys, str(served.daemon.socket))
    assert states(data, "NOT MET", "not visible") == set()
    assert states(data, "weaker") == MODES[extra]
    assert code == bool(MODES[extra])


def test_a_spare_worker_is_confined_as_any_other(tmp_path, capsys):
    with serving(tmp_path, "--spare-workers=1", "--keep-listening") as served:
        assert eventually(lambda: any(each.name == "worker spare" for each in examine(served.daemon.pid).processes), 30.0)
        code, data = status(capsys, str(served.daemon.socket))
    assert states(data, "NOT MET", "not visible", "weaker") == set()
    assert code == 0
    assert data["counts"] == {"worker_deaths": 0, "control_deaths": 0, "replayed": 0, "refused": 0, "undecided": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("status")) as one:
        yield one


@pytest.fixture(scope="module")
def daemon(served):
    return examine(served.daemon.pid)


def test_under_load_every_thread_and_descriptor_is_as_documented(served):
    with load(served):
        for _ in range(10):
            assert not_met(examine(served.daemon.pid)) == []


def test_every_purpose_is_in_the_documented_list(daemon):
    listed = {(role, purpose) for roles, purpose, _ in TOLD_BY for role in roles.split()}
    roles = {process.pid: process.role for process in daemon.processes}
    for pid, found in purposes(daemon).items():
        for purpose in found.values():
            documented = "the death of CHILD" if purpose.startswith("the death of ") else purpose
            assert (roles[pid], documented) in listed


def test_a_person_gets_a_table_with_every_expectation_and_descriptor(served, capsys):
    assert run(["status", str(served.daemon.pid), "--security"]) == 0
    text = capsys.readouterr().out
    assert f"share:      {served.share}" in text
    for line in (
        "the guest's memory", "link to the broker: requests", "channel to the supervisor", "a ring's kick: the frontend's",
        "of the share, donated: a file that the guest opened", "its own /proc/self/fd", "the death of worker 2",
    ):  # fmt: skip
        assert line in text
    assert all(f"  met  {each.what}" in text for each in EXPECTATIONS)
    assert "NOT MET" not in text
    assert "UNKNOWN" not in text


def test_without_security_it_says_what_runs(served, capsys):
    assert run(["status", f"{served.daemon.socket}.pid"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[-6:]] == ["supervisor", "broker", "control", "worker", "worker", "worker"]
    assert "EXPECTATION" not in text
    assert run(["status", str(served.daemon.socket), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["options"]["shared_dir"] == str(served.share)
    assert [each["name"] for each in data["processes"]] == ["supervisor", "broker", "control", "worker 0", "worker 1", "worker 2"]
    assert 0 < data["uptime_seconds"] < 3600


def test_before_a_frontend_connects_all_is_met_too(tmp_path, capsys):
    (tmp_path / "share").mkdir()
    with Daemon(tmp_path / "share", tmp_path / "vfsd.sock", Options()) as waiting:
        assert run(["status", str(waiting.socket), "--security"]) == 0
    assert "the vhost-user socket: waits for the frontend" in capsys.readouterr().out


def test_a_descriptor_that_the_starter_left_open_is_found(tmp_path, capsys):
    def leaking(*arguments):
        return ["/bin/sh", "-c", 'exec 9</etc/passwd; exec "$@"', "sh", *vfsd(*arguments)]

    with serving(tmp_path, command=leaking) as served:
        code, data = status(capsys, str(served.daemon.socket))
    assert code == 1
    assert states(data, "NOT MET") == {("supervisor", "descriptors")}  # and no child got it
    assert {"fd": 9, "target": "/etc/passwd", "purpose": None} in data["processes"][0]["descriptors"]


# --- what must not be so is found: each expectation, with what a census would show if it were broken ------------------------------


def in_one_thread(**changes):
    """Only the last thread is not as it should be."""

    def spoil(process):
        threads = process.census.threads
        return with_census(process, threads=(*threads[:-1], replace(threads[-1], **changes)))

    return spoil


def with_census(process, **changes):
    return replace(process, census=replace(process.census, **changes))


def with_report(**changes):
    return lambda process: replace(process, report=replace(process.report, **changes))


def with_limit(name, value):
    return lambda process: with_census(process, limits={**process.census.limits, name: (value, value)})


def with_fd(fd):
    return lambda process: with_census(process, fds={**process.census.fds, fd.number: fd})


def with_mount(**changes):
    return lambda process: with_census(process, mounts=(replace(process.census.mounts[0], **changes),))


def with_another_thread(process):
    return with_census(process, threads=(*process.census.threads, replace(process.census.leader, tid=1)))


HOST = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid", "net", "ipc", "uts", "user")}
SPOILT = {
    "children": [lambda process: with_census(process, parent=1)],
    "threads": [with_another_thread],
    "uids and gids": [in_one_thread(uids=(0, 65534, 65534, 65534)), in_one_thread(gids=(65534, 65534, 65534, 0))],
    "supplementary groups": [in_one_thread(groups=(4,))],
    "capabilities": [in_one_thread(permitted=("SYS_PTRACE",)), in_one_thread(effective=("NET_ADMIN",))],
    "capabilities to pass on": [in_one_thread(inheritable=("CHOWN",)), in_one_thread(ambient=("CHOWN",))],
    "capability bounding set": [in_one_thread(bounding=("CHOWN",))],
    "securebits": [with_report(securebits=0)],
    "no_new_privs": [in_one_thread(no_new_privs=False)],
    "seccomp": [in_one_thread(seccomp_mode=0), in_one_thread(seccomp_filters=1), in_one_thread(seccomp_filters=3)],
    "Landlock": [with_report(landlock=0)],
    "fault injection": [lambda process: with_census(process, command=("python", "-I", "-m", "vfsd.worker.faulty", "5"))],
    "namespaces": [in_one_thread(namespaces=HOST), lambda process: replace(process, census=host_namespaces(process.census))],
    "root directory": [
        with_mount(fs_type="ext4"),
        with_mount(options=frozenset({"nosuid", "nodev", "noexec"})),
        with_mount(fs_options=frozenset()),
        lambda process: with_census(process, mounts=process.census.mounts * 2),
    ],
    "working directory": [in_one_thread(cwd="/etc")],
    "memory": [lambda process: with_report(dumpable=True)(with_census(process, memory_owner=65534))],
    "limits": [with_limit("core file size", -1), with_limit("processes", 100), with_limit("open files", 70000)],
    "environment": [lambda process: with_census(process, environment=("PATH",))],
    "descriptors": [
        with_fd(Fd(number=99, target="/etc/shadow", mount=1, inode=5)),
        with_fd(Fd(number=99, target="socket:[1]", inode=1)),
        with_fd(Fd(number=99, target="anon_inode:[pidfd]", process=1)),
        with_fd(Fd(number=99, target="/memfd:other (deleted)", inode=1)),
        with_fd(Fd(number=0, target="/dev/sda")),
    ],
}


def host_namespaces(census):
    return replace(census, threads=tuple(replace(thread, namespaces=HOST) for thread in census.threads))


def spoilt(daemon, spoil, role="worker"):
    """What is found if the last process of the role were so."""
    last = [process for process in daemon.processes if process.role == role][-1]
    others = tuple(process for process in daemon.processes if process is not last)
    broken = replace(daemon, processes=(*others, spoil(last)))
    return {(subject.process.name, each.expectation.what) for subject, each in findings(broken) if each.state == "NOT MET"}, last.name


@pytest.mark.parametrize(("what", "spoil"), [(what, spoil) for what, all_of_it in SPOILT.items() for spoil in all_of_it])
def test_what_is_not_as_expected_is_found(daemon, what, spoil):
    found, name = spoilt(daemon, spoil)
    assert found == {(name, what)}


def test_every_expectation_was_tried():
    decided_by_options = {"what seccomp does", "seccomp policy"}
    assert {each.what for each in EXPECTATIONS} - decided_by_options == set(SPOILT)


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("capabilities", in_one_thread(permitted=("SYS_ADMIN",))),
        ("uids and gids", in_one_thread(uids=(1000, 0, 0, 0))),
        ("root directory", with_mount(options=frozenset({"nosuid", "nosymfollow"}))),
        ("securebits", with_report(securebits=239)),
        ("descriptors", with_fd(Fd(number=99, target="/etc", mount=1))),
    ],
)
def test_what_a_broker_must_not_have_is_found(daemon, what, spoil):
    found, name = spoilt(daemon, spoil, "broker")
    assert found == {(name, what)}


def test_a_mount_that_the_host_made_later_in_the_share_is_named(daemon):
    """It has the host's attributes, not those that the broker's own mounts have."""

    def with_later_mount(process):
        later = replace(process.census.mounts[0], number=9999, point="/sub", options=frozenset({"rw"}))
        return with_census(process, mounts=(*process.census.mounts, later))

    broker = next(process for process in daemon.processes if process.role == "broker")
    others = tuple(process for process in daemon.processes if process is not broker)
    (bad,) = [each for _, each in findings(replace(daemon, processes=(*others, with_later_mount(broker)))) if each.state == "NOT MET"]
    assert "/sub has not nodev nosuid nosymfollow" in bad.seen


def test_a_sysctl_that_would_open_the_brokers_memory_is_found(daemon, monkeypatch):
    monkeypatch.setattr(check_surroundings, "_suid_dumpable", lambda: 1)
    assert [(name, what) for name, what, _ in not_met(daemon)] == [("broker", "memory")]


def test_sockets_that_this_kernel_does_not_tell_of_are_unseen_and_others_are_found(served, monkeypatch):
    monkeypatch.setattr(sockets, "unix_sockets", lambda network_of=None: None)
    untold = examine(served.daemon.pid)
    assert {(what, state) for subject, found in judge(untold) for what, state in states_of(found)} == {("descriptors", "not visible")}
    assert spoilt(untold, with_fd(Fd(number=99, target="socket:[1]", inode=1, protocol="TCP")))[0] == {("worker 2", "descriptors")}


def states_of(found):
    return [(each.expectation.what, each.state) for each in found if each.state != "met"]


def test_only_the_supervisor_may_speak_to_the_system_log_or_a_service_manager(daemon):
    found = Sockets({**daemon.sockets.by_inode, 7: UnixSocket(socket.SOCK_DGRAM, listens=False, peer=8)})
    spoil = with_fd(Fd(number=99, target="socket:[7]", inode=7))
    for role, expected in (("supervisor", set()), ("broker", {"descriptors"}), ("worker", {"descriptors"})):
        processes = list(daemon.processes)
        at = next(at for at, process in enumerate(processes) if process.role == role)
        processes[at] = spoil(processes[at])
        assert {what for _, what, _ in not_met(replace(daemon, processes=tuple(processes), sockets=found))} == expected


def test_a_second_broker_is_found(daemon):
    """A worker that is taken over can change its command line, which is all that an ordinary user sees of its role."""
    found, _ = spoilt(daemon, lambda process: replace(process, role="broker", name="broker"))
    assert ("supervisor", "children") in found


def test_a_process_unknown_to_the_supervisor_is_found(daemon):
    found, _ = spoilt(daemon, lambda process: replace(process, role="unknown", name="unknown"))
    assert ("unknown", "role") in found
    assert ("supervisor", "children") in found


# --- an ordinary user's -----------------------------------------------------------------------------------------------------------


@contextmanager
def of_user(*extra):
    with (
        folder_of(USER) as folder,
        serving(folder, "--inode-file-handles=never", *extra, command=lambda *arguments: command_as(USER, vfsd(*arguments))) as served,
    ):
        yield served


@pytest.mark.parametrize("extra", [(), RANGE_MAPS], ids=["own-id", "ranges"])
def test_in_a_user_namespace_nothing_is_weaker(capsys, extra):
    with of_user(*extra) as served:
        code, data = status(capsys, str(served.daemon.socket))
        as_seen = status_as_user(served)
    assert (code, states(data, "NOT MET", "weaker", "not visible")) == (0, set())
    assert_user_sees_their_own(as_seen)


def status_as_user(served):
    command = [
        sys.executable,
        "-c",
        "from vfsd.tools.vfsdctl import main; main()",
        "status",
        str(served.daemon.socket),
        "--security",
        "--json",
    ]
    ended = subprocess.run(command_as(USER, command), capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    return ended.returncode, json.loads(ended.stdout)


def assert_user_sees_their_own(as_seen):
    """Of the supervisor not what only CAP_SYS_PTRACE shows; nothing is invented, and nothing of it counts as a failure."""
    code, data = as_seen
    assert code == 0
    assert states(data, "NOT MET", "weaker") == set()
    unseen = states(data, "not visible")
    assert {("supervisor", "descriptors"), ("worker", "securebits"), ("worker", "Landlock"), ("broker", "securebits")} <= unseen
    assert ("worker", "capabilities") in states(data, "met")
    assert ("worker", "seccomp") in states(data, "met")


def test_without_namespaces_an_ordinary_users_is_weaker(capsys):
    with of_user("--sandbox=none") as served:
        code, data = status(capsys, str(served.daemon.socket))
    assert code == 1
    assert states(data, "NOT MET", "not visible") == set()
    assert {("worker", "uids and gids"), ("worker", "capability bounding set"), ("broker", "securebits")} <= states(data, "weaker")


# --- not a vfsd -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/vfsd.sock", "cannot read /nowhere/vfsd.sock.pid"),
        ("{own_pid}", "is not the supervisor of a vfsd"),
        ("0", "no such process"),
    ],
)
def test_what_is_no_vfsd_is_said_to_be_none(capsys, name, said):
    assert run(["status", name.format(own_pid=os.getpid()), "--security"]) == 1
    assert said in capsys.readouterr().err


def test_who_may_not_read_the_pid_file_is_sent_to_root(monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("vfsd.tools.daemon.open", refuse, raising=False)
    assert run(["status", "/run/vm1.sock"]) == 1
    assert "cannot read /run/vm1.sock.pid: Permission denied; run this as root" in capsys.readouterr().err
