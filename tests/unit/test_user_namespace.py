"""What is said when a user namespace, or the programs that fill its map, cannot be had. That it works is for other tests."""

import errno
import os

import pytest

from vfsd.errors import ConfigError
from vfsd.sandbox import user_namespace as module
from vfsd.sandbox.id_maps import IdRange
from vfsd.sandbox.user_namespace import enter_user_namespace, read_standing


@pytest.mark.parametrize(
    ("switches", "number", "said"),
    [
        ({"/proc/sys/kernel/unprivileged_userns_clone": "0"}, errno.EPERM, "kernel.unprivileged_userns_clone is 0"),
        ({"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, errno.EPERM, "AppArmor restricts them"),
        ({"/proc/sys/user/max_user_namespaces": "0"}, errno.ENOSPC, "user.max_user_namespaces is 0"),
        ({}, errno.ENOSPC, "user.max_user_namespaces) is reached"),
        ({}, errno.EINVAL, "this kernel has no user namespaces"),
        ({}, errno.EPERM, "a container's seccomp profile?"),
    ],
)
def test_what_forbids_a_user_namespace_is_named_and_the_remedy(monkeypatch, switches, number, said):
    def refuse(_flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "_read", switches.get)
    monkeypatch.setattr(module.syscalls, "unshare", refuse)
    with pytest.raises(ConfigError) as refused:
        enter_user_namespace((), ())
    text = str(refused.value)
    assert text.startswith("--sandbox=namespace: ")
    assert said in text
    assert errno.errorcode[number] in text
    assert "--sandbox=none" in text


@pytest.mark.parametrize("kind", ["uid", "gid"])
def test_the_program_that_is_missing_is_named(monkeypatch, kind):
    monkeypatch.setattr(module.shutil, "which", lambda *_, **__: None)
    ranges = (IdRange(0, 100000, 10),)
    with pytest.raises(ConfigError, match=f"--{kind}-map: the program new{kind}map.*not found; install it \\(package uidmap"):
        enter_user_namespace(ranges if kind == "uid" else (), ranges if kind == "gid" else ())


def test_who_we_are_is_read_from_the_kernel():
    standing = read_standing()
    assert standing.own_uid == os.geteuid()
    assert sum(each.size for each in standing.uid_map) >= 1
