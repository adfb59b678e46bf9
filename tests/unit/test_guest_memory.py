"""Guest memory: what a hostile frontend or guest may say about it, and that it can always be unmapped."""

import errno
import mmap
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsd.errors import FrontendBreach, GuestBreach
from vfsd.worker.guest_memory import GuestMemory

PAGE = mmap.PAGESIZE
UVA = 0x7F0000000000


@pytest.fixture
def ram():
    """A memfd of 8 pages, each full of its number, and the check that no descriptor is left over."""
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    for page in range(8):
        os.pwrite(fd, bytes([page]) * PAGE, page * PAGE)
    before = len(os.listdir("/proc/self/fd"))
    yield fd
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)


@pytest.fixture
def memory(ram):
    memory = GuestMemory()
    yield memory
    memory.clear()


def shows(views):
    return b"".join(views)


def test_a_region_shows_and_changes_the_file(ram, memory):
    memory.add(ram, 0x100000, 2 * PAGE, UVA, PAGE)
    (view,) = memory.slices(0x100000 + PAGE - 2, 4)
    assert shows([view]) == b"\1\1\2\2"
    view[0:2] = b"ab"
    assert os.pread(ram, 3, 2 * PAGE - 2) == b"ab\2"
    os.pwrite(ram, b"cd", 2 * PAGE)
    assert shows([view]) == b"abcd"
    view.release()


@pytest.mark.parametrize("offset", [1, PAGE - 1, PAGE + 5, 3 * PAGE + 100])
def test_a_region_may_begin_at_any_offset_of_the_file(ram, memory, offset):
    memory.add(ram, 0, PAGE, UVA, offset)
    assert shows(memory.slices(0, PAGE)) == os.pread(ram, PAGE, offset)
    assert shows([memory.contiguous(UVA, PAGE)]) == os.pread(ram, PAGE, offset)


def test_the_fd_stays_the_callers(ram, memory):
    memory.add(ram, 0, PAGE, UVA, 0)
    os.fstat(ram)


def test_a_buffer_may_span_adjacent_regions(ram, memory):
    memory.add(ram, 3 * PAGE, PAGE, UVA + 8 * PAGE, 5 * PAGE)
    memory.add(ram, 0, PAGE, UVA, 0)
    memory.add(ram, PAGE, 2 * PAGE, UVA + 2 * PAGE, 6 * PAGE)
    views = memory.slices(PAGE - 1, 2 * PAGE + 2)
    assert [len(view) for view in views] == [1, 2 * PAGE, 1]
    assert shows(views) == b"\0" + b"\6" * PAGE + b"\7" * PAGE + b"\5"


def test_an_indirect_table_is_the_guests_memory_or_a_copy_of_two_regions(ram, memory):
    memory.add(ram, 0, PAGE, UVA, 0)
    memory.add(ram, PAGE, PAGE, UVA + PAGE, 4 * PAGE)
    assert isinstance(memory.table(0, 32), memoryview)
    assert memory.table(PAGE - 16, 32) == bytes(16) + b"\4" * 16
    with pytest.raises(GuestBreach):
        memory.table(2 * PAGE - 16, 32)


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (0, 1),  # below all
        (PAGE - 1, 1),
        (PAGE - 1, 2),  # begins below
        (3 * PAGE, 1),  # in the gap
        (3 * PAGE - 1, 2),  # runs into the gap
        (2 * PAGE, 3 * PAGE),  # across the gap
        (6 * PAGE, 1),  # above all
        (5 * PAGE, PAGE + 1),  # runs out above
        (PAGE, 2**32 - 1),
        (2**64 - 1, 2**32 - 1),  # sums that wrap in 64 bits
        (2**64 - 8, 16),
    ],
)
def test_what_is_not_in_guest_memory_is_a_guest_breach(ram, memory, gpa, length):
    memory.add(ram, PAGE, 2 * PAGE, UVA, 0)
    memory.add(ram, 4 * PAGE, 2 * PAGE, UVA + 4 * PAGE, 4 * PAGE)
    for warmed_by in (PAGE, 4 * PAGE):  # the last-used region must not change the answer
        memory.slices(warmed_by, 1)
        with pytest.raises(GuestBreach, match="not in guest memory"):
            memory.slices(gpa, length)


def test_with_no_region_every_address_is_a_guest_breach():
    for gpa in (0, 1, 2**64 - 1):
        with pytest.raises(GuestBreach):
            GuestMemory().slices(gpa, 1)


