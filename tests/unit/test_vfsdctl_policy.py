"""`vfsdctl policy`, as it is typed: what it prints and how it ends."""

import json
import shlex
from pathlib import Path

import pytest

from tests.support.documents import TREE
from vfsd.sandbox.seccomp import POLICY_FILE, load_policy
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES
from vfsd.tools.vfsdctl import run

HARMLESS = '{ syscall = "getpid", used_by = "the test", reason = "because of the test" }'


@pytest.fixture
def ctl(capsys):
    """Run a policy command: (exit status, stdout, stderr)."""

    def command(*argv):
        status = run(["policy", *map(str, argv)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def written(tmp_path):
    """Write a policy: rules of the worker, and of other roles what is given; each further role may make one harmless call."""

    def write(*rules, name="policy.toml", **others):
        roles = {"worker": rules, **others}
        text = "version = 1\n"
        for role in ROLES:
            rows = ",\n".join([HARMLESS, *roles.get(role, ())])
            text += f'[role.{role}]\ndefault = "kill"\nrules = [\n{rows}\n]\n'
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def rule(syscall, when=None, **more):
    fields = {"syscall": syscall, "used_by": "x", "reason": f"because {syscall}", **({"when": when} if when else {}), **more}
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in fields.items()) + " }"


def edited(tmp_path, old, new, name="edited.toml"):
    text = Path(POLICY_FILE).read_text()
    assert text.count(old) == 1
    path = tmp_path / name
    path.write_text(text.replace(old, new))
    return path


def test_the_policy_that_vfsd_comes_with_is_in_order(ctl):
    status, out, err = ctl("check")
    assert (status, err) == (0, "")
    assert "worker: calls allowed: 22 on x86_64 and 22 on aarch64; any other: kills the process" in out


def test_check_tells_every_finding(ctl, tmp_path):
    path = tmp_path / "bad.toml"
    rows = [
        rule("reed"), rule("epoll_wait"), rule("write", ["arg0 >= 3"]), rule("futex", ["arg1 only 1"]), rule("futex", ["arg1 == 1"]),
        rule("execve"), rule("close", ["arg9 == 1"]),
    ]  # fmt: skip
    path.write_text(f'version = 1\n[group.idle]\nrules = []\n[role.worker]\ndefault = "kill"\nrules = [{", ".join(rows)}]\n')
    status, out, err = ctl("check", path)
    assert (status, out) == (1, "")
    for expected in (
        'schema: role worker, rule 3 (write): condition "arg0 >= 3": argument 0 of write is 32 bits wide',
        'schema: role worker, rule 7 (close): condition "arg9 == 1" is not understood [the rule\'s reason: "because close"]',
        "schema: group idle: no role uses it",
        "role: there is no role broker",
        "syscall: role worker, rule 1 (reed): libseccomp knows no such system call",
        "redundant: role worker, rule 5 (futex): role worker, rule 4 (futex) already cover(s) every call that it is about",
        "forbidden: role worker may call execve, which starts programs",
        "syscall: role worker, rule 2 (epoll_wait): aarch64 has no such system call: give the rule an arch [aarch64]",
        "10 finding(s)",
    ):
        assert expected in err


def test_check_as_json(ctl, written):
    status, out, _ = ctl("check", "--json", written(rule("execve"), rule("epoll_wait")))
    data = json.loads(out)
    assert status == 1
    assert not data["usable"]
    assert ["worker" in each["text"] for each in data["findings"] if each["kind"] == "forbidden"] == [True]
    assert [each["architectures"] for each in data["findings"] if each["kind"] == "syscall"] == [["aarch64"]]
    _, out, _ = ctl("check", "--json")
    data = json.loads(out)
    assert data["usable"]
    assert data["roles"]["worker"] == {"default": "kill", "syscalls": {"x86_64": 22, "aarch64": 22}}


def test_rules_that_only_together_cover_another_are_found(ctl, written):
    halves = [rule("umask", ["arg0 & 1 == 0"]), rule("umask", ["arg0 & 1 == 1"])]
    _, _, err = ctl("check", written(*halves, broker=[*halves, rule("umask", ["arg0 & 2 == 2"])]))
    assert "redundant: role broker, rule 4 (umask): role broker, rule 2 (umask), role broker, rule 3 (umask) already cover" in err


def test_a_file_that_is_no_policy_at_all(ctl, tmp_path):
    (tmp_path / "p").write_text("version = ")
    for command in (["check"], ["show"]):
        status, out, err = ctl(*command, tmp_path / "p")
        assert (status, out) == (1, "")
        assert err.startswith(f"vfsdctl: seccomp policy {tmp_path / 'p'}: ")


def test_a_policy_that_is_not_understood_is_not_shown_in_part(ctl, written):
    status, out, err = ctl("show", written(rule("write", ["arg0 >= 3"]), rule("write", ["arg0 >= 4"])))
    assert (status, out) == (1, "")
    assert "(and 1 more: vfsdctl policy check lists them)" in err


def test_explain_names_outcome_arguments_reason_use_and_place(ctl):
    status, out, _ = ctl("explain", "fcntl", "--role", "worker", "--arch", "x86_64")
    assert status == 0
    assert out.splitlines()[0] == "fcntl: number 72 on x86_64"
    assert "worker: depends on the arguments; with others than these: kills the process" in out
    assert "  arg1 == F_DUPFD_CLOEXEC: allowed\n    reason: duplicates a descriptor that is held" in out
    assert "    used by: mmap.mmap\n    stands in: role worker, rule 3 (fcntl)" in out
    assert "  forbidden to every policy with arg1 & 0xffffffff == F_SETFL: it changes an open file for all that hold it" in out
    assert "broker" not in out


def test_explain_takes_the_number_that_the_kernel_logs(ctl):
    assert ctl("explain", "59", "--arch", "x86_64")[1].startswith("execve: number 59 on x86_64\n")
    assert ctl("explain", "221", "--arch", "aarch64")[1].startswith("execve: number 221 on aarch64\n")
    status, _, err = ctl("explain", "9999", "--arch", "x86_64")
    assert (status, err) == (1, "vfsdctl: x86_64 has no system call 9999 that libseccomp knows\n")


@pytest.mark.parametrize(
    ("syscall", "role", "expected"),
    [
        ("execve", "worker", "worker: kills the process: no rule names it\n  forbidden to every policy: it starts programs"),
        ("execve", "supervisor", "supervisor: allowed: no rule names it"),
        ("bpf", "supervisor", "supervisor: kills the process\n  any arguments: kills the process"),
        ("clone3", "worker", "worker: not made: fails with ENOSYS"),
        ("brk", "worker", "worker: not made: returns 0"),
        ("openat", "broker", "forbidden to every policy unless arg0 & 0x80000000 == 0: it takes a path from the working directory"),
    ],
)
def test_explain_every_outcome(ctl, syscall, role, expected):
    assert expected in ctl("explain", syscall, "--role", role)[1]


def test_explain_as_json(ctl):
    data = json.loads(ctl("explain", "brk", "--json", "--arch", "x86_64")[1])
    assert (data["syscall"], data["number"], set(data["roles"])) == ("brk", 12, set(ROLES))
    assert data["roles"]["worker"]["rules"][0]["action"] == "errno(0)"
    assert data["roles"]["broker"]["rules"][0]["action"] == "allow"


def test_explain_of_a_call_that_only_another_machine_has(ctl):
    assert ctl("explain", "epoll_wait", "--arch", "aarch64")[1].startswith("epoll_wait: aarch64 has no such call\n")
    assert ctl("explain", "reed")[2] == "vfsdctl: libseccomp knows no system call reed\n"


@pytest.mark.parametrize(
    ("argv", "status", "outcome", "rule_named"),
    [
        (["broker", "openat", "5", "0", "O_RDONLY|O_CLOEXEC"], 0, "allow", "role broker, rule 1 (openat)"),
        (["broker", "openat", "AT_FDCWD", "0", "O_RDONLY|O_CLOEXEC"], 1, "kill the process", "default"),
        (["broker", "openat", "-100", "0", "O_CLOEXEC"], 1, "kill the process", "default"),
        (["broker", "openat", "5", "0", "O_RDONLY"], 1, "kill the process", "default"),
        (
            ["worker", "mmap", "0", "4096", "PROT_READ", "MAP_ANONYMOUS"],
            1,
            "fail with ENOMEM",
            "role worker, group fixed-memory, rule 4 (mmap)",
        ),
        (["worker", "mmap", "0", "4096", "PROT_EXEC", "MAP_ANONYMOUS"], 1, "kill the process", "default"),
        (["worker", "brk"], 1, "return 0 without the call", "group fixed-memory, rule 1 (brk)"),
        (["supervisor", "bpf"], 1, "kill the process", "role supervisor, rule 1 (bpf)"),
        (["supervisor", "execve"], 0, "allow", "default"),
        (["worker", "fcntl", "3", "F_DUPFD"], 1, "kill the process", "default"),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_emulate_gives_the_verdict_and_the_rule(ctl, architecture, argv, status, outcome, rule_named):
    ended, out, err = ctl("emulate", *argv, "--arch", architecture)
    first, second, *_ = out.splitlines()
    assert (ended, err) == (status, "")
    assert first.endswith(f"on {architecture}: {outcome}")
    assert second.startswith("decided by: ")
    assert rule_named in second


def test_emulate_prints_what_the_readme_shows(ctl):
    lines = (TREE / "README.md").read_text().splitlines()
    typed = next(number for number, line in enumerate(lines) if line.startswith("$ vfsdctl policy emulate "))
    out = ctl(*shlex.split(lines[typed])[3:], "--arch", "x86_64")[1].splitlines()
    assert out[:2] == lines[typed + 1 : typed + 3]  # the third line counts instructions: libseccomp's versions differ


def test_emulate_uses_the_constants_of_the_machine_asked_about(ctl):
    """O_NOFOLLOW of the one is O_DIRECT, or nothing, of the other."""
    x86, arm = (
        json.loads(ctl("emulate", "broker", "openat", "5", "0", "O_NOFOLLOW|O_CLOEXEC", "--arch", each, "--json")[1])
        for each in ARCHITECTURES
    )
    assert (x86["arguments"][2], arm["arguments"][2]) == (0o2400000, 0o2100000)
    assert x86["allowed"]
    assert arm["allowed"]
    assert x86["rule"]["where"] == "role broker, rule 1 (openat)"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["worker", "reed"], "libseccomp knows no system call reed"),
        (["worker", "read", "O_NONSENSE"], "'O_NONSENSE' is neither a number nor a constant that is known"),
        (["worker", "read", "*"], "'*' is neither a number"),
        (["worker", "read", "0x10000000000000000"], "does not fit into 64 bits"),
        (["worker", "read", *"1234567"], "at most 6 arguments"),
        (["worker", "epoll_wait", "--arch", "aarch64"], "aarch64 has no system call epoll_wait"),
    ],
)
def test_emulate_refuses_what_is_no_call(ctl, argv, message):
    status, out, err = ctl("emulate", *argv)
    assert (status, out) == (1, "")
    assert message in err


