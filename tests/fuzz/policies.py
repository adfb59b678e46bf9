"""Seccomp policies: any TOML document, and what the compiled filter then does.

Oracle: a document is a policy or a ConfigError of one line; of a policy, the compiled BPF program answers every call as
`RolePolicy.verdict` says, at the very arguments where it may change, on the high halves of narrow ones too.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import pyseccomp

from tests.fuzz.provider import Provider, Recipe
from vfsd.errors import ConfigError
from vfsd.sandbox.bpf import RET_ALLOW, RET_KILL_PROCESS, ret_errno, run_filter
from vfsd.sandbox.seccomp import compile_role, load_policy
from vfsd.sandbox.seccomp_constants import WIDE_ARGUMENTS, constants_of
from vfsd.sandbox.seccomp_policy import RolePolicy, parse_policy

_WAYS = ("rules", "document", "text", "condition")
_SYSCALLS = ("read", "write", "fcntl", "mmap", "lseek", "openat", "pwritev2", "socket", "epoll_wait", "no_such_call", "UPPER")
_OPERATORS = ("==", "only", "has", "is fd", "&", "!=", "<", "<=", ">", ">=", "?=")
_NAMES = (*sorted(constants_of("x86_64"))[:40], "NO_SUCH_NAME")
_ACTIONS = (None, "allow", "kill", "errno(EPERM)", "errno(0)", "errno(38)", "errno(NOPE)", "errno(4096)", "log", 3)
_ODD = (None, True, 1, 1.0, "text", [], {}, [1], ["a"], [{}])
_KEYS = ("version", "group", "role", "default", "use", "rules", "syscall", "when", "action", "arch", "reason", "used_by", "more")
_MOST_CALLS = 40


def one_input(data: bytes) -> None:
    provider = Provider(data)
    way = provider.pick(_WAYS)
    if way == "condition":
        _check_meaning(provider)
        return
    if way == "text":
        _load(provider.rest())
        return
    document = _document(provider) if way == "rules" else _odd_table(provider, 0)
    try:
        roles = parse_policy(document)
    except ConfigError as error:
        _check_refusal(error)
        return
    if platform.machine() == "x86_64":
        for role in roles.values():
            _check_compiled(provider, role)


def _check_refusal(error: ConfigError) -> None:
    assert str(error).startswith("seccomp policy")


def _load(text: bytes) -> None:
    """As a file."""
    file = os.memfd_create("policy", os.MFD_CLOEXEC)
    try:
        os.write(file, text)
        load_policy(f"/proc/self/fd/{file}")
    except ConfigError as error:
        _check_refusal(error)
    finally:
        os.close(file)


def _document(provider: Provider) -> dict[str, Any]:
    """A policy that is mostly right."""
    default = "allow" if provider.one_in(3) else "kill"
    document: dict[str, Any] = {"version": 1, "role": {"worker": {"default": default, "rules": _rules(provider)}}}
    if provider.one_in(4):
        document["group"] = {"shared": {"rules": _rules(provider)}}
        document["role"]["worker"]["use"] = ["shared"]
    if provider.one_in(8):
        document["role"]["worker"][provider.pick(_KEYS)] = _odd(provider, 0)
    return document


def _rules(provider: Provider) -> list[dict[str, Any]]:
    return [_rule(provider) for _ in range(provider.byte() % 6)]


def _rule(provider: Provider) -> dict[str, Any]:
    rule: dict[str, Any] = {"syscall": provider.pick(_SYSCALLS), "reason": "the fuzzer's", "used_by": "the fuzzer"}
    if conditions := [_condition(provider) for _ in range(provider.byte() % 4)]:
        rule["when"] = conditions
    if provider.flag():
        rule["action"] = provider.pick(_ACTIONS)
    if provider.one_in(8):
        rule["arch"] = provider.pick((["x86_64"], ["aarch64"], ["x86_64", "aarch64"], ["riscv64"], []))
    if provider.one_in(16):
        rule[provider.pick(_KEYS)] = _odd(provider, 0)
    return rule


def _condition(provider: Provider) -> str:
    argument, operator = f"arg{provider.byte() % 7}", provider.pick(_OPERATORS)
    if operator == "is fd":
        return f"{argument} is fd"
    if operator == "&":
        return f"{argument} & {_value(provider)} == {_value(provider)}"
    return f"{argument} {operator} {_value(provider)}"


def _value(provider: Provider) -> str:
    """Numbers and names; some written as nobody should."""
    words = []
    for _ in range(1 + provider.byte() % 3):
        match provider.byte() % 8:
            case 0 | 1 | 2:
                words.append(str(provider.number()))
            case 3 | 4:
                words.append(hex(provider.number()))
            case 5 | 6:
                words.append(provider.pick(_NAMES))
            case _:
                words.append(provider.blob(8000).decode(errors="replace"))
    return "|".join(words)


def _odd(provider: Provider, depth: int) -> Any:
    if depth < 4 and provider.flag():
        return _odd_table(provider, depth + 1) if provider.flag() else [_odd(provider, depth + 1) for _ in range(provider.byte() % 3)]
    return provider.pick(_ODD)


def _odd_table(provider: Provider, depth: int) -> dict[str, Any]:
    table = {provider.pick(_KEYS): _odd(provider, depth) for _ in range(provider.byte() % 5)}
    return table | {"version": 1} if depth == 0 else table


def _check_compiled(provider: Provider, role: RolePolicy) -> None:
    try:
        program = compile_role(role, "kill", "x86_64")
    except ConfigError as error:
        _check_refusal(error)
        return
    for _ in range(_MOST_CALLS):
        syscall, arguments = _call(provider, role)
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, syscall)
        verdict = role.verdict(syscall, arguments, "x86_64")
        expected = {"allow": RET_ALLOW, "kill": RET_KILL_PROCESS}.get(verdict) if isinstance(verdict, str) else ret_errno(verdict)
        assert run_filter(program, number, arguments) == expected, (syscall, arguments, verdict)
        if verdict == "allow":  # then also what the kernel makes of it, which of a narrow argument sees the low half only
            assert role.verdict(syscall, _as_the_kernel_sees(syscall, arguments), "x86_64") == "allow", (syscall, arguments)
        if not provider.left:
            return


def _as_the_kernel_sees(syscall: str, arguments: tuple[int, ...]) -> tuple[int, ...]:
    wide = WIDE_ARGUMENTS.get(syscall, frozenset())
    return tuple(value if number in wide else value & 0xFFFFFFFF for number, value in enumerate(arguments))


def _check_meaning(provider: Provider) -> None:
    """One condition alone: a second reading of the grammar."""
    syscall, operator = provider.pick(_SYSCALLS[:8]), provider.pick(_OPERATORS)
    value, mask, actual = provider.number(), provider.number(), provider.number()
    if provider.flag():
        actual = (value + provider.byte() - 2) % (1 << 64)
    condition = {"is fd": "arg0 is fd", "&": f"arg0 & {mask} == {value}"}.get(operator, f"arg0 {operator} {value}")
    rule = {"syscall": syscall, "reason": "the fuzzer's", "used_by": "the fuzzer", "when": [condition]}
    try:
        role = parse_policy({"version": 1, "role": {"worker": {"default": "kill", "rules": [rule]}}})["worker"]
    except ConfigError as error:
        _check_refusal(error)
        return
    expected = {
        "==": actual == value, "only": actual | value == value, "has": actual & value == value, "is fd": actual < 1 << 31,
        "&": actual & mask == value, "!=": actual != value, "<": actual < value, "<=": actual <= value, ">": actual > value, ">=": actual >= value,
    }[operator]  # fmt: skip
    assert role.verdict(syscall, (actual, 0, 0, 0, 0, 0), "x86_64") == ("allow" if expected else "kill"), (condition, actual)


def _call(provider: Provider, role: RolePolicy) -> tuple[str, tuple[int, ...]]:
    """A call at which a rule of the role may just hold or not."""
    rules = role.rules_for("x86_64")
    arguments = [0] * 6
    if not rules or provider.one_in(8):
        return "getpid", (0,) * 6
    rule = provider.pick(rules)
    for each in rule.comparisons:
        base = each.operand if each.operator == "masked" else each.value
        arguments[each.argument] = (base + provider.pick((0, 0, 0, 1, -1, 1 << 32, 1 << 31, 1 << 63, ~each.value))) % (1 << 64)
    if provider.one_in(4):
        arguments[provider.byte() % 6] = provider.number()
    return rule.syscall, tuple(arguments)


def seeds() -> dict[str, bytes]:
    def text(document: str) -> bytes:
        return bytes(Recipe().pick(_WAYS, "text").raw(document.encode()))

    def rules(*conditions: str, syscall: str = "fcntl", calls: bytes = bytes(40)) -> bytes:
        """One rule, its conditions as free text, and what `_call` reads."""
        recipe = Recipe().pick(_WAYS, "rules").one_in(3).byte(1).pick(_SYSCALLS, syscall).byte(len(conditions))
        for condition in conditions:
            argument, operator, *value = condition.split(" ", 2)
            recipe.byte(int(argument[3:])).pick(_OPERATORS, "is fd" if operator == "is" else operator)
            if operator == "&":
                mask, operand = value[0].split(" == ")
                recipe.byte(0).byte(7).blob(mask.encode()).byte(0).byte(7).blob(operand.encode())
            elif operator != "is":
                recipe.byte(0).byte(7).blob(value[0].encode())
        recipe.flag(False).one_in(8).one_in(16).one_in(4).one_in(8)  # no action, no arch, nothing odd
        return bytes(recipe.raw(calls))

    row = '{ syscall = "read", reason = "it reads", used_by = "the seed", when = ["arg0 is fd"] }'
    return {
        "a-role": text(f'version = 1\n[role.worker]\ndefault = "kill"\nrules = [{row}]\n'),
        "a-group": text(f'version = 1\n[group.all]\nrules = [{row}]\n[role.worker]\ndefault = "kill"\nuse = ["all"]\n'),
        "not-toml": text("version = = 1"),
        "not-utf-8": bytes(Recipe().pick(_WAYS, "text").raw(b"version = 1 # \xff")),
        **{
            f"condition-{number}-{actual}": bytes(
                Recipe().pick(_WAYS, "condition").byte(2).byte(number).number(4).number(6).number(actual).flag(False)
            )
            for number in range(len(_OPERATORS) - 1)
            for actual in (4, 7)
        },
        "equal": rules("arg1 == 1"),
        # What once went wrong: tracebacks for three texts, and a rule that a caller satisfies by bits that the kernel does not see.
        "a-leading-zero": rules("arg1 == 010"),
        "a-number-of-many-digits": rules("arg1 == " + "9" * 5000),
        "brackets-in-brackets": text("version = " + "[" * 1500),
        "a-bit-that-the-kernel-does-not-see": rules("arg0 has 0x100000000", syscall="write"),
        "masks-of-one-argument": rules("arg3 only 0x22", "arg3 has 0x20", syscall="mmap"),
        "a-mask": rules("arg0 & 0xffffffff == 3"),
        "a-descriptor": rules("arg0 is fd", "arg1 == 4"),
        "an-order-of-a-wide-argument": rules("arg1 <= 4096", syscall="lseek"),
        "an-order-of-a-narrow-argument": rules(
            "arg0 >= 3", syscall="write", calls=bytes(Recipe().one_in(8).byte(0).byte(0).one_in(4, True).byte(0).number((1 << 32) + 1))
        ),
    }
