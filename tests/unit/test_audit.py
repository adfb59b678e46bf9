"""`make audit` says of each claim what was found, and of what was not tried that it was not."""

import sys

import pytest

from tests.support.frontend.checks import eventually
from tools import audit
from tools.audit import Verdict, attempt, failures, status, summary_of, table, try_all, untried
from tools.audit_claims import TREE, Claim, claims, named_for_threats


def shell(script, **more):
    return Claim("it is so", ["sh", "-c", script], **more)


def pytest_says(closing, code=0, before="/dev/null"):
    return shell(f"cat '{before}'; echo '===== {closing} in 1.23s ====='; exit {code}", by_tests=True)


@pytest.mark.parametrize(
    ("claim", "verdict", "evidence"),
    [
        (shell("echo all is well"), Verdict.HOLDS, "all is well"),
        (shell("echo it is not >&2; exit 1"), Verdict.FAILS, "it is not"),
        (shell("kill -9 $$"), Verdict.FAILS, ""),
        (pytest_says("5 passed"), Verdict.HOLDS, "5 passed"),
        (pytest_says("5 passed, 2 skipped"), Verdict.PARTLY, "5 passed, 2 skipped"),
        (pytest_says("7 skipped"), Verdict.NOT_TRIED, "7 skipped"),
        (pytest_says("1 failed, 5 passed", 1), Verdict.FAILS, "1 failed, 5 passed"),
        (shell("echo hardly begun", by_tests=True), Verdict.NOT_TRIED, "hardly begun"),
        (shell("true", needs=["no-such-program"]), Verdict.NOT_TRIED, "not installed: no-such-program"),
        (shell("true", only_full=True), Verdict.LEFT_OUT, "--full"),
    ],
)
def test_each_claim_has_the_verdict_that_its_command_earned(tmp_path, claim, verdict, evidence):
    outcome = attempt(claim, tmp_path / "log")
    assert (outcome.verdict, evidence in outcome.evidence) == (verdict, True)


def test_a_command_without_end_is_killed_with_all_it_started_and_fails(tmp_path):
    outcome = attempt(shell("sleep 1000 & echo $!; wait"), tmp_path / "log", longest_seconds=1)
    assert (outcome.verdict, outcome.evidence) == (Verdict.FAILS, "did not end within 1 s")
    sleeper = int(outcome.output.splitlines()[-1])
    assert eventually(lambda: not runs(sleeper))


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_would_change_the_tests_is_not_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("VFSD_TEST_DAEMON", "rust")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    assert attempt(shell("env"), tmp_path / "log").output.count("VFSD_TEST_DAEMON") == 0
    assert "PYTEST_ADDOPTS" not in (tmp_path / "log").read_text()
    assert "VFSD_TEST_FULL=1" in attempt(shell("env", only_full=True), tmp_path / "log", full=True).output


def test_the_exit_status_tells_whether_all_that_was_asked_for_was_found(tmp_path):
    held, failed, untried_one = (
        try_all([claim], tmp_path, full=False) for claim in (shell("true"), shell("false"), pytest_says("1 skipped"))
    )
    left_out = try_all([shell("true", only_full=True)], tmp_path, full=False)
    assert status(held + left_out, unchanged=True) == 0
    assert status(held, unchanged=False) == 1
    assert status(held + failed, unchanged=True) == 1
    assert status(held + untried_one, unchanged=True) == 1


def test_an_interrupted_audit_reports_what_it_has(tmp_path, monkeypatch):
    def interrupted(claim, log, **_):
        if log.name == "02.log":
            raise KeyboardInterrupt
        return attempt(claim, log)

    monkeypatch.setattr(audit, "attempt", interrupted)
    outcomes = try_all([shell("true")] * 3, tmp_path, full=False)
    assert [outcome.verdict for _, outcome in outcomes] == [Verdict.HOLDS, Verdict.NOT_TRIED, Verdict.NOT_TRIED]


def test_the_report_has_a_line_for_each_claim_and_shows_failures_and_reasons(tmp_path):
    (tmp_path / "said").write_text("SKIPPED [2] tests/a.py:7: no such kernel\nSKIPPED [1] tests/b.py:1: no such kernel\n")
    skipping = pytest_says("5 passed, 3 skipped", before=tmp_path / "said")
    outcomes = try_all([shell("true"), shell("echo broken; exit 1"), skipping], tmp_path, full=False)
    told = list(table(outcomes))
    assert [line.split(" | ")[1] for line in told[2:5]] == ["holds", "**FAILS**", "holds, as far as tried"]
    assert told[-2] == "**3 claims: 1 holds; 1 holds, as far as tried; 1 FAILS.**"
    assert list(untried(outcomes)) == ["Not tried of 3: 3 × no such kernel", ""]
    assert "    broken" in list(failures(outcomes))


def test_pytest_itself_is_understood(tmp_path):
    """Its closing line, and its reasons for what it skipped."""
    (tmp_path / "test_two.py").write_text(
        "import pytest\ndef test_one(): pass\n@pytest.mark.skip(reason='because of that')\ndef test_two(): pass\n"
    )
    claim = Claim("it is so", [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", str(tmp_path)], by_tests=True)
    outcome = attempt(claim, tmp_path / "log")
    assert (outcome.verdict, summary_of(claim, outcome.output)) == (Verdict.PARTLY, "1 passed, 1 skipped")
    assert next(iter(untried([(claim, outcome)]))) == "Not tried of 1: 1 × because of that"


def test_every_test_that_speaks_for_a_threat_is_run_and_is_there():
    run = [path for claim in claims() for path in claim.command if path.startswith("tests/")]
    assert len(named_for_threats()) > 40
    assert named_for_threats() <= set(run)
    assert sorted(path for path in run if not (TREE / path).exists()) == []
    assert sorted(path for path in set(run) if run.count(path) > 1) == []
