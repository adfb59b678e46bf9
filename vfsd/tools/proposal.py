"""Rules for calls that a policy lacks: a draft in TOML, which somebody has to narrow, and to give reasons for.

Pure. What is proposed permits only what was seen where that can be told from numbers alone; which argument is a descriptor, an
address or a length cannot, so arguments that were not the same small number in every call stay free, and are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from vfsd.tools.syscall_record import Missing, SyscallRecord

_LARGEST_FLAGS = 1 << 20  # more is an address, a length or -1
_EXAMPLES_SHOWN = 3


def propose_rules(record: SyscallRecord) -> list[str]:
    """Lines of TOML; none when nothing is missing."""
    lines: list[str] = []
    for name, role in sorted(record.roles.items()):
        if role.missing:
            lines += [
                "",
                "# Made after lock-down, and not allowed. Give each a reason and narrow conditions, or do without the call.",
                f"[role.{name}]",
                "rules = [",
            ]
            lines += [line for syscall, missing in sorted(role.missing.items()) for line in _rule(syscall, missing)]
            lines.append("]")
    return lines


def _rule(syscall: str, missing: Missing) -> list[str]:
    seen = [f"{syscall}({', '.join(map(hex, example))})" for example in missing.examples[:_EXAMPLES_SHOWN]]
    when = "".join(f'"arg{number} == {value:#x}", ' for number, value in _constant_arguments(missing.examples))
    conditions = f"when = [{when[:-2]}], " if when else ""
    return [f"  # {missing.count} times, as {' or '.join(seen)}", f'  {{ syscall = "{syscall}", {conditions}used_by = "", reason = "" }},']


def _constant_arguments(examples: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """(number, value) of each argument but the first, mostly a descriptor or a path, that was always the same small number."""
    shortest = min((len(example) for example in examples), default=0)
    values = [{example[number] for example in examples} for number in range(shortest)]
    return [(number, each) for number, seen in enumerate(values) if number and len(seen) == 1 and (each := min(seen)) < _LARGEST_FLAGS]
