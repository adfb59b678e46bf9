r"""Fault expressions: `TARGET:ACTION[:SELECTOR…]`, as `READ:error=EIO:when=3+2`. Text in, Rule or ConfigError out. Pure.

Who controls the bytes: the operator. Every mistake is answered with its column, what is wrong there, and what may stand there.
A `:` that belongs to a value is written `\:`, a backslash `\\`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from vfsd.errors import ConfigError
from vfsd.faults import catalogue
from vfsd.faults.rule import Action, Rule, When

MAX_EXPRESSION = 1000
_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9}
_MOST_NS = 3600 * 10**9
_ERRNOS: dict[str, int] = {name: number for name, number in vars(errno).items() if name.startswith("E")}
_MOST_COUNT = 10**15


class _Part(NamedTuple):
    """A piece of the expression between two colons, and where it begins (from 1)."""

    text: str
    column: int

    @property
    def key(self) -> str:
        return self.text.partition("=")[0]

    @property
    def value(self) -> str | None:
        return self.text.partition("=")[2] if "=" in self.text else None

    @property
    def value_column(self) -> int:
        return self.column + len(self.key) + 1


def parse_rule(text: str) -> Rule:
    """Raises ConfigError that shows the offending part."""
    return _Parser(text).rule()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > MAX_EXPRESSION:
            self._fail(MAX_EXPRESSION + 1, "the expression is too long", f"at most {MAX_EXPRESSION} characters")
        if not text.isprintable():
            self._fail(1, "there is a character that cannot be printed", "leave it out")
        self._parts = list(self._split(text))

    def _fail(self, column: int, what: str, remedy: str) -> NoReturn:
        shown = self._text if self._text.isprintable() and len(self._text) <= MAX_EXPRESSION else ascii(self._text[:80])
        raise ConfigError(f"fault rule {shown!r}, column {column}: {what}; {remedy}")

    def _one_of(self, part: _Part, what: str, choices: Iterable[str]) -> NoReturn:
        self._fail(part.column, f"{part.key!r} {what}", f"use one of {', '.join(choices)}")

    @staticmethod
    def _split(text: str) -> Iterable[_Part]:
        start = 0
        for found in re.finditer(r"(?:[^:\\]|\\.|\\$)*(?::|$)", text):
            piece = found.group()
            yield _Part(piece.removesuffix(":") if piece.endswith(":") else piece, start + 1)
            start = found.end()
            if not piece.endswith(":"):
                return

    def rule(self) -> Rule:
        target, *rest = self._parts
        kind, role, subjects = self._target(target)
        if not rest or not rest[0].text:
            column = len(self._text) + 1 if not rest else rest[0].column
            self._fail(
                column, "here an action is missing", f"add one of {', '.join(self._actions(kind))}, as in {target.text}:{_EXAMPLE[kind]}"
            )
        action = self._action(rest[0], kind, subjects)
        if kind == catalogue.SEND_FDS:  # who receives them cuts them off, who sends them fails
            role = "worker" if action.name == "truncate" else "broker"
        selected = self._selectors(rest[1:], kind)
        point = self._point(selected.pop("at", None), kind, action)
        for part in rest[1:]:
            if point in catalogue.UNKNOWN_AT.get(part.key, ()):
                self._fail(part.column, f"at={point} there is no {part.key} yet, or any", f"leave {part.key} out, or name another point")
        return Rule(self._text, kind, role, subjects, action, self._when(selected), point=point, **selected)

    # --- targets -------------------------------------------------------------------------------------------------------

    def _target(self, part: _Part) -> tuple[str, str, frozenset[str]]:
        """(kind, role, subjects)."""
        text = part.text
        if text in catalogue.ROLES:
            return text, text, frozenset({text})
        if text in (catalogue.KICK, catalogue.CALL):
            return text, "worker", frozenset({text})
        if text == catalogue.SEND_FDS:
            return text, "", frozenset({text})
        if text == catalogue.FRONTEND:
            return text, "control", frozenset({text})
        role, dot, call = text.partition(".")
        if dot:
            return "syscall", role, self._call(part, role, call)
        return "operation", "worker", self._operations(part)

    def _call(self, part: _Part, role: str, call: str) -> frozenset[str]:
        if role not in catalogue.CALLS:
            self._one_of(_Part(role, part.column), "is no process whose system calls can fail", catalogue.CALLS)
        call = catalogue.CALL_ALIASES.get(call, call)
        if call not in catalogue.CALLS[role]:
            at = _Part(call, part.column + len(role) + 1)
            self._one_of(at, f"is no system call of the {role}'s that can fail", catalogue.CALLS[role])
        return frozenset({f"{role}.{call}"})

    def _operations(self, part: _Part) -> frozenset[str]:
        if part.text == catalogue.ANY_OPERATION:
            return frozenset(catalogue.OPERATIONS)
        column = part.column
        names = part.text.split(",")
        for name in names:
            if name not in catalogue.OPERATIONS:
                others = (
                    *catalogue.ROLES,
                    "broker.CALL",
                    "worker.CALL",
                    catalogue.KICK,
                    catalogue.CALL,
                    catalogue.SEND_FDS,
                    catalogue.FRONTEND,
                )
                remedy = f"use FUSE operations, as READ or READ,WRITE, {catalogue.ANY_OPERATION} for all, or one of {', '.join(others)}"
                if name.upper() in catalogue.OPERATIONS:
                    remedy = f"write {name.upper()}"
                self._fail(column, f"{name!r} is nothing that can fail" if name else "here a target is missing", remedy)
            column += len(name) + 1
        return frozenset(names)

    # --- actions -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _actions(kind: str) -> tuple[str, ...]:
        if kind == "operation":
            return catalogue.OF_OPERATIONS
        return catalogue.OF_CALLS if kind == "syscall" else catalogue.ACTIONS[kind]

    def _action(self, part: _Part, kind: str, subjects: frozenset[str]) -> Action:
        name = part.key
        if name not in self._actions(kind):
            self._one_of(part, f"is no action of {self._parts[0].text}", self._actions(kind))
        if name == "short" and not subjects <= set(catalogue.SHORTENED):
            self._fail(part.column, "only READ and WRITE can be short", "use READ, WRITE or READ,WRITE as the target")
        if name == "error":
            if kind == catalogue.SEND_FDS and part.value not in catalogue.SEND_ERRORS:
                at = _Part(part.value or "", part.value_column)
                self._one_of(at, "is not what sendmsg(2) fails with", catalogue.SEND_ERRORS)
            return Action(name, self._errno(part))
        if name == "delay":
            least, most = self._times(part)
            return Action(name, 0, least, most)
        if name in ("short", "corrupt"):
            return Action(name, -1 if part.value is None else self._integer(part, 0, 2**32 - 1))
        if part.value is not None:
            self._fail(part.value_column, f"{name} takes no value", f"write {name}")
        return Action(name)

    def _errno(self, part: _Part) -> int:
        number = _ERRNOS.get(part.value or "")
        if number is None and (part.value or "").isdecimal() and 0 < int(part.value or "") < 4096:
            number = int(part.value or "")
        if number is None:
            self._fail(
                part.value_column,
                f"{part.value!r} is no error" if part.value else "an error is missing",
                "use a name as EIO, or its number",
            )
        return number

    # --- selectors -----------------------------------------------------------------------------------------------------

    def _selectors(self, parts: list[_Part], kind: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in parts:
            if part.key not in catalogue.SELECTORS[kind]:
                self._one_of(part, f"is no selector of {self._parts[0].text}", catalogue.SELECTORS[kind])
            if part.key in found:
                self._fail(part.column, f"{part.key} stands twice", "leave one out")
            if not part.value:
                self._fail(part.value_column, f"{part.key} needs a value", f"as in {_VALUES[part.key]}")
            found[part.key] = self._selector(part, kind)
        return {_FIELDS.get(key, key): value for key, value in found.items()}

    def _selector(self, part: _Part, kind: str) -> Any:
        if part.key == "message" and part.value not in catalogue.MESSAGES[kind]:
            self._one_of(_Part(part.value or "", part.value_column), "is no message that comes there", catalogue.MESSAGES[kind])
        read: dict[str, Callable[[_Part], Any]] = {
            "when": self._strace_when,
            "prob": self._probability,
            "during": self._times,
            "path": lambda each: re.sub(r"\\(.)", r"\1", each.value or "").encode(errors="surrogateescape"),
            "at": lambda each: each,
            "message": lambda each: each.value,
        }
        return read[part.key](part) if part.key in read else self._integer(part, *_BOUNDS[part.key])

    def _point(self, part: _Part | None, kind: str, action: Action) -> str | None:
        """`at=` is needed by what happens at a point."""
        if kind not in (*catalogue.ROLES, catalogue.FRONTEND):
            return None
        points = catalogue.CLOSING_POINTS if kind == catalogue.FRONTEND else catalogue.points_of(kind)
        if part is None:
            self._fail(len(self._text) + 1, f"when {kind} is to {action.name} is missing", f"add at= one of {', '.join(points)}")
        if part.value not in points:
            self._one_of(_Part(part.value or "", part.value_column), f"is no point of {kind}", points)
        return part.value

    def _when(self, selected: dict[str, Any]) -> When:
        """All that counts, taken out of `selected`."""
        given = [key for key in ("when", "nth", "every", "after") if key in selected]
        if len(given) > 1:
            part = next(each for each in self._parts if each.key == given[1])
            self._fail(
                part.column, f"{given[0]} and {given[1]} contradict each other", "leave one out; when=FIRST..LAST+STEP says all of it"
            )
        when = selected.pop("when", When())
        if "nth" in selected:
            number = selected.pop("nth")
            when = When(number, number)
        elif "every" in selected:
            number = selected.pop("every")
            when = When(number, 0, number)
        elif "after" in selected:
            when = When(selected.pop("after") + 1)
        return When(when.first, when.last, when.step, selected.pop("times", 0))

    # --- values --------------------------------------------------------------------------------------------------------

    def _integer(self, part: _Part, least: int, most: int) -> int:
        value = part.value or ""
        if not (value.isascii() and value.isdecimal()) or not least <= int(value) <= most:
            self._fail(
                part.value_column, f"{value!r} is no number from {least} to {most}", f"as in {_VALUES.get(part.key, part.key + '=1')}"
            )
        return int(value)

    def _strace_when(self, part: _Part) -> When:
        found = re.fullmatch(r"(\d{1,15})(?:\.\.(\d{1,15}))?(\+(\d{0,15}))?", part.value or "", re.ASCII)
        if found is None or not int(found[1]) or found[4] == "0" or (found[2] and int(found[2]) < int(found[1])):
            self._fail(
                part.value_column, f"{part.value!r} is no FIRST, FIRST..LAST, FIRST+STEP or FIRST..LAST+STEP",
                "when=3 is the third only, 3+2 the third, fifth and so on, 3+ the third and all later, 3..9 the third to the ninth",
            )  # fmt: skip
        first, last, step = int(found[1]), int(found[2] or 0), int(found[4] or 1)
        if not last and found[3] is None:
            last = first
        return When(first, last, step)

    def _probability(self, part: _Part) -> float:
        found = re.fullmatch(r"\d*\.?\d+|\d+\.", part.value or "", re.ASCII)
        if found is None or not 0 < float(found.group()) <= 1:
            self._fail(part.value_column, f"{part.value!r} is no probability", "use a number above 0, up to 1, as in prob=0.1")
        return float(found.group())

    def _times(self, part: _Part) -> tuple[int, int]:
        """`50ms`, or a range `10ms..50ms`."""
        first, dots, last = (part.value or "").partition("..")
        least = self._time(first, part.value_column)
        most = self._time(last, part.value_column + len(first) + 2) if dots else least
        if most < least or (part.key == "during" and most == least):
            self._fail(part.value_column, f"{part.value!r} is no range of times", f"as in {_VALUES[part.key]}")
        return least, most

    def _time(self, text: str, column: int) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s|min)", text, re.ASCII)
        if found is None or float(found[1]) * _NS[found[2]] > _MOST_NS:
            self._fail(column, f"{text!r} is no time up to an hour", "use a number with ns, us, ms, s or min, as 50ms")
        return int(float(found[1]) * _NS[found[2]])


_FIELDS = {"prob": "probability", "during": "window_ns"}
_BOUNDS = {
    "nth": (1, _MOST_COUNT), "every": (1, _MOST_COUNT), "after": (0, _MOST_COUNT), "times": (1, _MOST_COUNT), "seed": (0, 2**64 - 1),
    "nodeid": (0, 2**64 - 1), "uid": (0, 2**32 - 1), "queue": (0, 255),
}  # fmt: skip
_VALUES = {
    "when": "when=3+2", "nth": "nth=3", "every": "every=10", "after": "after=100", "times": "times=1", "prob": "prob=0.1",
    "seed": "seed=42", "during": "during=10s..20s", "path": "path=/db/*", "nodeid": "nodeid=1", "uid": "uid=1000", "queue": "queue=1",
    "at": "at=after-pop", "message": "message=Create", "delay": "delay=50ms or delay=10ms..50ms",
}  # fmt: skip
_EXAMPLE = {
    "operation": "error=EIO", "syscall": "error=ESTALE", "worker": "kill:at=after-pop", "broker": "kill:at=after-request",
    "control": "kill:at=before-reply", "kick": "lose", "call": "lose", "send_fds": "truncate", "frontend": "close:at=now",
}  # fmt: skip
