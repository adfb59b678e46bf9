"""Which policy a start takes, whether it may, and what the log says of it."""

import hashlib
from pathlib import Path

import pytest

from vfsd.cli import parse_options
from vfsd.errors import ConfigError
from vfsd.filters import make_filters
from vfsd.log import INFO, Logger
from vfsd.sandbox.seccomp import POLICY_FILE, load_policy


class Lines(Logger):
    def __init__(self):
        super().__init__(INFO)
        self.lines = []

    def _emit(self, level, text):
        self.lines.append((level, text))


@pytest.fixture
def log():
    return Lines()


@pytest.fixture
def edited(tmp_path):
    """The policy that vfsd comes with, changed, in a file."""

    def edit(*changes):
        text = Path(POLICY_FILE).read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "policy.toml"
        path.write_text(text)
        return str(path)

    return edit


EXECUTABLE = (
    '"arg2 == PROT_READ|PROT_WRITE", "arg3 == MAP_PRIVATE',
    '"arg2 only PROT_READ|PROT_WRITE|PROT_EXEC", "arg3 == MAP_PRIVATE',
)
NO_BPF = ('  { syscall = "bpf", used_by = "nobody", reason = "kernel programs; a large attack surface" },\n', "")


def options(*argv):
    return parse_options(["--shared-dir=/srv", "--socket-path=/run/s", *argv])


def test_the_hashes_in_the_log_are_those_of_the_policy_and_of_every_filter(log):
    filters = make_filters(options(), log)
    ((level, line),) = log.lines
    assert level == INFO
    assert f"seccomp=kill; sha256 of policy (own) {hashlib.sha256(Path(POLICY_FILE).read_bytes()).hexdigest()}, of filters: " in line
    assert set(filters) == {"broker", "control", "worker", "supervisor"}
    for role, program in filters.items():
        assert program == load_policy().compile(role, "kill")
        assert f"{role} {hashlib.sha256(program).hexdigest()}" in line


def test_another_action_is_another_filter(log):
    make_filters(options("--seccomp=log"), log)
    make_filters(options("--seccomp=kill"), log)
    assert "seccomp=log; " in log.lines[0][1]
    assert log.lines[0][1].split("worker ")[1] != log.lines[1][1].split("worker ")[1]


def test_without_seccomp_nothing_is_loaded_and_nothing_said(log):
    assert set(make_filters(options("--seccomp=none"), log).values()) == {b""}
    assert log.lines == []


def test_a_file_replaces_the_policy(log, edited):
    path = edited(('{ syscall = "restart_syscall"', '{ syscall = "getppid"'))
    filters = make_filters(options(f"--seccomp-policy={path}"), log)
    assert filters["worker"] != load_policy().compile("worker", "kill")
    assert [level for level, _line in log.lines] == [INFO]
    assert f"sha256 of policy ({path})" in log.lines[0][1]


def test_a_weak_policy_is_refused_and_told_how(log, edited):
    path = edited(EXECUTABLE, NO_BPF)
    with pytest.raises(ConfigError) as refusal:
        make_filters(options(f"--seccomp-policy={path}"), log)
    text = str(refusal.value)
    assert text.startswith(
        f"--seccomp-policy={path}: role broker may call mmap with arg2 has PROT_EXEC, which makes memory executable; e.g. mmap("
    )
    assert '(mmap), "the inode table grows; no file is ever mapped"]' in text
    assert "and 1 more: vfsdctl policy check" in text
    assert text.endswith("mend it, or use --allow-weak-policy")
    assert log.lines == []


def test_a_weak_policy_that_is_wanted_gives_a_warning_for_each_weakness(log, edited):
    path = edited(EXECUTABLE, NO_BPF)
    filters = make_filters(options(f"--seccomp-policy={path}", "--allow-weak-policy"), log)
    assert filters["broker"]
    warnings = [line for level, line in log.lines if level < INFO]
    assert [line.split(": ")[1].split(",")[0] for line in warnings] == [
        "role broker may call mmap with arg2 has PROT_EXEC",
        "role supervisor may call bpf",
    ]
    assert "[no rule denies it]" in warnings[1]


def test_a_policy_without_a_role_is_refused(log, tmp_path):
    text = Path(POLICY_FILE).read_text()
    path = tmp_path / "policy.toml"
    path.write_text(text[: text.index("[role.supervisor]")])
    with pytest.raises(ConfigError, match="there is no role supervisor, and every process of vfsd needs its filter"):
        make_filters(options(f"--seccomp-policy={path}", "--allow-weak-policy"), log)


def test_a_policy_with_a_role_that_vfsd_has_not_is_refused(log, edited):
    path = edited(("[role.worker]", '[role.janitor]\ndefault = "kill"\nuse = ["life"]\n[role.worker]'))
    with pytest.raises(ConfigError, match="vfsd has no role janitor"):
        make_filters(options(f"--seccomp-policy={path}"), log)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seccomp-policy=/p", "--seccomp=none"], "argument --seccomp-policy: not allowed with argument --seccomp=none"),
        (["--allow-weak-policy"], "argument --allow-weak-policy: is about --seccomp-policy, which is not given"),
    ],
)
def test_options_that_contradict_each_other_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit):
        options(*argv)
    assert message in capsys.readouterr().err
