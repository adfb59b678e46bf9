"""The units of deploy/, started by a real systemd: root's and the ordinary user's, by a connection, by another one, under AppArmor.

One guest for all of it: each start of vfsd takes most of a minute in an emulated machine, and its boot another. Everyday runs leave this file out (conftest.py).
"""

import json
import re
import time

import pytest

from tests.support.guest.debian import PROBE_PATH, PYTHON, VFSDCTL, DebianGuest, tree_archive

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(2400)]

# As docs/deployment.md has it.
INSTALL = """
set -e
cp /opt/deploy/systemd/*.service /opt/deploy/systemd/*.socket /etc/systemd/system/
cp /opt/deploy/systemd/vfsd.sysusers.conf /usr/lib/sysusers.d/vfsd.conf
cp /opt/deploy/systemd/vfsd.tmpfiles.conf /usr/lib/tmpfiles.d/vfsd.conf
systemd-sysusers
systemd-tmpfiles --create
mkdir /srv/vfsd/vm1 /srv/vfsd/vm2
echo contents >/srv/vfsd/vm1/file
echo contents >/srv/vfsd/vm2/file
chown -R vfsd:vfsd /srv/vfsd/vm2
mkdir -p /etc/systemd/system/vfsd@.service.d /etc/systemd/system/vfsd-nonroot@.service.d
printf '[Service]\\nTimeoutStartSec=900\\n' | tee /etc/systemd/system/vfsd{,-nonroot}@.service.d/patience.conf
systemctl daemon-reload
systemctl start vfsd@vm1.socket vfsd-nonroot@vm2.socket
"""
WAIT_SECONDS = 900.0
WATCHDOG_SECONDS = 20
ROOTS = {"vfsd@vm1.service": "/run/vfsd/vm1.sock", "vfsd-nonroot@vm2.service": "/run/vfsd/vm2-nonroot.sock"}


@pytest.fixture(scope="module")
def machine():
    with tree_archive() as archive, DebianGuest(archive) as guest:
        guest.check("bash", "-c", INSTALL)
        yield guest


def probe(guest, unit, *hold):
    """Start the probe as a unit of its own; what it said is in /run/probe.json."""
    guest.check("rm", "-f", "/run/probe.json")
    guest.check(
        "systemd-run", "--unit=probe", f"--setenv=PYTHONPATH={PROBE_PATH}", "--property=StandardOutput=truncate:/run/probe.json",
        *(() if hold else ("--wait",)), PYTHON, "-m", "tests.guest.systemd_probe", ROOTS[unit], unit, "file", *hold, timeout=WAIT_SECONDS,
    )  # fmt: skip


def said(guest):
    return json.loads(eventually(guest, lambda: guest.check("cat", "/run/probe.json")))


def eventually(guest, read, accepts=bool):
    deadline = time.monotonic() + WAIT_SECONDS
    while not accepts(value := read()):
        if time.monotonic() > deadline:
            pytest.fail(f"{value!r} for {WAIT_SECONDS:.0f} s; the journal:\n{guest.check('journalctl', '--no-pager', '--lines=60')}")
        time.sleep(1)
    return value


def journal(guest, unit):
    """Of vfsd itself, in its latest run: (priority, message)."""
    run = guest.properties(unit, "InvocationID")["InvocationID"]
    lines = guest.check("journalctl", "--no-pager", "--output=json", f"_SYSTEMD_INVOCATION_ID={run}", "_COMM=vfsd").splitlines()
    return [(int(entry["PRIORITY"]), entry["MESSAGE"]) for entry in map(json.loads, lines)]


def exposure(guest, unit):
    words = guest.check("systemd-analyze", "--no-pager", "security", unit).splitlines()
    return float(re.search(r"Overall exposure level .*: ([\d.]+)", words[-1])[1])


def assert_confined_as_documented(guest, unit):
    """By vfsdctl on the host: units have networks of their own, and a dozen filters below vfsd's."""
    pid = guest.properties(unit, "MainPID")["MainPID"]
    code, census = vfsdctl(guest, "status", "--security", pid)
    unmet = [(each["name"], row) for each in census["processes"] for row in each["expectations"] if row["state"] != "met"]
    assert (code, unmet) == (0, [])
    assert sorted({each["role"] for each in census["processes"]}) == ["broker", "control", "supervisor", "worker"]
    code, filters = vfsdctl(guest, "policy", "dump", "--all", "--pid", pid)
    assert (code, [fault for each in filters["processes"] for fault in each["faults"]]) == (0, [])
    assert filters["as_expected"]
    assert all(each["started_with"] for each in filters["processes"]), "systemd's"


def vfsdctl(guest, *words):
    done = guest.run(VFSDCTL, *words, "--json", timeout=WAIT_SECONDS)
    assert done.stderr == ""
    return done.code, json.loads(done.stdout)


def assert_ended_well(guest, unit):
    assert guest.properties(unit, "ActiveState", "Result", "StatusText") == {
        "ActiveState": "inactive",
        "Result": "success",
        "StatusText": "Ending",
    }


