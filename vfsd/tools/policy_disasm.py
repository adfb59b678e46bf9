"""A BPF program of seccomp in readable form: one line per instruction, system calls and arguments by name.

The program may come from a process that is looked at, so nothing about it is taken for granted.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from vfsd.sandbox import bpf
from vfsd.sandbox.seccomp import compile_role, syscall_name
from vfsd.sandbox.seccomp_policy import RolePolicy
from vfsd.tools.policy_foreign import Shown

_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16  # struct seccomp_data
_X32_BIT = 0x40000000
_JUMPS = {0x15: "==", 0x25: ">", 0x35: ">=", 0x45: "&"}
_FIXED_RETURNS = {
    bpf.RET_ALLOW: "allow",
    bpf.RET_KILL_PROCESS: "kill the process",
    bpf.RET_KILL_THREAD: "kill the thread",
    bpf.RET_LOG: "log and allow",
    bpf.RET_TRAP: "trap",
}


def disassemble_roles(roles: Sequence[RolePolicy], architecture: str) -> Shown:
    parts = [f"# role {role.name}, {architecture}\n{disassemble(compile_role(role, 'kill', architecture), architecture)}" for role in roles]
    return Shown("\n".join(parts))


def disassemble(program: bytes, architecture: str) -> str:
    """Raises ValueError for what is not a whole number of instructions."""
    code = bpf.instructions(program)
    loaded = _what_is_loaded(code)
    lines = []
    for position, instruction in enumerate(code):
        (known,) = loaded[position] if len(loaded[position]) == 1 else ("",)
        text, note = _describe(position, instruction, known, architecture)
        lines.append(f"{position:4}  {text:<42}{'; ' + note if note else ''}".rstrip())
    return "\n".join(lines) + "\n"


def _what_is_loaded(code: Sequence[bpf.Instruction]) -> list[set[str]]:
    """What the accumulator may hold before each instruction; jumps only go forward, so one pass finds all."""
    loaded: list[set[str]] = [set() for _ in range(len(code) + 1)]
    for position, (operation, if_true, if_false, constant) in enumerate(code):
        after, held = {position + 1}, loaded[position]
        match operation:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                held = {_name_of_word(constant)}
            case 0x05:  # BPF_JMP | BPF_JA
                after = {position + 1 + constant}
            case 0x15 | 0x25 | 0x35 | 0x45:
                after = {position + 1 + if_true, position + 1 + if_false}
            case 0x06:  # BPF_RET | BPF_K
                after = set()
        for target in after:
            if target < len(code):
                loaded[target] |= held
    return loaded


def outcome_of(value: int) -> str:
    """A filter's return value in words."""
    if value & 0xFFFF0000 == bpf.RET_ERRNO:
        number = value & 0xFFFF
        return f"fail with {errno.errorcode.get(number, number)}" if number else "return 0 without the call"
    return _FIXED_RETURNS.get(value, f"unknown action {value:#x}")


def _describe(position: int, instruction: bpf.Instruction, loaded: str, architecture: str) -> tuple[str, str]:
    operation, if_true, if_false, constant = instruction
    after = position + 1
    match operation:
        case 0x20:  # BPF_LD | BPF_W | BPF_ABS
            return f"load [{constant}]", _name_of_word(constant)
        case 0x54:  # BPF_ALU | BPF_AND | BPF_K
            return f"and {constant:#x}", ""
        case 0x05:  # BPF_JMP | BPF_JA
            return f"goto {after + constant}", ""
        case 0x15 | 0x25 | 0x35 | 0x45:
            text = f"if {_JUMPS[operation]} {constant:#x} goto {after + if_true} else {after + if_false}"
            return text, _name_of_constant(operation, constant, loaded, architecture)
        case 0x06:  # BPF_RET | BPF_K
            return f"return {constant:#x}", outcome_of(constant)
        case _:
            return f"operation {operation:#x} {if_true} {if_false} {constant:#x}", "not one that libseccomp makes"


def _name_of_word(offset: int) -> str:
    if offset == _OFFSET_NUMBER:
        return "number of the system call"
    if offset == _OFFSET_ARCHITECTURE:
        return "architecture"
    index, rest = divmod(offset - _OFFSET_ARGUMENTS, 8)
    if not 0 <= index < 6 or rest not in (0, 4):
        return "instruction pointer" if offset in (8, 12) else "outside of seccomp_data"
    return f"arg{index}, {'upper' if rest else 'lower'} half"


def _name_of_constant(operation: int, constant: int, loaded: str, architecture: str) -> str:
    if loaded == "architecture":
        return next((f"AUDIT_ARCH_{name.upper()}" for name, value in bpf.AUDIT_ARCH.items() if value == constant), "")
    if loaded != "number of the system call":
        return ""
    if operation == 0x35 and constant == _X32_BIT:  # BPF_JGE
        return "the x32 entry"
    return syscall_name(constant, architecture) or ""
