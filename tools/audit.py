"""`make audit`: everything that speaks for vfsd's confinement, tried now and here; a report of one page, for the file.

Each claim is the work of one command, whose whole output is kept beside the report. A test that was skipped is said to be:
it speaks for nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import vfsd
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT as SHARE_ROOT
from tests.support.frontend.serving import start
from vfsd.sandbox import landlock
from vfsd.sandbox.seccomp import POLICY_FILE, load_policy

TREE = Path(__file__).parents[1]
VFSDCTL = [str(Path(sys.executable).with_name("vfsdctl"))]
PYTEST = [sys.executable, "-m", "pytest", "-n", "auto", "--randomly-seed=1"]
LOCK_DOWN = [f"tests/security/test_{name}.py" for name in ("lockdown", "roots", "readonly", "user_namespace", "running_daemon", "status")]
HOSTILE = [f"tests/security/test_hostile_{name}.py" for name in ("messages", "requests", "children")]
DEPLOYMENT = ["tests/unit/test_deploy.py", "tests/unit/test_service_manager.py", "tests/integration/test_service_manager.py"]
_CLOSING_LINE = re.compile(r"^=+ (.*) in [\d.]+s.* =+$")
_SHOWN = 5  # lines of a failure, in the report


@dataclass(frozen=True)
class Check:
    """One claim, and the command that speaks for it. `by_tests`: it is pytest, whose closing line is the summary."""

    claim: str
    command: Sequence[str]
    by_tests: bool = False


@dataclass(frozen=True)
class Outcome:
    passed: bool
    summary: str
    output: str
    seconds: float


def tests(claim: str, *paths: str) -> Check:
    return Check(claim, [*PYTEST, *paths], by_tests=True)


OFFLINE = (
    Check("the policy is understood, forbids what it must, has no rule twice", [*VFSDCTL, "policy", "check"]),
    tests("the compiled filters answer as the policy reads", "tests/unit/test_seccomp_filters.py", "tests/unit/test_seccomp_policy.py"),
    tests(
        "documents say what the policy, the code and the tests are",
        "tests/unit/test_generated_docs.py",
        "tests/unit/test_hardening.py",
        "tests/unit/test_semantics.py",
    ),
)
BY_ATTACK = (
    tests(
        "every rule is tried with what it permits and what it does not; every call that is not listed dies",
        "tests/security/test_every_rule.py",
        "tests/security/test_filters_kill.py",
    ),
    tests("lock-down, roots, read-only shares, user namespaces, the daemon as it runs", *LOCK_DOWN),
    tests("hostile workers and a hostile control get nothing, and others are served on", *HOSTILE),
    tests("donated descriptors lead nowhere else, layer by layer", "tests/security/test_escapes.py"),
    tests("fuzzing: fixed seeds, and the corpus", "tests/fuzz"),
    tests("deployment: units, profile, socket activation, heartbeats", *DEPLOYMENT),
)
COVERAGE = Check(
    "no rule is superfluous: recorded runs exercise it, or it is known why not", [sys.executable, str(TREE / "tools/record_coverage")]
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="audit", description="Try all that speaks for vfsd's confinement, and report.")
    parser.add_argument("--folder", default=str(TREE / ".cache/audit"), help="where the report and each command's output are kept")
    folder = Path(parser.parse_args().folder)
    if os.geteuid() != 0:
        print("audit: confinement and attacks on it need uid 0", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [(check, run(check, folder)) for check in (*OFFLINE, *BY_ATTACK, COVERAGE)]
    with daemon_with_a_frontend() as pid:
        outcomes += [(check, run(check, folder)) for check in of_a_running_daemon(pid)]
    report = "\n".join([*headline(), *table(outcomes), *failures(outcomes), f"Each command's output: {folder}"])
    (folder / "report.md").write_text(report + "\n")
    print(report)
    return 0 if all(outcome.passed for _, outcome in outcomes) else 1


@contextmanager
def daemon_with_a_frontend() -> Iterator[int]:
    """The pid of a vfsd that serves two queues and has a file open."""
    with tempfile.TemporaryDirectory(prefix="vfsd-audit-", dir="/var/tmp") as folder:
        served = start(Path(folder), Options(request_queues=2), queues=3)
        try:
            served.client.open(served.client.write_file(SHARE_ROOT, b"file", b"x").nodeid)
            yield served.daemon.pid
        finally:
            served.close()


def of_a_running_daemon(pid: int) -> list[Check]:
    return [
        Check(
            "what runs is what was read: the kernel's filters are the policy's", [*VFSDCTL, "policy", "dump", "--pid", str(pid), "--all"]
        ),
        Check("census: each process, thread and descriptor is as documented", [*VFSDCTL, "status", str(pid), "--security"]),
    ]


def run(check: Check, folder: Path) -> Outcome:
    print(f"{check.claim} ...", file=sys.stderr, flush=True)
    begun = time.monotonic()
    done = subprocess.run(check.command, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    name = re.sub(r"\W+", "-", check.claim)[:40].strip("-")
    (folder / f"{name}.log").write_text(f"$ {' '.join(check.command)}\n{done.stdout}")
    summary = summary_of(check, done.stdout)
    tried = not check.by_tests or " passed" in summary  # pytest is content if it skipped all there was
    return Outcome(done.returncode == 0 and tried, summary, done.stdout, time.monotonic() - begun)


def summary_of(check: Check, output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    closing = _CLOSING_LINE.match(last) if check.by_tests else None
    return closing[1] if closing else last[:100]


def headline() -> Iterator[str]:
    kernel = os.uname()
    yield f"# vfsd {vfsd.__version__}: audit of its confinement, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    yield ""
    yield f"* source: {source()}"
    yield f"* machine: {kernel.sysname} {kernel.release} {kernel.machine}, Landlock ABI {landlock.abi_version() or 'none'}"
    yield f"* Python {platform.python_version()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}"
    yield f"* policy: SHA-256 {sha256(Path(POLICY_FILE).read_bytes()).hexdigest()}"
    policy = load_policy()
    for role in sorted(policy.roles):
        yield f"  * filter of {role}: SHA-256 {sha256(policy.compile(role, 'kill')).hexdigest()}"
    yield ""


def source() -> str:
    """Commit, and whether the tree is that commit's."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TREE, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=TREE, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return f"commit {commit}{', WITH CHANGES that are not committed' if changed else ''}"


def table(outcomes: Sequence[tuple[Check, Outcome]]) -> Iterator[str]:
    yield "| result | claim | evidence |"
    yield "| --- | --- | --- |"
    for check, outcome in outcomes:
        yield f"| {verdict(outcome)} | {check.claim} | {outcome.summary} ({outcome.seconds:.0f} s) |"
    yield ""
    failed = sum(not outcome.passed for _, outcome in outcomes)
    yield f"**{len(outcomes) - failed} of {len(outcomes)} claims hold.**"
    yield ""


def verdict(outcome: Outcome) -> str:
    if not outcome.passed:
        return "**FAILS**"
    return "holds, as far as tried" if "skipped" in outcome.summary else "holds"


def failures(outcomes: Sequence[tuple[Check, Outcome]]) -> Iterator[str]:
    for check, outcome in outcomes:
        if not outcome.passed:
            yield f"{check.claim}:"
            yield from (f"    {line}" for line in outcome.output.splitlines()[-_SHOWN:])
            yield ""


if __name__ == "__main__":
    sys.exit(main())
