"""`vfsdctl policy dump`: the filters that the kernel has on a daemon's processes, compared with what a policy compiles to."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from typing import Any

from vfsd.errors import ConfigError
from vfsd.sandbox.seccomp import POLICY_FILE, KillMode, load_policy
from vfsd.tools.daemon import members, supervisor_of, supervisor_of_socket
from vfsd.tools.loaded_filters import Filter, LoadedFilters, brought_along, compiled_filters, look_at
from vfsd.tools.policy_disasm import disassemble

BROUGHT_ALONG = "of who started vfsd"


def add_to(subcommands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subcommands.add_parser(
        "dump",
        help="what the kernel really has loaded, compared with the policy",
        description="Read the seccomp filters of a process, thread by thread, from the kernel, and say which role's filter each is. "
        "Those that vfsd was started with, in a container or by a service manager, come before its own, and are no fault. "
        "The process is stopped for a moment and goes on undisturbed. Exit status 1 if any is not what the policy compiles to.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pid", type=int, metavar="PID", help="this process of a daemon")
    which.add_argument("--socket", metavar="PATH", help="the daemon that made this socket, with all its processes")
    parser.add_argument("--all", action="store_true", help="with --pid: all processes of that daemon")
    parser.add_argument("--policy", default=POLICY_FILE, metavar="FILE", help="compare with this policy (default: the one vfsd comes with)")
    parser.add_argument("--disasm", action="store_true", help="also the instructions of each program")
    parser.add_argument("--json", action="store_true", help="as JSON, the programs included")
    parser.set_defaults(run=_run)


def _run(found: argparse.Namespace) -> int:
    known = compiled_filters(load_policy(found.policy))
    processes = _look(found, known)
    if found.json:
        print(json.dumps(_document(processes, disassembled=found.disasm), indent=2))
    else:
        print("\n".join(line for process in processes for line in _lines(process)))
        if found.disasm:
            print("".join(f"\n{each.digest}  {each}\n{_disassembly(each)}" for each in _distinct(processes)), end="")
        print(f"\n{_summary(processes)}")
    return 1 if any(process.faults() for process in processes) else 0


def _look(found: argparse.Namespace, known: dict[bytes, tuple[str, KillMode]]) -> list[LoadedFilters]:
    """At those that were asked for; and at the supervisor, as only that one shows what vfsd was started with."""
    supervisor = supervisor_of(found.pid) if found.socket is None else supervisor_of_socket(found.socket)
    first, *others = members(supervisor)
    everything = found.socket is not None or found.all
    looked = look_at(first, known)
    inherited = brought_along(looked)
    wanted = [looked] if everything or found.pid == supervisor else []
    wanted += [look_at(each, known) for each in others if everything or each.pid == found.pid]
    if not wanted:
        raise ConfigError(f"process {found.pid} does not run any more; look again")
    return [replace(each, inherited=inherited) for each in wanted]


def _lines(process: LoadedFilters) -> list[str]:
    """Threads that have the same filters, which should be all, are told together."""
    lines = [f"{process.name} (pid {process.pid})"]
    alike: dict[tuple[Filter, ...], list[int]] = {}
    for tid, filters in process.threads.items():
        alike.setdefault(filters, []).append(tid)
    for filters, tids in alike.items():
        own = process.own(filters)
        lines.append(f"  {_threads(tids)}: {_count(len(filters))}")
        lines += [_line(each, BROUGHT_ALONG) for each in filters[: len(filters) - len(own)]]
        lines += [_line(each, str(each)) for each in own]
    return lines + [f"  WRONG: {fault}" for fault in process.faults()]


def _summary(processes: list[LoadedFilters]) -> str:
    threads = sum(len(process.threads) for process in processes)
    wrong = sum(len(process.faults()) for process in processes)
    found = f"{wrong} are WRONG" if wrong else "all have what the policy compiles to"
    inherited = len(processes[0].inherited)
    return f"{threads} threads of {len(processes)} processes: {found}" + (
        f", above {inherited} filters that vfsd was started with" if inherited else ""
    )


def _line(loaded: Filter, what: str) -> str:
    return f"    {loaded.digest}  {loaded.instructions:4} instructions  {what}"


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
                "name": process.name,
                "started_with": [each.digest for each in process.inherited],
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
