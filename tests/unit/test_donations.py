"""When an inode's descriptor is worth donating, who holds one; and what is learnt about file systems."""

import threading

from vfsd.broker import donations as module
from vfsd.broker import traits as traits_module
from vfsd.broker.donations import NodeDonations
from vfsd.broker.traits import Traits
from vfsd.sandbox import filecalls
from vfsd.wire.broker_messages import TRAIT_FLUSH, TRAIT_SLOW

NFS = 0x6969


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_the_second_question_within_a_second_is_worth_it(monkeypatch):
    clock, donations = Clock(monkeypatch), NodeDonations()
    assert not donations.worthwhile(5)
    clock.now += 0.9
    assert not donations.worthwhile(6)
    assert donations.worthwhile(5)
    clock.now += module.INTEREST_SECONDS
    assert not donations.worthwhile(5)
    clock.now += 0.5
    assert donations.worthwhile(5)


def test_the_memory_of_questions_is_bounded(monkeypatch):
    Clock(monkeypatch)
    donations = NodeDonations()
    for nodeid in range(5000):
        donations.worthwhile(nodeid)
    assert len(donations._asked) <= 4096
    assert donations.worthwhile(4999)
    assert not donations.worthwhile(0), "the oldest was dropped"


def test_holders_are_bits_until_the_inode_is_gone():
    donations = NodeDonations()
    donations.grant(5, 0)
    donations.grant(5, 63)
    donations.grant(6, 1)
    assert len(donations) == 2
    assert donations.forget(5) == 1 | 1 << 63
    assert donations.forget(5) == 0
    assert donations.forget(6) == 2
    assert len(donations) == 0


def test_a_forgotten_inode_was_not_asked_for(monkeypatch):
    Clock(monkeypatch)
    donations = NodeDonations()
    donations.worthwhile(5)
    donations.forget(5)
    assert not donations.worthwhile(5)


def test_grants_of_several_threads_are_all_kept():
    donations = NodeDonations()
    start = threading.Barrier(8)

    def grant(worker):
        start.wait()
        for nodeid in range(100):
            donations.grant(nodeid, worker)

    running = [threading.Thread(target=grant, args=(worker,)) for worker in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(donations.forget(nodeid) == 0xFF for nodeid in range(100))


def test_a_local_file_system_has_no_traits_and_is_asked_once(tmp_path, monkeypatch):
    traits = Traits()
    with open(tmp_path / "file", "w", encoding="ascii") as file:
        assert traits.of(file.fileno(), 1, 2) == 0
        monkeypatch.setattr(filecalls, "file_system_type", lambda _fd: NFS)
        assert traits.of(file.fileno(), 1, 2) == 0
        assert traits.of(file.fileno(), 1, 3) == TRAIT_FLUSH | TRAIT_SLOW, "another device is another file system"


def test_what_is_known_of_mounts_is_bounded(monkeypatch):
    monkeypatch.setattr(filecalls, "file_system_type", lambda _fd: NFS)
    traits = Traits()
    for mount in range(2 * traits_module._MOST_MOUNTS):
        assert traits.of(0, mount, 1) == TRAIT_FLUSH | TRAIT_SLOW
    assert len(traits._known) <= traits_module._MOST_MOUNTS
