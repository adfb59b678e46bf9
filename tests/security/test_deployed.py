"""`vfsdctl status --security` and `policy dump` of a daemon as it is deployed: in another network namespace, below filters of its starter's.

What its starter brought along is no fault; what is amiss is found all the same.
"""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.frontend.daemon import Options, vfsd
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start
from vfsd.sandbox.seccomp import load_policy
from vfsd.tools.daemon import examine, members, supervisor_of
from vfsd.tools.loaded_filters import EXPECTED, Filter, brought_along, compiled_filters, look_at

pytestmark = pytest.mark.root

OWN_NETWORK = ["unshare", "--net"]
FILTERED = [sys.executable, "-m", "tests.security.filtered"]
VFSDCTL = [str(Path(sys.executable).with_name("vfsdctl"))]
# Root, but for the capability that takes it into other namespaces.
LESS_THAN_ROOT = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
BROUGHT_ALONG = 2


def below_filters(*arguments):
    return [*OWN_NETWORK, *FILTERED, str(BROUGHT_ALONG), *vfsd(*arguments)]


def with_a_filter_more_on(module):
    return lambda *arguments: [*FILTERED, module, *vfsd(*arguments)[3:]]


def leaking_a_socket_of_the_network(*arguments):
    listen = "import os, socket, sys; s = socket.socket(); s.listen(); os.dup2(s.fileno(), 9); os.execv(sys.argv[1], sys.argv[1:])"
    return [*OWN_NETWORK, sys.executable, "-c", listen, *vfsd(*arguments)]


@contextmanager
def serving(folder, command, *extra):
    """A daemon with a frontend, and a file open."""
    served = start(folder, Options(extra=extra), command=command)
    try:
        served.client.open(served.client.write_file(ROOT, b"file", b"x").nodeid)
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("deployed"), below_filters) as one:
        yield one


