"""One daemon and one booted guest of each kind serve the whole run; each test works in a directory of its own.

After every test the guest drops its caches, and the process that keeps the inodes must hold as many descriptors as before.
`VFSD_TEST_DAEMON=rust|c` runs the same tests against another daemon, `VFSD_TEST_DAEMON_OPTIONS` adds options,
`VFSD_TEST_FULL=1` (`make test-all`) uses full sizes everywhere.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.guest import probes
from tests.support.guest.daemons import Daemon, daemon_under_test
from tests.support.guest.guest import Guest, QemuGuest, UmlGuest

KINDS: dict[str, type[Guest]] = {"uml": UmlGuest, "qemu": QemuGuest}
FULL = os.environ.get("VFSD_TEST_FULL") == "1"
SETTLE_SECONDS = 15.0


def pytest_report_header() -> str:
    return f"guest tests: daemon {daemon_under_test().name} {' '.join(daemon_options())}{', full sizes' if FULL else ''}"


def daemon_options() -> list[str]:
    return os.environ.get("VFSD_TEST_DAEMON_OPTIONS", "").split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here boots a guest, and every daemon needs root to confine itself."""
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="daemons confine themselves with privileges that only root has"))


class Serving:
    """A daemon, a guest that has mounted its share at /mnt, and the share's directory on the host."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        with ExitStack() as stack:
            # not below pytest's own temporary directory: that may be a tmpfs, which has no file handles worth testing
            self.host = tempfile.mkdtemp(prefix="share-", dir="/var/tmp")
            stack.callback(shutil.rmtree, self.host, ignore_errors=True)
            os.chmod(self.host, 0o755)
            self.daemon: Daemon = stack.enter_context(daemon_under_test()(self.host, options=daemon_options()))
            self.guest: Guest = stack.enter_context(KINDS[kind]([self.daemon.socket]))
            self.guest.daemon_ended = self.daemon.ended
            self.guest.mount()
            self._stack = stack.pop_all()
        self._settled = -1

    def usable(self) -> bool:
        return self.guest.alive() and self.daemon.ended() is None

    def close(self) -> None:
        self._stack.close()

    def fd_count(self) -> int:
        """Descriptors in the process that keeps the inodes, once the guest has forgotten what it does not use."""
        self.guest.drop_caches()
        return self.daemon.fd_count()

    def assert_fd_count(self, before: int) -> None:
        """FORGET and RELEASE have no answer, so the daemon may need a moment after the guest is done."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (now := self.fd_count()) != before and time.monotonic() < deadline:
            time.sleep(0.2)
        assert now == before, "the daemon keeps descriptors of files that the guest has forgotten"


class Share:
    """One test's directory, by its name on the host and in the guest."""

    def __init__(self, serving: Serving, name: str) -> None:
        self.serving = serving
        self.kind = serving.kind
        self.guest = serving.guest
        self.host = f"{serving.host}/{name}"
        self.inside = f"/mnt/{name}"

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> Any:
        """Runs a function of probes.py in the guest."""
        return self.guest.call(function, *arguments, timeout=timeout)

    def both(self, function: Callable[..., Any], name: str, *arguments: Any) -> tuple[Any, Any]:
        """What a probe says of one name: in the guest, and on the host."""
        return self.call(function, f"{self.inside}/{name}", *arguments), function(f"{self.host}/{name}", *arguments)

    def assert_same(self, name: str = "") -> None:
        """The guest sees below this name what the host has: names, types, metadata, link targets, contents."""
        inside, host = f"{self.inside}/{name}", f"{self.host}/{name}"
        if self.call(probes.survey_digest, inside, timeout=600) != probes.survey_digest(host):
            assert self.call(probes.survey, inside, timeout=600) == probes.survey(host)

    def full(self, value: int, everyday_in_qemu: int, everyday_in_uml: int | None = None) -> int:
        """A size that a guest takes minutes for is reduced in everyday runs: QEMU has no KVM here, User-Mode Linux is faster."""
        if FULL:
            return value
        return everyday_in_qemu if self.kind != "uml" else everyday_in_uml or value


@pytest.fixture(scope="session")
def servings() -> Iterator[dict[str, Serving]]:
    started: dict[str, Serving] = {}
    yield started
    with ExitStack() as stack:
        for serving in started.values():
            stack.callback(serving.close)


@pytest.fixture(params=[pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in KINDS])
def serving(request: pytest.FixtureRequest, servings: dict[str, Serving]) -> Serving:
    kind = request.param
    if kind in servings and not servings[kind].usable():
        servings.pop(kind).close()
    if kind not in servings:
        servings[kind] = Serving(kind)
    return servings[kind]


@pytest.fixture
def share(serving: Serving, request: pytest.FixtureRequest) -> Iterator[Share]:
    logged_before = len(serving.daemon.log())
    fds_before = serving.fd_count()
    name = re.sub(r"\W+", "-", request.node.name)[:80] + f"-{time.monotonic_ns()}"
    share = Share(serving, name)
    os.mkdir(share.host)
    yield share
    if serving.usable():
        share.call(probes.remove_trees, share.inside, "/tmp/tree", timeout=600)
        serving.assert_fd_count(fds_before)
        assert "ERROR" not in serving.daemon.log()[logged_before:]
    shutil.rmtree(share.host, ignore_errors=True)
