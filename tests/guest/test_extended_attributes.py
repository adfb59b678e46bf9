"""Extended attributes and ACLs with a real kernel's INIT, its checks of permissions, and its own words for what it asks."""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest import probes
from tests.guest.configurations import FULL, KINDS, extra_options
from tests.support.guest.daemons import VfsdDaemon
from tests.support.guest.guest import Guest, UmlGuest

GUESTS = [pytest.param(kind, marks=getattr(pytest.mark, kind.partition("-")[0])) for kind in KINDS if FULL or kind != "qemu"]
RULES = """
    :prefix:all:trusted.:user.virtiofs.: :bad:server::trusted.:
    :prefix:all:security.:user.virtiofs.: :bad:server::security.:
    :ok:all:::
"""
OPTIONS = ["--posix-acl", "--security-label=auto", f"--xattrmap={RULES}"]
USER = 1000
ACL_HEADER, ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
USER_OBJ, NAMED_USER, GROUP_OBJ, MASK, OTHER = 1, 2, 4, 0x10, 0x20
NO_ID = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> str:
    return (ACL_HEADER.pack(2) + b"".join(ACL_ENTRY.pack(*entry) for entry in entries)).hex()


def private_but_for(uid: int, permissions: int, owner: int = 7) -> str:
    return acl(
        (USER_OBJ, owner, NO_ID), (NAMED_USER, permissions, uid), (GROUP_OBJ, 0, NO_ID), (MASK, permissions, NO_ID), (OTHER, 0, NO_ID)
    )


@pytest.fixture(scope="module", params=GUESTS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guest, Path]]:
    host = tmp_path_factory.mktemp("share")
    host.chmod(0o755)
    with ExitStack() as stack:
        daemon = stack.enter_context(VfsdDaemon(str(host), options=[*extra_options(), *OPTIONS]))
        guest = stack.enter_context(KINDS[request.param]([daemon.socket]))
        guest.daemon_ended = daemon.ended
        guest.mount()
        yield guest, host
        assert "ERROR" not in daemon.log()


def test_attributes_of_every_namespace_that_the_rules_let_through(served: tuple[Guest, Path]) -> None:
    guest, host = served
    (host / "file").touch()
    large = os.urandom(3000).hex()
    guest.call(probes.set_xattr, "/mnt/file", "user.large", large)
    guest.call(probes.set_xattr, "/mnt/file", "trusted.overlay.opaque", b"y".hex())
    assert guest.call(probes.xattrs, "/mnt/file") == {"user.large": large, "trusted.overlay.opaque": b"y".hex()}
    assert probes.xattrs(host / "file") == {"user.large": large, "user.virtiofs.trusted.overlay.opaque": b"y".hex()}
    guest.call(probes.remove_xattr, "/mnt/file", "user.large")
    assert list(probes.xattrs(host / "file")) == ["user.virtiofs.trusted.overlay.opaque"]


def test_an_acl_set_by_the_guest_is_the_hosts_and_decides_in_the_guest(served: tuple[Guest, Path]) -> None:
    guest, host = served
    (host / "secret").write_text("content")
    os.chmod(host / "secret", 0o600)
    read = ("read_text", "/mnt/secret")
    assert guest.call(probes.as_user, USER, USER, [], *read) == "PermissionError EACCES"
    guest.call(probes.set_xattr, "/mnt/secret", "system.posix_acl_access", private_but_for(USER, 4))
    assert probes.xattrs(host / "secret") == {"system.posix_acl_access": private_but_for(USER, 4)}
    assert guest.call(probes.as_user, USER, USER, [], *read) == "'content'"
    assert guest.call(probes.as_user, USER + 1, USER, [], *read) == "PermissionError EACCES"


def test_a_default_acl_is_inherited_instead_of_the_umask(served: tuple[Guest, Path]) -> None:
    guest, host = served
    (host / "directory").mkdir()
    os.chmod(host / "directory", 0o777)
    guest.call(probes.as_user, USER, USER, [], "create_with_umask", "/mnt/directory/without", 0o027, 0o666)
    assert stat.S_IMODE((host / "directory" / "without").stat().st_mode) == 0o640
    guest.call(probes.set_xattr, "/mnt/directory", "system.posix_acl_default", private_but_for(USER, 6))
    guest.call(probes.as_user, USER, USER, [], "create_with_umask", "/mnt/directory/with", 0o077, 0o666)
    assert stat.S_IMODE((host / "directory" / "with").stat().st_mode) == 0o660
    assert stat.S_IMODE((host / "directory" / "with-directory").stat().st_mode) == 0o660
    inherited = probes.xattrs(host / "directory" / "with-directory")
    assert inherited["system.posix_acl_default"] == private_but_for(USER, 6)
    assert inherited["system.posix_acl_access"] == private_but_for(USER, 6, owner=6)


def test_a_new_file_has_the_label_that_the_guests_kernel_gives_it(served: tuple[Guest, Path]) -> None:
    """Debian's User-Mode Linux has SELinux, with no policy loaded; the other guest's kernel gives none."""
    guest, host = served
    (host / "labels").mkdir(mode=0o777)
    (host / "labels").chmod(0o777)
    guest.call(probes.as_user, USER, USER, [], "create_with_umask", "/mnt/labels/new", 0o022, 0o777)
    for name in ("new", "new-directory"):
        label = probes.xattrs(host / "labels" / name).get("user.virtiofs.security.selinux")
        assert label == (b"unlabeled\0".hex() if isinstance(guest, UmlGuest) else None)
        assert (host / "labels" / name).stat().st_uid == USER


@pytest.mark.parametrize(("groups", "kept"), [([2000], True), ([], False)])
def test_property_37_the_set_group_id_bit_goes_where_the_caller_is_not_in_the_group(
    served: tuple[Guest, Path], groups: list[int], kept: bool
) -> None:
    guest, host = served
    path = host / f"sgid-{kept}"
    path.touch()
    os.chown(path, USER, 2000)
    os.chmod(path, 0o2770)
    set_acl = ("set_xattr", f"/mnt/{path.name}", "system.posix_acl_access", private_but_for(5, 7))
    assert guest.call(probes.as_user, USER, USER, groups, *set_acl) == "None"
    assert bool(path.stat().st_mode & stat.S_ISGID) == kept
    assert probes.xattrs(path) == {"system.posix_acl_access": private_but_for(5, 7)}
