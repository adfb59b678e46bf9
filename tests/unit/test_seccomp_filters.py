"""The compiled filters do exactly what the policy says, checked without loading them."""

import ctypes.util
import functools
import os
import platform
import random
import subprocess
import sys

import pyseccomp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsd.errors import ConfigError
from vfsd.sandbox.bpf import (
    AUDIT_ARCH,
    AUDIT_ARCH_I386,
    RET_ALLOW,
    RET_KILL_PROCESS,
    RET_LOG,
    RET_TRAP,
    ret_errno,
    run_filter,
)
from vfsd.sandbox.seccomp import POLICY_FILE, load_policy, syscall_number
from vfsd.sandbox.seccomp_policy import ARCHITECTURES, ROLES

CONFINED = ("broker", "control", "worker")
LAST_NUMBER = 500
X32_BIT = 0x40000000

NEVER = """
    execve execveat clone fork vfork ptrace socket connect bind listen accept accept4 mount umount2 pivot_root chroot
    unshare setns  fsopen fsmount open_tree move_mount mount_setattr bpf io_uring_setup io_uring_enter userfaultfd
    process_vm_readv process_vm_writev  pidfd_open pidfd_getfd pidfd_send_signal kill tkill tgkill prctl seccomp open
    creat openat2 stat lstat access chmod chown  setuid setgid setreuid setregid setfsuid setfsgid perf_event_open keyctl
    init_module memfd_create shmat  exit mprotect madvise
""".split()  # noqa: SIM905  # sixty lines of list are no clearer

ONLY_THE_BROKER = """
    openat open_by_handle_at name_to_handle_at statx readlinkat mkdirat unlinkat renameat2 linkat symlinkat mknodat fchownat
    fchmodat  utimensat faccessat faccessat2 ioctl getxattr setxattr listxattr removexattr chdir fchdir setresuid setresgid setgroups capset umask
""".split()  # noqa: SIM905  # sixty lines of list are no clearer

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers and the emulated architecture are x86_64's")


@pytest.fixture(scope="module")
def policy():
    return load_policy()


@pytest.fixture(scope="module", params=ROLES)
def compiled(request, policy):
    return policy.roles[request.param], policy.compile(request.param, "kill")


@functools.cache
def load_policy_once():
    return load_policy()


@functools.cache
def compile_once(name: str, architecture: str) -> bytes:
    return load_policy_once().compile(name, "kill", architecture)


def number_of(name: str) -> int:
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    assert number >= 0, name
    return number


def expected_return(verdict) -> int:
    return {"allow": RET_ALLOW, "kill": RET_KILL_PROCESS}.get(verdict) or ret_errno(verdict)


def satisfying(rule) -> list[int]:
    """Arguments that meet all of a rule's conditions; the others are noise."""
    arguments = [random.getrandbits(64) for _ in range(6)]
    for each in rule.comparisons:
        assert each.operator == "masked", "the shipped policy uses no other"
        arguments[each.argument] = each.operand
    return arguments


def variations(arguments: list[int], rules) -> list[tuple[int, ...]]:
    """The same with one argument changed: each single bit, other rules' values, extremes."""
    found = [tuple(arguments)]
    for position in range(6):
        values = {arguments[position] ^ 1 << bit for bit in range(64)} | {0, 2**64 - 1, 0xFFFFFF9C, random.getrandbits(64)}
        values |= {each.operand for rule in rules for each in rule.comparisons if each.argument == position}
        found += [(*arguments[:position], value, *arguments[position + 1 :]) for value in values]
    return found


def test_the_filter_agrees_with_the_policy_on_every_rule(compiled):
    role, program = compiled
    for rule in role.rules_for("x86_64"):
        rivals = [other for other in role.rules_for("x86_64") if other.syscall == rule.syscall]
        for arguments in variations(satisfying(rule), rivals):
            verdict = role.verdict(rule.syscall, arguments, "x86_64")
            seen = run_filter(program, number_of(rule.syscall), arguments)
            assert seen == expected_return(verdict), (rule.where, [hex(each) for each in arguments])


