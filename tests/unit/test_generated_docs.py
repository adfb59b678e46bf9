"""Documents that are made from the source are what the source would make of them now, and numbers in the others are right."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest

from tests.support.documents import TREE, load_tool
from vfsd.faults.matrix import MATRIX
from vfsd.sandbox.seccomp import load_policy
from vfsd.sandbox.seccomp_forbidden import FORBIDDEN
from vfsd.tools.expectations import EXPECTATIONS
from vfsd.tools.fd_purposes import TOLD_BY
from vfsd.tools.rule_coverage import FINDINGS, State, load_seldom_used
from vfsd.tools.syscall_record import rule_name
from vfsd.wire import broker_messages, channel


class Generated(NamedTuple):
    """`change`: of a document that its tool then must find to be wrong, for it `says` something else."""

    document: str
    change: tuple[str, str]
    says: str


GENERATED = {
    "protocol_doc": Generated("protocol.md", ("| 10 | Lookup |", "| 11 | Lookup |"), "the tables say"),
    "seccomp_doc": Generated("seccomp.md", ("`preadv2`", "`preadv`"), "the policy says"),
    "faults_doc": Generated("faults.md", ("`after-pop`", "`after-lunch`"), "vfsd/faults and the tests say"),
    "census_doc": Generated(
        "census.md", ("| threads | /proc/PID/task | 1 | 22 |", "| threads | /proc/PID/task | 1 | 23 |"), "the expectations say"
    ),
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_document_is_up_to_date(name):
    assert load_tool(name).check(TREE / "docs" / GENERATED[name].document) == ""


@pytest.mark.parametrize("name", GENERATED)
def test_a_changed_or_missing_document_is_noticed(name, tmp_path):
    generated = GENERATED[name]
    document, right = tmp_path / generated.document, load_tool(name).render()
    assert "missing" in load_tool(name).check(document)
    assert generated.change[0] in right
    document.write_text(right.replace(*generated.change))
    assert f"not what {generated.says}" in load_tool(name).check(document)


@pytest.mark.parametrize("name", GENERATED)
def test_the_tool_is_run_by_its_name_and_checks(name):
    tool = TREE / "tools" / name
    assert os.access(tool, os.X_OK)
    done = subprocess.run([sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_message_and_notice_has_a_row():
    text = load_tool("protocol_doc").render()
    rows = [(spec.tag, spec.message) for spec in broker_messages.REQUESTS] + list(broker_messages.NOTICES.items())
    for table in (channel.SUPERVISOR_TO_CHILD, channel.CONTROL_TO_SUPERVISOR, channel.BROKER_TO_SUPERVISOR):
        rows += [(tag, row.message) for tag, row in table.items()]
    for table in (channel.CONTROL_TO_WORKER, channel.WORKER_TO_CONTROL):
        rows += [(tag, row.message) for tag, row in table.items()]
    missing = [message.__name__ for tag, message in rows if f"| {tag} | {message.__name__} |" not in text]
    assert missing == []


def test_every_rule_and_every_forbidden_call_has_a_place_in_the_document():
    text = load_tool("seccomp_doc").render()
    sections = dict(re.findall(r"^## (\w+)$(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL))
    for name, role in load_policy().roles.items():
        rows = [line for line in sections[name].splitlines() if line.startswith("| `")]
        assert len(rows) == len({rule.where for rule in role.rules})
        assert all(any(line.startswith(f"| `{rule.syscall}`") and rule.reason in line for line in rows) for rule in role.rules)
    forbidden = text.split("## What no policy may allow")[1]
    assert [each.syscall for each in FORBIDDEN if f"`{each.syscall}`" not in forbidden] == []


def test_the_census_has_a_row_for_each_expectation_variant_and_purpose():
    text = load_tool("census_doc").render()
    for expectation in EXPECTATIONS:
        assert f"| {expectation.what} | {expectation.shown_by} |" in text
        for variant in expectation.variants:
            assert f"| {variant.condition.name} | {expectation.what} |" in text
    assert all(f"| {purpose} |" in text for _, purpose, _ in TOLD_BY)


def test_every_fault_is_tried_and_every_marker_names_one():
    patterns = [pattern for _file, _test, pattern in load_tool("faults_doc").marked_tests()]
    assert [cell.name for cell in MATRIX if not any(fnmatchcase(cell.name, pattern) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(fnmatchcase(cell.name, pattern) for cell in MATRIX)] == []


def test_every_rule_is_in_the_document_of_what_was_exercised():
    """What was recorded takes minutes to record again (`make coverage-record`); that no rule is new since does not."""
    text = (TREE / "docs" / "seccomp-coverage.md").read_text()
    policy = load_policy()
    seldom = load_seldom_used(policy)
    sections = {section.partition("\n")[0]: section for section in text.split("\n## ")[1:]}
    assert set(sections) == set(policy.roles)
    for role in policy.roles.values():
        rows = re.findall(r"^\| `(.*)` \| (.*) \| (.*) \| (.*) \|$", sections[role.name], re.MULTILINE)
        states = {name.replace("\\|", "|"): State(state) for name, _action, state, _why in rows}
        assert set(states) == {rule_name(rule) for rule in role.rules}
        assert not [name for name, state in states.items() if state in FINDINGS]
        assert [name for name, state in states.items() if state is State.SELDOM and (role.name, name) not in seldom] == []


# Where the documents say how many system calls a role's filter allows (of the supervisor: denies).
SYSCALL_COUNTS = {
    "README.md": [
        (r"(\d+) and (\d+) system calls that their filters list", ["worker", "control"]),
        (r"deny-list of (\d+) calls", ["supervisor"]),
        (
            r"allowed: (\d+) calls \(worker\), (\d+) \(control\), (\d+) \(broker\).*?denied: (\d+) calls \(supervisor\)",
            ["worker", "control", "broker", "supervisor"],
        ),
        (r"^supervisor +\d+ +\d+ +\d+ +filter +all but (\d+)", ["supervisor"]),
        (r"^broker +\d+ +\d+ +\d+ +filter +(\d+)", ["broker"]),
        (r"^control +\d+ +\d+ +\d+ +filter +(\d+)", ["control"]),
        (r"^worker +\d+ +\d+ +\d+ +filter +(\d+)", ["worker"]),
    ],
    "docs/threat-model.md": [
        (r"(\d+) allowed calls \(worker\), (\d+) \(control\)", ["worker", "control"]),
        (r"(\d+) system calls with\s+conditions", ["broker"]),
    ],
    "docs/architecture.md": [(r"seccomp filter that denies (\d+) calls", ["supervisor"])],
}


def syscall_count(role):
    """On x86-64, which the documents speak of."""
    rules = role.rules_for("x86_64")
    counts_denied = role.default == "allow"
    return len({rule.syscall for rule in rules if (rule.action != "allow") == counts_denied})


@pytest.mark.parametrize("document", SYSCALL_COUNTS)
def test_numbers_of_system_calls_are_those_of_the_policy(document):
    text = (TREE / document).read_text()
    counts = {name: syscall_count(role) for name, role in load_policy().roles.items()}
    for pattern, roles in SYSCALL_COUNTS[document]:
        found = list(re.finditer(pattern, text, re.MULTILINE))
        assert found, f"{document} no longer says {pattern}"
        for match in found:
            assert [int(number) for number in match.groups()] == [counts[role] for role in roles], match.group()
