"""Command lines of older virtiofsd versions."""

import pytest

from vfsd.cli import parse_options
from vfsd.cli_compat import modernize
from vfsd.errors import ConfigError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["-o", "source=/srv"], ["--shared-dir=/srv"]),
        (["-osource=/srv"], ["--shared-dir=/srv"]),
        (["-o", "source=/a,,b,cache=none"], ["--shared-dir=/a,b", "--cache=never"]),
        (["-o", "source=/a=b"], ["--shared-dir=/a=b"]),
        (["-o", "cache=always,sandbox=chroot"], ["--cache=always", "--sandbox=chroot"]),
        (["-o", "xattr,no_flock,posix_lock"], ["--xattr", "--no-flock", "--posix-lock"]),
        (["-o", "no_xattr,flock,no_posix_lock"], ["--no-xattr", "--flock", "--no-posix-lock"]),
        (["-o", "no_readdirplus,killpriv_v2,no_announce_submounts"], ["--no-readdirplus", "--killpriv-v2", "--no-announce-submounts"]),
        (
            ["-o", "writeback,allow_direct_io,posix_acl,security_label"],
            ["--writeback", "--allow-direct-io", "--posix-acl", "--security-label"],
        ),
        (["-o", "no_writeback,no_posix_acl,no_security_label,no_allow_direct_io"], []),
        (["-o", "xattrmap=:map::user.virtiofs.:"], ["--xattrmap=:map::user.virtiofs.:"]),
        (["-o", "modcaps=-mknod:-setfcap"], ["--modcaps=-mknod:-setfcap"]),
        (["-o", "log_level=err"], ["--log-level=error"]),
        (["-o", "loglevel=debug,allow_root,fsname=x"], ["--log-level=debug"]),
        (["-f", "-d", "--readonly"], ["--log-level=debug", "--readonly"]),
        (["--shared-dir", "/srv", "--tag", "x"], ["--shared-dir", "/srv", "--tag", "x"]),
    ],
)
def test_old_words_become_todays(old, new):
    assert modernize(old) == new


@pytest.mark.parametrize(
    ("old", "reason"),
    [
        (["-o"], "says nothing"),
        (["-o", ","], "says nothing"),
        (["-o", "timeout=1"], "choose by --cache"),
        (["-o", "max_idle_threads=3"], "--num-request-queues"),
        (["-o", "oops"], "'oops' is not known"),
        (["-o", "xattr=1"], "'xattr=1' is not known"),
        (["-o", "source"], "'source' is not known"),
        (["-o", "no_cache=auto"], "'no_cache=auto' is not known"),
    ],
)
def test_an_old_word_that_means_nothing_is_refused(old, reason, capsys):
    with pytest.raises(ConfigError, match="argument -o: .*" + reason):
        modernize(old)
    with pytest.raises(SystemExit) as end:
        parse_options(["--fd=3", *old])
    assert end.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_command_line_of_libvirt_9():
    options = parse_options(
        ["--fd=30", "-o", "source=/srv/a,,b,cache=always,xattr,no_flock,no_posix_lock,sandbox=chroot", "--thread-pool-size=8", "-d"]
    )
    assert (options.fd, options.shared_dir, options.cache, options.sandbox) == (30, b"/srv/a,b", "always", "chroot")
    assert (options.features.xattr, options.features.flock, options.features.posix_lock) == (True, False, False)


def test_the_command_line_of_kata():
    options = parse_options(["--syslog", "--cache=auto", "--shared-dir=/srv", "--fd=3", "--thread-pool-size=1", "--announce-submounts"])
    assert options.syslog


def test_a_mistake_in_an_old_word_names_todays_option(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--fd=3", "-o", "source=/srv,cache=sometimes"])
    assert "argument --cache: invalid choice: 'sometimes'" in capsys.readouterr().err
