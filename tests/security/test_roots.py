"""What is left of the host's files: for a broker the share, for control and workers nothing; the filter left out on purpose."""

import errno
import os
import stat
import subprocess

import pytest

from tests.security.sandbox import Sandbox, broker, control, worker
from vfsd.sandbox.census import NAMESPACES, take_census

EMPTY = {"worker": worker, "control": control}


@pytest.fixture
def share(tmp_path):
    """A share with an outside, a symlink to it, a device node, and another file system mounted inside."""
    (tmp_path / "secret").write_text("outside")
    inside = tmp_path / "share"
    for path in (inside / "directory", inside / "mounted"):
        path.mkdir(parents=True)
    (inside / "file").write_text("inside")
    (inside / "link").symlink_to("file")
    (inside / "escape").symlink_to("/etc")
    os.mknod(inside / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    subprocess.run(["mount", "-t", "tmpfs", "inner", inside / "mounted"], check=True)
    subprocess.run(["mount", "--make-shared", inside / "mounted"], check=True)
    try:
        yield str(inside)
    finally:
        subprocess.run(["umount", inside / "mounted"], check=True)


def try_in(sandbox, spec, expression):
    return sandbox.evaluate(spec, expression, filtered=False)


# --- nothing: control and workers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", EMPTY)
def test_control_and_workers_have_their_own_namespaces_and_an_empty_root(sandbox: Sandbox, role):
    ours = take_census(os.getpid()).namespaces
    with sandbox.holding(EMPTY[role]()) as census:
        differing = {kind for kind in NAMESPACES if census.namespaces[kind] != ours[kind]}
        assert differing == {"mnt", "net", "ipc", "uts"}
        assert census.root_entries == ()
        with open(f"/proc/{census.pid}/mountinfo") as file:
            (only,) = file.read().splitlines()
        assert " ro,nosuid,nodev,noexec" in only
        with open(f"/proc/{census.pid}/net/dev") as file:
            assert [line.split(":")[0].strip() for line in file.readlines()[2:]] == ["lo"]


def test_two_workers_share_no_namespace(sandbox: Sandbox):
    with sandbox.holding(worker()) as one, sandbox.holding(worker()) as other:
        for kind in ("mnt", "net", "ipc", "uts"):
            assert one.namespaces[kind] != other.namespaces[kind]


@pytest.mark.parametrize("mode", ["namespace", "chroot"])
@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/fd", "/../etc/passwd", "../../etc/passwd"])
def test_no_file_of_the_host_has_a_name(sandbox: Sandbox, mode, path):
    assert try_in(sandbox, worker(sandbox=mode), f"errno_of(os.stat, {path!r})") in (errno.ENOENT, errno.EACCES)


@pytest.mark.parametrize("mode", ["namespace", "chroot"])
def test_nothing_can_be_made_in_the_empty_root(sandbox: Sandbox, mode):
    for thing in ("os.mkdir", "os.listdir", "os.mkfifo"):
        assert try_in(sandbox, worker(sandbox=mode), f"errno_of({thing}, '/x')") in (errno.EROFS, errno.EACCES, errno.ENOENT)


def test_chroot_mode_leaves_no_directory_behind(sandbox: Sandbox):
    before = set(os.listdir("/tmp"))
    try_in(sandbox, worker(sandbox="chroot"), "None")
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("vfsd-empty-")]


def test_landlock_holds_where_a_descriptor_of_a_directory_was_given(sandbox: Sandbox, share):
    directory = os.open(share, os.O_RDONLY | os.O_DIRECTORY)
    os.chmod(share, 0o777)
    try:
        spec = {"fds": [directory], "sandbox": "none", "enter": None}
        attempts = {
            "errno_of(os.open, 'file', os.O_RDONLY, dir_fd=fds[0])": errno.EACCES,
            "errno_of(os.open, '../secret', os.O_RDONLY, dir_fd=fds[0])": errno.EACCES,
            "errno_of(os.open, '/etc/passwd', os.O_RDONLY)": errno.EACCES,
            "errno_of(os.mkdir, 'made', dir_fd=fds[0])": errno.EACCES,
            "errno_of(os.unlink, 'file', dir_fd=fds[0])": errno.EACCES,
            "errno_of(os.symlink, 'x', 'made', dir_fd=fds[0])": errno.EACCES,
            "errno_of(os.execve, '/bin/true', ['true'], {})": errno.EACCES,
            "errno_of(os.listdir, fds[0])": 0,  # what was given is usable
        }
        for expression, expected in attempts.items():
            assert try_in(sandbox, worker(**spec), expression) == expected, expression
    finally:
        os.close(directory)


def test_without_the_filter_a_worker_still_gets_no_privilege(sandbox: Sandbox):
    attempts = {
        "errno_of(os.setresuid, 0, 0, 0)": errno.EPERM,
        "errno_of(os.setgroups, [0])": errno.EPERM,
        "errno_of(os.chroot, '/')": errno.EACCES,  # not even to be entered
        "libc.unshare(0x40000000)": -1,  # CLONE_NEWNET
        "libc.mount(b'x', b'/', b'tmpfs', 0, None)": -1,
        "libc.ptrace(16, 1, None, None)": -1,  # PTRACE_ATTACH
    }
    for expression, expected in attempts.items():
        assert try_in(sandbox, worker(), expression) == expected, expression


