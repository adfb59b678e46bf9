"""What a seccomp filter answers, worked out from its BPF program without loading it (classic BPF, seccomp's part of it)."""

import struct

AUDIT_ARCH_I386 = 0x40000003
AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_AARCH64 = 0xC00000B7

RET_KILL_PROCESS = 0x80000000
RET_TRAP = 0x00030000
RET_LOG = 0x7FFC0000
RET_ALLOW = 0x7FFF0000

_INSTRUCTION = struct.Struct("<HBBI")
_SECCOMP_DATA = struct.Struct("<IIQ6Q")  # nr, arch, instruction pointer, arguments
_BITS = 0xFFFFFFFF


def ret_errno(number: int) -> int:
    return 0x00050000 | number


def run_filter(program: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int = AUDIT_ARCH_X86_64) -> int:
    """The filter's return value for one system call."""
    data = _SECCOMP_DATA.pack(number & _BITS, architecture, 0, *(list(arguments) + [0] * 6)[:6])
    code = list(_INSTRUCTION.iter_unpack(program))
    accumulator, position = 0, 0
    while True:
        operation, if_true, if_false, constant = code[position]
        position += 1
        match operation:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= constant
            case 0x05:  # BPF_JMP | BPF_JA
                position += constant
            case 0x15 | 0x25 | 0x35 | 0x45:  # JEQ, JGT, JGE, JSET
                holds = {
                    0x15: accumulator == constant,
                    0x25: accumulator > constant,
                    0x35: accumulator >= constant,
                    0x45: bool(accumulator & constant),
                }[operation]
                position += if_true if holds else if_false
            case 0x06:  # BPF_RET | BPF_K
                return constant
            case _:
                raise AssertionError(f"instruction {operation:#x} at {position - 1}: not one that libseccomp makes")
