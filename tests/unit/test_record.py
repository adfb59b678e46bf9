"""What the supervisor keeps of its processes, and how vfsdctl finds it, or does without."""

import os
from dataclasses import replace

import pytest

from vfsd.cli import parse_options
from vfsd.errors import ConfigError
from vfsd.record import Counts, Record, Report, in_force, read_record
from vfsd.roles import more_capabilities
from vfsd.sandbox.census import take_census
from vfsd.tools import daemon

REPORT = Report(role="worker 0", securebits=239, landlock=7, dumpable=False)


def options(*argv):
    return parse_options(["--shared-dir=/srv/share", "--socket-path=/run/vm.sock", *argv])


def read_own():
    return daemon._read_record(os.getpid())


def test_what_was_entered_is_found_among_the_descriptors():
    assert read_own() is None
    with Record(options("--sandbox=chroot")) as record:
        record.enter(10, replace(REPORT, role="broker"))
        record.enter(12345678, REPORT)
        record.count(worker_deaths=1, replayed=3)
        record.count(worker_deaths=1)
        record.write_counts()
        counts = Counts(worker_deaths=2, replayed=3)
        assert read_own() == (in_force(options("--sandbox=chroot")), {10: replace(REPORT, role="broker"), 12345678: REPORT}, counts)
    assert read_own() is None


def test_a_record_that_is_empty_or_of_another_version_is_refused():
    with Record(options()), pytest.raises(ConfigError, match="cannot be read"):
        read_own()
    for text in (b"", b"{}", b"[]", b'{"options": {"unknown": 1}, "processes": {}}'):
        with pytest.raises(ValueError, match=r".+"):
            read_record(text)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--sandbox=none", "--seccomp=log", "--readonly"),
        ("--seccomp", "trap", "--inode-file-handles", "never", "--num-request-queues", "7"),
        ("--seccomp-policy", "/etc/policy.toml", "--allow-weak-policy"),
        ("--modcaps=-mknod:+kill", "-o", "sandbox=chroot,no_flock", "-d"),
        ("--xattr", "--posix-acl", "--cache=never", "--uid-map=:0:1:1:", "--num-request-queues=64"),
    ],
)
def test_who_may_not_read_it_learns_the_same_from_the_command_line(argv):
    command = ("python", "-m", "vfsd", "--shared-dir=/srv/share", "--socket-path=/run/vm.sock", *argv)
    census = replace(take_census(os.getpid(), list_root=False), command=command)
    expected = in_force(options(*argv), more_capabilities(options(*argv)))
    if not any(word.startswith("--num-request-queues") for word in argv):
        expected = replace(expected, request_queues=64)  # the default depends on the daemon's CPUs: as many as can be
    assert daemon._options(census) == expected


def test_paths_are_escaped_as_proc_shows_them():
    path = b"/srv/odd\nname\xff"
    assert in_force(replace(options(), shared_dir=path)).shared_dir == "/srv/odd\\nname\\udcff"


def test_a_socket_path_leads_to_the_pid_beside_it(tmp_path):
    (tmp_path / "vm.sock.pid").write_text("4711\n")
    assert daemon.find_supervisor(str(tmp_path / "vm.sock")) == 4711
    assert daemon.find_supervisor(str(tmp_path / "vm.sock.pid")) == 4711
    assert daemon.find_supervisor("4711") == 4711
    (tmp_path / "vm.sock.pid").write_text("no pid")
    with pytest.raises(ConfigError, match="has no pid in it"):
        daemon.find_supervisor(str(tmp_path / "vm.sock"))


@pytest.mark.parametrize(
    ("argv", "more"),
    [
        (["--modcaps=+dac_read_search:-mknod"], ()),
        (["--modcaps=+dac_read_search", "--inode-file-handles=never"], ("DAC_READ_SEARCH",)),
        (["--modcaps=+kill:+chown"], ("KILL",)),
        (["--modcaps=+kill:-kill"], ()),
    ],
)
def test_a_capability_that_the_broker_has_anyway_is_none_more(argv, more):
    assert more_capabilities(options(*argv)) == more