def vfsdctl(*words, below=()):
    """(exit status, what it printed as JSON)"""
    done = subprocess.run([*below, *VFSDCTL, *words, "--json"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def status(served, below=()):
    """(exit status, state -> what is in that state, of which role)"""
    code, data = vfsdctl("status", "--security", str(served.daemon.pid), below=below)
    states = {}
    for process in data["processes"]:
        for each in process["expectations"]:
            states.setdefault(each["state"], set()).add((process["role"], each["what"]))
    return code, states


# --- sockets ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [(), OWN_NETWORK], ids=["where the frontend is", "in a third network"])
def test_both_ends_of_every_socket_are_seen_in_other_networks(deployed, below):
    """The supervisor's pairs lie in one, the frontend's connection in another."""
    code, states = status(deployed, below)
    assert (code, set(states)) == (0, {"met"})


def test_sockets_of_a_network_that_cannot_be_entered_are_said_to_be_unseen(deployed):
    code, states = status(deployed, LESS_THAN_ROOT)
    assert code == 0
    assert states.pop("not visible") == {(role, "descriptors") for role in ("supervisor", "broker", "control", "worker")}
    assert set(states) == {"met"}


@pytest.mark.parametrize("below", [(), LESS_THAN_ROOT], ids=["root", "less than root"])
def test_a_socket_that_is_not_a_unix_one_is_found_whoever_looks(leaking, below):
    code, states = status(leaking, below)
    assert (code, states["NOT MET"]) == (1, {("supervisor", "descriptors")})


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("leaking"), leaking_a_socket_of_the_network) as one:
        yield one


# --- filters ----------------------------------------------------------------------------------------------------------------------


def test_filters_that_the_starter_brought_along_are_told_apart(deployed):
    code, data = vfsdctl("policy", "dump", "--all", "--pid", str(deployed.daemon.pid))
    assert (code, data["as_expected"]) == (0, True)
    assert [each["role"] for each in data["processes"]] == ["supervisor", "broker", "control", "worker"]
    for process in data["processes"]:
        assert len(process["started_with"]) == BROUGHT_ALONG
        for thread in process["threads"]:
            brought, own = thread["filters"][:BROUGHT_ALONG], thread["filters"][BROUGHT_ALONG:]
            assert brought == process["started_with"]
            assert tuple(data["filters"][digest]["role"] for digest in own) == EXPECTED[process["role"]]


def test_people_are_told_which_filters_were_there_before(deployed):
    done = subprocess.run([*VFSDCTL, "policy", "dump", "--pid", str(deployed.daemon.pid)], capture_output=True, text=True, check=True)
    assert done.stdout.count("instructions  of who started vfsd") == BROUGHT_ALONG
    assert "instructions  supervisor (kill)" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("what the policy compiles to, above 2 filters that vfsd was started with")


def test_one_process_is_looked_at_alone(deployed):
    control = deployed.daemon.pids()[2]
    code, data = vfsdctl("policy", "dump", "--pid", str(control))
    assert (code, [each["pid"] for each in data["processes"]]) == (0, [control])


@pytest.mark.parametrize("module", ["vfsd.broker", "vfsd.worker.control", "vfsd.worker"])
def test_a_filter_more_on_one_process_is_found(tmp_path, module):
    with serving(tmp_path, with_a_filter_more_on(module)) as served:
        code, data = vfsdctl("policy", "dump", "--all", "--pid", str(served.daemon.pid))
        status_code, states = status(served)
    (role,) = {each["role"] for each in data["processes"] if each["faults"]}
    assert (code, role) == (1, module.rpartition(".")[2])
    assert (status_code, states["NOT MET"]) == (1, {(role, "seccomp")})


def test_filters_of_the_starter_do_not_stand_for_missing_ones(tmp_path):
    with serving(tmp_path, below_filters, "--seccomp=none") as served:
        code, data = vfsdctl("policy", "dump", "--all", "--pid", str(served.daemon.pid))
    assert code == 1
    assert all(each["faults"] for each in data["processes"])


@pytest.fixture(scope="module")
def looked_at(deployed):
    """By role, as the kernel has it."""
    known = compiled_filters(load_policy())
    found = [look_at(member, known) for member in members(deployed.daemon.pid)]
    return {each.role: replace(each, inherited=brought_along(found[0])) for each in found}


STRANGE = Filter(b"\6\0\0\0\0\0\0\0", None, None)


@pytest.mark.parametrize("role", EXPECTED)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda filters: filters[:-1],
        lambda filters: filters[1:],
        lambda filters: (),
        lambda filters: (*filters, STRANGE),
        lambda filters: (STRANGE, *filters),
        lambda filters: (STRANGE, *filters[1:]),
        lambda filters: (*filters[:BROUGHT_ALONG], STRANGE, *filters[BROUGHT_ALONG:]),
        lambda filters: (*filters, filters[-1]),
        lambda filters: tuple(reversed(filters)),
    ],
)
def test_what_is_missing_too_much_or_misplaced_on_one_thread_is_found(looked_at, role, spoil):
    loaded = looked_at[role]
    assert loaded.faults() == []
    last = max(loaded.threads)
    (fault,) = replace(loaded, threads={**loaded.threads, last: spoil(loaded.threads[last])}).faults()
    assert fault.startswith(f"thread {last} has ")


def test_a_filter_that_the_supervisor_took_on_later_is_not_one_it_was_started_with(looked_at):
    """It lies above its own: then nothing is taken as brought along, and all that is strange is told."""
    supervisor = looked_at["supervisor"]
    (filters,) = supervisor.threads.values()
    later = replace(supervisor, threads={supervisor.pid: (*filters, STRANGE)})
    assert brought_along(later) == ()
    assert replace(later, inherited=brought_along(later)).faults()


def test_whose_process_it_is_is_found_from_each_of_them(deployed):
    assert {supervisor_of(pid) for pid in deployed.daemon.pids()} == {deployed.daemon.pid}
    assert [each.pid for each in members(deployed.daemon.pid)] == [each.pid for each in examine(deployed.daemon.pid).processes]
