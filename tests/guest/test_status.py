"""A vfsd that serves a real kernel: each process, thread and descriptor is as docs/census.md says, whatever the frontend handed over."""

import pytest

from tests.guest import probes
from tests.guest.conftest import Share
from tests.support.guest.daemons import daemon_under_test
from vfsd.tools.daemon import examine, find_supervisor
from vfsd.tools.expectations import judge


@pytest.mark.skipif(daemon_under_test().name != "vfsd", reason="only vfsd has a census")
def test_all_is_as_expected_while_a_guest_uses_the_share(share: Share) -> None:
    share.call(probes.write_pattern, f"{share.inside}/file", 100_000)
    daemon = examine(find_supervisor(share.serving.daemon.socket))
    found = [(subject.process.name, finding) for subject, findings in judge(daemon) for finding in findings]
    assert [(name, each.expectation.what, each.seen) for name, each in found if each.state != "met"] == []
    assert "the guest's memory" in {purpose for subject, _ in judge(daemon) for purpose in (subject.purposes or {}).values()}