@given(
    regions=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=5),
    gpa=st.integers(0, 50),
    length=st.integers(1, 20),
    before=st.integers(0, 50),
)
def test_slices_agree_with_a_map_of_single_bytes(regions, gpa, length, before):
    """Regions of a few bytes; the model is a dictionary of address to byte."""
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.write(ram, bytes(range(64)))
    memory = GuestMemory()
    model = {}
    for number, (start, size) in enumerate(regions):
        span = range(start, start + size)
        try:
            memory.add(ram, start, size, UVA, number * 8)
        except FrontendBreach:
            assert any(address in model for address in span)
        else:
            assert not any(address in model for address in span)
            model.update(zip(span, range(number * 8, number * 8 + size), strict=True))
    os.close(ram)
    for address, count in ((before, 1), (gpa, length)):
        wanted = [model.get(address + n) for n in range(count)]
        try:
            got = shows(memory.slices(address, count))
        except GuestBreach:
            assert None in wanted
        else:
            assert list(got) == wanted
    memory.clear()


@pytest.mark.parametrize(
    ("gpa", "size", "uva", "offset", "message"),
    [
        (0, 0, UVA, 0, "region of 0 bytes"),
        (0, -1, UVA, 0, "region of -1 bytes"),
        (2**64 - PAGE, PAGE + 1, UVA, 0, "guest address .* 64 bits"),
        (2**64, PAGE, UVA, 0, "guest address .* 64 bits"),
        (-1, PAGE, UVA, 0, "guest address .* 64 bits"),
        (0, PAGE, 2**64 - PAGE + 1, 0, "user address .* 64 bits"),
        (0, 8 * PAGE + 1, UVA, 0, "the file is smaller"),
        (0, 8 * PAGE, UVA, 1, "the file is smaller"),
        (0, PAGE, UVA, 8 * PAGE, "the file is smaller"),
        (0, PAGE, UVA, 2**63 - PAGE, "no file is so long"),
        (0, PAGE, UVA, 2**64 - 1, "no file is so long"),
        (0, 2**64 - 1, 0, 0, "no file is so long"),
        (0, PAGE, UVA, -1, "no file is so long"),
    ],
)
def test_a_region_no_frontend_shares_is_a_breach(ram, memory, gpa, size, uva, offset, message):
    with pytest.raises(FrontendBreach, match=message):
        memory.add(ram, gpa, size, uva, offset)


def test_a_region_may_end_at_the_end_of_the_address_space(ram, memory):
    memory.add(ram, 2**64 - PAGE, PAGE, 2**64 - PAGE, PAGE)
    assert shows(memory.slices(2**64 - 1, 1)) == b"\1"
    assert shows([memory.contiguous(2**64 - 1, 1)]) == b"\1"
    with pytest.raises(GuestBreach):
        memory.slices(2**64 - 1, 2)


@pytest.mark.parametrize(("gpa", "size"), [(2, 1), (2, 2), (1, 2), (3, 2), (1, 4), (3, 1), (0, 8)])
def test_overlapping_regions_are_a_breach_and_neighbours_are_not(ram, memory, gpa, size):
    memory.add(ram, 2 * PAGE, 2 * PAGE, UVA, 0)
    with pytest.raises(FrontendBreach, match=r"overlaps the memory region of .* at guest address 0x2000"):
        memory.add(ram, gpa * PAGE, size * PAGE, UVA + 16 * PAGE, 0)
    memory.add(ram, 0, 2 * PAGE, UVA + 16 * PAGE, 0)
    memory.add(ram, 4 * PAGE, PAGE, UVA + 32 * PAGE, 0)


