"""`vfsdctl policy coverage RECORD...`: rules that recorded runs never exercised."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import POLICY_FILE, Policy, load_policy
from vfsd.tools.rule_coverage import FINDINGS, RuleCoverage, State, cover, load_seldom_used
from vfsd.tools.syscall_record import SyscallRecord, new_record, parse_record, policy_digest


def add_to(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "coverage",
        help="which rules recorded runs never exercised",
        description="Add up records of vfsdctl policy learn, and say which rules of the policy they exercised. Exit status 1 if there is a "
        "rule that was not, and that is not known to be seldom used, or a call that the policy lacks, or one that it denies.",
        allow_abbrev=False,
    )
    parser.add_argument("records", nargs="+", metavar="RECORD", help="a file of vfsdctl policy learn --record")
    parser.add_argument(
        "--policy", default=POLICY_FILE, metavar="FILE", help="the policy that they ran with (default: the one vfsd comes with)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, every rule")
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    policy = load_policy(found.policy)
    record = read_records(policy, found.records)
    rows = cover(policy, record, load_seldom_used(policy) if found.policy == POLICY_FILE else {})
    missing = [f"{role}: {syscall}" for role, seen in record.roles.items() for syscall in seen.missing]
    findings = [row for row in rows if row.state in FINDINGS]
    if found.json:
        document = {
            "runs": record.runs,
            "rules": [_document(row) for row in rows],
            "missing": missing,
            "findings": len(findings) + len(missing),
        }
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(_lines(record, rows, findings, missing)))
    return 1 if findings or missing else 0


def read_records(policy: Policy, paths: Sequence[str]) -> SyscallRecord:
    """All of them as one. Raises ConfigError where one is of another policy."""
    total = new_record(policy)
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                record = parse_record(file.read(), path)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        if record.policy != policy_digest(policy):
            raise ConfigError(f"{path}: was recorded with another policy; record again, or name that policy by --policy")
        total.add(record)
    return total


def _lines(record: SyscallRecord, rows: list[RuleCoverage], findings: list[RuleCoverage], missing: list[str]) -> list[str]:
    lines = [f"{record.runs} runs"]
    for role in dict.fromkeys(row.role for row in rows):
        states = Counter(row.state for row in rows if row.role == role)
        lines.append(f"{role}: " + ", ".join(f"{states[state]} {state}" for state in State if states[state]))
    lines += [f"FINDING: {row.role}: {row.state}: {row.rule}" for row in findings]
    return lines + [f"FINDING: {each}: made after lock-down, and not allowed" for each in missing]


def _document(row: RuleCoverage) -> dict[str, object]:
    return {"role": row.role, "rule": row.rule, "action": row.action, "state": row.state.value, "count": row.count, "why": row.why}
