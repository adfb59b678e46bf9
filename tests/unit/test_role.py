"""How every child ends: with a status, and with a word to its supervisor if it failed."""

import contextlib
import os
import socket

from vfsd.channel import Channel, ChannelClosed
from vfsd.config import ControlConfig
from vfsd.errors import ConfigError
from vfsd.log import ERROR
from vfsd.role import run_role
from vfsd.sandbox.lockdown import Confinement
from vfsd.wire.channel import WORKER_TO_SUPERVISOR, Failed, Log, Ready


def run_in_child(body):
    """The exit status of a process that runs this role, and what it said."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        confinement = Confinement(
            role="control", sandbox="none", seccomp_filter=b"", uid=None, gid=None, capabilities=(), landlock=False, nofile=None, supervisor_pidfd=None
        )  # fmt: skip
        config = ControlConfig(
            channel_fd=theirs.fileno(), supervisor_pidfd=0, confinement=confinement, sandbox="none", log_level=3, tag=None, request_queues=1
        )  # fmt: skip
        pid = os.fork()
        if pid == 0:
            run_role(config, "control", body)
        theirs.close()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        channel, said = Channel(ours, WORKER_TO_SUPERVISOR), []
        with contextlib.suppress(ChannelClosed):
            while True:
                said.append(channel.receive().message)
        return status, said


def test_a_role_that_returns_ends_with_0():
    assert run_in_child(lambda channel, log: channel.send(Ready())) == (0, [Ready()])


def test_what_the_user_can_mend_is_told_as_a_failure():
    def body(channel, log):
        raise ConfigError("sandbox: cannot do it; do that")

    assert run_in_child(body) == (1, [Failed(b"sandbox: cannot do it; do that")])


def test_a_bug_is_logged_with_its_place():
    def body(channel, log):
        {}["missing"]

    status, said = run_in_child(body)
    assert status == 1
    assert isinstance(said[0], Log)
    assert said[0].level == ERROR
    assert said[0].text.startswith(b"bug in control: KeyError at ")


def test_the_end_of_the_supervisor_is_no_error():
    def body(channel, log):
        raise ChannelClosed

    assert run_in_child(body) == (0, [])
