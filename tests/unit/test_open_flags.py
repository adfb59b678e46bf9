"""Whose operations take set-id bits away, by request flag or by caller."""

import os

import pytest

from vfsd.wire import fuse_abi as abi
from vfsd.worker.open_flags import host_open_flags, kills_set_id, kills_set_id_unsaid

ROOT, USER, UNKNOWN = 0, 1000, 0xFFFFFFFF


class Fs:
    def __init__(self, agreed=0):
        self._agreed = agreed

    def agreed(self, flag):
        return bool(self._agreed & flag)


class From:
    def __init__(self, uid):
        self.uid = uid


@pytest.mark.parametrize("uid", [ROOT, USER, UNKNOWN])
@pytest.mark.parametrize("flagged", [0, 4])
def test_with_killpriv_the_requests_flag_decides(uid, flagged):
    assert kills_set_id(Fs(abi.FUSE_HANDLE_KILLPRIV_V2), From(uid), flagged) == int(flagged != 0)


@pytest.mark.parametrize(("uid", "kills"), [(ROOT, 0), (USER, 1), (UNKNOWN, 0)])
def test_without_it_only_who_is_known_not_to_be_root_kills(uid, kills):
    """The guest's kernel takes the bits away at the write that follows, if it must."""
    assert kills_set_id(Fs(), From(uid), 4) == kills
    assert kills_set_id_unsaid(Fs(), From(uid)) == kills


@pytest.mark.parametrize(("uid", "kills"), [(ROOT, 0), (USER, 1), (UNKNOWN, 1)])
def test_with_killpriv_an_operation_without_a_flag_kills_for_all_but_root(uid, kills):
    assert kills_set_id_unsaid(Fs(abi.FUSE_HANDLE_KILLPRIV_V2), From(uid)) == kills


def test_the_write_back_cache_reads_what_it_writes():
    cached, plain = Fs(abi.FUSE_WRITEBACK_CACHE), Fs()
    assert host_open_flags(cached, os.O_WRONLY | os.O_TRUNC) == os.O_RDWR | os.O_TRUNC
    assert host_open_flags(plain, os.O_WRONLY | os.O_CLOEXEC) == os.O_WRONLY
    assert host_open_flags(cached, os.O_RDONLY) == os.O_RDONLY
