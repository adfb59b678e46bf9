"""For all tests: a known umask, inputs that are the same each time, and which tests run in one process when pytest runs several (`-n`): those that share fixtures."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

SHARED_FOR_LONG = ("servings", "file_system")  # fixtures that serve the tests of one parameter, in all files or in one
UMASK = 0o022


def pytest_configure() -> None:
    os.umask(UMASK)  # tests name modes; whoever starts them may have any
    settings.register_profile("vfsd", deadline=None, derandomize=True, database=None)  # the same inputs each time, however long they take
    settings.load_profile("vfsd")


@pytest.fixture(autouse=True)
def umask_is_left_as_it_was() -> Iterator[None]:
    yield
    assert os.umask(UMASK) == UMASK


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    """A guest's tests are one group, and so are those of a file system; else a file is one."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    shared = next((str(parameters[name]) for name in SHARED_FOR_LONG if name in parameters), "")
    return shared or item.path.name
