"""`vfsdctl policy dump`: the filters that the kernel has on a daemon's processes, compared with what a policy compiles to."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

from vfsd.sandbox.seccomp import POLICY_FILE, load_policy
from vfsd.tools.loaded_filters import Filter, LoadedFilters, compiled_filters, look_at
from vfsd.tools.policy_disasm import disassemble
from vfsd.tools.processes import children_of, supervisor_of, threads_of


def add_to(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "dump",
        help="what the kernel really has loaded, compared with the policy",
        description="Read the seccomp filters of a process, thread by thread, from the kernel, and say which role's filter each is. "
        "The process is stopped for a moment and goes on undisturbed. Exit status 1 if any is not what the policy compiles to.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pid", type=int, metavar="PID", help="this process")
    which.add_argument("--socket", metavar="PATH", help="the daemon that made this socket, with all its processes")
    parser.add_argument("--all", action="store_true", help="with --pid of a supervisor: its children too")
    parser.add_argument("--policy", default=POLICY_FILE, metavar="FILE", help="compare with this policy (default: the one vfsd comes with)")
    parser.add_argument("--disasm", action="store_true", help="also the instructions of each program")
    parser.add_argument("--json", action="store_true", help="as JSON, the programs included")
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    known = compiled_filters(load_policy(found.policy))
    processes = [look_at(pid, known) for pid in _pids(found)]
    if found.json:
        print(json.dumps(_document(processes, disassembled=found.disasm), indent=2))
    else:
        print("\n".join(line for process in processes for line in _lines(process)))
        if found.disasm:
            print("".join(f"\n{each.digest}  {each}\n{_disassembly(each)}" for each in _distinct(processes)), end="")
    return 1 if any(process.faults() for process in processes) else 0


def _pids(found: argparse.Namespace) -> list[int]:
    first = supervisor_of(found.socket) if found.socket is not None else found.pid
    threads_of(first)  # that it is there
    return [first, *children_of(first)] if found.all or found.socket is not None else [first]


def _lines(process: LoadedFilters) -> list[str]:
    """Threads that have the same filters, which should be all, are told together."""
    lines = [f"{process.role} (pid {process.pid})"]
    alike: dict[tuple[Filter, ...], list[int]] = {}
    for tid, filters in process.threads.items():
        alike.setdefault(filters, []).append(tid)
    for filters, tids in alike.items():
        lines.append(f"  {_threads(tids)}: {_count(len(filters))}")
        lines += [f"    {each.digest}  {each.instructions:4} instructions  {each}" for each in filters]
    return lines + [f"  WRONG: {fault}" for fault in process.faults()]


def _threads(tids: list[int]) -> str:
    return f"thread {tids[0]}" if len(tids) == 1 else f"{len(tids)} threads ({', '.join(map(str, tids))})"


def _count(filters: int) -> str:
    return {0: "no filter", 1: "1 filter"}.get(filters, f"{filters} filters, the oldest first")


def _distinct(processes: list[LoadedFilters]) -> list[Filter]:
    found = {each for process in processes for thread in process.threads.values() for each in thread}
    return sorted(found, key=lambda each: each.digest)


def _disassembly(loaded: Filter) -> str:
    return disassemble(loaded.program, platform.machine())


def _document(processes: list[LoadedFilters], *, disassembled: bool) -> dict[str, Any]:
    return {
        "as_expected": not any(process.faults() for process in processes),
        "processes": [
            {
                "pid": process.pid,
                "role": process.role,
                "threads": [{"tid": tid, "filters": [each.digest for each in thread]} for tid, thread in process.threads.items()],
                "faults": process.faults(),
            }
            for process in processes
        ],
        "filters": {each.digest: _filter_document(each, disassembled=disassembled) for each in _distinct(processes)},
    }


def _filter_document(loaded: Filter, *, disassembled: bool) -> dict[str, Any]:
    document = {
        "role": loaded.role,
        "action": loaded.action,
        "instructions": loaded.instructions,
        "program": loaded.program.hex(),
    }
    return document | {"disassembly": _disassembly(loaded).splitlines()} if disassembled else document
