"""What the kernel says of confined processes, thread by thread, and how confinement fails."""

import errno
import os
import select
import signal
import socket
import subprocess
import sys

import pytest

from tests.security.sandbox import (
    BROKER_CAPABILITIES,
    DEADLINE_SECONDS,
    NOBODY,
    SUPERVISOR_CAPABILITIES,
    Sandbox,
    broker,
    call,
    control,
    supervisor,
    worker,
)
from vfsd.sandbox.capabilities import NAMES
from vfsd.sandbox.census import take_census
from vfsd.wire.channel import MAX_PACKET, WORKER_TO_SUPERVISOR, Log, decode_message

ORDINARY_USER = 1000
POWERLESS = {"worker": worker, "control": control}


def by_number(names):
    return tuple(name for name in NAMES if name in names)


# --- every thread -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["namespace", "chroot", "none"])
@pytest.mark.parametrize("role", POWERLESS)
def test_every_thread_of_control_and_workers_is_nobody_with_nothing(sandbox: Sandbox, role, mode):
    threads = 0 if role == "control" else 4
    with sandbox.holding(POWERLESS[role](sandbox=mode, threads=threads)) as census:
        assert len(census.threads) == threads + 1
        for thread in census.threads:
            assert thread.uids == (NOBODY,) * 4
            assert thread.gids == (NOBODY,) * 4
            assert thread.groups == ()
            assert thread.has_no_capability
            assert thread.no_new_privs
            assert thread.seccomp_mode == 2
            assert thread.seccomp_filters == 1


def test_every_thread_of_the_broker_has_its_capabilities_and_no_other(sandbox: Sandbox, tmp_path):
    with sandbox.holding(broker(str(tmp_path), threads=4)) as census:
        assert len(census.threads) == 5
        for thread in census.threads:
            assert thread.uids == thread.gids == (0,) * 4
            assert thread.groups == ()
            assert thread.permitted == thread.effective == by_number(BROKER_CAPABILITIES)
            assert thread.inheritable == thread.ambient == thread.bounding == ()
            assert thread.no_new_privs
            assert thread.seccomp_mode == 2


def test_the_supervisor_keeps_only_what_starting_workers_takes(sandbox: Sandbox):
    with sandbox.holding(supervisor()) as census:
        assert census.leader.permitted == census.leader.effective == census.leader.bounding == by_number(SUPERVISOR_CAPABILITIES)
        assert census.leader.inheritable == census.leader.ambient == ()
        assert census.leader.no_new_privs
        assert census.leader.seccomp_filters == 1


def test_the_supervisor_can_still_start_a_worker_which_then_has_two_filters(sandbox: Sandbox):
    # what proc_status reads by was opened before the filter; after it, a worker could not
    child = worker(expression="[line for line in proc_status.splitlines() if line.startswith('Seccomp')]")
    outcome = sandbox.run(supervisor(attempt="start_child", child=child))
    assert outcome.value == {"status": 0, "outcome": '{"value": ["Seccomp:\\t2", "Seccomp_filters:\\t2"]}'}


def test_what_the_supervisor_starts_gets_no_capability_back_by_being_root(sandbox: Sandbox):
    child = worker(enter=None, lock=False, expression="census.take_census(os.getpid()).leader.effective")
    outcome = sandbox.run(supervisor(attempt="start_child", child=child))
    assert outcome.value["status"] == 0
    assert all(f'"{name}"' in outcome.value["outcome"] for name in SUPERVISOR_CAPABILITIES)
    assert '"DAC_READ_SEARCH"' not in outcome.value["outcome"]


def test_the_supervisor_dies_of_what_it_denies_itself(sandbox: Sandbox):
    assert sandbox.attempt(supervisor(), call("ptrace", 0, 0, 0, 0)).killed_by_filter
    assert sandbox.attempt(supervisor(), call("bpf", 0, 0, 0)).killed_by_filter
    assert sandbox.attempt(supervisor(), call("getppid")).value == os.getpid()


