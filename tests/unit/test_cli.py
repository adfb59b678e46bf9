"""The command line: named and behaving as the Rust virtiofsd's."""

import json
import os
import subprocess
import sys

import pytest

import vfsd
from vfsd.cli import build_parser, default_request_queues, parse_options, run
from vfsd.log import INFO, TRACE

MINIMAL = ["--shared-dir", "/srv", "--socket-path", "/run/s"]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        parse_options(argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_the_defaults_are_the_documented_ones():
    options = parse_options(MINIMAL)
    assert (options.shared_dir, options.socket_path, options.fd, options.tag) == (b"/srv", b"/run/s", None, None)
    assert (options.cache, options.sandbox, options.seccomp, options.inode_file_handles) == ("auto", "namespace", "kill", "prefer")
    assert (options.readonly, options.announce_submounts, options.rlimit_nofile) == (False, True, None)
    assert options.request_queues == default_request_queues()
    assert 1 <= options.request_queues <= 4
    assert options.log_level == INFO


def test_every_option_with_an_equals_sign_and_without():
    joined = [
        "--shared-dir=/srv/x", "--socket-path=/run/s", "--socket-group=kvm", "--tag=fs", "--cache=never", "--sandbox=chroot",
        "--seccomp=log", "--inode-file-handles=mandatory", "--num-request-queues=3", "--readonly", "--no-announce-submounts",
        "--rlimit-nofile=0", "--log-level=trace",
    ]  # fmt: skip
    options = parse_options(joined)
    assert parse_options([part for option in joined for part in option.split("=", 1)]) == options
    assert (options.socket_group, options.tag, options.cache, options.sandbox) == ("kvm", b"fs", "never", "chroot")
    assert (options.request_queues, options.readonly, options.announce_submounts) == (3, True, False)
    assert (options.rlimit_nofile, options.log_level) == (0, TRACE)


def test_deprecated_and_alias_spellings():
    assert parse_options(["--shared-dir=/s", "--socket=/run/old"]).socket_path == b"/run/old"
    assert parse_options([*MINIMAL, "--inode-file-handles=fallback"]).inode_file_handles == "prefer"
    assert parse_options([*MINIMAL, "--announce-submounts"]).announce_submounts


@pytest.mark.parametrize(
    ("argv", "xattr", "posix_acl", "security_label", "remapped"),
    [
        ([], False, "off", "off", False),
        (["--xattr"], True, "off", "off", False),
        (["--posix-acl"], True, "on", "off", False),
        (["--posix-acl=auto"], True, "auto", "off", False),
        (["--security-label"], True, "off", "on", False),
        (["--security-label", "auto"], True, "off", "auto", False),
        (["--xattrmap=:ok:all:::"], True, "off", "off", False),
        (["--xattrmap=:map::user.virtiofs.:"], True, "off", "off", True),
    ],
)
def test_extended_attributes_come_with_what_needs_them(argv, xattr, posix_acl, security_label, remapped):
    features = parse_options([*MINIMAL, *argv]).features
    assert (features.xattr, features.posix_acl, features.security_label) == (xattr, posix_acl, security_label)
    assert features.capability_remapped == remapped


def test_a_mistake_in_the_rules_for_names_is_shown(capsys):
    error = refused(capsys, *MINIMAL, "--xattrmap=:ok:all::: :oops:all:::")
    assert "argument --xattrmap: at character 13: 'oops' is no type" in error
    assert ": >>>here>>> oops:all:::" in error


def test_names_need_not_be_utf8():
    assert parse_options(["--shared-dir", os.fsdecode(b"/s\xff"), "--fd=3"]).shared_dir == b"/s\xff"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--fd=3"], "--shared-dir"),
        (["--shared-dir=/s"], "--socket-path"),
        ([*MINIMAL, "--fd=3"], "--fd"),
        ([*MINIMAL, "--cache=sometimes"], "--cache"),
        ([*MINIMAL, "--cach=auto"], "--cach"),
        ([*MINIMAL, "--tag=" + "x" * 37], "--tag: 37 bytes"),
        ([*MINIMAL, "--tag="], "--tag"),
        ([*MINIMAL, "--num-request-queues=0"], "--num-request-queues: 0 is out of range; give a number from 1 to 64"),
        ([*MINIMAL, "--num-request-queues=many"], "'many' is not a number"),
        (["--shared-dir=/s", "--fd=3", "--socket-group=kvm"], "--socket-group"),
        (["--shared-dir=", "--fd=3"], "--shared-dir: the path is empty"),
        ([*MINIMAL, "--rlimit-nofile=-1"], "--rlimit-nofile"),
        ([*MINIMAL, "--migration-mode=find-paths"], "--migration-mode"),
    ],
)
def test_a_command_line_that_cannot_be_names_the_option(capsys, argv, named):
    assert named in refused(capsys, *argv)


