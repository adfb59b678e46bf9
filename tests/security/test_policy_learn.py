"""`vfsdctl policy learn`: a real daemon under observation, told what its policy lacks and does not need; nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support.frontend.daemon import READY
from vfsd.sandbox.seccomp import POLICY_FILE
from vfsd.tools import vfsdctl

LEARN = "import sys; from vfsd.tools import vfsdctl; sys.exit(vfsdctl.run(['policy', 'learn', *sys.argv[1:]]))"
DEADLINE_SECONDS = 120


def learn(tmp_path, *options, stop_by=signal.SIGTERM):
    """Observe a daemon until it waits for a frontend, then stop it through the observer: (exit status, its output, the daemon's log)."""
    (tmp_path / "share").mkdir()
    daemon = [sys.executable, "-m", "vfsd", "--shared-dir", str(tmp_path / "share"), "--socket-path", str(tmp_path / "vfsd.sock")]
    command = [sys.executable, "-c", LEARN, *options, "--", *daemon]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    hang = threading.Timer(DEADLINE_SECONDS, process.kill)
    hang.start()
    log = []
    for line in process.stderr:
        log.append(line)
        if READY in line:
            process.send_signal(stop_by)
    out, _ = process.communicate()
    hang.cancel()
    return process.returncode, out, log


@pytest.mark.parametrize("stop_by", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_with_the_policy_it_came_with_lacks_nothing(tmp_path, stop_by):
    status, out, log = learn(tmp_path, "--record", str(tmp_path / "record"), "--json", stop_by=stop_by)
    assert status == 0, (out, log)
    found = json.loads(out)
    assert set(found["record"]["roles"]) == {"supervisor", "broker", "control", "worker"}
    assert all(role["missing"] == {} for role in found["record"]["roles"].values())
    assert found["record"]["roles"]["broker"]["used"]["close"] > 0
    assert "fsync" in found["unused"]["broker"]
    assert found["unused"]["supervisor"] == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["record", "share"]
    assert not any(str(tmp_path) in command for command in commands())
    assert json.loads((tmp_path / "record").read_text()) == found["record"]


def commands():
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    yield file.read().decode(errors="backslashreplace")
            except OSError:
                continue


def test_what_a_policy_lacks_is_told_and_a_rule_without_a_reason_proposed(tmp_path):
    changed = tmp_path / "policy.toml"
    with open(POLICY_FILE, encoding="utf-8") as file:
        changed.write_text("".join(line for line in file if 'syscall = "recvmsg"' not in line))
    status, out, _log = learn(tmp_path, "--policy", str(changed))
    assert status == 1
    assert "  missing: recvmsg (" in out
    start = out.index("[role.control]")
    assert '{ syscall = "recvmsg", ' in out[start:]
    assert 'used_by = "", reason = "" }' in out[start:]


def test_what_is_no_daemon_of_ours_is_refused(tmp_path, capsys):
    assert vfsdctl.run(["policy", "learn", "--", "true"]) == 1
    assert "no process of it was locked down" in capsys.readouterr().err
    assert vfsdctl.run(["policy", "learn", "--", "vfsd", "--seccomp=none"]) == 1
    assert "nothing tells where lock-down is" in capsys.readouterr().err


def test_without_strace_it_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vfsdctl.run(["policy", "learn", "--", "vfsd"]) == 1
    assert "strace is not installed" in capsys.readouterr().err