def test_root_is_started_by_a_connection_serves_it_and_ends_with_it(machine):
    unit = "vfsd@vm1.service"
    probe(machine, unit)
    answers = said(machine)
    assert answers == {
        "status": f"Serving /srv/vfsd/vm1 to process {answers['pid']}", "pid": answers["pid"], "read": "contents\n",
        "mknod fifo": "done", "mknod device": "Operation not permitted", "chmod u+s": "done", "chown 1234": "done",
    }  # fmt: skip
    assert machine.check("stat", "--format=%u:%g", "/srv/vfsd/vm1/made").strip() == "1234:1234"
    eventually(machine, lambda: machine.properties(unit, "ActiveState")["ActiveState"], lambda state: state == "inactive")
    assert_ended_well(machine, unit)
    assert journal(machine, unit)[-3:] == [
        (6, "Waiting for vhost-user socket connection..."),
        (6, "Client connected, servicing requests"),
        (6, "Client disconnected, shutting down"),
    ]
    assert exposure(machine, unit) <= 2.5


@pytest.fixture
def apparmor(machine):
    machine.check("apparmor_parser", "--replace", "/opt/deploy/apparmor/vfsd")
    yield
    machine.check("apparmor_parser", "--remove", "/opt/deploy/apparmor/vfsd")


@pytest.fixture
def short_watchdog(machine):
    folder = "/etc/systemd/system/vfsd@vm1.service.d"
    machine.check("mkdir", "-p", folder)
    machine.check("sh", "-c", f"printf '[Service]\\nWatchdogSec={WATCHDOG_SECONDS}\\n' >{folder}/watchdog.conf")
    machine.systemctl("daemon-reload")
    yield
    machine.check("rm", "-r", folder)
    machine.systemctl("daemon-reload")


def test_the_next_connection_starts_it_again_and_one_that_hangs_is_ended_under_apparmor(machine, apparmor, short_watchdog):
    """Readiness, then heartbeats for longer than systemd waits without; a broker that is stopped gives none."""
    unit = "vfsd@vm1.service"
    probe(machine, unit, "hold")
    eventually(machine, lambda: machine.run("test", "-s", "/run/probe.json").code == 0)
    assert said(machine)["read"] == "contents\n"
    pid = machine.properties(unit, "MainPID")["MainPID"]
    processes = machine.check("cat", f"/sys/fs/cgroup/{machine.properties(unit, 'ControlGroup')['ControlGroup']}/cgroup.procs").split()
    assert {machine.check("cat", f"/proc/{each}/attr/current").strip("\0\n") for each in processes} == {"vfsd (enforce)"}
    assert_confined_as_documented(machine, unit)
    assert "DENIED" not in machine.check("journalctl", "--no-pager", "--dmesg")
    since = machine.properties(unit, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"]
    beats = lambda: int(machine.properties(unit, "WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"])  # noqa: E731
    eventually(machine, beats, lambda beat: beat > int(since) + 2 * WATCHDOG_SECONDS * 1_000_000)
    assert machine.properties(unit, "MainPID", "ActiveState") == {"MainPID": pid, "ActiveState": "active"}
    broker = next(each for each in processes if "vfsd.broker" in machine.check("cat", f"/proc/{each}/cmdline"))
    machine.check("kill", "-STOP", broker)
    eventually(machine, lambda: machine.properties(unit, "ActiveState")["ActiveState"], lambda state: state == "failed")
    assert machine.properties(unit, "Result") == {"Result": "watchdog"}
    assert not any(machine.run("test", "-d", f"/proc/{each}").code == 0 for each in processes), "nothing of it is left"
    machine.run("systemctl", "stop", "probe.service")
    machine.run("systemctl", "reset-failed", "probe.service", unit)
    assert machine.properties("vfsd@vm1.socket", "SubState") == {"SubState": "listening"}, "it may be started again"


def test_an_ordinary_user_has_a_root_of_its_own_and_serves(machine):
    unit = "vfsd-nonroot@vm2.service"
    probe(machine, unit, "hold")
    eventually(machine, lambda: machine.run("test", "-s", "/run/probe.json").code == 0)
    answers = said(machine)
    assert answers == {
        "status": f"Serving /srv/vfsd/vm2 to process {answers['pid']}", "pid": answers["pid"], "read": "contents\n",
        "mknod fifo": "done", "mknod device": "Operation not permitted", "chmod u+s": "Operation not permitted",
        "chown 1234": "Operation not permitted",
    }  # fmt: skip
    assert machine.check("stat", "--format=%U:%G", "/srv/vfsd/vm2/made").strip() == "vfsd:vfsd"
    assert_confined_as_documented(machine, unit)
    machine.run("systemctl", "stop", "probe.service")
    eventually(machine, lambda: machine.properties(unit, "ActiveState")["ActiveState"], lambda state: state == "inactive")
    assert_ended_well(machine, unit)
    assert [priority for priority, text in journal(machine, unit) if text.startswith("broker: uid 0, gid 0 of the guest")] == [4]
    assert exposure(machine, unit) <= 1.0