@st.composite
def random_calls(draw, role, architecture):
    """Of a call that the role has rules about, or of any; each argument is random, or near what a rule compares it with."""
    rules = role.rules_for(architecture)
    name = draw(st.sampled_from(sorted({rule.syscall for rule in rules} | {"execve", "openat", "prctl", "getpid"})))
    values = [{0, 1, 2**31, 2**32 - 100, 2**64 - 100, 2**64 - 1} for _ in range(6)]
    for each in (each for rule in rules if rule.syscall == name for each in rule.comparisons):
        values[each.argument] |= {each.operand, ~each.value % 2**64, each.operand | 1 << 32, each.operand ^ 1 << draw(st.integers(0, 63))}
    return name, tuple(draw(st.one_of(st.sampled_from(sorted(found)), st.integers(0, 2**64 - 1))) for found in values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ROLES)
@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_the_filter_agrees_with_the_policy_on_any_call(name, architecture, data):
    role = load_policy_once().roles[name]
    syscall, arguments = data.draw(random_calls(role, architecture))
    number = syscall_number(syscall, architecture)
    if number is None:
        return
    seen = run_filter(compile_once(name, architecture), number, arguments, AUDIT_ARCH[architecture])
    assert seen == expected_return(role.verdict(syscall, arguments, architecture))


@pytest.mark.parametrize("name", ROLES)
def test_a_filter_of_one_machine_kills_the_calls_of_the_other(name):
    for own, other in (ARCHITECTURES, reversed(ARCHITECTURES)):
        number = syscall_number("read", other)
        assert run_filter(compile_once(name, own), number, (), AUDIT_ARCH[other]) == RET_KILL_PROCESS


@pytest.mark.parametrize("name", ROLES)
def test_a_filter_made_on_this_machine_by_name_is_the_one_made_for_it(policy, name):
    assert policy.compile(name, "kill") == policy.compile(name, "kill", platform.machine())


def test_there_is_no_filter_for_a_machine_without_a_policy(policy):
    with pytest.raises(ConfigError, match="there is none for riscv64"):
        policy.compile("worker", "kill", "riscv64")


def test_what_the_policy_does_not_name_gets_the_default(compiled):
    role, program = compiled
    named = {number_of(rule.syscall) for rule in role.rules_for("x86_64")}
    for number in set(range(LAST_NUMBER)) - named:
        assert run_filter(program, number, (0,) * 6) == expected_return(role.default), number


def test_a_call_by_another_entry_of_the_kernel_kills(compiled):
    _, program = compiled
    assert run_filter(program, 3, architecture=AUDIT_ARCH_I386) == RET_KILL_PROCESS
    assert run_filter(program, X32_BIT | number_of("read")) == RET_KILL_PROCESS


@pytest.mark.parametrize(("action", "returned"), [("kill", RET_KILL_PROCESS), ("log", RET_LOG), ("trap", RET_TRAP)])
def test_the_action_replaces_kill_and_nothing_else(policy, action, returned):
    worker = policy.compile("worker", action)
    assert run_filter(worker, number_of("execve")) == returned
    assert run_filter(worker, number_of("read")) == RET_ALLOW
    assert run_filter(worker, number_of("clone3")) == ret_errno(38)
    supervisor = policy.compile("supervisor", action)
    assert run_filter(supervisor, number_of("bpf")) == returned
    assert run_filter(supervisor, number_of("execve")) == RET_ALLOW


@pytest.mark.parametrize("role", CONFINED)
@pytest.mark.parametrize("name", NEVER)
def test_no_confined_role_may(policy, role, name):
    assert all(rule.syscall != name for rule in policy.roles[role].rules)


@pytest.mark.parametrize("role", ["control", "worker"])
@pytest.mark.parametrize("name", ONLY_THE_BROKER)
def test_control_and_workers_take_no_path_and_change_no_identity(policy, role, name):
    assert all(rule.syscall != name for rule in policy.roles[role].rules)


