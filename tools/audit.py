"""`make audit`: everything that speaks for vfsd's confinement, tried now and here; a report of one page, for the file.

Each claim is the work of one command (`audit_claims.py`), whose whole output is kept beside the report; the report has its
SHA-256. A test that was skipped speaks for nothing, and neither does a claim that could not be tried: the report says so.

Exit status: 0 if every claim that was to be tried holds, in what could be tried of it; 1 if one fails, or could not be tried at all.
"""

from __future__ import annotations

import argparse
import enum
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import vfsd
from tools.audit_claims import TREE, Claim, claims
from vfsd.sandbox import landlock
from vfsd.sandbox.seccomp import POLICY_FILE, load_policy

LONGEST_SECONDS = 3600
_CLOSING_LINE = re.compile(r"^=+ (.*) in [\d.]+s.* =+$")
_SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S+ (.*)$", re.MULTILINE)
_END_SECONDS = 60
_SHOWN = 5  # lines of a failure, in the report
_SHOWN_DIGITS = 16  # of an output's hash
_NOT_PASSED_ON = ("VFSD_", "PYTEST_", "PYTHON")  # what would change what is tried


class Verdict(enum.Enum):
    HOLDS = "holds"
    PARTLY = "holds, as far as tried"
    FAILS = "**FAILS**"
    NOT_TRIED = "**NOT TRIED**"
    LEFT_OUT = "not tried"


