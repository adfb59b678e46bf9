"""A policy in other sandboxes' formats says the same, or less: each is read back by its own rules, and asked about many calls."""

import json
import random
import re
import subprocess
import sys
import tomllib

import pytest

from vfsd.errors import ConfigError
from vfsd.sandbox import bpf
from vfsd.sandbox.seccomp import load_policy, syscall_number
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES, parse_policy
from vfsd.tools.policy_disasm import disassemble, outcome_of
from vfsd.tools.policy_foreign import firecracker, minijail, oci
from vfsd.tools.policy_formats import table, toml
from vfsd.tools.vfsdctl import run

CONFINED = ("broker", "control", "worker")
ALL_BITS = 2**64 - 1


def role_of(*rules, default="kill"):
    rows = [{"used_by": "x", "reason": "because of the test", **rule} for rule in rules]
    return parse_policy({"version": 1, "role": {"worker": {"default": default, "rules": rows}}})["worker"]


# Comparisons and actions that the shipped policy does not use.
ODD = role_of(
    {"syscall": "lseek", "when": ["arg1 > 5"]},
    {"syscall": "read", "when": ["arg2 <= 0x100000000", "arg1 != 7"]},
    {"syscall": "write", "when": ["arg2 >= 3"]},
    {"syscall": "mmap", "when": ["arg0 < 9", "arg2 & 0xf0 == 0x50", "arg3 has 0x8000000000000001"]},
    {"syscall": "madvise", "when": ["arg2 == 8"], "action": "errno(EPERM)"},
    {"syscall": "madvise", "when": ["arg2 == 4"]},
)


def roles():
    return [*(load_policy().roles[name] for name in CONFINED), ODD]


def calls(role, architecture):
    """Calls that meet a rule, each also with one argument changed, and some that no rule is about."""
    dice = random.Random(7)
    rules = role.rules_for(architecture)
    for rule in rules:
        arguments = [dice.getrandbits(64) for _ in range(6)]
        for each in rule.comparisons:
            free = arguments[each.argument] & ~each.value if each.operator == "masked" else each.value
            arguments[each.argument] = free | each.operand
        yield rule.syscall, tuple(arguments)
        for each in rule.comparisons:
            position, value = each.argument, arguments[each.argument]
            changed = {value ^ 1 << bit for bit in range(64)} | {0, ALL_BITS, (value + 1) & ALL_BITS, (value - 1) & ALL_BITS}
            for other in sorted(changed):
                yield rule.syscall, (*arguments[:position], other, *arguments[position + 1 :])
    yield from ((name, (0,) * 6) for name in ("execve", "ptrace", "read", "openat"))


def holds_in_oci(argument, arguments):
    actual, value = arguments[argument["index"]], argument["value"]
    return {
        "SCMP_CMP_EQ": actual == value,
        "SCMP_CMP_NE": actual != value,
        "SCMP_CMP_LT": actual < value,
        "SCMP_CMP_LE": actual <= value,
        "SCMP_CMP_GT": actual > value,
        "SCMP_CMP_GE": actual >= value,
        "SCMP_CMP_MASKED_EQ": actual & value == argument.get("valueTwo"),
    }[argument["op"]]


