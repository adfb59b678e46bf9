"""semantics.md, property 28: whichever system call of an operation fails, nothing is lost and nothing is counted.

Each message is sent again and again, its first, second, third … system call failing, until it comes through without.
"""

import errno
import inspect
import os
import stat
from collections import Counter

import pytest

from tests.support.broker import Bench
from tests.support.messages import sample
from vfsd.broker.inode_store import ROOT_NODEID
from vfsd.broker.requests import HANDLERS
from vfsd.sandbox import filecalls
from vfsd.wire import attr
from vfsd.wire import broker_messages as wire

pytestmark = pytest.mark.root  # handles are opened

# By these the broker reaches files. Not close(2), which frees the descriptor whatever it says, nor what gives a thread its
# own ids back, whose failure ends the broker.
OS_CALLS = (
    "open", "dup", "fstat", "mkdir", "mknod", "symlink", "link", "unlink", "rmdir", "chmod", "readlink", "ftruncate", "fstatvfs",
    "fsync", "fdatasync", "getxattr", "setxattr", "listxattr", "removexattr",
)  # fmt: skip
# Whatever else is written for the broker there is tried without being named here.
FILE_CALLS = tuple(
    name
    for name, call in vars(filecalls).items()
    if inspect.isfunction(call) and call.__module__ == filecalls.__name__ and not name.startswith(("_", "set_thread_"))
)
ERRNOS = (errno.EMFILE, errno.ENOMEM, errno.EINTR, errno.ESTALE)
ME = {"uid": os.getuid(), "gid": os.getgid()}
# Variants of messages: fields that decide which calls are made.
VARIANTS = {
    wire.SetAttr: [
        {"valid": attr.SET_MODE, "mode": 0o600}, {"valid": attr.SET_UID | attr.SET_GID, **ME}, {"valid": attr.SET_SIZE, "fh": 0},
        {"valid": attr.SET_SIZE}, {"valid": attr.SET_MTIME_NOW},
    ],
    wire.MkNod: [{"mode": stat.S_IFREG | 0o600}, {"mode": stat.S_IFIFO | 0o600}],
    wire.Open: [{"flags": os.O_RDWR}, {"flags": os.O_RDWR | os.O_TRUNC}],
    wire.Create: [{"flags": os.O_RDWR, "mode": 0o600}, {"flags": os.O_RDWR, "name": b"file"}],
    wire.TmpFile: [{"flags": os.O_RDWR, "mode": 0o600}],
    wire.FSync: [{"data_only": 0}, {"data_only": 1}],
    wire.Fetch: [{}, {"nodeid": "directory", "fh": "directory"}],
    wire.Ioctl: [{"command": filecalls.FS_IOC_GETFLAGS}],
    wire.FAllocate: [{"length": 4096}],
    wire.Access: [{"mask": 4}],
    wire.ReadLink: [{"nodeid": "link"}],
    wire.OpenDir: [{"nodeid": "directory"}],
    wire.SetLock: [{"flock": 1}],  # the first POSIX lock of a session waits for what workers say
}  # fmt: skip
NEEDS_NO_CALL = {wire.Flush}  # what it does is close(2)


class FailingCalls:
    """Counts the calls at the boundary to the kernel; the one whose turn it is fails."""

    def __init__(self, monkeypatch):
        self._turn = None
        self._errno = 0
        self._count = 0
        for module, names in ((os, OS_CALLS), (filecalls, FILE_CALLS)):
            for name in names:
                monkeypatch.setattr(module, name, self._wrap(getattr(module, name)))

    def _wrap(self, real):
        def call(*arguments, **named):
            if self._turn is not None:
                self._count += 1
                if self._count == self._turn:
                    raise OSError(self._errno, os.strerror(self._errno))
            return real(*arguments, **named)

        return call

    def arm(self, turn, number):
        self._turn, self._errno, self._count = turn, number, 0

    def disarm(self):
        """Whether a call failed."""
        failed = self._turn is not None and self._count >= self._turn
        self._turn = None
        return failed


