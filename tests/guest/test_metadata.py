"""Owners, modes, times, types, links: what stat says is the same on both sides, and the guest's changes reach the host."""

import os
import stat

import pytest

from tests.guest import probes
from tests.guest.conftest import Share

USER = 1000
GROUP = 1000
OTHER_GROUP = 2000


def test_stat_says_the_same_on_both_sides(share: Share) -> None:
    probes.make_every_type(share.host)
    for name in os.listdir(share.host):
        inside, host = share.both(probes.attributes, name)
        assert inside == host, name


def test_every_file_type_made_on_the_host_is_seen(share: Share) -> None:
    probes.make_every_type(share.host)
    share.assert_same()


def test_every_file_type_is_made_by_the_guest(share: Share) -> None:
    share.call(probes.make_every_type, share.inside)
    types = {name: stat.S_IFMT(os.lstat(f"{share.host}/{name}").st_mode) for name in os.listdir(share.host)}
    assert types == {
        "regular": stat.S_IFREG,
        "hard-link": stat.S_IFREG,
        "directory": stat.S_IFDIR,
        "symlink": stat.S_IFLNK,
        "dangling": stat.S_IFLNK,
        "fifo": stat.S_IFIFO,
        "socket": stat.S_IFSOCK,
        "character": stat.S_IFCHR,
        "block": stat.S_IFBLK,
    }
    assert os.stat(f"{share.host}/block").st_rdev == os.makedev(259, 65537)
    share.assert_same()


@pytest.mark.parametrize("mode", [0o000, 0o644, 0o755, 0o777, 0o1777, 0o2755, 0o4755, 0o6711])
def test_chmod(share: Share, mode: int) -> None:
    share.call(probes.write_text, f"{share.inside}/file", "")
    share.guest.python("import os; os.chmod(path, mode)", path=f"{share.inside}/file", mode=mode)
    assert stat.S_IMODE(os.stat(f"{share.host}/file").st_mode) == mode
    inside, host = share.both(probes.attributes, "file")
    if share.configuration.writeback:
        inside["ctime_ns"] = host["ctime_ns"]  # the guest's clock said when, and the host does not know yet
    assert inside == host


def test_chown_of_a_file_and_of_a_symlink(share: Share) -> None:
    share.call(probes.make_every_type, share.inside)
    share.guest.python(
        "import os; os.chown(f'{root}/regular', 12, 34); os.chown(f'{root}/regular', -1, 56); os.lchown(f'{root}/symlink', 78, 90)",
        root=share.inside,
    )
    assert (os.stat(f"{share.host}/regular").st_uid, os.stat(f"{share.host}/regular").st_gid) == (12, 56)
    assert (os.lstat(f"{share.host}/symlink").st_uid, os.lstat(f"{share.host}/symlink").st_gid) == (78, 90)
    share.assert_same()


def test_chown_takes_the_set_id_bits_away(share: Share) -> None:
    probes.write_text(f"{share.host}/program", "x")
    os.chmod(f"{share.host}/program", 0o6755)
    share.guest.python("import os; os.chown(path, 5, 5)", path=f"{share.inside}/program")
    assert stat.S_IMODE(os.stat(f"{share.host}/program").st_mode) == 0o755


def test_times_are_set_to_the_nanosecond(share: Share) -> None:
    share.call(probes.write_text, f"{share.inside}/file", "x")
    share.guest.python("import os; os.utime(path, ns=(1_111_111_111_222_333_444, 999_888_777_666_555_444))", path=f"{share.inside}/file")
    found = os.stat(f"{share.host}/file")
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_111_111_111_222_333_444, 999_888_777_666_555_444)
    share.guest.python("import os; os.symlink('x', path); os.utime(path, ns=(5, 7), follow_symlinks=False)", path=f"{share.inside}/link")
    assert os.lstat(f"{share.host}/link").st_mtime_ns == 7


def test_a_write_changes_the_modification_time(share: Share) -> None:
    probes.write_text(f"{share.host}/file", "x")
    os.utime(f"{share.host}/file", (0, 0))
    share.call(probes.patch, f"{share.inside}/file", 0, "y")
    assert os.stat(f"{share.host}/file").st_mtime > 1_000_000_000


def test_statfs_says_what_the_host_says(share: Share) -> None:
    inside, host = share.both(probes.file_system, "")
    assert inside == host


def test_what_a_user_creates_is_the_users(share: Share) -> None:
    os.chmod(share.host, 0o777)
    result = share.call(probes.as_user, USER, GROUP, [], "make_every_type_but_devices", share.inside)
    assert result == "None"
    for name in os.listdir(share.host):
        found = os.lstat(f"{share.host}/{name}")
        assert (found.st_uid, found.st_gid) == (USER, GROUP), name
    share.assert_same()


@pytest.mark.parametrize(("mask", "mode", "expected"), [(0o022, 0o666, 0o644), (0o077, 0o777, 0o700), (0o000, 0o666, 0o666)])
def test_the_callers_umask_counts(share: Share, mask: int, mode: int, expected: int) -> None:
    os.chmod(share.host, 0o777)
    assert share.call(probes.as_user, USER, GROUP, [], "create_with_umask", f"{share.inside}/made", mask, mode) == "None"
    assert stat.S_IMODE(os.stat(f"{share.host}/made").st_mode) == expected
    assert stat.S_IMODE(os.stat(f"{share.host}/made-directory").st_mode) == expected