@dataclass(frozen=True)
class Outcome:
    verdict: Verdict
    evidence: str
    output: str = ""
    log: Path | None = None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="audit", description="Try all that speaks for vfsd's confinement, and report.", allow_abbrev=False
    )
    parser.add_argument("--folder", default=str(TREE / ".cache/audit"), help="where the report and each command's output are kept")
    parser.add_argument("--full", action="store_true", help="also what takes many minutes: the units in a guest with systemd")
    found = parser.parse_args()
    if os.geteuid() != 0:
        print("audit: confinement and attacks on it need uid 0", file=sys.stderr)
        return 1
    folder = Path(found.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    before = source()
    outcomes = try_all(claims(), folder, full=found.full)
    sections = [headline(before), table(outcomes), untried(outcomes), failures(outcomes), changed(before, source())]
    report = "\n".join([line for section in sections for line in section] + [f"Each command, and its output: {folder}"])
    (folder / "report.md").write_text(report + "\n")
    print(report)
    return status(outcomes, unchanged=before == source())


def status(outcomes: Sequence[tuple[Claim, Outcome]], *, unchanged: bool) -> int:
    """A claim that nobody asked to be tried is no failure; one that could not be tried is."""
    bad = any(outcome.verdict in (Verdict.FAILS, Verdict.NOT_TRIED) for _, outcome in outcomes)
    return 1 if bad or not unchanged else 0


# --- trying ---------------------------------------------------------------------------------------------------------------------


def try_all(wanted: Sequence[Claim], folder: Path, *, full: bool) -> list[tuple[Claim, Outcome]]:
    """Interrupted by ^C, or asked to end, it goes on to the report: what was not reached is not tried."""
    outcomes: list[tuple[Claim, Outcome]] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        for number, claim in enumerate(wanted, 1):
            print(f"{number}/{len(wanted)} {claim.text} ...", file=sys.stderr, flush=True)
            outcomes.append((claim, attempt(claim, folder / f"{number:02}.log", full=full)))
    except KeyboardInterrupt:
        outcomes += [(claim, Outcome(Verdict.NOT_TRIED, "interrupted")) for claim in wanted[len(outcomes) :]]
    return outcomes


def attempt(claim: Claim, log: Path, *, full: bool = False, longest_seconds: float = LONGEST_SECONDS) -> Outcome:
    if claim.only_full and not full:
        return Outcome(Verdict.LEFT_OUT, "takes many minutes; --full tries it")
    missing = [program for program in claim.needs if shutil.which(program) is None]
    if missing:
        return Outcome(Verdict.NOT_TRIED, f"not installed: {' '.join(missing)}")
    begun = time.monotonic()
    code = run(claim, log, longest_seconds)
    output = log.read_text(errors="backslashreplace")
    if code is None:
        return Outcome(Verdict.FAILS, f"did not end within {longest_seconds:.0f} s", output, log)
    evidence = summary_of(claim, output)
    return Outcome(verdict_of(claim, code, evidence), f"{evidence} ({time.monotonic() - begun:.0f} s)", output, log)


def run(claim: Claim, log: Path, longest_seconds: float) -> int | None:
    """The exit status of the command, None if it had to be killed, with all that it started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
    if claim.only_full:
        environment["VFSD_TEST_FULL"] = "1"
    with log.open("w") as file:
        file.write(f"$ {shlex.join(claim.command)}\n")
        file.flush()
        process = subprocess.Popen(
            claim.command, cwd=TREE, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(longest_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started, as ^C would: tests then stop their daemons. What is left is killed."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary_of(claim: Claim, output: str) -> str:
    """The last line; of pytest what it counted."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if len(lines) > 1 else ""  # the first is the command's own
    closing = _CLOSING_LINE.match(last) if claim.by_tests else None
    return closing[1] if closing else last[:100]


def verdict_of(claim: Claim, code: int, evidence: str) -> Verdict:
    if code != 0:
        return Verdict.FAILS
    if claim.by_tests and " passed" not in evidence:  # pytest is content if it skipped all there was
        return Verdict.NOT_TRIED
    return Verdict.PARTLY if claim.by_tests and "skipped" in evidence else Verdict.HOLDS


# --- reporting ------------------------------------------------------------------------------------------------------------------


def headline(source: str) -> Iterator[str]:
    kernel = os.uname()
    yield f"# vfsd {vfsd.__version__}: audit of its confinement, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
    yield ""
    yield f"* source: {source}"
    yield f"* machine: {kernel.sysname} {kernel.release} {kernel.machine}, Landlock ABI {landlock.abi_version() or 'none'}"
    yield f"* Python {platform.python_version()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}"
    yield f"* policy: SHA-256 {sha256(Path(POLICY_FILE).read_bytes()).hexdigest()}"
    policy = load_policy()
    for role in sorted(policy.roles):
        yield f"  * filter of {role}: SHA-256 {sha256(policy.compile(role, 'kill')).hexdigest()}"
    yield ""


def source() -> str:
    """Commit, whether the tree is that commit's, and a hash of what runs that needs no git."""
    files = sorted(path for path in (TREE / "vfsd").rglob("*") if path.suffix in (".py", ".toml"))
    listed = "".join(f"{sha256(path.read_bytes()).hexdigest()}  {path.relative_to(TREE)}\n" for path in files)
    return f"{_commit()}; {len(files)} files of vfsd/, SHA-256 of their SHA-256: {sha256(listed.encode()).hexdigest()}"


def _commit() -> str:
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TREE, capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=TREE, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return f"commit {commit}{', WITH CHANGES that are not committed' if changes else ''}"


def table(outcomes: Sequence[tuple[Claim, Outcome]]) -> Iterator[str]:
    yield "| # | result | claim | evidence | SHA-256 of the output |"
    yield "| --- | --- | --- | --- | --- |"
    for number, (claim, outcome) in enumerate(outcomes, 1):
        digest = "–" if outcome.log is None else f"{sha256(outcome.log.read_bytes()).hexdigest()[:_SHOWN_DIGITS]}…"
        yield f"| {number} | {outcome.verdict.value} | {claim.text} | {outcome.evidence} | {digest} |"
    yield ""
    counts = {verdict: sum(outcome.verdict is verdict for _, outcome in outcomes) for verdict in Verdict}
    told = [f"{number} {verdict.value.strip('*')}" for verdict, number in counts.items() if number]
    yield f"**{len(outcomes)} claims: {'; '.join(told)}.**"
    yield ""


def untried(outcomes: Sequence[tuple[Claim, Outcome]]) -> Iterator[str]:
    """Why tests were skipped, of each claim."""
    for number, (claim, outcome) in enumerate(outcomes, 1):
        reasons: dict[str, int] = {}
        for count, reason in _SKIPPED.findall(outcome.output) if claim.by_tests else ():
            reasons[reason] = reasons.get(reason, 0) + int(count)
        yield from (f"Not tried of {number}: {count} × {reason}" for reason, count in reasons.items())
        yield from [""] if reasons else []


def failures(outcomes: Sequence[tuple[Claim, Outcome]]) -> Iterator[str]:
    for number, (claim, outcome) in enumerate(outcomes, 1):
        if outcome.verdict is Verdict.FAILS:
            yield f"{number}, {claim.text}:"
            yield from (f"    {line}" for line in outcome.output.splitlines()[-_SHOWN:])
            yield ""


def changed(before: str, after: str) -> Iterator[str]:
    if before != after:
        yield f"**The source changed while it was tried**: now {after}"
        yield ""


if __name__ == "__main__":
    sys.exit(main())
