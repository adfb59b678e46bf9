"""Options that decide what of the guest's wishes reaches the host's files, seen on the broker's own descriptors and in INIT."""

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.frontend.checks import raises
from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import LINUX_INIT_FLAGS, ROOT
from tests.support.frontend.serving import own_directory, start
from vfsd.wire import fuse_abi as abi

EVERY_FLAG = LINUX_INIT_FLAGS | abi.FUSE_CREATE_SUPP_GROUP | abi.FUSE_ALLOW_IDMAP | abi.FUSE_DIRECT_IO_ALLOW_MMAP


def broker_flags(fs, name):
    """The open flags of the broker's own descriptor of a file."""
    pid = next(pid for pid in fs.served.daemon.pids() if b"vfsd.broker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{fd}").endswith(f"/{name}"):
            with open(f"/proc/{pid}/fdinfo/{fd}") as info:
                flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
            if not flags & os.O_PATH:
                return flags
    raise AssertionError(f"the broker has not opened {name}")


@pytest.mark.parametrize(
    ("option", "flag"), [("--allow-direct-io", os.O_DIRECT), ("--preserve-noatime", os.O_NOATIME)], ids=["direct-io", "noatime"]
)
@pytest.mark.parametrize("handles", ["never", "prefer"])
def test_a_flag_reaches_the_host_only_if_the_user_says_so(pool, handles, option, flag):
    for extra, expected in (((), 0), ((option,), flag)):
        with own_directory(pool, "options", Options(handles=handles, extra=extra)) as fs:
            fs.put("existing", bytes(8192))
            existing = fs.lookup(b"existing")
            fh = fs.client.open(existing, os.O_RDWR | flag).fh
            assert broker_flags(fs, "existing") & flag == expected
            made, opened = fs.client.create(fs.dir, b"made", flags=os.O_RDWR | flag)
            assert broker_flags(fs, "made") & flag == expected
            fs.client.release(existing, fh)
            fs.client.release(made.nodeid, opened.fh)


def test_direct_io_reads_and_writes(pool):
    with own_directory(pool, "options", Options(extra=("--allow-direct-io",))) as fs:
        entry, opened = fs.client.create(fs.dir, b"file", flags=os.O_RDWR | os.O_DIRECT)
        with raises(errno.EINVAL):
            fs.client.write(entry.nodeid, opened.fh, 1, bytes(4096))  # the host's rule about offsets
        fs.client.release(entry.nodeid, opened.fh)


def test_with_the_write_back_cache_a_file_opened_for_writing_can_be_read(pool):
    """The guest fills its pages before it writes a part of one."""
    with own_directory(pool, "options", Options(extra=("--writeback",))) as fs:
        fs.put("file", b"abc")
        nodeid = fs.lookup(b"file")
        fh = fs.client.open(nodeid, os.O_WRONLY).fh
        assert fs.client.read(nodeid, fh, 0, 10) == b"abc"
        fs.client.release(nodeid, fh)


def test_with_the_write_back_cache_pages_go_where_they_belong_although_the_file_appends(pool):
    with own_directory(pool, "options", Options(extra=("--writeback",))) as fs:
        fs.put("file", b"0123456789")
        nodeid = fs.lookup(b"file")
        fh = fs.client.open(nodeid, os.O_WRONLY | os.O_APPEND).fh
        fs.client.write(nodeid, fh, 4, b"xy", flags=abi.FUSE_WRITE_CACHE, open_flags=os.O_WRONLY | os.O_APPEND)
        assert fs.get("file") == b"0123xy6789"
        fs.client.write(nodeid, fh, 4, b"end", open_flags=os.O_WRONLY | os.O_APPEND)
        assert fs.get("file") == b"0123xy6789end"
        fs.client.release(nodeid, fh)


@pytest.mark.parametrize(
    ("extra", "flag"),
    [
        (("--writeback",), abi.FUSE_WRITEBACK_CACHE),
        (("--allow-mmap",), abi.FUSE_DIRECT_IO_ALLOW_MMAP),
        (("--killpriv-v2",), abi.FUSE_HANDLE_KILLPRIV_V2),
        (("--posix-acl",), abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK | abi.FUSE_SETXATTR_EXT),
        (("--posix-acl=auto",), abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK | abi.FUSE_SETXATTR_EXT),
        (("--security-label",), abi.FUSE_SECURITY_CTX),
        (("--security-label=auto",), abi.FUSE_SECURITY_CTX),
    ],
)
def test_an_option_is_agreed_with_the_guest_only_if_it_was_given(serve, extra, flag):
    assert serve(Options(), init=False).client.init(flags=EVERY_FLAG).flags & flag == 0
    assert serve(Options(extra=extra), init=False).client.init(flags=EVERY_FLAG).flags & flag == flag