def test_diff_of_a_policy_with_itself_is_nothing(ctl, tmp_path):
    _, text, _ = ctl("show", "--format", "toml")
    (tmp_path / "same.toml").write_text(text)
    assert ctl("diff", POLICY_FILE, tmp_path / "same.toml") == (0, "", "")


def test_diff_tells_what_became_possible_and_fails(ctl, tmp_path):
    new = edited(tmp_path, '"arg2 only MSG_DONTWAIT|MSG_NOSIGNAL"]', '"arg2 only MSG_DONTWAIT|MSG_NOSIGNAL|1"]')
    status, out, _ = ctl("diff", POLICY_FILE, new, "--role", "worker")
    assert status == 1
    assert out == (
        "+ worker: sendmsg: possible, e.g. sendmsg(0x0, 0x0, 0x1, 0x0, 0x0, 0x0)\n"
        "    old: arg2 only MSG_DONTWAIT|MSG_NOSIGNAL: allowed\n"
        "    new: arg2 only MSG_DONTWAIT|MSG_NOSIGNAL|1: allowed\n"
    )
    status, out, _ = ctl("diff", new, POLICY_FILE)
    assert status == 0
    assert [line.split(", e.g.")[0] for line in out.splitlines() if line.startswith("-")] == [
        f"- {role}: sendmsg: impossible" for role in ("broker", "control", "worker")
    ]


