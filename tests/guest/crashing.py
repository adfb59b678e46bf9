"""The integrity workload in a guest while workers are killed twice a second, and the look at what became of it, on both sides."""

from tests.guest import integrity
from tests.support.guest.daemons import VfsdDaemon
from tests.support.guest.guest import Guest
from tests.support.killer import Killer

PROCESSES = 4
SEED = 20


def work_and_kill(guest: Guest, daemon: VfsdDaemon, inside: str, outside: str, seconds: int) -> Killer:
    """In a directory that does not exist yet. What the programs do follows from the seed, as do the moments of the kills; what a
    worker is at then depends on the machine, so each run tries others.
    """
    killer = Killer(daemon.processes, SEED)
    with killer.at_work():
        report = guest.call(integrity.run, inside, SEED, PROCESSES, seconds, timeout=seconds + 120)
    assert report["failures"] == []
    guest.drop_caches()
    assert guest.call(integrity.differences, inside, PROCESSES, timeout=300) == []
    assert integrity.compare(integrity.survey(outside), guest.call(integrity.expected, PROCESSES)) == []
    assert killer.kills
    return killer
