"""What a seccomp filter answers, worked out from its BPF program without loading it (classic BPF, seccomp's part of it).

Pure. The program may come from anywhere, a process that is looked at included: whatever the kernel would not run is a ValueError.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

AUDIT_ARCH_I386 = 0x40000003
AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_AARCH64 = 0xC00000B7
AUDIT_ARCH = {"x86_64": AUDIT_ARCH_X86_64, "aarch64": AUDIT_ARCH_AARCH64}  # by the name that a policy uses

RET_KILL_PROCESS = 0x80000000
RET_KILL_THREAD = 0x00000000
RET_TRAP = 0x00030000
RET_ERRNO = 0x00050000
RET_LOG = 0x7FFC0000
RET_ALLOW = 0x7FFF0000

_INSTRUCTION = struct.Struct("<HBBI")
_SECCOMP_DATA = struct.Struct("<IIQ6Q")  # nr, arch, instruction pointer, arguments
_BITS = 0xFFFFFFFF
_ARGUMENT_BITS = (1 << 64) - 1


class Instruction(NamedTuple):
    """struct sock_filter."""

    operation: int
    if_true: int
    if_false: int
    constant: int


class Outcome(NamedTuple):
    """`path`: the positions of the instructions that ran, the deciding return last."""

    value: int
    path: tuple[int, ...]


def ret_errno(number: int) -> int:
    return RET_ERRNO | number


@lru_cache(maxsize=16)  # who asks about one filter asks about many calls
def instructions(program: bytes) -> tuple[Instruction, ...]:
    """Raises ValueError for what is not a whole number of instructions."""
    if not program or len(program) % _INSTRUCTION.size:
        raise ValueError(f"not a BPF program: {len(program)} bytes")
    return tuple(Instruction(*fields) for fields in _INSTRUCTION.iter_unpack(program))


def run_filter(program: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int = AUDIT_ARCH_X86_64) -> int:
    """The filter's return value for one system call."""
    return trace_filter(program, number, arguments, architecture).value


def trace_filter(program: bytes, number: int, arguments: tuple[int, ...], architecture: int) -> Outcome:
    """The filter's return value for one system call, and how it came to it. Missing arguments are 0."""
    six = [argument & _ARGUMENT_BITS for argument in (list(arguments) + [0] * 6)[:6]]
    data = _SECCOMP_DATA.pack(number & _BITS, architecture, 0, *six)
    code = instructions(program)
    accumulator, position = 0, 0
    path: list[int] = []
    while position < len(code):
        path.append(position)
        operation, if_true, if_false, constant = code[position]
        position += 1
        match operation:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                if constant % 4 or constant >= _SECCOMP_DATA.size:
                    raise ValueError(f"instruction {position - 1}: loads from {constant}, which is not a word of seccomp_data")
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= constant
            case 0x05:  # BPF_JMP | BPF_JA
                position += constant
            case 0x15 | 0x25 | 0x35 | 0x45:
                position += if_true if _holds(operation, accumulator, constant) else if_false
            case 0x06:  # BPF_RET | BPF_K
                return Outcome(constant, tuple(path))
            case _:
                raise ValueError(f"instruction {position - 1}: operation {operation:#x} is not one that libseccomp makes")
    raise ValueError("the program runs past its end")


def _holds(operation: int, accumulator: int, constant: int) -> bool:
    match operation:
        case 0x15:  # BPF_JEQ | BPF_K
            return accumulator == constant
        case 0x25:  # BPF_JGT | BPF_K
            return accumulator > constant
        case 0x35:  # BPF_JGE | BPF_K
            return accumulator >= constant
        case _:  # BPF_JSET | BPF_K
            return bool(accumulator & constant)