def test_a_tag_of_36_bytes_fits():
    assert parse_options([*MINIMAL, "--tag=" + "x" * 36]).tag == b"x" * 36


def test_capabilities_are_printed_whatever_else_is_asked(capsys):
    assert run(["--no-such-option", "--print-capabilities", "--fd=x"]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "fs", "features": ["separate-options"]}


def test_help_names_the_options_that_starters_look_for():
    text = build_parser().format_help()
    for option in ("--readonly", "--shared-dir", "--socket-path", "--fd", "--inode-file-handles", "--no-announce-submounts"):
        assert option in text


def test_the_version_is_printed_by_the_real_program():
    ended = subprocess.run([sys.executable, "-I", "-m", "vfsd", "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout == f"vfsd {vfsd.__version__}\n"


@pytest.mark.parametrize("implying", ["--xattrmap=:map::user.:", "--posix-acl", "--security-label=auto"])
def test_attributes_cannot_be_refused_and_asked_for(capfd, implying):
    with pytest.raises(SystemExit) as ended:
        parse_options([*MINIMAL, "--no-xattr", implying])
    assert ended.value.code == 2
    assert f"--no-xattr: not allowed with argument {implying.partition('=')[0]}" in capfd.readouterr().err
    assert parse_options([*MINIMAL, implying]).features.xattr
    assert not parse_options([*MINIMAL, "--no-xattr"]).features.xattr


@pytest.mark.parametrize("text", ["1_0", "٣", " 3", "+3", "", "x", "9" * 5000])
def test_numbers_are_plain_decimal_ones(capfd, text):
    with pytest.raises(SystemExit):
        parse_options([*MINIMAL, f"--num-request-queues={text}"])
    assert "is not a number; give one from 1 to 64" in capfd.readouterr().err


def test_translations_are_collected_in_order():
    options = parse_options([*MINIMAL, "--translate-uid=map:0:1:2", "--translate-uid", "host:5:6:7", "--translate-gid=forbid-guest:0:1"])
    assert (options.translate_uid, options.translate_gid) == (("map:0:1:2", "host:5:6:7"), ("forbid-guest:0:1",))
    assert (parse_options(MINIMAL).translate_uid, parse_options(MINIMAL).translate_gid) == ((), ())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--translate-uid=map:0:1"], "--translate-uid=map:0:1: map takes 3 numbers"),
        (["--translate-gid=map:0:1:9", "--translate-gid", "guest:8:0:1"], "--translate-gid=guest:8:0:1: overlaps with --translate-gid=map:0:1:9"),
        (["--translate-gid=map:0:1:2", "--posix-acl=auto"], "--posix-acl: cannot be used with --translate-uid or --translate-gid"),
    ],
)  # fmt: skip
def test_translations_that_cannot_be_are_an_error_of_one_line(capsys, arguments, line):
    errors = refused(capsys, *MINIMAL, *arguments)
    assert errors.count("\n") == 1
    assert line in errors


def test_a_share_that_is_not_there_is_an_error_of_one_line_and_status_1(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-I", "-m", "vfsd", f"--shared-dir={tmp_path}/none", f"--socket-path={tmp_path}/s"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert f"--shared-dir={tmp_path}/none: does not exist" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_maps_may_be_repeated_as_libvirt_does():
    options = parse_options([*MINIMAL, "--uid-map=:0:1000:1:", "--uid-map", ":1:100000:65536:", "--gid-map=,0,1001,1,"])
    assert options.uid_map == ((0, 1000, 1), (1, 100000, 65536))
    assert options.gid_map == ((0, 1001, 1),)
    assert parse_options(MINIMAL).uid_map == parse_options(MINIMAL).gid_map == ()


@pytest.mark.parametrize("option", ["--uid-map", "--gid-map"])
def test_a_bad_map_shows_option_text_reason_and_remedy(capsys, option):
    text = refused(capsys, *MINIMAL, f"{option}=:0:1000:")
    assert f"argument {option}: ':0:1000:' is not three numbers" in text
    assert "write :INSIDE:OUTSIDE:COUNT:, for instance" in text
    text = refused(capsys, *MINIMAL, f"{option}=:0:1000:1:", f"{option}=:0:2000:1:")
    assert f"argument {option}: :0:1000:1: and :0:2000:1: map an id twice" in text
