"""Real daemons and in-process frontends: one running vfsd per configuration, shared by tests, with a fresh FUSE session for each."""

import os
from pathlib import Path

import pytest

from tests.support.frontend.daemon import Daemon, Options
from tests.support.frontend.device import Device
from tests.support.frontend.serving import Pool, own_directory, start

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if os.geteuid() != 0:
        skip = pytest.mark.skip(reason="vfsd's sandbox and file handles need uid 0")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    pool = Pool(lambda: tmp_path_factory.mktemp("vfsd"))
    yield pool
    pool.close()


@pytest.fixture(params=["never", "prefer", "mandatory"])
def handles(request):
    return request.param


@pytest.fixture
def fs(pool, handles):
    """A directory in a share served with each way of keeping inodes."""
    with own_directory(pool, "functions", Options(handles=handles)) as fs:
        yield fs


@pytest.fixture
def plain_fs(pool):
    """A directory in a share, where the way of keeping inodes cannot matter."""
    with own_directory(pool, "functions", Options()) as fs:
        yield fs


@pytest.fixture
def serve(tmp_path):
    """Start daemons of the test's own; arguments as for start()."""
    served = []

    def serve(options=None, **how):
        folder = tmp_path / f"daemon-{len(served)}"
        folder.mkdir()
        served.append(start(folder, options, **how))
        return served[-1]

    yield serve
    for one in served:
        print(one.daemon.describe())
        one.close()


@pytest.fixture
def unattached(tmp_path):
    """Start a daemon and connect, but send no vhost-user message yet; arguments for Device."""
    made = []

    def unattached(options=None, **device_options):
        (tmp_path / "share").mkdir()
        daemon = Daemon(tmp_path / "share", tmp_path / "vfsd.sock", options)
        made.append(daemon)
        device = Device(str(daemon.socket), **device_options)
        made.append(device)
        return daemon, device

    yield unattached
    for one in reversed(made):
        if isinstance(one, Daemon):
            print(one.describe())
            one.stop()
        else:
            one.close()