def test_a_set_gid_directory_hands_its_group_down(share: Share) -> None:
    os.chown(share.host, 0, OTHER_GROUP)
    os.chmod(share.host, 0o2777)
    assert share.call(probes.as_user, USER, GROUP, [], "create_with_umask", f"{share.inside}/made", 0o022, 0o755) == "None"
    assert os.stat(f"{share.host}/made").st_gid == OTHER_GROUP
    directory = os.stat(f"{share.host}/made-directory")
    assert (directory.st_gid, stat.S_IMODE(directory.st_mode)) == (OTHER_GROUP, 0o2755)


def test_a_user_is_refused_what_the_mode_refuses(share: Share) -> None:
    probes.write_text(f"{share.host}/private", "secret")
    os.chmod(f"{share.host}/private", 0o600)
    for probe in ("read_text", "unlink"):
        assert share.call(probes.as_user, USER, GROUP, [], probe, f"{share.inside}/private") == "PermissionError EACCES"
    assert share.call(probes.as_user, USER, GROUP, [], "chmod", f"{share.inside}/private", 0o777) == "PermissionError EPERM"
    assert share.call(probes.as_user, USER, GROUP, [], "access", f"{share.inside}/private", os.R_OK) == "False"
    assert probes.read_text(f"{share.host}/private") == "secret"


def test_a_supplementary_group_gives_access(share: Share) -> None:
    probes.write_text(f"{share.host}/shared", "for the group")
    os.chown(f"{share.host}/shared", 0, OTHER_GROUP)
    os.chmod(f"{share.host}/shared", 0o640)
    assert share.call(probes.as_user, USER, GROUP, [], "read_text", f"{share.inside}/shared") == "PermissionError EACCES"
    assert share.call(probes.as_user, USER, GROUP, [OTHER_GROUP], "read_text", f"{share.inside}/shared") == "'for the group'"


@pytest.mark.parametrize("mode", [0o4777, 0o6777])
@pytest.mark.parametrize("user", [USER, 0], ids=["a user", "root"])
@pytest.mark.parametrize("how", ["write", "open", "truncate", "ftruncate", "fallocate", "copy"])
def test_changing_contents_leaves_the_set_id_bits_that_the_host_would_leave(share: Share, how: str, user: int, mode: int) -> None:
    for name in ("program", "reference"):
        probes.write_text(f"{share.host}/{name}", "content")
        os.chmod(f"{share.host}/{name}", mode)
    assert share.call(probes.as_user, user, user, [], "change_contents", f"{share.inside}/program", how) == "None"
    assert probes.as_user(user, user, [], "change_contents", f"{share.host}/reference", how) == "None"
    inside, host = share.both(probes.attributes, "program")
    assert inside["mode"] == host["mode"] == probes.attributes(f"{share.host}/reference")["mode"]
    assert probes.read_text(f"{share.host}/program") == probes.read_text(f"{share.host}/reference")


def test_hard_links_are_one_file(share: Share) -> None:
    share.call(probes.write_text, f"{share.inside}/one", "shared")
    share.guest.python("import os; os.mkdir(f'{root}/d'); os.link(f'{root}/one', f'{root}/d/two')", root=share.inside)
    share.call(probes.append, f"{share.inside}/d/two", " contents")
    one, two = share.call(probes.attributes, f"{share.inside}/one"), share.call(probes.attributes, f"{share.inside}/d/two")
    assert one == two
    assert one["nlink"] == 2
    assert probes.read_text(f"{share.host}/one") == "shared contents"
    share.guest.check("rm", f"{share.inside}/one")
    assert share.call(probes.attributes, f"{share.inside}/d/two")["nlink"] == 1
    share.assert_same()


def test_a_symlink_itself_can_be_hard_linked(share: Share) -> None:
    share.guest.python(
        "import os; os.symlink('t', f'{root}/s'); os.link(f'{root}/s', f'{root}/s2', follow_symlinks=False)", root=share.inside
    )
    assert os.readlink(f"{share.host}/s2") == "t"
    assert os.lstat(f"{share.host}/s").st_ino == os.lstat(f"{share.host}/s2").st_ino


def test_long_symlinks(share: Share) -> None:
    for length in (1, 59, 60, 255, 4095):
        target = ("t" * 200 + "/") * 21
        share.guest.python("import os; os.symlink(target, path)", target=target[:length], path=f"{share.inside}/{length}")
        assert os.readlink(f"{share.host}/{length}") == target[:length]
    share.assert_same()


def test_fifos_and_sockets_connect_processes_of_the_guest(share: Share) -> None:
    os.mkfifo(f"{share.host}/fifo")
    assert share.call(probes.talk_through_fifo, f"{share.inside}/fifo", "through the pipe") == "through the pipe"
    assert share.call(probes.talk_through_socket, f"{share.inside}/socket") == ["hello", True]