def test_a_broker_keeps_no_capability_that_its_starter_did_not_have(sandbox: Sandbox, tmp_path):
    with sandbox.holding(broker(str(tmp_path), lacking=["DAC_READ_SEARCH"])) as census:
        assert census.leader.permitted == by_number(set(BROKER_CAPABILITIES) - {"DAC_READ_SEARCH"})


def test_without_seccomp_everything_else_still_holds(sandbox: Sandbox):
    with sandbox.holding(worker(), filtered=False) as census:
        assert census.leader.has_no_capability
        assert census.leader.no_new_privs
        assert census.leader.seccomp_mode == 0


# --- started by an ordinary user ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["worker", "broker"])
def test_started_by_an_ordinary_user_without_a_sandbox_it_is_confined_as_far_as_it_can_be(sandbox: Sandbox, role):
    spec = worker(role=role, sandbox="none", enter=None, uid=None, start_uid=ORDINARY_USER)
    with sandbox.holding(spec) as census:
        for thread in census.threads:
            assert thread.uids == (ORDINARY_USER,) * 4
            assert thread.permitted == thread.effective == thread.inheritable == thread.ambient == ()
            assert thread.no_new_privs
            assert thread.seccomp_mode == 2


@pytest.mark.parametrize(
    ("enter", "mode", "step"),
    [
        ("empty", "namespace", "make namespaces"),
        ("share", "namespace", "make namespaces"),
        ("share", "chroot", "change the root directory"),
        ("empty", "chroot", "change the root directory"),
        (None, "namespace", "empty the capability bounding set"),
    ],
)
def test_an_ordinary_user_is_told_which_step_failed_and_what_to_do(sandbox: Sandbox, enter, mode, step):
    spec = worker(sandbox=mode, enter=enter, share="/", uid=None, start_uid=ORDINARY_USER)
    outcome = sandbox.run(spec)
    assert step in outcome.config_error
    assert "EPERM" in outcome.config_error
    assert "--sandbox=none" in outcome.config_error


@pytest.mark.parametrize(
    ("lacking", "step"),
    [
        ("SETPCAP", "bounding set"),
        ("SETGID", "supplementary groups"),
        ("SETUID", f"become user {NOBODY}"),
        ("SYS_ADMIN", "make namespaces"),
    ],
)
def test_a_missing_capability_is_named(sandbox: Sandbox, lacking, step):
    outcome = sandbox.run(worker(lacking=[lacking]))
    assert step in outcome.config_error
    assert f"CAP_{lacking}" in outcome.config_error


# --- the supervisor's death ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["worker", "broker"])
def test_children_die_with_the_supervisor(sandbox: Sandbox, role, tmp_path):
    child = worker() if role == "worker" else broker(str(tmp_path))
    child.attempt = "hold"
    child.hold_fd, hold_write = os.pipe()
    read_fd, write_fd = os.pipe()
    spec = sandbox._with_filter(supervisor(lock=False, attempt="supervise", child=child), filtered=True)
    with open(read_fd, "rb", buffering=0) as results, open(hold_write, "wb", buffering=0):
        process = sandbox._start(spec, write_fd)
        os.close(write_fd)
        os.close(child.hold_fd)
        said = results.read(1 << 16)
        assert b'"said": "confined"' in said
        pid = int(said.split(b'"pid": ')[1].split(b",")[0])
        pidfd = os.pidfd_open(pid)
        assert take_census(pid).leader.seccomp_mode == 2
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE_SECONDS)
        assert wait_for_death(pidfd)
        os.close(pidfd)


def wait_for_death(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(5000))


def test_a_child_whose_supervisor_is_dead_already_does_not_start(sandbox: Sandbox):
    short_lived = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = os.pidfd_open(short_lived.pid)
    short_lived.wait()
    outcome = sandbox.run(worker(supervisor_pidfd=pidfd))
    os.close(pidfd)
    assert "the supervisor died" in outcome.config_error


