"""One daemon and one booted guest serve all tests of a configuration (configurations.py); each test works in a directory of its own.

pytest runs the tests of a configuration together, in random order, and ends its daemon and guest before the next begins.

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
from tests.guest.configurations import FULL, KINDS, Configuration, configurations, extra_options
from tests.support.guest.daemons import Daemon, daemon_under_test
from tests.support.guest.guest import Guest

SETTLE_SECONDS = 15.0
collect_ignore = [] if FULL else ["test_systemd.py", "test_crashes_of_queues.py"]  # guests of their own, and minutes


def pytest_report_header() -> str:
    return f"guest tests: daemon {daemon_under_test().name} {' '.join(extra_options())}{', full sizes' if FULL else ''}"


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

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        with ExitStack() as stack:
            # not below pytest's own temporary directory: that may be a tmpfs, which has no file handles worth testing
            self.host = tempfile.mkdtemp(prefix="share-", dir="/var/tmp")
            stack.callback(shutil.rmtree, self.host, ignore_errors=True)
            os.chmod(self.host, 0o755)
            self.daemon: Daemon = stack.enter_context(daemon_under_test()(self.host, options=configuration.options))
            self.guest: Guest = stack.enter_context(KINDS[configuration.kind]([self.daemon.socket]))
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
        self.configuration = serving.configuration
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
        if self.configuration.writeback:  # times are the guest's own until it has written them
            self.guest.drop_caches()
        if self.call(probes.survey_digest, inside, timeout=600) != probes.survey_digest(host):
            assert self.call(probes.survey, inside, timeout=600) == probes.survey(host)

    def maps_shared(self) -> bool:
        """Whether a file can be mapped to be shared: without a cache only where kernel and option allow it."""
        allowed = "--allow-mmap" in self.configuration.options and self.guest.kernel >= (6, 6)
        return self.configuration.cache != "never" or allowed

    def size(self, full: int, everyday: int, everyday_once: int | None = None) -> int:
        """How much of something: all of it in one configuration of a full run, more than a little in one of an everyday run."""
        if self.configuration.number > 0:
            return everyday
        return full if FULL else everyday_once or full


class Servings:
    """What serves a configuration, started when first needed, and again after a test broke it."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self._running: Serving | None = None

    def usable(self) -> Serving:
        if self._running is not None and not self._running.usable():
            self.close()
        if self._running is None:
            self._running = Serving(self.configuration)
        return self._running

    def close(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()


def _parameter(configuration: Configuration) -> Any:
    return pytest.param(configuration, id=str(configuration), marks=getattr(pytest.mark, configuration.kind.partition("-")[0]))


@pytest.fixture(scope="session", params=[_parameter(configuration) for configuration in configurations()])
def servings(request: pytest.FixtureRequest) -> Iterator[Servings]:
    servings = Servings(request.param)
    yield servings
    servings.close()


@pytest.fixture
def serving(servings: Servings) -> Serving:
    return servings.usable()


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
