"""Several processes of the guest work in the share at once, and nothing of anyone's is lost."""

import os

import pytest

from tests.guest import probes
from tests.guest.conftest import Share

PROCESSES = 6


def test_appends_from_several_processes_are_all_there(share: Share) -> None:
    records = 200
    assert share.call(probes.append_from_several, f"{share.inside}/log", PROCESSES, records) == 0
    lines = probes.read_text(f"{share.host}/log").splitlines()
    assert sorted(lines) == sorted(f"{number:03d} {record:05d}" for number in range(PROCESSES) for record in range(records))


def test_several_processes_write_parts_of_one_file(share: Share) -> None:
    part = 300_000
    assert share.call(probes.write_own_parts, f"{share.inside}/file", PROCESSES, part) == 0
    with open(f"{share.host}/file", "rb") as file:
        assert file.read() == b"".join(probes.pattern(part, number) for number in range(PROCESSES))
    # With write-back a write in the same jiffy as one whose time was sent already sends none: the time is then the host's own.
    if not share.configuration.writeback:
        share.assert_same()


def test_exclusive_creation_has_one_winner_each(share: Share) -> None:
    assert share.call(probes.race_to_create, share.inside, PROCESSES, 100) == 0
    assert len(os.listdir(share.host)) == 100
    assert all(len(probes.read_text(f"{share.host}/{name}")) == 1 for name in os.listdir(share.host))


def test_several_processes_build_and_clear_one_directory(share: Share) -> None:
    assert share.call(probes.build_and_clear, share.inside, PROCESSES, 60) == 0
    assert os.listdir(share.host) == []


def test_a_file_is_found_while_it_is_renamed(share: Share) -> None:
    assert share.call(probes.stat_while_renamed, share.inside, 200) == 0


@pytest.mark.parametrize("lock", ["flock", "lockf"])
def test_locks_keep_processes_apart(share: Share, lock: str) -> None:
    assert share.call(probes.count_under_lock, f"{share.inside}/counter", 4, 25, lock) == [0, "100"]
    assert probes.read_text(f"{share.host}/counter") == "100"
