"""Set-id bits of files that are open for writing: what the broker puts back, and what it does not."""

import os
import stat
import threading

import pytest

from vfsd.broker.set_id_bits import SetIdBits

NODEID = 5


@pytest.fixture
def bits():
    bits = SetIdBits()
    yield bits
    assert len(bits) == 0, "a record was left"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.fixture
def fd(file):
    fd = os.open(file, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def restore(bits, fd):
    proc = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    yield lambda asked: bits.restore(NODEID, fd, asked, proc)
    os.close(proc)


@pytest.fixture
def opened(bits):
    """The file is open for writing."""
    bits.hold(NODEID)
    yield
    bits.let_go(NODEID)


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def strip(file):
    """As the kernel at a write of nobody's."""
    file.chmod(mode(file) & ~0o6000)


@pytest.mark.parametrize(("asked", "restored"), [(0o6000, 0o6755), (0o4000, 0o4755), (0, 0o755), (0o177777, 0o6755)])
def test_what_was_seen_and_is_asked_for_comes_back_and_nothing_else(bits, file, fd, restore, opened, asked, restored):
    file.chmod(0o6755)
    bits.learn(NODEID, fd)
    strip(file)
    restore(asked)
    assert oct(mode(file)) == oct(restored)


def test_bits_that_were_never_seen_are_not_set(bits, file, fd, restore, opened):
    file.chmod(0o755)
    bits.learn(NODEID, fd)
    restore(0o6000)
    assert mode(file) == 0o755


def test_a_file_that_is_opened_while_its_bits_are_away_keeps_them(bits, file, fd, restore, opened):
    file.chmod(0o4755)
    bits.learn(NODEID, fd)
    strip(file)
    bits.learn(NODEID, fd)
    restore(0o4000)
    assert mode(file) == 0o4755


def test_bits_that_were_taken_away_meanwhile_do_not_come_back(bits, file, fd, restore, opened):
    file.chmod(0o6755)
    bits.learn(NODEID, fd)
    strip(file)
    with bits.changing(NODEID) as record:
        record.known &= ~stat.S_ISUID
    restore(0o6000)
    assert mode(file) == 0o2755


def test_nothing_is_remembered_of_a_file_that_is_closed(bits, file, fd, restore):
    file.chmod(0o6755)
    bits.learn(NODEID, fd)
    strip(file)
    restore(0o6000)
    assert mode(file) == 0o755


def test_a_record_lasts_as_long_as_its_last_opener(bits, file, fd, restore, opened):
    file.chmod(0o4755)
    bits.hold(NODEID)
    bits.learn(NODEID, fd)
    bits.let_go(NODEID)
    strip(file)
    restore(0o4000)
    assert mode(file) == 0o4755


def test_putting_back_waits_for_a_change_of_mode_and_then_leaves_it_alone(bits, file, fd, restore, opened):
    """chmod(2) sets all bits: the permissions that were read before the change must not be written after it."""
    file.chmod(0o4755)
    bits.learn(NODEID, fd)
    strip(file)
    thread = threading.Thread(target=restore, args=(0o4000,))
    with bits.changing(NODEID) as record:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        file.chmod(0o600)
        record.known = 0
    thread.join()
    assert mode(file) == 0o600
