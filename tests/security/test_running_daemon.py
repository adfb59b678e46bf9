"""The daemon as it really runs, with a frontend attached and files open: what each of its processes, and every thread, may do."""

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start
from vfsd.sandbox.census import take_census

pytestmark = pytest.mark.root

BROKER_CAPABILITIES = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID", "MKNOD", "SETFCAP"}
SUPERVISOR_CAPABILITIES = {"SYS_ADMIN", "SYS_CHROOT", "SETPCAP", "SETUID", "SETGID", "KILL"}
NOBODY = 65534


@pytest.fixture(scope="module", params=["prefer", "never"])
def running(request, tmp_path_factory):
    """(handle mode, role -> censuses) of a daemon that serves two queues and has a file open."""
    served = start(tmp_path_factory.mktemp("running"), Options(handles=request.param, request_queues=2), queues=3)
    entry = served.client.write_file(ROOT, b"file", b"x")
    served.client.open(entry.nodeid)
    censuses = {"supervisor": [], "vfsd.broker": [], "vfsd.worker.control": [], "vfsd.worker": []}
    for pid in served.daemon.pids():
        censuses[role_of(pid, served.daemon.pid)].append(take_census(pid))
    yield request.param, censuses
    served.close()


def role_of(pid: int, supervisor: int) -> str:
    if pid == supervisor:
        return "supervisor"
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[words.index(b"-m") + 1].decode()


def test_there_is_one_of_each_and_a_worker_per_request_queue(running):
    _mode, censuses = running
    assert {role: len(found) for role, found in censuses.items()} == {
        "supervisor": 1,
        "vfsd.broker": 1,
        "vfsd.worker.control": 1,
        "vfsd.worker": 2,
    }


@pytest.mark.parametrize("role", ["vfsd.worker.control", "vfsd.worker"])
def test_what_parses_guest_bytes_has_nothing(running, role):
    _mode, censuses = running
    ours = os.readlink("/proc/self/ns/net")
    for process in censuses[role]:
        for thread in process.threads:
            assert thread.has_no_capability, (process.pid, thread)
            assert set(thread.uids) == set(thread.gids) == {NOBODY}
            assert thread.groups == ()
            assert thread.no_new_privs
            assert (thread.seccomp_mode, thread.seccomp_filters) == (2, 2)
        assert process.root_entries == ()
        assert process.namespaces["net"] != ours


def test_the_broker_has_what_it_needs_and_no_more(running):
    mode, censuses = running
    wanted = BROKER_CAPABILITIES | ({"DAC_READ_SEARCH"} if mode == "prefer" else set())
    (broker,) = censuses["vfsd.broker"]
    for thread in broker.threads:
        assert set(thread.permitted) == set(thread.effective) == wanted, thread
        assert not (thread.inheritable)
        assert not (thread.bounding)
        assert not (thread.ambient)
        assert thread.no_new_privs
        assert thread.seccomp_mode == 2


def test_the_supervisor_keeps_what_starting_workers_takes(running):
    _mode, censuses = running
    (supervisor,) = censuses["supervisor"]
    for thread in supervisor.threads:
        assert set(thread.permitted) == SUPERVISOR_CAPABILITIES
        assert thread.seccomp_mode == 2


def broker_of(served):
    return next(pid for pid in served.daemon.pids() if role_of(pid, served.daemon.pid) == "vfsd.broker")


def test_the_broker_has_the_capabilities_that_the_user_chose(tmp_path):
    served = start(tmp_path, Options(extra=("--modcaps=-mknod:-CAP_SETFCAP:+kill",)))
    expected = BROKER_CAPABILITIES - {"MKNOD", "SETFCAP"} | {"DAC_READ_SEARCH", "KILL"}
    for thread in take_census(broker_of(served)).threads:
        assert set(thread.permitted) == set(thread.effective) == expected
    assert any("--modcaps: the broker has more capabilities than it needs: kill" in line for line in served.daemon.log)
    served.close()


def test_a_policy_from_a_file_is_what_runs(tmp_path):
    """The log's hashes are those of the programs that vfsdctl makes of the file, and the daemon serves with them."""
    shown = run_vfsdctl("policy", "show", "--format", "toml")
    (tmp_path / "policy.toml").write_bytes(shown)
    with contextlib.closing(start(tmp_path, Options(extra=(f"--seccomp-policy={tmp_path / 'policy.toml'}",)))) as served:
        served.client.write_file(ROOT, b"file", b"x")
        (line,) = [line for line in served.daemon.log if "sha256" in line]
    assert f"policy ({tmp_path / 'policy.toml'}) {hashlib.sha256(shown).hexdigest()}" in line
    for role in ("broker", "control", "worker", "supervisor"):
        program = run_vfsdctl("policy", "show", str(tmp_path / "policy.toml"), "--role", role, "--format", "bpf")
        assert f"{role} {hashlib.sha256(program).hexdigest()}" in line


def test_a_weak_policy_from_a_file_starts_nothing(tmp_path):
    (tmp_path / "policy.toml").write_bytes(
        run_vfsdctl("policy", "show", "--format", "toml").replace(b'{ syscall = "bpf"', b'{ syscall = "getppid"')
    )
    (tmp_path / "share").mkdir()
    command = [sys.executable, "-m", "vfsd", "--shared-dir", tmp_path / "share", "--socket-path", tmp_path / "sock"]
    done = subprocess.run(
        [*command, f"--seccomp-policy={tmp_path / 'policy.toml'}"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "role supervisor may call bpf, which loads programs into the kernel" in done.stderr
    assert not (tmp_path / "sock").exists()


def run_vfsdctl(*arguments: str) -> bytes:
    script = "from vfsd.tools.vfsdctl import main; main()"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True).stdout
