"""`vfsdctl status`: what runs, and with --security whether each process is confined as docs/census.md says.

Exit status 0 if everything that may be seen is as it must be, 1 if something is not or is weaker than the default.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from vfsd.record import Counts
from vfsd.tools.check import Subject
from vfsd.tools.daemon import Daemon, Process, examine, find_supervisor
from vfsd.tools.expectations import Finding, judge

_SEEN_WIDTH = 70
_EPILOG = """Run it as root. An ordinary user sees less of even their own vfsd, whose processes are not dumpable; what is not visible
is said to be so, and is no failure. Paths of files in the share are shown as the guest named them, escaped."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("status", help="say what a running vfsd is, and how it is confined", epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("daemon", metavar="PID|SOCKET", help="the supervisor's pid, or the path of the socket (PATH.pid beside it is read)")
    parser.add_argument("--security", action="store_true", help="hold each process and thread to what is expected of it")
    parser.add_argument("--json", action="store_true", help="the same as data")
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    daemon = examine(find_supervisor(found.daemon))
    judged = list(judge(daemon)) if found.security else []
    if found.json:
        print(json.dumps(_as_data(daemon, judged), indent=2))
    else:
        print("\n".join([*_overview(daemon), *_report(judged)]))
    return 1 if any(finding.state in ("NOT MET", "weaker") for _, findings in judged for finding in findings) else 0


def _overview(daemon: Daemon) -> Iterable[str]:
    options = daemon.options
    yield f"share:      {options.shared_dir}{' (read-only)' if options.readonly else ''}"
    yield f"socket:     {options.socket_path or 'was passed by who started vfsd'}"
    yield f"confined:   --sandbox={options.sandbox} --seccomp={options.seccomp} --inode-file-handles={options.inode_file_handles}"
    if options.faults:
        yield "faults:     are injected by rules (vfsdctl fault list): this vfsd is for tests"
    yield f"command:    {' '.join(ascii(word)[1:-1] for word in daemon.supervisor.census.command)}"
    yield f"running for {_duration(daemon.uptime_seconds)}"
    if daemon.counts is not None:
        yield f"survived:   {_survived(daemon.counts)}"
    yield ""
    rows = [_row(process) for process in daemon.processes]
    yield from _table(("PROCESS", "PID", "THREADS", "UID", "FDS"), rows)


def _survived(counts: Counts) -> str:
    deaths = f"{counts.worker_deaths} deaths of workers, {counts.control_deaths} of control"
    return f"{deaths}; {counts.replayed} requests run again, {counts.refused} refused, {counts.undecided} appends undecided (EIO)"


def _row(process: Process) -> tuple[str, ...]:
    census = process.census
    fds = "?" if census.fds is None else str(len(census.fds))
    return process.name, str(census.pid), str(len(census.threads)), str(census.leader.uids[1]), fds


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _report(judged: Sequence[tuple[Subject, list[Finding]]]) -> Iterable[str]:
    """For each process what was expected and seen, then its descriptors; a summary last."""
    if not judged:
        return
    for subject, findings in judged:
        yield ""
        yield f"{subject.process.name} (pid {subject.process.pid})"
        yield ""
        yield from _indented(_table(("", "EXPECTATION", "SEEN", "EXPECTED"), [line for finding in findings for line in _lines(finding)]))
        yield ""
        yield from _indented(_table(("FD", "WHAT", "PURPOSE"), _descriptors(subject)))
    yield ""
    yield from _summary(judged)


def _lines(finding: Finding) -> Iterable[tuple[str, ...]]:
    """One finding; what was seen may take further lines."""
    expected = finding.expected
    if finding.condition is not None:
        expected += f" [{finding.condition.name}]"
    columns = [textwrap.wrap(text, _SEEN_WIDTH) or [""] for text in (finding.seen, expected)]
    for at in range(max(len(column) for column in columns)):
        cells = (column[at] if at < len(column) else "" for column in columns)
        yield (finding.state if at == 0 else "", finding.expectation.what if at == 0 else "", *cells)


def _descriptors(subject: Subject) -> list[tuple[str, ...]]:
    if subject.purposes is None or subject.process.census.fds is None:
        return [("?", "", "not visible to this user")]
    fds = subject.process.census.fds
    return [(str(number), fds[number].target, purpose or "UNKNOWN") for number, purpose in subject.purposes.items()]


def _summary(judged: Sequence[tuple[Subject, list[Finding]]]) -> Iterable[str]:
    counts: dict[str, int] = {}
    for _, findings in judged:
        for finding in findings:
            counts[finding.state] = counts.get(finding.state, 0) + 1
    total = sum(counts.values())
    yield f"{total} expectations: " + ", ".join(
        f"{counts[state]} {state}" for state in ("met", "weaker", "not visible", "NOT MET") if state in counts
    )
    weakened = {finding.condition.name for _, findings in judged for finding in findings if finding.state == "weaker" and finding.condition}
    if weakened:
        yield f"weaker than the default, as asked for: {'; '.join(sorted(weakened))}"
    if "not visible" in counts:
        yield "what is not visible to this user was not looked at: run this as root"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _indented(lines: Iterable[str]) -> Iterable[str]:
    return (f"  {line}" for line in lines)


def _as_data(daemon: Daemon, judged: Sequence[tuple[Subject, list[Finding]]]) -> dict[str, Any]:
    by_pid = {subject.process.pid: (subject, findings) for subject, findings in judged}
    return {
        "pid": daemon.supervisor.pid,
        "uptime_seconds": round(daemon.uptime_seconds, 1),
        "options": asdict(daemon.options),
        "command": [ascii(word)[1:-1] for word in daemon.supervisor.census.command],
        "counts": None if daemon.counts is None else asdict(daemon.counts),
        "processes": [
            {**_process_data(each), **_security_data(*by_pid[each.pid])} if judged else _process_data(each) for each in daemon.processes
        ],
    }


def _process_data(process: Process) -> dict[str, Any]:
    census = process.census
    return {"name": process.name, "role": process.role, "pid": census.pid, "threads": len(census.threads), "uid": census.leader.uids[1]}


def _security_data(subject: Subject, findings: list[Finding]) -> dict[str, Any]:
    fds, purposes = subject.process.census.fds, subject.purposes
    return {
        "expectations": [
            {
                "what": each.expectation.what,
                "shown_by": each.expectation.shown_by,
                "expected": each.expected,
                "seen": each.seen,
                "state": each.state,
                "because": None if each.condition is None else each.condition.name,
            }
            for each in findings
        ],
        "descriptors": None
        if fds is None or purposes is None
        else [{"fd": number, "target": fds[number].target, "purpose": purpose} for number, purpose in purposes.items()],
        "threads": [asdict(thread) for thread in subject.process.census.threads],
        "namespaces": subject.process.census.namespaces,
        "limits": subject.process.census.limits,
        "environment": subject.process.census.environment,
    }
