"""The interpreter of seccomp filters: what the kernel would not run is an error, whoever made the program."""

import struct

import pytest

from vfsd.sandbox.bpf import RET_ALLOW, RET_KILL_PROCESS, run_filter, trace_filter

LOAD, AND, GOTO, JEQ, JGT, JGE, JSET, RETURN = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45, 0x06


def program(*rows):
    return b"".join(struct.pack("<HBBI", *row) for row in rows)


def test_the_path_to_the_answer_is_told():
    code = program((LOAD, 0, 0, 0), (JEQ, 0, 1, 39), (RETURN, 0, 0, RET_ALLOW), (RETURN, 0, 0, RET_KILL_PROCESS))
    assert trace_filter(code, 39, (), 0) == (RET_ALLOW, (0, 1, 2))
    assert trace_filter(code, 40, (), 0) == (RET_KILL_PROCESS, (0, 1, 3))


@pytest.mark.parametrize(
    ("operation", "holds_for", "not_for"), [(JEQ, [6], [5, 7]), (JGT, [7], [5, 6]), (JGE, [6, 7], [5]), (JSET, [4, 2, 7], [1, 8])]
)
def test_jumps(operation, holds_for, not_for):
    code = program((LOAD, 0, 0, 16), (operation, 0, 1, 6), (RETURN, 0, 0, 1), (RETURN, 0, 0, 0))
    assert [run_filter(code, 0, (value,)) for value in [*holds_for, *not_for]] == [1] * len(holds_for) + [0] * len(not_for)


def test_both_halves_of_an_argument_can_be_loaded():
    code = program((LOAD, 0, 0, 60), (AND, 0, 0, 0xF), (GOTO, 0, 0, 0), (JEQ, 0, 1, 3), (RETURN, 0, 0, 1), (RETURN, 0, 0, 0))
    assert run_filter(code, 0, (0, 0, 0, 0, 0, 3 << 32)) == 1
    assert run_filter(code, 0, (0, 0, 0, 0, 0, 3)) == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"", "not a BPF program"),
        (b"1234567", "not a BPF program"),
        (program((LOAD, 0, 0, 64), (RETURN, 0, 0, 0)), "not a word of seccomp_data"),
        (program((LOAD, 0, 0, 2), (RETURN, 0, 0, 0)), "not a word of seccomp_data"),
        (program((0xFF, 0, 0, 0)), "operation 0xff"),
        (program((LOAD, 0, 0, 0)), "runs past its end"),
        (program((GOTO, 0, 0, 0xFFFFFFFF)), "runs past its end"),
    ],
)
def test_what_the_kernel_would_not_run_is_an_error(code, message):
    with pytest.raises(ValueError, match=message):
        run_filter(code, 0)
