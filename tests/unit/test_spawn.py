"""A program as the first process of a pid namespace, by the running interpreter."""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest

from vfsd.errors import ConfigError
from vfsd.sandbox import syscalls
from vfsd.sandbox.spawn import start_in_pid_namespace

pytestmark = pytest.mark.root


@pytest.fixture
def run():
    """Runs Python in a namespace: what it wrote to stderr, and its exit status."""

    def run(script, *pass_fds):
        output = os.memfd_create("output")
        try:
            process = start_in_pid_namespace([sys.executable, "-I", "-c", script], stderr=output, pass_fds=pass_fds, remedy="")
            status = process.wait()
            assert process.wait() == status  # asked again, it still knows
            return os.pread(output, 1 << 16, 0).decode(), status
        finally:
            os.close(output)

    return run


def test_it_is_process_1_of_its_namespace_and_we_stay_in_ours(run):
    before = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "pid_for_children")]
    output, status = run("import os, sys; print(os.getpid(), os.getppid(), os.getsid(0), os.getcwd(), dict(os.environ), file=sys.stderr)")
    assert output.split(" ", 4)[:4] == ["1", "0", "1", "/"]
    assert "PATH" not in output
    assert status == 0
    assert [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "pid_for_children")] == before


def test_it_has_the_descriptors_that_were_passed_and_no_other(run):
    given, kept_back = os.pipe()
    os.set_inheritable(kept_back, True)  # as one that our own starter left open
    try:
        probe = "import os, sys\nfor fd in range(3, 3000):\n try: os.fstat(fd)\n except OSError: continue\n print(fd, file=sys.stderr)"
        output, _ = run(probe, given)
        assert output.split() == [str(given)]
    finally:
        os.close(given)
        os.close(kept_back)


def test_a_descriptor_above_a_lowered_limit_does_not_reach_it_either(run):
    """--rlimit-nofile lowers the limit after our starter opened what it pleased."""
    given, kept_back = os.pipe()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = 2900
    os.dup2(kept_back, high, inheritable=True)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2800, limits[1]))
        probe = "import os, sys\nfor fd in range(3, 3000):\n try: os.fstat(fd)\n except OSError: continue\n print(fd, file=sys.stderr)"
        output, _ = run(probe, given)
        assert output.split() == [str(given)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in (given, kept_back, high):
            os.close(fd)


def test_how_it_ended_is_told_as_subprocess_tells_it(run):
    assert run("raise SystemExit(7)")[1] == 7
    process = start_in_pid_namespace([sys.executable, "-I", "-c", "import signal; signal.pause()"], stderr=2, pass_fds=(), remedy="")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_what_cannot_be_executed_is_our_error(tmp_path):
    plain = Path(tmp_path / "plain")
    plain.touch()
    for program, expected in ((plain, PermissionError), (tmp_path / "none", FileNotFoundError)):
        with pytest.raises(expected):
            start_in_pid_namespace([str(program)], stderr=2, pass_fds=(), remedy="")


def test_a_host_that_forbids_the_namespace_is_a_step_that_failed(monkeypatch):
    def refuse(_flags):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(syscalls, "fork_into", refuse)
    with pytest.raises(ConfigError, match=r"cannot make a pid namespace: Operation not permitted \(EPERM\); do this"):
        start_in_pid_namespace(["/bin/true"], stderr=2, pass_fds=(), remedy="do this")
