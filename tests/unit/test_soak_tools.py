"""What the soak, the crash demo and the guest's integrity test judge by: each of them sees what it is there to see."""

import os

import pytest

from tests.guest import integrity
from tests.support.killer import Table, quantile
from tools.process_samples import SLACK, Holding, Sample, figure, growth
from vfsd.fds import OwnedFd
from vfsd.wire.inflight import TABLE_BYTES
from vfsd.worker.inflight_memory import MappedTable

PROCESSES = 2


@pytest.fixture
def worked(tmp_path, monkeypatch):
    """A directory in which the integrity workload was, on the host's own file system."""
    monkeypatch.setattr(integrity, "REPORTS", str(tmp_path / "report"))
    root = str(tmp_path / "work")
    assert integrity.run(root, 7, PROCESSES, 0, least=150)["failures"] == []
    assert integrity.differences(root, PROCESSES) == []
    return root


def flip_a_byte(root):
    name = next(name for name, what in sorted(integrity.survey(root).items()) if what[0] == "file" and what[3])
    with open(f"{root}/{name}", "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))


def append_twice(root):
    with open(f"{root}/p0/log", "r+b") as file:
        last = file.readlines()[-1]
        file.write(last)


def make_a_name(root):
    os.mkdir(f"{root}/p1/twice")


def lose_an_increment(root):
    with open(f"{root}/shared/flock", "r+b") as file:
        number = int(file.read())
        file.seek(0)
        file.write(b"%019d" % (number + 1))


def link_once_more(root):
    os.link(f"{root}/p0/log", f"{root}/elsewhere")


@pytest.mark.parametrize("harm", [flip_a_byte, append_twice, make_a_name, lose_an_increment, link_once_more])
def test_the_workload_sees_what_is_lost_or_done_twice(worked, harm):
    harm(worked)
    assert integrity.differences(worked, PROCESSES)


def test_the_workload_sees_that_a_name_was_won_twice(worked, monkeypatch):
    reports = integrity.reports(PROCESSES)
    for report in reports:
        report["won"] = ["claim-1"]
    monkeypatch.setattr(integrity, "reports", lambda _processes: reports)
    assert any("won twice" in line for line in integrity.differences(worked, PROCESSES))


def test_the_killer_sees_what_is_in_flight_and_what_is_being_run_again():
    with OwnedFd(os.memfd_create("table")) as fd:
        os.ftruncate(fd.fileno(), TABLE_BYTES)
        written = MappedTable(fd.fileno())
        seen = Table(f"/proc/self/fd/{fd.fileno()}")
        written.begin(1, 64, 5, 5)
        written.take(3, 100)
        written.take(63, 101)
        assert (seen.used_idx, seen.in_flight, seen.run_twice) == (5, 2, False)
        written.count_death(63)
        assert seen.run_twice
        written.link([63])
        written.clear([63], 6)
        assert (seen.used_idx, seen.in_flight, seen.run_twice) == (6, 1, False)
        seen.close()
        written.close()


def samples(kib=lambda _number: 1000, fds=lambda _number: 10):
    return [Sample(number, number * 100, {"broker": Holding(kib(number), fds(number), 2)}) for number in range(40)]


def test_a_flat_run_is_flat_and_a_leak_is_growth():
    assert not any(change.grew for change in growth(samples()))
    leaks = growth(samples(fds=lambda number: 10 + number))
    assert [change.what for change in leaks if change.grew] == ["fds"]
    leaks = growth(samples(kib=lambda number: 1000 + number * SLACK["KiB"] / 20))
    assert [change.what for change in leaks if change.grew] == ["KiB"]


def test_too_few_samples_are_no_verdict():
    with pytest.raises(ValueError, match="too few"):
        growth(samples()[:3])


def test_the_figure_begins_and_ends_with_the_run():
    lines = figure(samples(), rows=4).splitlines()
    assert "| 0 " in lines[2]
    assert "| 3,900 " in lines[-1]


def test_quantiles():
    assert [quantile([1, 2, 3, 4], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 3, 4, 4]
