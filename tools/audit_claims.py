"""What `make audit` claims of vfsd's confinement, each claim with the one command that speaks for it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).parents[1]
VFSDCTL = str(Path(sys.executable).with_name("vfsdctl"))
PYTEST = [sys.executable, "-m", "pytest", "-n", "auto", "-p", "no:cacheprovider", "--randomly-seed=1"]
OF_A_DAEMON = [sys.executable, "-m", "tools.audit_daemon"]
# Tables there end with the tests of each threat.
THREATS = ("docs/hardening.md", "docs/threat-model.md")
_TEST_FILE = re.compile(r"`((?:unit|integration|security)/test_\w+\.py)")


@dataclass(frozen=True)
class Claim:
    """`by_tests`: the command is pytest's, whose closing line is the evidence. `needs`: programs without which nothing can be tried.

    `only_full`: it takes many minutes, and is left out unless it is asked for.
    """

    text: str
    command: Sequence[str]
    by_tests: bool = False
    needs: Sequence[str] = ()
    only_full: bool = False


def by_tests(text: str, files: str | Iterable[str], *, needs: Sequence[str] = (), only_full: bool = False) -> Claim:
    """`files`: below tests/, without test_ and .py: `unit/deploy hardening` is two of them."""
    paths = _paths(files) if isinstance(files, str) else list(files)
    return Claim(text, [*PYTEST, *paths], by_tests=True, needs=needs, only_full=only_full)


def _paths(words: str) -> list[str]:
    folder, found = "", []
    for word in words.split():
        folder, name = word.split("/") if "/" in word else (folder, word)
        found.append(f"tests/{folder}/test_{name}.py")
    return found


POLICY = (
    Claim("the policy is understood, forbids what it must, has no rule twice", [VFSDCTL, "policy", "check"]),
    by_tests("the compiled filters answer as the policy reads", "unit/seccomp_filters seccomp_policy seccomp_forbidden"),
    by_tests("documents say what the policy, the code and the tests are", "unit/generated_docs hardening semantics"),
    by_tests(
        "every rule is tried with what it permits and what it does not; every call that is not listed dies",
        "security/every_rule filters_kill",
    ),
    Claim(
        "no rule is superfluous: recorded runs exercise it, or it is known why not",
        [sys.executable, str(TREE / "tools/record_coverage")],
        needs=["strace"],
    ),
)
ATTACKS = (
    by_tests(
        "whatever a guest or a frontend sends is answered, or ends that connection",
        "unit/virtio_ring virtqueue vrings request guest_memory memory_table vhost_user_codec frontend_stream device "
        "integration/vhost_user_breaches ring_breaches ring_layouts malformed_requests",
    ),
    by_tests("lock-down, roots, read-only shares, user namespaces, the daemon as it runs", "security/lockdown roots readonly user_namespace running_daemon"),
    by_tests("hostile workers and a hostile control get nothing, and others are served on", "security/hostile_messages hostile_requests hostile_children"),
    by_tests("donated descriptors lead nowhere else, layer by layer", "security/escapes"),
    by_tests("fuzzing: fixed seeds, and the corpus", ["tests/fuzz"]),
)  # fmt: skip
DEPLOYMENT = (
    by_tests("deployment: units, profile, socket activation, heartbeats", "unit/deploy service_manager integration/service_manager"),
    by_tests(
        "units that a real systemd has started confine vfsd as documented, also under AppArmor",
        "guest/systemd", needs=["qemu-system-x86_64", "mmdebstrap"], only_full=True,
    ),
)  # fmt: skip
RUNNING = (
    by_tests("what looks at a daemon finds what is amiss, and only that", "security/status policy_dump deployed"),
    Claim("what runs is what was read: the kernel's filters are the policy's", [*OF_A_DAEMON, VFSDCTL, "policy", "dump", "--all", "--pid"]),
    Claim("census: each process, thread and descriptor is as documented", [*OF_A_DAEMON, VFSDCTL, "status", "--security"]),
)


def claims() -> list[Claim]:
    told = [*POLICY, *ATTACKS, *DEPLOYMENT, *RUNNING]
    rest = sorted(named_for_threats() - {path for claim in told for path in claim.command})
    others = by_tests("all other tests that the documents name for a threat", rest)
    return [*POLICY, *ATTACKS, others, *DEPLOYMENT, *RUNNING]


def named_for_threats() -> set[str]:
    return {f"tests/{name}" for document in THREATS for name in _TEST_FILE.findall((TREE / document).read_text(encoding="utf-8"))}
