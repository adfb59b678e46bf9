"""Workers are killed while programs work in the share: they see no error, no byte is lost, nothing is done twice."""

import pytest

from tests.guest.conftest import Share
from tests.guest.crashing import work_and_kill
from tests.support.guest.daemons import VfsdDaemon, daemon_under_test

pytestmark = pytest.mark.skipif(daemon_under_test() is not VfsdDaemon, reason="no other daemon survives its own crash")


@pytest.mark.timeout(600)
def test_nothing_is_lost_while_workers_die(share: Share) -> None:
    daemon = share.serving.daemon
    assert isinstance(daemon, VfsdDaemon)
    work_and_kill(share.guest, daemon, f"{share.inside}/work", f"{share.host}/work", share.size(120, 6, 20))