def test_listing_with_attributes_can_be_switched_off(serve):
    plus = abi.FUSE_DO_READDIRPLUS | abi.FUSE_READDIRPLUS_AUTO
    assert serve(Options(extra=("--no-readdirplus",)), init=False).client.init(flags=EVERY_FLAG).flags & plus == 0
    assert serve(Options(), init=False).client.init(flags=EVERY_FLAG).flags & plus == plus


@pytest.mark.parametrize(
    ("option", "missing"),
    [
        ("--posix-acl", abi.FUSE_POSIX_ACL),
        ("--posix-acl", abi.FUSE_DONT_MASK),
        ("--posix-acl", abi.FUSE_SETXATTR_EXT),
        ("--security-label", abi.FUSE_SECURITY_CTX),
    ],
)
def test_a_guest_that_cannot_do_what_was_asked_for_is_refused_and_with_auto_served_without(serve, option, missing):
    strict = serve(Options(extra=(option,)), init=False)
    with raises(errno.EPROTO):
        strict.client.init(flags=EVERY_FLAG & ~missing)
    assert strict.daemon.wait_for_log(f"{option}: the guest's kernel cannot do it; use {option}=auto")
    lenient = serve(Options(extra=(f"{option}=auto",)), init=False)
    agreed = lenient.client.init(flags=EVERY_FLAG & ~missing).flags
    assert agreed & (abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK | abi.FUSE_SETXATTR_EXT | abi.FUSE_SECURITY_CTX) == 0
    lenient.client.getattr(ROOT)


def test_id_mapped_mounts_are_agreed_on_where_the_caller_need_not_be_known(serve):
    assert serve(Options(), init=False).client.init(flags=EVERY_FLAG).flags & abi.FUSE_ALLOW_IDMAP
    assert not serve(Options(extra=("--killpriv-v2",)), init=False).client.init(flags=EVERY_FLAG).flags & abi.FUSE_ALLOW_IDMAP


@pytest.mark.parametrize(("cache", "warned"), [("never", True), ("metadata", True), ("auto", False)])
def test_a_write_back_cache_without_a_cache_is_remarked_on(tmp_path, cache, warned):
    with closing(start(tmp_path, Options(cache=cache, extra=("--writeback",)))) as served:
        assert any("--writeback: the guest has no cache to write back" in line for line in served.daemon.log) == warned


@pytest.mark.parametrize("how", ["unlink", "rmdir", "rename"])
@pytest.mark.parametrize("handles", ["never", "prefer"])
def test_with_the_write_back_cache_the_times_of_what_was_just_removed_can_be_set(pool, handles, how):
    """As the guest's kernel does; what fails there its syncfs(2) reports."""
    with own_directory(pool, "options", Options(handles=handles, extra=("--writeback",))) as fs:
        before = fs.served.daemon.fd_census()
        (os.mkdir if how == "rmdir" else os.mknod)(fs.host / "victim")
        nodeid = fs.lookup(b"victim")
        if how == "rename":
            fs.put("other", b"")
            fs.client.rename(fs.dir, b"other", fs.dir, b"victim")
        else:
            getattr(fs.client, how)(fs.dir, b"victim")
        attr = fs.client.setattr(nodeid, mtime_ns=7).attr
        assert (attr.mtime_ns, attr.nlink) == (7, 0)
        fs.client.forget(nodeid)
        fs.served.daemon.wait_for_census(before)


def test_what_a_guest_with_write_back_failed_to_remove_is_not_kept(pool):
    """Removed by the host after that, it is gone for the guest too."""
    with own_directory(pool, "options", Options(handles="prefer", extra=("--writeback",))) as fs:
        os.mkdir(fs.host / "full")
        fs.put("full/file", b"")
        nodeid = fs.lookup(b"full")
        with raises(errno.ENOTEMPTY):
            fs.client.rmdir(fs.dir, b"full")
        os.unlink(fs.host / "full/file")
        os.rmdir(fs.host / "full")
        with raises(errno.ESTALE):
            fs.client.getattr(nodeid)