def test_what_cannot_be_read_or_mapped_is_a_frontend_breach(memory, ram):
    reader, writer = os.pipe()
    readonly = os.open(f"/proc/self/fd/{ram}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(FrontendBreach, match="cannot be read"):
            memory.add(reader, 0, PAGE, UVA, 0)
        with pytest.raises(FrontendBreach, match=r"cannot be mapped: .*Permission denied"):
            memory.add(readonly, 0, PAGE, UVA, 0)
    finally:
        for fd in (reader, writer, readonly):
            os.close(fd)


def test_a_file_that_shrinks_while_it_is_added_is_a_frontend_breach(memory, ram, monkeypatch):
    def shrink_after(fd, buffers, offset):
        os.ftruncate(fd, PAGE)
        return 1

    monkeypatch.setattr(os, "preadv", shrink_after)
    with pytest.raises(FrontendBreach, match="cannot be mapped"):
        memory.add(ram, 0, 2 * PAGE, UVA, 0)


@pytest.mark.parametrize(
    ("uva", "length"), [(UVA - 1, 2), (UVA + 2 * PAGE, 1), (UVA, 2 * PAGE + 1), (UVA + PAGE, 2**64), (0, 1), (2**64 - 1, 2)]
)
def test_a_ring_outside_every_region_is_a_frontend_breach(ram, memory, uva, length):
    memory.add(ram, 0, 2 * PAGE, UVA, 0)
    memory.add(ram, 2 * PAGE, 2 * PAGE, UVA + 16 * PAGE, 0)
    with pytest.raises(FrontendBreach, match="does not lie in one memory region"):
        memory.contiguous(uva, length)


def test_a_ring_is_found_by_the_frontends_address(ram, memory):
    memory.add(ram, 0, 2 * PAGE, UVA, 0)
    memory.add(ram, 2 * PAGE, 2 * PAGE, UVA + 16 * PAGE, 4 * PAGE)
    with memory.contiguous(UVA + 17 * PAGE, PAGE) as view:
        assert shows([view]) == b"\5" * PAGE


def test_no_region_at_all_says_what_to_add_to_the_command_line():
    with pytest.raises(FrontendBreach, match=r"guest RAM is not shared memory.*memory-backend-memfd.*share=on"):
        GuestMemory().contiguous(UVA, 16)


def test_removing_unmaps_only_that_region(ram, memory):
    memory.add(ram, 0, PAGE, UVA, 0)
    memory.add(ram, PAGE, PAGE, UVA + PAGE, 4 * PAGE)
    memory.slices(0, 1)  # makes it the last used
    memory.remove(0, PAGE, UVA)
    with pytest.raises(GuestBreach):
        memory.slices(0, 1)
    assert shows(memory.slices(PAGE, 1)) == b"\4"
    memory.add(ram, 0, PAGE, UVA, 2 * PAGE)
    assert shows(memory.slices(0, 1)) == b"\2"


@pytest.mark.parametrize("named", [(0, PAGE, UVA + 1), (1, PAGE, UVA), (0, PAGE + 1, UVA)])
def test_removing_what_was_not_added_is_a_frontend_breach(ram, memory, named):
    memory.add(ram, 0, PAGE, UVA, 0)
    with pytest.raises(FrontendBreach, match="there is no memory region"):
        memory.remove(*named)


def test_a_view_in_use_keeps_its_region_mapped_and_is_named(ram, memory):
    memory.add(ram, 0, PAGE, UVA, PAGE)
    memory.add(ram, PAGE, PAGE, UVA + PAGE, 2 * PAGE)
    (kept,) = memory.slices(0, 4)
    with pytest.raises(BufferError, match="at guest address 0x0 cannot be unmapped"):
        memory.remove(0, PAGE, UVA)
    assert shows(memory.slices(0, 4)) == b"\1\1\1\1", "the region is as usable as before"
    with pytest.raises(BufferError, match="at guest address 0x0 cannot be unmapped"):
        memory.clear()
    assert shows([kept]) == b"\1\1\1\1"
    with pytest.raises(GuestBreach):  # the other one is gone
        memory.slices(PAGE, 1)
    kept.release()
    memory.remove(0, PAGE, UVA)


def test_the_syscalls_named_in_the_docstring_are_enough():
    """A process that may make no other; newfstatat answers EPERM, as in the workers' policy."""
    script = textwrap.dedent(f"""
        import os, pyseccomp as sc
        from vfsd.worker.guest_memory import GuestMemory
        fd = os.memfd_create("ram"); os.truncate(fd, 65536)
        memory = GuestMemory()
        rules = sc.SyscallFilter(sc.KILL_PROCESS)
        for name in ("preadv2", "close", "munmap", "exit_group", "brk"):
            rules.add_rule(sc.ALLOW, name)
        rules.add_rule(sc.ALLOW, "fcntl", sc.Arg(1, sc.EQ, {1030}))  # F_DUPFD_CLOEXEC
        rules.add_rule(sc.ALLOW, "mmap", sc.Arg(0, sc.EQ, 0), sc.Arg(2, sc.EQ, 3), sc.Arg(3, sc.EQ, 1))
        rules.add_rule(sc.ERRNO({errno.EPERM}), "newfstatat")
        rules.load()
        memory.add(fd, 0, 8192, 0, 4099)
        view = memory.slices(5, 3)[0]
        view[:] = b"abc"
        del view
        memory.clear()
        os._exit(0)
    """)
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr
