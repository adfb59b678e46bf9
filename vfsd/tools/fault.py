"""`vfsdctl fault`: change the fault rules of a vfsd that was started with --fault-rules or --fault-socket. docs/faults.md has the rules.

Exit status 1 if vfsd refuses, or there is no such vfsd.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from typing import Any

from vfsd.errors import ConfigError
from vfsd.faults.grammar import parse_rule
from vfsd.faults.socket_path import MOST_REPLY, default_path

_ANSWER_SECONDS = 10.0
_HEAR_SECONDS = 2.0  # for the processes to hear of a change
_LOOK_SECONDS = 0.002


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("fault", help="make parts of a running vfsd fail, to test a guest", allow_abbrev=False)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, what in (
        ("add", "add rules: all, or none if one cannot be"),
        ("list", "show the rules, how often each was matched and hit, and the seed"),
        ("remove", "remove rules by their numbers"),
        ("clear", "remove all rules"),
    ):
        action = actions.add_parser(name, help=what, allow_abbrev=False)
        action.add_argument("socket", metavar="SOCKET", help="the vhost-user socket's path, or that of --fault-socket")
        if name == "add":
            action.add_argument("rules", metavar="RULE", nargs="+", help="as READ:error=EIO:when=3+2")
        elif name == "remove":
            action.add_argument("numbers", metavar="NUMBER", nargs="+", type=int)
        else:
            action.add_argument("--json", action="store_true", help="the same as data")
        action.set_defaults(run=_run, do=name)


def _run(found: argparse.Namespace) -> int:
    asked: dict[str, Any] = {"do": found.do}
    if found.do == "add":
        for rule in found.rules:
            parse_rule(rule)  # a mistake is shown without a vfsd, too
        asked["rules"] = found.rules
    elif found.do == "remove":
        asked["numbers"] = found.numbers
    path = os.fsencode(found.socket)
    answer = ask(path, asked)
    if found.do != "list" and (deaf := wait_until_heard(path)):
        print(f"vfsdctl: {', '.join(deaf)} did not hear of it within {_HEAR_SECONDS:.0f} s: busy, hung, or being replaced", file=sys.stderr)
    if getattr(found, "json", False):
        print(json.dumps(answer))
    elif found.do == "list":
        _show(answer)
    else:
        print(*answer.get("added", answer.get("removed", [])))
    return 0


def ask(path: bytes, asked: dict[str, Any]) -> dict[str, Any]:
    """One question to vfsd. Raises ConfigError for its refusal, and if it cannot be reached."""
    beside = default_path(path)
    name = os.fsdecode(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_ANSWER_SECONDS)
        try:
            sock.connect(beside if os.path.exists(beside) else path)
        except OSError as error:
            remedy = "is vfsd running, with --fault-rules or --fault-socket, and are you root or who started it?"
            raise ConfigError(f"{name}: {error.strerror}; {remedy}") from error
        try:
            sock.send(json.dumps(asked).encode())
            packet = sock.recv(MOST_REPLY)
        except OSError:
            packet = b""
    if not packet:
        raise ConfigError(f"{name}: no answer: vfsd answers root and who started it, and nobody else; or it has just ended")
    answer: dict[str, Any] = json.loads(packet)
    if "error" in answer:
        raise ConfigError(str(answer["error"]))
    return answer


def wait_until_heard(path: bytes) -> list[str]:
    """Until every process that a change concerns knows of it; who does not, after some time. Nobody, if vfsd died of it."""
    deadline = time.monotonic() + _HEAR_SECONDS
    while True:
        try:
            deaf: list[str] = ask(path, {"do": "list"})["deaf"]
        except ConfigError:
            return []
        if not deaf or time.monotonic() > deadline:
            return deaf
        time.sleep(_LOOK_SECONDS)


def _show(answer: dict[str, Any]) -> None:
    print(f"seed {answer['seed']}")
    rows = [("NUMBER", "MATCHES", "HITS", "RULE")]
    rows += [(str(rule["number"]), str(rule["matches"]), str(rule["hits"]), rule["rule"]) for rule in answer["rules"]]
    for number, matches, hits, rule in rows:
        print(f"{number:>6}  {matches:>8}  {hits:>8}  {rule}")
