"""For all tests: what shares a guest or a module's fixtures runs in one process, when pytest runs several (`-n`)."""

import pytest

SHARED_FOR_LONG = ("servings", "file_system")  # fixtures that serve the tests of one parameter, in all files or in one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    """A guest's tests are one group, and so are those of a file system; else a file is one."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    shared = next((str(parameters[name]) for name in SHARED_FOR_LONG if name in parameters), "")
    return shared or item.path.name
