"""What is read off strace's lines: who makes a call, whether it is locked down then, and which rule decides."""

import json

import pytest

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import load_policy
from vfsd.tools import policy_coverage, proposal, rule_coverage, vfsdctl
from vfsd.tools.rule_coverage import State
from vfsd.tools.syscall_record import Recorder, new_record, parse_record, rule_name
from vfsd.tools.syscall_trace import SyscallTrace

WORKER = '100 execve("/usr/bin/python3", ["/usr/bin/python3", "-I", "-m", "vfsd.worker", "23"], 0x7f /* 0 vars */) = 0'
LOCK_DOWN = "100 seccomp(0x1, 0x1, 0x7fad0556fd60) = 0"


def reported(*lines):
    calls = []
    trace = SyscallTrace(lambda *call: calls.append(call))
    for line in lines:
        trace.feed(line)
    return calls


def test_only_what_comes_after_lock_down_is_reported():
    lines = (WORKER, "100 openat(0xffffff9c, 0x7f, 0x80000) = 0x3", LOCK_DOWN, "100 read(0x3, 0x7f00, 0x8) = 0x8")
    assert reported(*lines) == [("worker", "read", (3, 0x7F00, 8))]


@pytest.mark.parametrize(
    "attempt",
    [
        "100 seccomp(0x1, 0x1, 0) = -1 EFAULT (Bad address)",  # libseccomp asks what the kernel can do
        "100 seccomp(0x2, 0, 0x7ffdf4b2c87c) = 0",
        "100 seccomp(0x1, 0x1, 0x7fad0556fd60 <unfinished ...>",
    ],
)
def test_lock_down_is_a_filter_that_was_taken(attempt):
    assert reported(WORKER, attempt, "100 read(0x3, 0x7f00, 0x8) = 0x8") == []


def test_a_call_that_is_told_in_two_lines_is_one():
    lines = (WORKER, "100 seccomp(0x1, 0x1, 0x7f <unfinished ...>", "100 <... seccomp resumed>) = 0")
    wait = ("100 poll(0x7f10, 0x2, 0xffffffffffffffff <unfinished ...>", "100 <... poll resumed>) = 0x1")
    assert reported(*lines, *wait) == [("worker", "poll", (0x7F10, 2, 0xFFFFFFFFFFFFFFFF))]


def test_a_thread_is_of_its_process_also_in_another_pid_namespace():
    thread = "100 clone3({flags=CLONE_VM|CLONE_THREAD} => {parent_tid=[3]}, 88) = 3 /* 102 in strace's PID NS */"
    assert reported(WORKER, thread, LOCK_DOWN, "102 sched_yield() = 0") == [("worker", "sched_yield", ())]
    assert reported(WORKER, LOCK_DOWN, "102 sched_yield() = 0") == []


def test_what_a_locked_down_process_starts_is_told_by_what_it_executes():
    supervisor = '90 execve("/usr/bin/vfsd", ["vfsd", "--tag=x"], 0x7f /* 3 vars */) = 0'
    lines = (supervisor, "90 seccomp(0x1, 0x1, 0x7f) = 0", "90 clone(child_stack=NULL, flags=CLONE_NEWPID|SIGCHLD) = 100")
    assert reported(*lines, "100 setsid() = 100")[-1] == ("supervisor", "setsid", ())
    assert reported(*lines, WORKER, "100 setsid() = 100")[-1][:2] == ("supervisor", "execve")
    failed = WORKER.replace("= 0", "= -1 ENOENT (No such file)")
    assert reported(*lines, failed, "100 setsid() = 100")[-1] == ("supervisor", "setsid", ())


def test_a_pid_that_comes_again_is_somebody_else():
    assert reported(WORKER, LOCK_DOWN, "100 +++ exited with 0 +++", "100 getpid() = 100") == []


@pytest.mark.parametrize("line", ["", "strace: nonsense", "100 --- SIGSYS {} ---", "100 ???", "100 <... read resumed>) = 0"])
def test_what_is_no_call_is_passed_over(line):
    assert reported(WORKER, LOCK_DOWN, line) == []


@pytest.fixture(scope="module")
def policy():
    return load_policy()


def recorded(policy, *calls):
    record = new_record(policy, runs=1)
    recorder = Recorder(policy, record)
    for role, name, arguments in calls:
        recorder.observe(role, name, arguments)
    return record


