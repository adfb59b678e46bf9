"""A short run of the load that `make soak REQUESTS=` makes long: every answer as it must be, and nothing left behind."""

from tests.support.frontend.checks import eventually, eventually_stable
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import ROOT
from tools.soak_requests import MIX, ForgetLane, QueueLoad, make_files

ROUNDS = 12
QUEUES = 2


def test_a_busy_guests_requests_are_answered_and_leave_nothing_behind(serve):
    served = serve(Options(request_queues=QUEUES), queues=QUEUES + 1)
    make_files(served.share, QUEUES)
    client = served.client
    client.list(ROOT, plus=True)
    served.new_session()
    before = eventually_stable(served.daemon.fd_census)
    loads = [QueueLoad(served.device, client, queue, seed=queue) for queue in range(1, QUEUES + 1)]
    hiprio = ForgetLane(served.device)
    for _ in range(ROUNDS):
        for load in loads:
            load.begin()
        for load in loads:
            assert load.finish() == sum(MIX.values())
            hiprio.forget(load.forgets, load.listed)
    hiprio.lane.finish()
    client.queue = 1
    served.new_session()
    assert eventually(lambda: served.daemon.fd_census() == before)
    assert served.unexpected_log() == []
