"""deploy/: units, profile and descriptions are read by the programs they are written for. Whether they work: tests/guest/test_systemd.py."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vfsd.cli import CAPABILITIES, parse_options
from vfsd.roles import _BROKER_CAPABILITIES, _HANDLE_CAPABILITY, SUPERVISOR_CAPABILITIES

DEPLOY = Path(__file__).parents[2] / "deploy"
SYSTEMD = DEPLOY / "systemd"
PROGRAM = "/opt/vfsd/bin/vfsd"
EXPOSURE = {"vfsd@": 2.5, "vfsd-nonroot@": 1.0}  # of systemd.exec's sandboxing, as systemd-analyze counts it: 0 is none


@pytest.mark.parametrize("unit", EXPOSURE)
def test_exposure_is_within_bounds(unit):
    threshold = f"--threshold={EXPOSURE[unit] * 10:.0f}"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", threshold, SYSTEMD / f"{unit}.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def root(tmp_path):
    """A root directory with the distribution's units, ours, and a program where ours look for it."""
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for unit in (*SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.socket")):
        shutil.copy(unit, units)
    program = tmp_path / PROGRAM[1:]
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def verify(root):
    units = [f"{unit}vm1.{kind}" for unit in EXPOSURE for kind in ("service", "socket")]
    done = subprocess.run(["systemd-analyze", "verify", f"--root={root}", "--man=no", *units], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_systemd_finds_nothing_wrong_with_the_units(root):
    assert verify(root) == (0, "")


def test_systemd_would_find_something_wrong(root):
    with (root / "etc/systemd/system/vfsd@.service").open("a") as unit:
        unit.write("NoSuchSetting=yes\n")
    assert "NoSuchSetting" in verify(root)[1]


def settings(unit):
    """Of a unit file: name → values, in order."""
    found = {}
    for line in (SYSTEMD / unit).read_text().splitlines():
        if name := re.match(r"([A-Za-z]+)=(.*)", line):
            found.setdefault(name[1], []).append(name[2])
    return found


def test_the_unit_of_root_leaves_the_capabilities_that_vfsd_uses_but_mknod():
    bounding = {name for value in settings("vfsd@.service")["CapabilityBoundingSet"] for name in value.split()}
    used = {*_BROKER_CAPABILITIES, _HANDLE_CAPABILITY, *SUPERVISOR_CAPABILITIES}
    assert bounding == {f"CAP_{name}" for name in used - {"MKNOD"}}
    assert settings("vfsd-nonroot@.service")["CapabilityBoundingSet"] == [""]


@pytest.mark.parametrize("unit", EXPOSURE)
def test_the_command_line_of_a_unit_is_one_that_vfsd_takes(unit):
    found = settings(f"{unit}.service")
    variables = dict(value.strip('"').split("=", 1) for value in found["Environment"])
    program, *words = found["ExecStart"][0].split()
    assert program == PROGRAM
    argv = []
    for word in words:
        if word.startswith("${"):
            argv.append(variables[word[2:-1]])
        elif word.startswith("$"):
            argv += variables.get(word[1:], "").split()
        else:
            argv.append(word)
    options = parse_options([*argv, "--fd=3"])
    assert options.shared_dir == b"/srv/vfsd/%i"
    assert options.inode_file_handles == ("never" if unit == "vfsd-nonroot@" else "prefer")


@pytest.mark.root
def test_users_and_directories_are_made(tmp_path):
    """By the two programs that read the snippets, in another root directory; as root, since some are to be root's."""
    (tmp_path / "etc").mkdir()
    for program, snippet in (("systemd-sysusers", "vfsd.sysusers.conf"), ("systemd-tmpfiles", "vfsd.tmpfiles.conf")):
        more = ["--create"] if program == "systemd-tmpfiles" else []
        subprocess.run([program, f"--root={tmp_path}", *more, SYSTEMD / snippet], check=True, capture_output=True)
    assert "vfsd:" in (tmp_path / "etc/passwd").read_text()
    for folder in ("run/vfsd", "srv/vfsd", "etc/vfsd", "var/lib/vfsd/root"):
        assert (tmp_path / folder).stat().st_mode & 0o7777 == 0o755


def parse_profile(path):
    return subprocess.run(["apparmor_parser", "--skip-kernel-load", "--skip-cache", path], capture_output=True, text=True, check=False)


def test_the_apparmor_profile_compiles(tmp_path):
    assert parse_profile(DEPLOY / "apparmor/vfsd").returncode == 0
    wrong = tmp_path / "vfsd"
    wrong.write_text((DEPLOY / "apparmor/vfsd").read_text().replace("capability chown,", "capability chwon,"))
    assert parse_profile(wrong).returncode != 0


def test_the_apparmor_profile_refuses_no_path():
    """What AppArmor sees of the broker are paths of the share: /opt/vfsd in it is a guest's directory like any other."""
    path = DEPLOY / "apparmor/vfsd"
    whole = subprocess.run(
        ["apparmor_parser", "--preprocess", path], capture_output=True, text=True, check=True
    ).stdout  # with what it includes
    rules = [line.strip() for line in whole.splitlines() if not line.lstrip().startswith("#")]
    assert [rule for rule in rules if re.match(r"(audit +)?deny\b", rule)] == []
    assert {"/ r,", "/** rwlk,"} <= set(rules)


def test_the_apparmor_profile_has_the_capabilities_that_vfsd_uses():
    named = set(re.findall(r"^ +capability (\w+),", (DEPLOY / "apparmor/vfsd").read_text(), re.MULTILINE))
    used = {*_BROKER_CAPABILITIES, _HANDLE_CAPABILITY, *SUPERVISOR_CAPABILITIES}
    assert named == {name.lower() for name in used} | {"sys_resource"}


def test_the_description_for_libvirt_is_of_the_schema_and_says_what_the_program_says():
    """QEMU's docs/interop/vhost-user.json, VhostUserBackend; `features` as libvirt reads it."""
    description = json.loads((DEPLOY / "60-vfsd.json").read_text())
    assert set(description) == {"description", "type", "binary", "features"}
    assert isinstance(description["description"], str)
    assert description["binary"] == PROGRAM
    assert {key: description[key] for key in ("type", "features")} == CAPABILITIES
