"""Whose files are made for users whose ids cannot be set."""

import pytest

from vfsd.broker.id_squash import IdSquash

LIBVIRT = ((0, 1000, 1), (1, 100000, 65536))  # as it comes out of a configuration: plain tuples


class Log:
    def __init__(self):
        self.warnings = []

    def warning(self, text):
        self.warnings.append(text)


@pytest.fixture
def log():
    return Log()


def test_what_is_mapped_is_left_alone_and_nothing_is_said(log):
    squash = IdSquash((0, 0), LIBVIRT, LIBVIRT, log)
    for ids in ((0, 0), (1, 65536), (65536, 1)):
        assert squash.settable(*ids) == ids
    assert log.warnings == []


def test_each_id_that_is_not_mapped_becomes_our_own_and_one_line_says_so(log):
    squash = IdSquash((0, 7), LIBVIRT, ((7, 7, 1),), log)
    assert squash.settable(70000, 7) == (0, 7)
    assert squash.settable(5, 70000) == (5, 7)
    assert squash.settable(70000, 0) == (0, 7)
    (line,) = log.warnings
    assert "uid 70000, gid 7 of the guest cannot be set here" in line
    assert "belongs to uid 0, gid 7" in line
    assert "--uid-map" in line


def test_without_a_map_there_is_nobody_but_ourselves(log):
    squash = IdSquash((1000, 1001), (), (), log)
    assert squash.settable(1000, 1001) == (1000, 1001)
    assert log.warnings == []
    assert squash.settable(0, 0) == (1000, 1001)
    assert len(log.warnings) == 1