def verdict_of_oci(profile, syscall, arguments):
    for row in profile["syscalls"]:
        if syscall in row["names"] and all(holds_in_oci(each, arguments) for each in row.get("args", [])):
            return row["errnoRet"] if row["action"] == "SCMP_ACT_ERRNO" else row["action"]
    return profile["defaultAction"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("role", [*roles(), load_policy().roles["supervisor"]], ids=lambda role: role.name)
def test_an_oci_profile_says_exactly_the_same(role, architecture):
    shown = oci([role], architecture)
    profile = json.loads(shown.text)
    words = {"allow": "SCMP_ACT_ALLOW", "kill": "SCMP_ACT_KILL_PROCESS"}
    for syscall, arguments in calls(role, architecture):
        verdict = role.verdict(syscall, arguments, architecture)
        assert verdict_of_oci(profile, syscall, arguments) == words.get(verdict, verdict), (syscall, arguments)
    assert profile["architectures"] == [f"SCMP_ARCH_{architecture.upper()}"]
    assert "another architecture's entry" in shown.left_out[0]


def holds_in_minijail(atom, arguments):
    name, operator, value = atom.split()
    actual, value = arguments[int(name.removeprefix("arg"))], int(value, 0)
    return {
        "==": actual == value, "!=": actual != value, "<": actual < value, "<=": actual <= value, ">": actual > value, ">=": actual >= value,
        "&": bool(actual & value), "in": not actual & ~value,
    }[operator]  # fmt: skip


def read_minijail(text):
    """(default action, system call -> [(atoms, action)])"""
    (default,) = re.findall(r"^@default (.*)$", text, re.MULTILINE)
    filters = {}
    for syscall, written in re.findall(r"^([a-z0-9_]+): (.*)$", text, re.MULTILINE):
        for one in written.removeprefix("{ ").removesuffix(" }").split(", "):
            *expression, action = one.split("; ")
            filters.setdefault(syscall, []).append(([atom for clause in expression for atom in clause.split(" && ")], action))
    return default, filters


def verdict_of_minijail(policy, syscall, arguments):
    default, filters = policy
    for atoms, action in filters.get(syscall, []):
        if all(holds_in_minijail(atom, arguments) for atom in atoms):
            return action
    return default


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("role", roles(), ids=lambda role: role.name)
def test_a_minijail_policy_says_exactly_the_same(role, architecture):
    shown = minijail([role], architecture)
    assert shown.left_out == ()
    policy = read_minijail(shown.text)
    for syscall, arguments in calls(role, architecture):
        verdict = role.verdict(syscall, arguments, architecture)
        expected = {"allow": "allow", "kill": "kill-process"}.get(verdict, f"return {verdict}")
        assert verdict_of_minijail(policy, syscall, arguments) == expected, (syscall, arguments)


def test_a_minijail_policy_cannot_deny_a_list_by_death():
    with pytest.raises(ConfigError, match="role supervisor denies a list of calls"):
        minijail([load_policy().roles["supervisor"]], "x86_64")


def holds_in_firecracker(argument, arguments):
    actual, value = arguments[argument["index"]], argument["val"]
    assert argument["type"] == "qword"
    if isinstance(argument["op"], dict):
        return actual & argument["op"]["masked_eq"] == value
    return {
        "eq": actual == value, "ne": actual != value, "lt": actual < value, "le": actual <= value, "gt": actual > value, "ge": actual >= value,
    }[argument["op"]]  # fmt: skip


def verdict_of_firecracker(found, syscall, arguments):
    for row in found["filter"]:
        if row["syscall"] == syscall and all(holds_in_firecracker(each, arguments) for each in row.get("args", [])):
            return found["filter_action"]
    return found["default_action"]


@pytest.mark.parametrize("role", [*roles(), load_policy().roles["supervisor"]], ids=lambda role: role.name)
def test_firecrackers_json_says_the_same_and_kills_where_it_cannot(role):
    shown = firecracker([role], "x86_64")
    found = json.loads(shown.text)[role.name]
    words = {"allow": "allow", "kill": "kill_process"}
    for syscall, arguments in calls(role, "x86_64"):
        verdict = role.verdict(syscall, arguments, "x86_64")
        assert verdict_of_firecracker(found, syscall, arguments) == words.get(verdict, "kill_process")
    failing = [rule for rule in role.rules_for("x86_64") if isinstance(rule.action, int)]
    assert len(shown.left_out) == len(failing)
    assert all(rule.where in text for rule, text in zip(failing, shown.left_out, strict=True))


def test_toml_is_a_policy_that_makes_the_same_filters():
    policy = load_policy()
    read_back = parse_policy(tomllib.loads(toml([policy.roles[name] for name in ROLES]).text))
    for role in ROLES:
        for each in ARCHITECTURES:
            shown = read_back[role]
            assert [(rule.syscall, rule.comparisons, rule.action, rule.reason) for rule in shown.rules_for(each)] == [
                (rule.syscall, rule.comparisons, rule.action, rule.reason) for rule in policy.roles[role].rules_for(each)
            ]


def test_toml_survives_texts_that_need_quoting():
    odd = role_of({"syscall": "read", "reason": 'a "quote", a \\, a tab\t, an ä and 🦝', "action": "errno(EPERM)", "arch": ["aarch64"]})
    shown = parse_policy(tomllib.loads(toml([odd]).text))["worker"]
    assert shown.rules[0].reason == odd.rules[0].reason
    assert (shown.rules[0].action, shown.rules[0].architectures) == (1, ("aarch64",))


def test_the_table_has_a_line_for_each_rule_and_counts():
    role = load_policy().roles["worker"]
    lines = table([role], "x86_64").text.splitlines()
    assert lines[0] == "worker (x86_64): 22 calls allowed, any other kills the process"
    assert len(lines) == 2 + len(role.rules_for("x86_64"))
    row = r"fcntl +allowed +arg1 == F_DUPFD_CLOEXEC +mmap\.mmap +duplicates a descriptor that is held.*"
    assert len([line for line in lines if re.fullmatch(row, line)]) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_disassembly_names_calls_arguments_and_answers(architecture):
    policy = load_policy()
    text = disassemble(policy.compile("worker", "kill", architecture), architecture)
    assert f"; AUDIT_ARCH_{architecture.upper()}" in text
    assert "; number of the system call" in text
    assert re.search(r"if == 0x[0-9a-f]+ goto \d+ else \d+ +; pwritev2$", text, re.MULTILINE)
    assert re.search(r"load \[56\] +; arg5, lower half$", text, re.MULTILINE)
    assert re.search(r"return 0x5000c +; fail with ENOMEM$", text, re.MULTILINE)
    assert re.search(r"return 0x50000 +; return 0 without the call$", text, re.MULTILINE)
    named = set(re.findall(r"; ([a-z0-9_]+)$", text, re.MULTILINE)) - {"architecture", "allow"}
    assert named == {rule.syscall for rule in policy.roles["worker"].rules_for(architecture)}
    assert len(text.splitlines()) == len(bpf.instructions(policy.compile("worker", "kill", architecture)))


def test_the_disassembly_of_what_libseccomp_would_not_make():
    code = b"\xff\0\0\0\1\0\0\0" + b"\x20\0\0\0\x07\0\0\0" + b"\x20\0\0\0\x40\0\0\0" + b"\x05\0\0\0\0\1\0\0"
    assert [line.split("; ")[1] for line in disassemble(code, "x86_64").splitlines()[:3]] == [
        "not one that libseccomp makes", "outside of seccomp_data", "outside of seccomp_data",
    ]  # fmt: skip
    assert [outcome_of(value) for value in (bpf.RET_LOG, bpf.RET_TRAP, 0, 0x7FC00000)] == [
        "log and allow", "trap", "kill the thread", "unknown action 0x7fc00000",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["oci", "minijail", "bpf"])
def test_a_format_for_one_process_needs_a_role(form, capsys):
    assert run(["policy", "show", "--format", form]) == 1
    assert f"--format={form}: is for one process; choose it with --role" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["table", "toml", "firecracker", "pfc", "disasm"])
def test_other_formats_show_every_role(form, capsys):
    assert run(["policy", "show", "--format", form, "--arch", "x86_64"]) == 0
    shown = capsys.readouterr().out
    assert all(role in shown for role in ROLES)


def test_pfc_is_of_the_architecture_asked_for(capsys):
    assert run(["policy", "show", "--format", "pfc", "--role", "worker", "--arch", "aarch64"]) == 0
    shown = capsys.readouterr().out
    assert "# filter for arch aarch64" in shown
    assert f'# filter for syscall "preadv2" ({syscall_number("preadv2", "aarch64")})' in shown


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bpf_is_the_program_itself(architecture):
    arguments = ["policy", "show", "--role", "broker", "--format", "bpf", "--arch", architecture]
    done = subprocess.run(
        [sys.executable, "-c", "from vfsd.tools.vfsdctl import main; main()", *arguments], capture_output=True, check=True
    )
    assert done.stdout == load_policy().compile("broker", "kill", architecture)
