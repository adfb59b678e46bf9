"""The file of --fault-rules: TOML with `rules`, a list of expressions or of tables that say the same, and perhaps `seed`. Pure.

    seed = 42
    rules = [
        "READ:error=EIO:when=3+2",
        { target = "FSYNC", delay = "50ms", prob = 0.1, path = "/db/*" },
        { target = "worker", kill = true, at = "after-pop", when = 100 },
    ]

Who controls the bytes: the operator.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any, NamedTuple

from vfsd.errors import ConfigError
from vfsd.faults.catalogue import NOW
from vfsd.faults.counters import MAX_RULES
from vfsd.faults.grammar import parse_rule
from vfsd.faults.rule import Rule


class RuleFile(NamedTuple):
    seed: int | None
    rules: list[Rule]


def parse_rule_file(text: str, name: str) -> RuleFile:
    """Raises ConfigError that names the file, and the rule by its number."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}; see docs/faults.md for an example") from None
    if unknown := sorted(set(found) - {"seed", "rules"}):
        raise ConfigError(f"{name}: {unknown[0]!r} is not known; there may be rules = […] and seed = NUMBER")
    seed, rules = found.get("seed"), found.get("rules", [])
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ConfigError(f"{name}: seed is {seed!r}; use a number from 0 to 2^63-1")
    if type(rules) is not list or len(rules) > MAX_RULES:
        raise ConfigError(f"{name}: rules must be a list of at most {MAX_RULES}; see docs/faults.md for an example")
    return RuleFile(seed, [_rule(rule, f"{name}: rule {number}") for number, rule in enumerate(rules, 1)])


def _rule(given: Any, name: str) -> Rule:
    try:
        rule = parse_rule(given if type(given) is str else _expression(given))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if rule.point == NOW:
        raise ConfigError(f"{name}: {rule.text!r}: at={NOW} is when a rule arrives at a vfsd that runs; give it by vfsdctl fault add")
    return rule


def _expression(given: Any) -> str:
    """A table as an expression: what follows `target` in the order in which it stands, `true` for what has no value."""
    if type(given) is not dict or type(given.get("target")) is not str:
        raise ConfigError('a rule is an expression, as "READ:error=EIO", or a table with target = "READ"')
    parts = [given["target"]]
    for key, value in given.items():
        if key == "target":
            continue
        if value is True:
            parts.append(key)
        elif type(value) in (int, float, str):
            parts.append(f"{key}={_escape(str(value))}")
        else:
            raise ConfigError(f"{key} is {value!r}; use a text, a number or true")
    return ":".join(parts)


def _escape(value: str) -> str:
    return re.sub(r"([:\\])", r"\\\1", value)
