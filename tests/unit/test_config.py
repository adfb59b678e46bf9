"""What each role is told, and how it gets there."""

import os
from dataclasses import replace

import pytest

from vfsd.config import BrokerConfig, ControlConfig, Features, WorkerConfig, config_memfd, pack_config, read_config, unpack_config
from vfsd.sandbox.lockdown import Confinement

CONFINEMENT = Confinement(
    role="worker",
    sandbox="namespace",
    seccomp_filter=b"\x06\0\0\0",
    uid=65534,
    gid=65534,
    capabilities=("CHOWN", "SETUID"),
    landlock=True,
    nofile=1024,
    supervisor_pidfd=7,
)
COMMON = {"channel_fd": 5, "supervisor_pidfd": 7, "confinement": CONFINEMENT, "sandbox": "namespace", "log_level": 3}
CONFIGS = [
    BrokerConfig(
        **COMMON,
        shared_dir=b"/sr\xff v",
        readonly=True,
        inode_file_handles="prefer",
        announce_submounts=False,
        xattr=True,
        posix_acl=True,
        xattrmap=":map::user.:",
        allow_direct_io=True,
        preserve_noatime=False,
        nofile=20000,
        uid_map=((0, 1000, 1), (1, 100000, 65536)),
        gid_map=(),
        own_uid=0,
        own_gid=1000,
    ),
    ControlConfig(**COMMON, tag=b"my\xfftag", request_queues=4),
    ControlConfig(**COMMON, tag=None, request_queues=1),
    WorkerConfig(**COMMON, index=3, control_fd=8, broker_fd=9, cache="auto", features=Features(posix_acl="auto", flock=False)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_configuration_arrives_as_it_was_written(config):
    assert unpack_config(type(config), pack_config(config)) == config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_reading_closes_the_memfd(config):
    with config_memfd(config) as fd:
        copy = os.dup(fd)
        assert read_config(type(config), copy) == config
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(copy)


def test_a_configuration_with_a_foreign_key_is_a_bug_that_shows():
    with pytest.raises(TypeError):
        unpack_config(ControlConfig, pack_config(CONFIGS[0]))


def test_configurations_cannot_be_changed():
    with pytest.raises(AttributeError):
        CONFIGS[1].request_queues = 2  # type: ignore[misc]
    assert replace(CONFIGS[1], request_queues=2).request_queues == 2
