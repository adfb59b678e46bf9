"""The list of what no policy may allow, and that a policy which does is found out."""

import pytest

from vfsd.errors import ConfigError
from vfsd.sandbox.bpf import AUDIT_ARCH, RET_ALLOW, RET_KILL_PROCESS, run_filter
from vfsd.sandbox.seccomp import load_policy, syscall_number
from vfsd.sandbox.seccomp_forbidden import FORBIDDEN, find_permitted, find_weaknesses
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES, parse_policy

NAMES = sorted({each.syscall for each in FORBIDDEN})
# Linux 6.13 to 6.17, the same on every machine: newer than many a libseccomp, which then knows neither name nor number.
NEW = {
    "setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466, "open_tree_attr": 467,
    "file_getattr": 468, "file_setattr": 469,
}  # fmt: skip


def role_of(name, *rules, default="kill"):
    """A role with these rules and one that does no harm."""
    rows = [{"used_by": "the test", "reason": "because of the test", **rule} for rule in ({"syscall": "getpid"}, *rules)]
    return parse_policy({"version": 1, "role": {name: {"default": default, "rules": rows}}})[name]


def weaknesses(*rules, name="worker", default="kill", architecture="x86_64"):
    return [str(each) for each in find_weaknesses(role_of(name, *rules, default=default), architecture)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_policy_that_vfsd_comes_with_allows_nothing_forbidden(architecture):
    for role in load_policy().roles.values():
        assert [str(each) for each in find_weaknesses(role, architecture)] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_forbidden_call_exists(name):
    numbers = {number for each in ARCHITECTURES if (number := syscall_number(name, each)) is not None}
    assert numbers or name in NEW
    assert name not in NEW or numbers <= {NEW[name]}


@pytest.mark.parametrize("role", ["broker", "control", "worker"])
@pytest.mark.parametrize("name", NEW)
def test_a_call_that_libseccomp_may_not_know_is_forbidden_and_kills(role, name):
    assert len(weaknesses({"syscall": name}, name=role)) == 1
    policy = load_policy()
    for architecture in ARCHITECTURES:
        program = policy.compile(role, "kill", architecture)
        assert run_filter(program, NEW[name], (3, 0, 0, 0, 0, 0), AUDIT_ARCH[architecture]) == RET_KILL_PROCESS
    assert run_filter(policy.compile("supervisor", "kill", "x86_64"), NEW[name], (3, 0, 0, 0, 0, 0)) == RET_ALLOW  # a start needs mounts


def test_the_broker_could_be_given_attributes_of_what_is_open_but_not_by_path():
    for name in ("getxattrat", "setxattrat", "listxattrat", "removexattrat", "file_getattr", "file_setattr"):
        assert weaknesses({"syscall": name, "when": ["arg0 is fd"]}, name="broker") == []
        (found,) = weaknesses({"syscall": name}, name="broker")
        assert "AT_FDCWD" in found


@pytest.mark.parametrize("forbidden", FORBIDDEN, ids=lambda each: f"{each.syscall}{each.arguments()}")
def test_who_allows_the_call_with_any_arguments_is_found_out(forbidden):
    for name in forbidden.roles:
        role = role_of(name, {"syscall": forbidden.syscall}) if name != "supervisor" else role_of(name, default="allow")
        assert find_permitted(role, forbidden, "x86_64") is not None


def test_the_supervisor_denies_the_whole_list_and_nothing_else():
    denied = {rule.syscall for rule in load_policy().roles["supervisor"].rules}
    assert denied == {each.syscall for each in FORBIDDEN if "supervisor" in each.roles}


def test_a_weakness_names_the_rule_its_reason_and_an_example():
    (found,) = weaknesses({"syscall": "execve", "reason": "I like it so"})
    assert found == (
        "role worker may call execve, which starts programs; e.g. execve(0x0, 0x0, 0x0, 0x0, 0x0, 0x0) "
        '[role worker, rule 2 (execve), "I like it so"]'
    )


def test_executable_memory_is_found_in_any_combination():
    assert weaknesses({"syscall": "mmap", "when": ["arg2 only PROT_READ|PROT_WRITE"]}) == []
    assert weaknesses({"syscall": "mmap", "when": ["arg2 == PROT_READ"]}) == []
    for conditions in (["arg2 == PROT_READ|PROT_EXEC"], ["arg2 only 7"], ["arg2 >= 3"], ["arg0 == NULL"], []):
        (found,) = weaknesses({"syscall": "mmap", "when": conditions})
        assert "makes memory executable" in found
    assert weaknesses({"syscall": "mmap", "when": ["arg2 < 4"]}) == []


def test_two_rules_that_together_leave_nothing_forbidden_are_no_weakness():
    both = [{"syscall": "fcntl", "when": [f"arg1 == {each}"]} for each in ("F_GETFL", "F_DUPFD_CLOEXEC")]
    assert weaknesses(*both) == []
    (found,) = weaknesses(*both, {"syscall": "fcntl", "when": ["arg1 == F_SETFL"]})
    assert "changes an open file for all that hold it" in found


def test_high_bits_hide_nothing():
    """The kernel looks at the low half of the command: a rule about the other bits would permit any."""
    with pytest.raises(ConfigError, match="argument 1 of fcntl is 32 bits wide"):
        weaknesses({"syscall": "fcntl", "when": ["arg1 == 0x100000004"]})


def test_an_errno_is_no_permission():
    assert weaknesses({"syscall": "clone3", "action": "errno(ENOSYS)"}) == []


def test_the_broker_must_not_resolve_from_the_working_directory():
    assert weaknesses({"syscall": "openat", "when": ["arg0 is fd"]}, name="broker") == []
    assert weaknesses({"syscall": "openat", "when": ["arg0 & 0x80000000 == 0"]}, name="broker") == []
    (found,) = weaknesses({"syscall": "openat"}, name="broker")
    assert "AT_FDCWD" in found
    two = weaknesses({"syscall": "linkat"}, name="broker")
    assert len(two) == 2
    assert len(weaknesses({"syscall": "linkat", "when": ["arg0 is fd"]}, name="broker")) == 1


def test_the_broker_must_not_change_identity_for_good():
    effective_only = ["arg0 & 0xffffffff == UNCHANGED_ID", "arg2 & 0xffffffff == UNCHANGED_ID"]
    assert weaknesses({"syscall": "setresuid", "when": effective_only}, name="broker") == []
    assert len(weaknesses({"syscall": "setresuid", "when": effective_only[:1]}, name="broker")) == 1
    assert len(weaknesses({"syscall": "setresuid", "when": effective_only}, name="worker")) == 1


def test_what_the_supervisor_no_longer_denies_is_a_weakness():
    names = {each.syscall for each in FORBIDDEN if "supervisor" in each.roles}
    all_but_two = [{"syscall": each} for each in sorted(names - {"bpf", "ptrace"})]
    rows = [*all_but_two, {"syscall": "ptrace", "when": ["arg0 & 0xffffffff == 0"]}]
    role = parse_policy(
        {"version": 1, "role": {"supervisor": {"default": "allow", "rules": [{"used_by": "x", "reason": "a test", **row} for row in rows]}}}
    )["supervisor"]
    found = [str(each) for each in find_weaknesses(role, "x86_64")]
    assert len(found) == 2
    assert all(text.endswith("[no rule denies it]") for text in found)


def test_a_confined_role_that_may_do_all_but_a_list_is_weak_in_every_way():
    listed = len([each for each in FORBIDDEN if "worker" in each.roles and "x86_64" in each.architectures])
    unlisted, *others = weaknesses({"syscall": "bpf"}, default="allow")
    assert "may call anything, which no rule names: its default must be kill" in unlisted
    assert len(others) == listed - 1


def test_a_call_that_a_machine_does_not_have_cannot_be_missing_from_a_list():
    assert {each.syscall for each in FORBIDDEN if each.architectures == ("x86_64",)} == {"iopl", "ioperm", "modify_ldt"}
    assert {role for each in FORBIDDEN for role in each.roles} == set(ROLES)