# --- the share: the broker ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["namespace", "chroot"])
def test_the_share_is_the_brokers_root_and_has_no_parent(sandbox: Sandbox, share, mode):
    spec = broker(share, sandbox=mode)
    inside = sorted(os.listdir(share))
    assert try_in(sandbox, spec, "sorted(os.listdir(share.root.fileno()))") == inside
    assert try_in(sandbox, spec, "sorted(os.listdir(os.open('..', os.O_RDONLY, dir_fd=share.root.fileno())))") == inside
    assert try_in(sandbox, spec, "sorted(os.listdir('/../../..'))") == inside
    assert try_in(sandbox, spec, "errno_of(os.stat, '../secret', dir_fd=share.root.fileno())") == errno.ENOENT
    assert try_in(sandbox, spec, "errno_of(os.stat, '/etc/passwd')") == errno.ENOENT


def test_the_broker_sees_the_mounts_of_the_share_and_no_others(sandbox: Sandbox, share):
    with sandbox.holding(broker(share)) as census, open(f"/proc/{census.pid}/mountinfo") as file:
        mounts = [line.split() for line in file]
    assert [mount[4] for mount in mounts] == ["/", "/mounted"]
    for mount in mounts:
        assert {"nosuid", "nodev", "nosymfollow"} <= set(mount[5].split(","))


def test_an_own_descriptor_can_be_opened_again_by_proc_self_fd(sandbox: Sandbox, share):
    reopen = "os.read(os.open(str(os.open('/file', os.O_PATH)), os.O_RDONLY, dir_fd=share.proc_self_fd.fileno()), 10).decode()"
    for mode in ("namespace", "chroot", "none"):
        path = "/file" if mode != "none" else f"{share}/file"
        assert try_in(sandbox, broker(share, sandbox=mode), reopen.replace("/file", path)) == "inside"


def test_the_brokers_procfs_shows_processes_only(sandbox: Sandbox, share):
    up = "os.listdir(os.open('../..', os.O_RDONLY, dir_fd=share.proc_self_fd.fileno()))"
    assert not {"sys", "sysrq-trigger", "kcore", "kmsg"} & set(try_in(sandbox, broker(share), up))


def test_no_symlink_in_the_share_is_followed(sandbox: Sandbox, share):
    for name in ("link", "escape/passwd"):
        assert try_in(sandbox, broker(share), f"errno_of(os.open, {name!r}, os.O_RDONLY, dir_fd=share.root.fileno())") == errno.ELOOP
    assert try_in(sandbox, broker(share), "os.readlink('link', dir_fd=share.root.fileno())") == "file"
    assert try_in(sandbox, broker(share), "errno_of(os.open, 'link', os.O_PATH | os.O_NOFOLLOW, dir_fd=share.root.fileno())") == 0


def test_no_device_in_the_share_can_be_opened(sandbox: Sandbox, share):
    assert try_in(sandbox, broker(share), "errno_of(os.open, 'null', os.O_RDWR, dir_fd=share.root.fileno())") == errno.EACCES


def test_writable_means_writable(sandbox: Sandbox, share):
    assert try_in(sandbox, broker(share), "errno_of(os.mkdir, 'made', dir_fd=share.root.fileno())") == 0
    assert try_in(sandbox, broker(share), "errno_of(os.mkdir, 'mounted/made', dir_fd=share.root.fileno())") == 0
    assert os.path.isdir(f"{share}/mounted/made")


def test_readonly_reaches_the_mounts_inside(sandbox: Sandbox, share):
    for name in ("made", "mounted/made"):
        assert try_in(sandbox, broker(share, readonly=True), f"errno_of(os.mkdir, {name!r}, dir_fd=share.root.fileno())") == errno.EROFS
    os.mkdir(f"{share}/by-the-host")  # it is the broker's view that is read-only
    assert os.path.isdir(f"{share}/by-the-host")


def test_mounts_of_the_host_come_through(sandbox: Sandbox, share):
    later = f"{share}/mounted/later"
    os.mkdir(later)
    with sandbox.holding(broker(share)) as census:
        subprocess.run(["mount", "-t", "tmpfs", "later", later], check=True)
        try:
            with open(f"/proc/{census.pid}/mountinfo") as file:
                assert " /mounted/later " in file.read()
        finally:
            subprocess.run(["umount", later], check=True)


def test_mounts_of_the_broker_do_not_go_out(sandbox: Sandbox, share):
    host_mounts = os.open("/proc/self/mountinfo", os.O_RDONLY)
    try:
        spec = broker(share, lock=False, fds=[host_mounts])
        mount = "libc.mount(b'leaked', b'/mounted', b'tmpfs', 0, None)"
        seen = try_in(sandbox, spec, f"{mount}, os.read(fds[0], 1 << 20).decode()")
    finally:
        os.close(host_mounts)
    assert seen[0] == 0
    assert "inner" in seen[1]
    assert "leaked" not in seen[1]


def test_the_whole_host_can_be_shared(sandbox: Sandbox):
    assert try_in(sandbox, broker("/"), "sorted(os.listdir('/'))") == sorted(os.listdir("/"))


@pytest.mark.parametrize("mode", ["namespace", "chroot", "none"])
def test_a_share_that_is_no_directory_is_refused(sandbox: Sandbox, share, mode):
    for path, code in ((f"{share}/file", "ENOTDIR"), (f"{share}/missing", "ENOENT")):
        outcome = sandbox.run(broker(path, sandbox=mode))
        assert "open the shared directory" in outcome.config_error
        assert code in outcome.config_error
        assert "--shared-dir" in outcome.config_error


def test_broker_and_worker_pid_namespaces_are_their_own(sandbox: Sandbox, share):
    child = broker(share, attempt="evaluate", expression="os.getpid(), os.readlink('../../self', dir_fd=share.proc_self_fd.fileno())")
    spec = broker(share, enter=None, lock=False, attempt="supervise", child=child)
    outcome = sandbox.run(spec, filtered=False)
    assert outcome.value["said"] == '{"value": [1, "1"]}'