# --- the rest -----------------------------------------------------------------------------------------------------------------


def test_a_limit_of_open_files_that_cannot_be_had_is_refused(sandbox: Sandbox):
    if "SYS_RESOURCE" in take_census(os.getpid()).leader.effective:
        pytest.skip("with CAP_SYS_RESOURCE any limit can be had")
    outcome = sandbox.run(worker(nofile=1 << 40))
    assert "limit of open files" in outcome.config_error
    assert "--rlimit-nofile=" in outcome.config_error


def test_the_limit_of_open_files_is_set(sandbox: Sandbox):
    expression = "__import__('resource').getrlimit(__import__('resource').RLIMIT_NOFILE)"
    assert sandbox.evaluate(worker(nofile=77, enter=None, sandbox="none", landlock=False), expression, filtered=False) == [77, 77]


@pytest.mark.parametrize("make", [worker, control])
def test_limits_deny_further_processes_and_locked_memory_also_without_a_filter(sandbox: Sandbox, make):
    expression = "[errno_of(os.fork), libc.mlock(id(os), 1)]"
    assert sandbox.evaluate(make(), expression, filtered=False) == [errno.EAGAIN, -1]


def test_confining_leaves_no_descriptor_behind(sandbox: Sandbox, tmp_path):
    for spec in (worker(), worker(sandbox="chroot"), control(sandbox="none")):
        spec.count_fds = True
        counted = sandbox.run(spec, filtered=False).value
        # what the pool threads of the harness wait on is theirs
        assert len(set(counted["after"]) - set(counted["before"])) == spec.threads
    spec = broker(str(tmp_path), count_fds=True, threads=0)
    counted = sandbox.run(spec, filtered=False).value
    assert len(set(counted["after"]) - set(counted["before"])) == 2  # root, /proc/self/fd


def test_a_confined_process_shows_its_memory_to_nobody_of_its_own_uid(sandbox: Sandbox):
    with sandbox.holding(worker(sandbox="none", enter=None)) as census:
        assert os.stat(f"/proc/{census.pid}/mem").st_uid == 0


def test_memory_runs_out_cleanly(sandbox: Sandbox):
    assert sandbox.run(worker(attempt="large_allocation")).memory_error
    assert sandbox.run(control(attempt="large_allocation")).memory_error


@pytest.mark.parametrize("made", [worker, control], ids=["worker", "control"])
def test_a_role_that_has_no_memory_left_can_still_say_so(sandbox: Sandbox, made):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(0)
        spec = made(attempt="use_up_memory", lock=False, fds=[theirs.fileno()], ends=1)
        sandbox.run(spec)
        message = decode_message(ours.recv(MAX_PACKET), 0, WORKER_TO_SUPERVISOR)
    assert isinstance(message, Log)
    assert message.text.startswith(f"bug in {spec.role}: MemoryError at ".encode())


def test_ordinary_allocations_fit_into_the_heap_taken_before(sandbox: Sandbox):
    assert sandbox.run(worker(attempt="churn")).value == 20_000


def test_a_worker_can_map_and_unmap_the_memory_of_a_frontend(sandbox: Sandbox):
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, 4096)
    assert sandbox.run(worker(attempt="map_shared", fds=[memfd])).value == 4096
    assert os.pread(memfd, 5, 0) == b"guest"
    os.close(memfd)


def test_locking_down_with_threads_running_is_a_bug():
    script = (
        "import threading, time\n"
        "from vfsd.sandbox.lockdown import Confinement, lock_down\n"
        "threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
        "nothing = dict(seccomp_filter=b'', uid=None, gid=None, capabilities=(), landlock=False, nofile=None, supervisor_pidfd=None)\n"
        "lock_down(Confinement(role='worker', sandbox='none', **nothing))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "RuntimeError: lock_down with threads running" in ended.stderr
