"""What seccomp_policy.toml may say, and how it is refused when it says something else."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import POLICY_FILE, load_policy
from vfsd.sandbox.seccomp_policy import parse_policy

READ = {"syscall": "read", "used_by": "the test", "reason": "because of the test"}


def rule(**changes):
    return {key: value for key, value in {**READ, **changes}.items() if value is not None}


def role_of(*rules, default="kill", **more):
    return parse_policy({"version": 1, "role": {"worker": {"default": default, "rules": list(rules)}}, **more})["worker"]


def refusal(*rules, **more):
    with pytest.raises(ConfigError) as caught:
        role_of(*rules, **more)
    return str(caught.value)


def verdict(condition, *arguments, syscall="fcntl", default="kill"):
    found = role_of(rule(syscall=syscall, when=[condition]), default=default)
    return found.verdict(syscall, (*arguments, *[0] * (6 - len(arguments))), "x86_64")


def load_text(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return load_policy(str(path))


def test_the_shipped_policy_has_every_role():
    assert set(load_policy().roles) == {"broker", "control", "supervisor", "worker"}


def test_every_shipped_rule_says_why_and_for_whom():
    for role in load_policy().roles.values():
        for each in role.rules:
            assert len(each.reason) >= 10, each.where
            assert each.used_by, each.where


def test_the_shipped_policy_is_valid_on_aarch64_too():
    with open(POLICY_FILE, "rb") as file:
        roles = parse_policy(tomllib.load(file))
    waits = {"epoll_wait", "epoll_pwait", "poll", "ppoll"}
    for role, wanted in {"broker": {"epoll_pwait", "ppoll"}, "control": {"ppoll"}, "worker": {"epoll_pwait"}}.items():
        assert {each.syscall for each in roles[role].rules_for("aarch64")} & waits == wanted


@pytest.mark.parametrize("key", ["syscall", "reason", "used_by"])
def test_a_rule_without_a_needed_key_is_refused(key):
    assert f"{key} is missing" in refusal(rule(**{key: None}))
    assert f"{key} is missing" in refusal(rule(**{key: "  "}))
    assert f"{key} is missing" in refusal(rule(**{key: 3}))


def test_a_refusal_names_role_rule_and_reason():
    text = refusal(rule(), rule(syscall="write", reason="writes things", when=["arg0 ?= 3"]))
    assert text == (
        'seccomp policy: role worker, rule 2 (write): condition "arg0 ?= 3" is not understood [the rule\'s reason: "writes things"]'
    )


def test_an_unknown_key_is_refused():
    assert "unknown key 'wen'" in refusal(rule(wen=["arg0 == 1"]))
    assert "unknown key 'roles'" in refusal(rule(), roles={})
    with pytest.raises(ConfigError, match="role worker: unknown key 'rule'"):
        parse_policy({"version": 1, "role": {"worker": {"default": "kill", "rule": []}}})


@pytest.mark.parametrize("version", [None, 0, 2, "1", True])
def test_another_version_is_refused(version):
    with pytest.raises(ConfigError, match="version"):
        parse_policy({"version": version, "role": {}})


def test_an_unknown_system_call_is_refused_with_its_reason(tmp_path):
    text = 'version = 1\n[role.worker]\ndefault = "kill"\nrules = [{ syscall = "reed", used_by = "x", reason = "to read" }]\n'
    with pytest.raises(ConfigError, match=r'role worker, rule 1 \(reed\): libseccomp knows no such system call.*"to read"'):
        load_text(tmp_path, text)


def test_a_call_of_another_machine_needs_an_arch(tmp_path):
    text = 'version = 1\n[role.worker]\ndefault = "kill"\nrules = [{ syscall = "vm86", used_by = "x", reason = "to read" }]\n'
    with pytest.raises(ConfigError, match="give the rule an arch"):
        load_text(tmp_path, text)


@pytest.mark.parametrize("operator", ["<", "<=", ">", ">=", "!="])
def test_comparisons_that_high_bits_satisfy_are_refused_on_narrow_arguments(operator):
    text = refusal(rule(when=[f"arg0 {operator} 3"]))
    assert "argument 0 of read is 32 bits wide" in text
    assert "because of the test" in text


@pytest.mark.parametrize("operator", ["<", "<=", ">", ">=", "!="])
def test_order_comparisons_are_fine_on_wide_arguments(operator):
    assert verdict(f"arg2 {operator} 0x100000000", 5, 0, 0xFFFFFFFF, syscall="read") in ("allow", "kill")


def test_a_denial_that_high_bits_evade_is_refused():
    with pytest.raises(ConfigError, match="evade this denial"):
        role_of(rule(syscall="fcntl", when=["arg1 == 4"]), default="allow")
    assert verdict("arg1 & 0xffffffff == 4", 1, 1 << 32 | 4, default="allow") == "kill"


def test_equality_is_exact_over_all_bits():
    assert verdict("arg1 == F_GETFL", 5, 3) == "allow"
    assert verdict("arg1 == F_GETFL", 5, 1 << 32 | 3) == "kill"


def test_only_permits_no_other_bit():
    assert verdict("arg2 only O_RDWR|O_CLOEXEC", 0, 0, 0o2000002, syscall="openat") == "allow"
    assert verdict("arg2 only O_RDWR|O_CLOEXEC", 0, 0, 0, syscall="openat") == "allow"
    assert verdict("arg2 only O_RDWR|O_CLOEXEC", 0, 0, 0o100, syscall="openat") == "kill"
    assert verdict("arg2 only O_RDWR|O_CLOEXEC", 0, 0, 1 << 40, syscall="openat") == "kill"


def test_has_wants_all_of_the_bits():
    assert verdict("arg3 has MAP_PRIVATE|MAP_ANONYMOUS", 0, 0, 0, 0x62, syscall="mmap") == "allow"
    assert verdict("arg3 has MAP_PRIVATE|MAP_ANONYMOUS", 0, 0, 0, 0x20, syscall="mmap") == "kill"


@given(st.integers(0, 2**64 - 1))
def test_is_fd_means_what_the_kernel_takes_for_a_descriptor(value):
    assert (verdict("arg0 is fd", value) == "allow") == (value < 2**31)


@pytest.mark.parametrize("number", ["010", "00", "0x", "9" * 5000, "0x" + "f" * 5000])
def test_what_python_would_not_read_as_a_number_is_refused(number):
    assert "neither a number nor" in refusal(rule(when=[f"arg1 == {number}"]))


@pytest.mark.parametrize("number", ["9" * 5000, "4096", "010", "0x10", "\u0663"])
def test_an_errno_that_cannot_be_is_refused(number):
    assert "there is no such errno" in refusal(rule(action=f"errno({number})"))


@pytest.mark.parametrize("condition", ["arg0 has 0x100000000", "arg0 == 0x100000001", "arg0 & 0x100000003 == 0x100000001"])
def test_a_condition_on_bits_that_the_kernel_does_not_see_is_refused(condition):
    assert "32 bits wide" in refusal(rule(syscall="write", when=[condition]))
    assert verdict(condition.replace("arg0", "arg1"), 0, 0x100000001, syscall="write") == "allow"


def test_a_document_that_nests_too_deeply_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="recursion"):
        load_text(tmp_path, "version = " + "[" * 5000)


def test_conditions_on_one_argument_are_joined():
    found = role_of(rule(syscall="mmap", when=["arg3 only 0x22", "arg3 has 0x20"]))
    assert [found.verdict("mmap", (0, 0, 0, flags, 0, 0), "x86_64") for flags in (0x20, 0x22, 0x02, 0x21)] == [
        "allow", "allow", "kill", "kill",
    ]  # fmt: skip


def test_conditions_that_cannot_both_hold_are_refused():
    assert "contradict" in refusal(rule(syscall="mmap", when=["arg3 == 1", "arg3 has 0x20"]))
    assert "compared more than once" in refusal(rule(when=["arg2 > 1", "arg2 < 5"]))


@pytest.mark.parametrize("condition", ["arg6 == 1", "arg0 == ", "arg0 == -1", "arg0 == O_NONSENSE", "arg0 & 1 == 2", "arg0 has 0", 7])
def test_a_condition_that_is_not_understood_is_refused(condition):
    assert "role worker, rule 1" in refusal(rule(when=[condition]))


def test_a_number_beyond_64_bits_is_refused():
    assert "64 bits" in refusal(rule(when=["arg1 == 0x10000000000000000"]))


@pytest.mark.parametrize("action", ["log", "errno", "errno()", "errno(ENONSENSE)", "errno(4096)", "errno(__doc__)", 5, None])
def test_an_unknown_action_is_refused(action):
    if action is None:
        assert role_of(rule(action=action)).rules[0].action == "allow"
    else:
        assert "action" in refusal(rule(action=action))


def test_errno_actions():
    assert role_of(rule(action="errno(ENOMEM)")).rules[0].action == 12
    assert role_of(rule(action="errno(0)")).rules[0].action == 0


def test_an_action_that_changes_nothing_is_refused():
    assert "does anyway" in refusal(rule(action="kill"))
    assert "does anyway" in refusal(rule(action="allow"), default="allow")


def test_a_redundant_rule_is_refused():
    assert "already decides" in refusal(rule(), rule())
    assert "already decides" in refusal(rule(), rule(when=["arg0 == 3"]))
    assert "already decides" in refusal(rule(when=["arg0 == 3"]), rule())
    role_of(rule(when=["arg0 == 3"]), rule(when=["arg0 == 4"]))


def test_rules_that_disagree_must_not_overlap():
    deny = rule(syscall="mmap", action="errno(ENOMEM)", when=["arg3 has MAP_ANONYMOUS"])
    assert "already decides" in refusal(deny, rule(syscall="mmap", when=["arg2 == 1"]))
    role_of(deny, rule(syscall="mmap", when=["arg3 == MAP_SHARED"]))


def test_groups_are_shared_and_must_exist_and_be_used():
    group = {"base": {"rules": [READ]}}
    shared = {"version": 1, "group": group, "role": {name: {"default": "kill", "use": ["base"]} for name in ("a", "b")}}
    assert [role.rules[0].syscall for role in parse_policy(shared).values()] == ["read", "read"]
    assert "no role uses it" in refusal(rule(), group=group)
    with pytest.raises(ConfigError, match="role a: uses group other, which is not there"):
        parse_policy({"version": 1, "role": {"a": {"default": "kill", "use": ["other"]}}})


def test_a_role_without_rules_is_refused():
    assert "has no rule" in refusal()


@pytest.mark.parametrize("default", [None, "deny", "errno(EPERM)"])
def test_a_role_needs_a_known_default(default):
    assert "default must be" in refusal(rule(), default=default)


@pytest.mark.parametrize(
    "document",
    [
        {"version": 1, "role": []},
        {"version": 1, "role": {"a": []}},
        {"version": 1, "role": {"a": {"default": "kill", "rules": {}}}},
        {"version": 1, "role": {"a": {"default": "kill", "rules": [3]}}},
        {"version": 1, "role": {"a": {"default": "kill", "use": "base", "rules": [READ]}}},
        {"version": 1, "role": {"a": {"default": "kill", "rules": [READ | {"arch": ["sparc"]}]}}},
        {"version": 1, "role": {"a": {"default": "kill", "rules": [READ | {"arch": []}]}}},
        {"version": 1, "group": 3, "role": {}},
    ],
)
def test_a_document_of_another_shape_is_refused(document):
    with pytest.raises(ConfigError):
        parse_policy(document)


@pytest.mark.parametrize("text", ["version = ", "\x00", "version = 1\nversion = 1"])
def test_a_file_that_is_not_toml_is_refused_with_its_name(tmp_path, text):
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        load_text(tmp_path, text)


def test_a_missing_file_is_refused_with_its_name():
    with pytest.raises(ConfigError, match=r"^seccomp policy /nowhere/policy\.toml: No such file or directory; give another file$"):
        load_policy("/nowhere/policy.toml")


def test_a_file_too_long_to_be_a_policy_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="longer than 1048576 bytes"):
        load_text(tmp_path, "#" * (1 << 20) + "\n")


def test_rules_of_another_machine_do_not_count():
    found = role_of(rule(), rule(syscall="epoll_wait", arch=["x86_64"]))
    assert found.verdict("epoll_wait", (0,) * 6, "x86_64") == "allow"
    assert found.verdict("epoll_wait", (0,) * 6, "aarch64") == "kill"