class Scene:
    """A share with one of each, a worker that knows them, and what may not change by a request that fails."""

    def __init__(self, path, mode):
        self._path = path
        (path / "file").write_bytes(b"content")
        (path / "directory").mkdir()
        (path / "link").symlink_to("file")
        self.bench = Bench(path, inode_file_handles=mode)
        self.worker = self.bench.add(0)
        self.bench.begin_session()
        self.nodeids = {name: self.worker.lookup(name.encode()) for name in ("file", "directory", "link")}
        self.counted = Counter(self.nodeids.values())
        self.fhs = {"file": self._open(wire.Open(self.nodeids["file"], os.O_RDWR))}
        self.fhs["directory"] = self._open(wire.OpenDir(self.nodeids["directory"]))
        self._round = 0

    def _open(self, message):
        got = self.worker.ask_ok(message)
        got.fd.close()
        return got.fields[0]

    def message(self, kind, variant):
        """Of names that are not there for what makes them, and of one that is for what takes it away."""
        self._round += 1
        name = b"new-%d" % self._round
        if kind in (wire.Unlink, wire.Rename):
            (self._path / os.fsdecode(name)).touch()
        elif kind is wire.RmDir:
            (self._path / os.fsdecode(name)).mkdir()
        elif kind in (wire.Lookup, wire.LookupMany):
            (self._path / os.fsdecode(name)).touch()
        fields = {
            "nodeid": self.nodeids["file"], "fh": self.fhs["file"], "parent": ROOT_NODEID, "new_parent": self.nodeids["directory"],
            "name": name, "new_name": name, "names": [name, b"file", b"missing"], "target": b"target", **ME,
        } | variant  # fmt: skip
        if fields["nodeid"] in self.nodeids:
            fields["nodeid"] = self.nodeids[fields["nodeid"]]
        if fields["fh"] in self.fhs:
            fields["fh"] = self.fhs[fields["fh"]]
        return sample(kind, **fields)

    def held(self):
        """Remembered directories are let go first: they are closed a moment later anyway."""
        share = self.bench.share
        share.paths.sweep(float("inf"))
        return len(os.listdir("/proc/self/fd")), len(share.store), share.store.fd_count, len(share.files), len(share.mounts)

    def count(self, kind, got):
        """Keep what the guest would forget."""
        if kind is wire.LookupMany:
            self.counted.update(nodeid for error, nodeid, _attr in got.fields if not error)
        elif wire.SPEC_OF[kind].reply[:2] == wire.SPEC_OF[wire.Lookup].reply:
            self.counted[got.fields[0]] += 1

    def forget_all(self):
        pairs = [number for pair in self.counted.items() for number in pair]
        self.worker.send(wire.Forget(pairs))
        self.bench.pump()


def rows():
    for kind in HANDLERS:
        if wire.SPEC_OF[kind].reply is not None:
            for variant in VARIANTS.get(kind, [{}]):
                yield pytest.param(kind, variant, id=" ".join([kind.__name__, *map(str, variant.values())]))


@pytest.fixture(params=["never", "mandatory"])
def scene(request, tmp_path):
    scene = Scene(tmp_path, request.param)
    yield scene
    scene.bench.close()


@pytest.mark.parametrize(("kind", "variant"), list(rows()))
def test_property_28_whichever_call_fails_nothing_is_lost_and_nothing_counted(scene, monkeypatch, kind, variant):
    calls = FailingCalls(monkeypatch)
    failures, refused = 0, set()
    for number in ERRNOS:
        for turn in range(1, 40):
            message = scene.message(kind, variant)
            before = scene.held()
            calls.arm(turn, number)
            got = scene.worker.ask(message)
            failed = calls.disarm()
            if got.fd is not None:
                got.fd.close()
            failures += failed
            if not failed:
                refused.add(got.errno)
            if got.errno:
                assert scene.held() == before, f"call {turn} failed with {errno.errorcode[number]}"
            else:
                scene.count(kind, got)
            if not failed:
                break
        else:
            pytest.fail("never comes through")
    scene.forget_all()
    assert len(scene.bench.share.store) == 1, "a lookup was counted that no answer told of"
    # A message that needs no call, or is refused before its first one, has nothing that could fail.
    assert failures or refused != {0} or kind in NEEDS_NO_CALL
