"""Small parts of the sandbox that can be tried without confining anything."""

import errno
import gc
import struct
import subprocess
import sys

import pytest

from vfsd.errors import ConfigError
from vfsd.sandbox import landlock, namespaces, seccomp_load, syscalls
from vfsd.sandbox.steps import step


def test_a_failing_step_names_itself_the_errno_and_what_to_do():
    with pytest.raises(ConfigError) as caught, step("dig a hole", "bring a spade"):
        raise OSError(errno.EPERM, "Operation not permitted")
    assert str(caught.value) == "sandbox: cannot dig a hole: Operation not permitted (EPERM); bring a spade"


def test_a_step_that_fails_without_an_errno_still_says_why():
    with pytest.raises(ConfigError, match=r"cannot dig: wet ground \(no errno\); wait"), step("dig", "wait"):
        raise OSError("wet ground")


def test_a_bug_inside_a_step_is_not_taken_for_a_failure():
    with pytest.raises(ValueError, match="bug"), step("dig", "wait"):
        raise ValueError("bug")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, [0x1FFF]),
        (2, [0x3FFF]),
        (3, [0x7FFF]),
        (4, [0x7FFF, 3]),
        (5, [0xFFFF, 3]),
        (6, [0xFFFF, 3, 3]),
        (7, [0xFFFF, 3, 3]),
        (99, [0xFFFF, 3, 3]),
    ],
)
def test_landlock_handles_every_right_of_the_kernels_version(version, expected):
    attribute = landlock._ruleset_attribute(version)
    assert list(struct.unpack(f"={len(attribute) // 8}Q", attribute)) == expected


def test_a_kernel_without_landlock_is_version_0(monkeypatch):
    def missing():
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(syscalls, "landlock_abi", missing)
    assert landlock.abi_version() == 0
    assert landlock.deny_all() == 0


@pytest.mark.parametrize("program", [b"", b"1234567", bytes(8 * 4097)])
def test_what_is_no_filter_is_not_loaded(program):
    with pytest.raises(OSError, match="not a BPF program"):
        seccomp_load.load_filter(program)


def test_failed_system_calls_raise_their_errno():
    for function, arguments, expected in (
        (syscalls.mount_setattr, (-1, b"", syscalls.AT_EMPTY_PATH, 1), errno.EBADF),
        (syscalls.open_tree, (-1, b"nothing", 0), errno.EBADF),
        (syscalls.landlock_restrict_self, (-1,), None),
        (syscalls.prctl, (syscalls.PR_CAPBSET_READ, 999), errno.EINVAL),
    ):
        with pytest.raises(OSError) as caught:
            function(*arguments)
        assert caught.value.errno is not None
        assert expected is None or caught.value.errno == expected


def test_without_a_sandbox_control_and_workers_stay_where_they_are():
    namespaces.enter_empty_root("none")


def test_without_a_sandbox_the_share_is_opened_where_it_is(tmp_path):
    share = namespaces.enter_share("none", bytes(tmp_path), readonly=False)
    try:
        for fd in (share.root, share.proc_self_fd):
            assert not fd.closed
    finally:
        share.close()
    assert share.root.closed


def test_the_settled_allocator_takes_its_heap_at_once_and_stops_the_collector():
    script = (
        "import ctypes, gc\n"
        "from vfsd.sandbox.memory import HEAP_BYTES, settle_allocator\n"
        "sbrk = ctypes.CDLL(None).sbrk\n"
        "sbrk.restype = ctypes.c_void_p\n"
        "before = sbrk(0)\n"
        "settle_allocator()\n"
        "settled = sbrk(0)\n"
        "for size in (100_000, 5_000_000, 40_000_000):\n"
        "    bytearray(size)\n"
        "print(settled - before >= HEAP_BYTES, sbrk(0) == settled, gc.isenabled(), gc.get_freeze_count() > 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "True True False True\n"
    assert gc.isenabled()
