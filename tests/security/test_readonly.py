"""--readonly against a worker that was taken over: it sends whatever the protocol has, and nothing on the host changes.

The broker is the real process. In namespace mode its mounts are read-only too; a file system that the host mounts later
inside the share is not, and in chroot mode nothing is: there the broker's own refusal is all there is.
"""

import errno
import fcntl
import os

import pytest

from tests.support.broker_process import BrokerProcess
from tests.support.file_systems import Mounts
from tests.support.messages import sample
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.requests import HANDLERS
from vfsd.sandbox import filecalls
from vfsd.sandbox.seccomp import load_policy
from vfsd.wire import attr
from vfsd.wire import broker_messages as wire

ME = {"uid": 0, "gid": 0}
# Fields with which a message does what it can do at most.
WORST = {
    wire.SetAttr: [
        {"valid": valid, "mode": 0o777, "size": 1, "mtime": 1, **ME}
        for valid in (attr.SET_MODE, attr.SET_UID | attr.SET_GID, attr.SET_SIZE, attr.SET_MTIME, attr.SET_ATIME_NOW, 0)
    ],
    wire.MkNod: [{"mode": 0o100600}, {"mode": 0o010600}],
    wire.Open: [{"flags": flags} for flags in (os.O_WRONLY, os.O_RDWR, os.O_ACCMODE, os.O_TRUNC)],
    wire.Create: [{"flags": os.O_RDWR}, {"flags": os.O_RDWR | os.O_TRUNC, "name": b"file"}, {"name": b"file"}],
    wire.TmpFile: [{"flags": os.O_RDWR}],
    wire.FAllocate: [{"length": 1 << 20}, {"mode": 3, "length": 4096}],
    wire.Access: [{"mask": 2}],
    wire.Ioctl: [{"command": command, "argument": bytes(filecalls.IOCTL_BYTES[command])} for command in filecalls.IOCTLS_THAT_WRITE],
    wire.SetLock: [{"kind": 1, "flock": 1}],
}
# Refused by what they ask for, not by their row: what else they can ask for is harmless.
REFUSED_BY_FIELDS = {wire.Open, wire.Access, wire.Ioctl}


def messages(nodeid, parent, fh):
    """(message, whether it must be refused) of every kind that the broker has."""
    for kind, row in HANDLERS.items():
        for worst in WORST.get(kind, [{}]):
            fields = {
                "nodeid": nodeid, "fh": fh, "parent": parent, "new_parent": parent, "name": b"made", "new_name": b"gone", **ME,
                "names": [b"file"], "target": b"target", "value": b"value", "set_id_bits": 0o6000,
            }  # fmt: skip
            if kind in (wire.Unlink, wire.Rename, wire.Lookup):
                fields["name"] = b"file"
            elif kind is wire.RmDir:
                fields["name"] = b"empty"
            elif "Xattr" in kind.__name__:
                fields["name"] = b"user.name"
            yield sample(kind, **(fields | worst)), row.writes or kind in REFUSED_BY_FIELDS


def snapshot(folder):
    """Everything below a folder that a writer could change: attributes without the access time, contents, targets."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        seen = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        attributes = (seen.st_ino, seen.st_mode, seen.st_nlink, seen.st_uid, seen.st_gid, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}
        found[path] = (attributes, content, xattrs)
    return found


def fill(folder):
    (folder / "file").write_bytes(b"content" * 1000)
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("file")
    os.chmod(folder / "file", 0o6755)


@pytest.fixture
def mounts(tmp_path):
    with Mounts(tmp_path) as mounts:
        mounts.tmpfs(tmp_path / "share", shared=True)
        for name in ("early", "late"):
            (tmp_path / "share" / name).mkdir()
        fill(tmp_path / "share")
        fill(mounts.tmpfs(tmp_path / "share" / "early"))
        yield mounts


@pytest.fixture(params=["never", "mandatory"])
def handles(request):
    return request.param


def start(share, handles, sandbox):
    return BrokerProcess(share, "--readonly", "--sandbox", sandbox, "--inode-file-handles", handles, "--xattr")


@pytest.mark.parametrize("sandbox", ["namespace", "chroot"])
def test_a_taken_over_worker_changes_nothing_in_a_read_only_share(mounts, tmp_path, handles, sandbox):
    share = tmp_path / "share"
    with start(share, handles, sandbox) as broker:
        fill(mounts.tmpfs(share / "late"))  # writable, and mounted after the start
        before = snapshot(share)
        for place in (b"", b"early/", b"late/"):
            parent = broker.lookup(place[:-1]) if place else ROOT_NODEID
            nodeid = broker.lookup(place + b"file")
            fh, fd = broker.open(wire.Open(nodeid, os.O_RDONLY))
            fd.close()
            for message, must_be_refused in messages(nodeid, parent, fh):
                if wire.SPEC_OF[type(message)].reply is None:
                    continue
                number = broker.errno_of(message)
                assert number == errno.EROFS or not must_be_refused, (place, message, number)
        assert snapshot(share) == before
        assert not [line for line in broker.drain_log() if "bug in" in line]


def test_donated_descriptors_of_a_read_only_share_can_only_be_read(mounts, tmp_path, handles):
    share = tmp_path / "share"
    with start(share, handles, "namespace") as broker:
        fill(mounts.tmpfs(share / "late"))
        before = snapshot(share)
        for place in (b"", b"early/", b"late/"):
            nodeid = broker.lookup(place + b"file")
            fh, opened = broker.open(wire.Open(nodeid, os.O_RDONLY))
            _, directory = broker.open(wire.OpenDir(broker.lookup(place + b"empty")))
            again = broker.ask(wire.Fetch(nodeid, fh)).fd
            broker.errno_of(wire.GetAttr(nodeid))
            path = broker.ask(wire.GetAttr(nodeid)).fd
            with opened, directory, again, path:
                for fd in (opened, again, directory):
                    assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
                assert fcntl.fcntl(path.fileno(), fcntl.F_GETFL) & os.O_PATH
                for fd in (opened, again, path):
                    for write in (lambda fd: os.pwrite(fd, b"x", 0), lambda fd: os.ftruncate(fd, 0)):
                        with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument"):
                            write(fd.fileno())
                    if place != b"late/":  # even root cannot open it again for writing: its mount is read-only
                        with pytest.raises(OSError, match="Read-only"):
                            os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDWR)
        assert snapshot(share) == before


# With a descriptor for reading, on a writable mount, one could still do these: a worker has none of them.
CHANGING = {
    "fchmod", "fchmodat", "fchown", "fchownat", "fsetxattr", "fremovexattr", "utimensat", "ftruncate", "fallocate", "ioctl", "openat",
    "open", "openat2", "open_by_handle_at", "linkat", "unlinkat", "renameat2", "mknodat", "mkdirat", "symlinkat", "mount_setattr",
}  # fmt: skip


def test_a_worker_has_no_call_that_changes_what_it_may_only_read():
    assert CHANGING.isdisjoint({rule.syscall for rule in load_policy().roles["worker"].rules})


def test_a_writable_mount_that_appears_later_is_named_once(mounts, tmp_path, handles):
    share = tmp_path / "share"
    with start(share, handles, "namespace") as broker:
        broker.lookup(b"early/file")
        fill(mounts.tmpfs(share / "late"))
        for _ in range(3):
            broker.lookup(b"late/file")
        assert "/late" in broker.wait_for_log("writable")
        broker.lookup(b"file")
        assert len([line for line in broker.drain_log() if "writable" in line]) == 1
