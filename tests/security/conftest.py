"""Confined processes, made by the roles' own code and the shipped policy."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.sandbox import Sandbox
from vfsd.sandbox import capabilities
from vfsd.sandbox.census import open_fds
from vfsd.sandbox.seccomp import load_policy

HERE = Path(__file__).parent
_NEEDED = ("SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE", "SETPCAP", "SETUID", "SETGID", "DAC_READ_SEARCH", "MKNOD")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in _NEEDED if not capabilities.may(name)]
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0 or missing:
                item.add_marker(pytest.mark.skip(reason=f"confining processes needs uid 0 and CAP_{', CAP_'.join(missing or _NEEDED)}"))


def _filters(action: str) -> dict[str, int]:
    policy = load_policy()
    fds = {}
    for role in policy.roles:
        fds[role] = os.memfd_create(f"filter-{role}")
        os.write(fds[role], policy.compile(role, action))
    return fds


@pytest.fixture(scope="session")
def filters() -> Iterator[dict[str, dict[str, int]]]:
    made = {action: _filters(action) for action in ("kill", "log", "trap")}
    yield made
    for fds in made.values():
        for fd in fds.values():
            os.close(fd)


@pytest.fixture
def sandbox(filters: dict[str, dict[str, int]]) -> Iterator[Sandbox]:
    before = open_fds(os.getpid())
    yield Sandbox(filters["kill"])
    assert open_fds(os.getpid()) == before
