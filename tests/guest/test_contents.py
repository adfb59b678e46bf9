"""Bytes written on one side are the bytes read on the other."""

import hashlib
import os

import pytest

from tests.guest import probes
from tests.guest.conftest import Share

SIZES = (0, 1, 4095, 4096, 4097, (1 << 20) + 1, 5_000_001)
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02


def test_files_written_in_the_guest_are_on_the_host(share: Share) -> None:
    for size in SIZES:
        share.call(probes.write_pattern, f"{share.inside}/{size}", size)
        assert probes.digest(f"{share.host}/{size}") == hashlib.sha256(probes.pattern(size, 0)).hexdigest()


def test_files_written_on_the_host_are_in_the_guest(share: Share) -> None:
    for size in SIZES:
        probes.write_pattern(f"{share.host}/{size}", size, 7)
        assert share.call(probes.digest, f"{share.inside}/{size}") == hashlib.sha256(probes.pattern(size, 7)).hexdigest()


def test_a_change_in_the_middle_leaves_the_rest_alone(share: Share) -> None:
    probes.write_pattern(f"{share.host}/file", 100_000)
    share.call(probes.patch, f"{share.inside}/file", 50_001, "changed")
    expected = bytearray(probes.pattern(100_000, 0))
    expected[50_001:50_008] = b"changed"
    assert probes.digest(f"{share.host}/file") == hashlib.sha256(expected).hexdigest()
    share.assert_same()


def test_appends_go_to_the_end(share: Share) -> None:
    probes.write_text(f"{share.host}/file", "begin\n")
    for number in range(20):
        share.call(probes.append, f"{share.inside}/file", f"line {number}\n")
    assert probes.read_text(f"{share.host}/file") == "begin\n" + "".join(f"line {number}\n" for number in range(20))


def test_a_host_change_is_seen_when_the_guest_opens_the_file_again(share: Share) -> None:
    probes.write_text(f"{share.host}/file", "first")
    assert share.call(probes.read_text, f"{share.inside}/file") == "first"
    probes.write_text(f"{share.host}/file", "second, and longer")
    if not share.configuration.writeback:  # whatever it may cache: a read makes it ask for the access time, and that tells all
        assert share.call(probes.wait_for, f"{share.inside}/file", "second, and longer", 10) is not None
        return
    # With it the size is the guest's own; pages are its own as long as it may keep them over an open.
    kept = {"always": "first", "auto": "secon", "never": "second, and longer"}[share.configuration.cache]
    assert share.call(probes.read_text, f"{share.inside}/file") == kept
    for _ in range(20):  # an inode that is just being let go of stays
        share.guest.drop_caches()
        if share.call(probes.read_text, f"{share.inside}/file") == "second, and longer":
            return
    pytest.fail("the guest reads what it had cached although it was told to drop it")


def test_truncation_by_name_and_by_descriptor(share: Share) -> None:
    probes.write_pattern(f"{share.host}/file", 10_000)
    share.guest.python("import os; os.truncate(path, 5_000)", path=f"{share.inside}/file")
    assert probes.digest(f"{share.host}/file") == hashlib.sha256(probes.pattern(10_000, 0)[:5_000]).hexdigest()
    assert share.call(probes.truncate_open, f"{share.inside}/file", 20_000) == 20_000
    assert probes.digest(f"{share.host}/file") == hashlib.sha256(probes.pattern(10_000, 0)[:5_000] + bytes(15_000)).hexdigest()
    share.assert_same()


def test_opening_with_truncation_empties_the_file(share: Share) -> None:
    probes.write_pattern(f"{share.host}/file", 10_000)
    share.call(probes.write_text, f"{share.inside}/file", "")
    assert os.path.getsize(f"{share.host}/file") == 0


def test_a_sparse_file_keeps_its_holes_beyond_4_gib(share: Share) -> None:
    share.call(probes.write_text, f"{share.inside}/sparse", "start")
    share.call(probes.patch, f"{share.inside}/sparse", 5 << 30, "far away")
    found = os.stat(f"{share.host}/sparse")
    assert found.st_size == (5 << 30) + 8
    assert found.st_blocks * 512 < 1 << 20
    inside, host = share.both(probes.segments, "sparse")
    assert inside == host
    assert len(host) == 2


def test_fallocate_reserves_and_punches_holes(share: Share) -> None:
    probes.write_pattern(f"{share.host}/file", 1 << 20)
    share.call(probes.fallocate, f"{share.inside}/file", FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 65536, 131072)
    expected = bytearray(probes.pattern(1 << 20, 0))
    expected[65536 : 65536 + 131072] = bytes(131072)
    assert probes.digest(f"{share.host}/file") == hashlib.sha256(expected).hexdigest()
    share.call(probes.fallocate, f"{share.inside}/file", 0, 0, 3 << 20)
    assert os.path.getsize(f"{share.host}/file") == 3 << 20
    inside, host = share.both(probes.segments, "file")
    assert inside == host


def test_copy_file_range_copies(share: Share) -> None:
    probes.write_pattern(f"{share.host}/source", 3_000_000)
    assert share.call(probes.copy_range, f"{share.inside}/source", f"{share.inside}/target", 3_000_000) == 3_000_000
    assert probes.digest(f"{share.host}/target") == probes.digest(f"{share.host}/source")


def test_a_mapped_file_is_read_and_written(share: Share) -> None:
    if not share.maps_shared():
        pytest.skip("without a cache there are no shared mappings")
    size = 2_000_000
    probes.write_pattern(f"{share.host}/file", size)
    assert share.call(probes.digest_mapped, f"{share.inside}/file") == probes.digest(f"{share.host}/file")
    share.call(probes.write_mapped, f"{share.inside}/file", size)
    expected = bytearray(probes.pattern(size, 9))
    expected[size // 2 : size // 2 + 6] = b"mapped"
    assert probes.digest(f"{share.host}/file") == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("size", [4096, 65536, 2 << 20])
def test_direct_io_round_trip(share: Share, size: int) -> None:
    assert share.call(probes.direct_round_trip, f"{share.inside}/file", size) == [size, size, True]
    assert probes.digest(f"{share.host}/file") == hashlib.sha256(probes.pattern(size, 11)).hexdigest()


def test_every_kind_of_sync_succeeds(share: Share) -> None:
    share.call(probes.write_synced, f"{share.inside}/file", 300_000)
    assert probes.digest(f"{share.host}/file") == hashlib.sha256(probes.pattern(300_000, 5) + b"tail").hexdigest()


def test_an_unlinked_open_file_lives_on(share: Share) -> None:
    gone, text, nlink, size, mode = share.call(probes.use_unlinked, f"{share.inside}/file")
    assert (gone, text, nlink, size, mode) == (True, "before aft", 0, 10, "0o100640")
    assert os.listdir(share.host) == []


def test_an_open_file_outlives_a_rename_over_it(share: Share) -> None:
    probes.write_text(f"{share.host}/old", "old contents")
    probes.write_text(f"{share.host}/new", "new contents")
    kept, now, old_exists, nlink = share.call(probes.read_across_rename, f"{share.inside}/new", f"{share.inside}/old")
    assert (kept, now, old_exists) == ("old contents", "new contents", False)
    assert nlink == 0
    assert probes.names(share.host) == ["old"]


def test_a_file_without_a_name_gets_one(share: Share) -> None:
    assert share.call(probes.use_temporary_file, share.inside, "named") == "named late"
    assert probes.read_text(f"{share.host}/named") == "named late"