@pytest.mark.parametrize("role", ["broker", "control", "worker"])
def test_no_confined_role_makes_memory_executable(policy, role):
    program = policy.compile(role, "kill")
    prot_exec, flags = 4, (0x01, 0x02, 0x22, 0x21)
    for protection in range(8):
        for kind in flags:
            if protection & prot_exec:
                assert run_filter(program, number_of("mmap"), (0, 4096, protection, kind, 5, 0)) == RET_KILL_PROCESS
    assert run_filter(program, number_of("mprotect"), (4096, 4096, 5)) == RET_KILL_PROCESS


def test_the_broker_resolves_names_only_below_descriptors(policy):
    program = policy.compile("broker", "kill")
    at_fdcwd_as_int, at_fdcwd_as_long = 0xFFFFFF9C, 0xFFFFFFFFFFFFFF9C
    exact = {"openat": (0, os.O_CLOEXEC), "statx": (0, 0x1100, 0x1FFF), "fchownat": (0, 0, 0, 0x1100), "newfstatat": (0, 0, 0x1000)}
    for name in ("openat", "statx", "mkdirat", "mknodat", "unlinkat", "readlinkat", "fchownat", "fchmodat", "utimensat", "newfstatat"):
        rest = exact.get(name, ())
        assert run_filter(program, number_of(name), (7, *rest)) == RET_ALLOW, name
        for nowhere in (at_fdcwd_as_int, at_fdcwd_as_long, 1 << 32 | 7):
            assert run_filter(program, number_of(name), (nowhere, *rest)) == RET_KILL_PROCESS, name


def test_a_broker_thread_changes_only_its_effective_ids(policy):
    program = policy.compile("broker", "kill")
    unchanged = 0xFFFFFFFF
    for name in ("setresuid", "setresgid"):
        assert run_filter(program, number_of(name), (unchanged, 1000, unchanged)) == RET_ALLOW
        assert run_filter(program, number_of(name), (2**64 - 1, 1000, 2**64 - 1)) == RET_ALLOW
        assert run_filter(program, number_of(name), (1000, 1000, unchanged)) == RET_KILL_PROCESS
        assert run_filter(program, number_of(name), (unchanged, 1000, 1000)) == RET_KILL_PROCESS


def test_high_bits_do_not_get_past_a_denial_or_into_a_permission(policy):
    worker = policy.compile("worker", "kill")
    f_dupfd_cloexec, f_setfl = 1030, 4
    assert run_filter(worker, number_of("fcntl"), (5, f_dupfd_cloexec)) == RET_ALLOW
    assert run_filter(worker, number_of("fcntl"), (5, f_setfl)) == RET_KILL_PROCESS
    assert run_filter(worker, number_of("fcntl"), (5, 1 << 32 | f_dupfd_cloexec)) == RET_KILL_PROCESS


def test_compiling_twice_gives_the_same_program(policy):
    assert policy.compile("worker", "kill") == policy.compile("worker", "kill")


def test_an_unknown_role_is_an_error(policy):
    with pytest.raises(ConfigError, match="no role janitor"):
        policy.compile("janitor", "kill")


def test_the_installed_policy_is_the_one_at_the_top_of_the_tree():
    top = os.path.join(os.path.dirname(__file__), "..", "..", "seccomp_policy.toml")
    with open(POLICY_FILE, "rb") as installed, open(top, "rb") as shown:
        assert installed.read() == shown.read()


def test_importing_the_compiler_starts_no_process():
    script = (
        "import sys\n"
        "sys.addaudithook(lambda event, _: sys.exit(f'started: {event}') "
        "if event in ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'os.system') else None)\n"
        "import vfsd.sandbox.seccomp\n"
        "print(vfsd.sandbox.seccomp.load_policy().compile('worker', 'kill')[:1] != b'')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_the_library_search_is_put_back_after_the_import():
    assert ctypes.util.find_library.__module__ == "ctypes.util"


def test_locking_down_does_not_need_libseccomp():
    script = "import sys, vfsd.sandbox.lockdown, vfsd.sandbox.namespaces, vfsd.sandbox.memory; print('pyseccomp' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