def test_a_record_counts_rules_and_keeps_examples_of_what_has_none(policy):
    record = recorded(policy, *[("worker", "fstat", (3, 0x7F))] * 3, ("worker", "getppid", ()), ("worker", "fcntl", (3, 4, 0x800)))
    assert record.roles["worker"].used == {"fstat": 3}
    assert {name: (each.count, each.examples) for name, each in record.roles["worker"].missing.items()} == {
        "getppid": (1, [()]),
        "fcntl": (1, [(3, 4, 0x800)]),
    }


def test_records_add_up_and_survive_a_file(policy):
    record = recorded(policy, ("worker", "fstat", (3, 0x7F)), ("broker", "getppid", ()))
    again = parse_record(record.to_json(), "file")
    again.add(record)
    assert again.runs == 2
    assert again.roles["worker"].used == {"fstat": 2}
    assert again.roles["broker"].missing["getppid"].count == 2


def test_a_record_of_another_policy_or_of_nothing_is_refused(policy, tmp_path):
    for text in ("", "[]", '{"format": 2}', '{"format": 1}'):
        with pytest.raises(ConfigError, match=r"file: "):
            parse_record(text, "file")
    other = recorded(policy)
    other.policy = "another"
    (tmp_path / "record").write_text(other.to_json())
    with pytest.raises(ConfigError, match="another policy"):
        policy_coverage.read_records(policy, [str(tmp_path / "record")])


def test_a_proposal_names_what_was_the_same_in_every_call_and_leaves_the_reason_to_people(policy):
    calls = [("worker", "madvise2", (address, 4096, 4)) for address in (0x7F0000001000, 0x7F0000002000)]
    lines = proposal.propose_rules(recorded(policy, *calls))
    assert lines[-2] == '  { syscall = "madvise2", when = ["arg1 == 0x1000", "arg2 == 0x4"], used_by = "", reason = "" },'
    assert "2 times, as madvise2(0x7f0000001000, 0x1000, 0x4) or" in lines[-3]
    assert proposal.propose_rules(recorded(policy)) == []


def test_a_rule_that_nothing_exercises_is_a_finding_and_a_seldom_one_is_not(policy):
    record = recorded(policy, ("worker", "fstat", (3, 0x7F)))
    seldom = rule_coverage.load_seldom_used(policy)
    states = {(row.role, row.rule): row.state for row in rule_coverage.cover(policy, record, seldom)}
    assert states["worker", "fstat"] is State.RECORDED
    assert states["worker", "restart_syscall"] is State.SELDOM
    assert states["broker", "fsync"] is State.NEVER
    assert states["supervisor", "bpf"] is State.DENIAL


def test_a_denied_call_that_was_attempted_is_a_finding(policy):
    record = recorded(policy, ("supervisor", "bpf", (0, 0, 0)), ("supervisor", "read", (0, 0, 0)))
    states = {row.rule: row.state for row in rule_coverage.cover(policy, record, {}) if row.role == "supervisor"}
    assert states["bpf"] is State.ATTEMPTED


def test_an_entry_about_no_rule_is_refused(policy, tmp_path):
    (tmp_path / "list.toml").write_text('[[rule]]\nroles = ["worker"]\nrule = "getppid"\nwhy = "x"\n')
    with pytest.raises(ConfigError, match="role worker has no rule 'getppid'"):
        rule_coverage.load_seldom_used(policy, str(tmp_path / "list.toml"))


def test_the_command_tells_findings_and_fails(policy, tmp_path, capsys):
    (tmp_path / "record").write_text(recorded(policy, ("worker", "getppid", ())).to_json())
    assert vfsdctl.run(["policy", "coverage", str(tmp_path / "record")]) == 1
    out = capsys.readouterr().out
    assert "FINDING: broker: never exercised: fsync" in out
    assert "FINDING: worker: getppid: made after lock-down, and not allowed" in out
    assert vfsdctl.run(["policy", "coverage", "--json", str(tmp_path / "record")]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == ["worker: getppid"]


def test_a_record_in_which_all_was_exercised_has_no_finding(policy, tmp_path, capsys):
    record = new_record(policy, runs=1)
    for role in policy.roles.values():
        if role.default == "kill":
            recorded_role = recorded(policy, (role.name, "exit_group", (0,))).roles[role.name]
            recorded_role.used.update(rule_name(rule) for rule in role.rules)
            record.roles[role.name] = recorded_role
    (tmp_path / "record").write_text(record.to_json())
    assert vfsdctl.run(["policy", "coverage", str(tmp_path / "record")]) == 0
    assert "FINDING" not in capsys.readouterr().out
