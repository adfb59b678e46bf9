"""`vfsdctl policy dump`: what the kernel has on a daemon that runs is what the policy compiles to, and looking disturbs nobody."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.frontend.checks import eventually
from tests.support.frontend.daemon import Daemon, Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start
from vfsd.sandbox.ptrace import read_filters
from vfsd.sandbox.seccomp import POLICY_FILE, load_policy
from vfsd.tools import daemon, loaded_filters, vfsdctl


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    running = start(tmp_path_factory.mktemp("dumped"), Options(request_queues=2), queues=3)
    yield running
    running.close()


def dump(capsys, *words):
    status = vfsdctl.run(["policy", "dump", *words])
    return status, capsys.readouterr().out


def test_every_thread_of_every_process_has_the_filters_of_the_policy_and_no_other(served, capsys):
    status, out = dump(capsys, "--socket", str(served.daemon.socket), "--json")
    found = json.loads(out)
    assert (status, found["as_expected"]) == (0, True)
    roles = {each["pid"]: each["role"] for each in found["processes"]}
    assert sorted(roles) == sorted(served.daemon.pids())
    assert sorted(roles.values()) == ["broker", "control", "supervisor", "worker", "worker"]
    for process in found["processes"]:
        assert {thread["tid"] for thread in process["threads"]} == {int(tid) for tid in os.listdir(f"/proc/{process['pid']}/task")}
        for thread in process["threads"]:
            filters = [found["filters"][digest] for digest in thread["filters"]]
            assert tuple(each["role"] for each in filters) == loaded_filters.EXPECTED[process["role"]]
            assert {each["action"] for each in filters} == {"kill"}


def test_what_the_kernel_has_is_byte_for_byte_what_was_compiled(served):
    policy = load_policy()
    (control,) = [each.pid for each in daemon.members(served.daemon.pid) if each.role == "control"]
    assert read_filters(control) == (policy.compile("supervisor", "kill"), policy.compile("control", "kill"))


def test_looking_at_a_daemon_disturbs_none_of_its_requests(served, capsys):
    """Every thread is stopped and let go in the middle of its waits, over and over, while a guest works."""
    looker = subprocess.Popen(
        [sys.executable, "-c", LOOK_AND_LOOK, "policy", "dump", "--socket", str(served.daemon.socket)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    number = 0
    while looker.poll() is None:
        entry = served.client.write_file(ROOT, b"%d" % number, b"what %d" % number)
        assert served.client.read_file(entry.nodeid) == b"what %d" % number
        number += 1
    assert (looker.returncode, looker.stderr.read()) == (0, "")
    looker.stderr.close()
    assert number > 0
    assert served.unexpected_log() == []


LOOK = "sys.exit(vfsdctl.run(sys.argv[1:]))"
LOOK_AND_LOOK = "import sys; from vfsd.tools import vfsdctl; sys.exit(max(vfsdctl.run(sys.argv[1:]) for _ in range(10)))"


def test_the_people_are_told_in_words(served, capsys):
    status, out = dump(capsys, "--pid", str(served.daemon.pid), "--all")
    assert status == 0
    assert "supervisor (pid" in out
    assert "2 filters, the oldest first" in out
    assert "unknown" not in out
    assert out.splitlines()[-1].endswith("threads of 5 processes: all have what the policy compiles to")


def test_the_instructions_can_be_read(served, capsys):
    status, out = dump(capsys, "--pid", str(served.daemon.pid), "--disasm")
    assert status == 0
    assert "return 0x7fff0000" in out
    status, out = dump(capsys, "--pid", str(served.daemon.pid), "--disasm", "--json")
    (loaded,) = json.loads(out)["filters"].values()
    assert len(loaded["disassembly"]) == loaded["instructions"] == len(bytes.fromhex(loaded["program"])) // 8


def test_a_filter_that_the_policy_does_not_make_is_unknown(served, capsys, tmp_path):
    changed = tmp_path / "policy.toml"
    with open(POLICY_FILE, encoding="utf-8") as file:
        changed.write_text("".join(line for line in file if '"restart_syscall"' not in line))
    status, out = dump(capsys, "--socket", str(served.daemon.socket), "--policy", str(changed))
    assert status == 1
    assert "WRONG: thread" in out
    assert "2 filters (supervisor, unknown), a worker should have 2 filters (supervisor, worker)" in out


def test_a_daemon_that_only_logs_is_not_as_it_should_be(tmp_path, capsys):
    (tmp_path / "share").mkdir()
    with Daemon(tmp_path / "share", tmp_path / "vfsd.sock", Options(extra=("--seccomp=log",))) as daemon:
        status, out = dump(capsys, "--socket", str(daemon.socket))
    assert status == 1
    assert "only logs" in out


def test_a_daemon_without_filters_is_not_as_it_should_be(tmp_path, capsys):
    (tmp_path / "share").mkdir()
    with Daemon(tmp_path / "share", tmp_path / "vfsd.sock", Options(extra=("--seccomp=none",))) as daemon:
        status, out = dump(capsys, "--socket", str(daemon.socket))
    assert status == 1
    assert "has no filter of vfsd's, a broker should have one filter (broker)" in out


def test_what_is_gone_or_no_vfsd_is_said_to_be(served, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for words, said in {
        ("--pid", str(ended.pid)): f"{ended.pid}: there is no such process",
        ("--pid", str(os.getpid())): f"{os.getpid()}: is no process of a vfsd",
        ("--socket", "/var/tmp/no such socket"): "cannot read /var/tmp/no such socket.pid",
    }.items():
        assert vfsdctl.run(["policy", "dump", *words]) == 1
        assert said in capsys.readouterr().err


def test_who_may_not_look_is_told_what_it_takes(served):
    done = look_after("os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)", served.daemon.pid)
    assert done.returncode == 1, done.stderr
    assert "it takes CAP_SYS_ADMIN and CAP_SYS_PTRACE" in done.stderr


def test_who_is_filtered_himself_is_told_why_he_sees_nothing(served):
    """In a container, say: the kernel answers only to who has no filter."""
    bpf_ret_allow = "(6).to_bytes(4, 'little') + (0x7FFF0000).to_bytes(4, 'little')"
    done = look_after(f"load_filter({bpf_ret_allow})", served.daemon.pid)
    assert done.returncode == 1, done.stderr
    assert "nobody who has a seccomp filter himself" in done.stderr


def look_after(change, pid):
    script = f"import os, sys; from vfsd.sandbox.seccomp_load import load_filter; from vfsd.tools import vfsdctl; {change}; {LOOK}"
    return subprocess.run([sys.executable, "-c", script, "policy", "dump", "--pid", str(pid)], capture_output=True, text=True, check=False)


def test_a_stopped_process_stays_stopped_and_a_killed_one_is_gone():
    """PTRACE_DETACH lets go of a thread as it found it."""
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        sleeper.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
        assert read_filters(sleeper.pid) == ()
        assert eventually(lambda: state(sleeper.pid) == "T")  # it stops anew by itself, once let go
        sleeper.send_signal(signal.SIGCONT)
        assert read_filters(sleeper.pid) == ()
        assert state(sleeper.pid) in "SR"
    finally:
        sleeper.kill()
        sleeper.wait()


def state(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rsplit(")", 1)[1].split()[0]