def test_diff_of_a_call_that_comes_and_one_that_goes(ctl, written):
    old, new = written(rule("getuid"), name="old"), written(rule("getgid"), name="new")
    status, out, _ = ctl("diff", old, new)
    assert status == 1
    assert "+ worker: getgid: possible, e.g. getgid(" in out
    assert "    old: no rule: kills the process\n    new: any arguments: allowed" in out
    assert "- worker: getuid: impossible, e.g. getuid(" in out


def test_diff_sees_through_another_way_of_writing_the_same(ctl, written):
    halves = [rule("umask", ["arg0 & 1 == 0"]), rule("umask", ["arg0 & 1 == 1"])]
    assert ctl("diff", written(rule("umask"), name="old"), written(*halves, name="new")) == (0, "", "")


def test_diff_of_how_a_call_fails(ctl, written):
    old, new = (written(rule("madvise", action=f"errno({each})"), name=each) for each in ("ENOMEM", "EPERM"))
    status, out, _ = ctl("diff", old, new)
    assert status == 0
    assert out.startswith("~ worker: madvise: fails differently, e.g. madvise(")


def test_diff_where_one_machine_alone_changes(ctl, written):
    old, new = written(name="old"), written(rule("getuid", arch=["aarch64"]), name="new")
    status, out, _ = ctl("diff", old, new)
    assert (status, out.splitlines()[0]) == (1, "+ worker: getuid: possible [aarch64], e.g. getuid(0x0, 0x0, 0x0, 0x0, 0x0, 0x0)")


def test_diff_of_a_role_that_then_may_do_anything(ctl, written):
    old = written(name="old")
    new = written(name="new")
    new.write_text(
        new.read_text().replace(
            f'[role.control]\ndefault = "kill"\nrules = [\n{HARMLESS}', f'[role.control]\ndefault = "allow"\nrules = [\n{rule("bpf")}'
        )
    )
    status, out, _ = ctl("diff", old, new, "--json")
    data = json.loads(out)
    assert status == 1
    assert [(each["role"], each["kind"], each["syscall"]) for each in data] == [("control", "possible", "(any other call)")]


def test_every_role_of_the_policy_can_be_asked_for():
    assert set(load_policy().roles) == set(ROLES)
