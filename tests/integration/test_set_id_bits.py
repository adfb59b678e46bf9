"""Set-id bits and file capabilities: gone exactly where the host's kernel takes them from such a caller, kept elsewhere.

The operation is made twice: in the guest by the daemon, and by a process of the host that is the same user, on a file of the
same file system. What a guest's kernel does by itself before it sends the operation is done here by `Guest`, as Linux does it.
"""

import os
import stat
import struct

import pytest

from tests.support.frontend.daemon import Options
from tests.support.frontend.fuse_client import LINUX_INIT_FLAGS, FuseClient
from tests.support.frontend.serving import own_directory
from tests.support.on_host import as_user
from vfsd.wire import fuse_abi as abi

ROOT_USER, STRANGER, OWNER = (0, 0), (3000, 3000), (1000, 1000)
FILE_GROUP = 2000
SUID, SGID, BOTH, SGID_WITHOUT_EXEC = 0o4777, 0o2777, 0o6777, 0o2767
# struct vfs_cap_data, revision 2, effective: CAP_NET_RAW. What setcap(8) writes.
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


@pytest.fixture(params=[False, True], ids=["the guest kills", "killpriv-v2"])
def v2(request):
    return request.param


@pytest.fixture
def fs(pool, v2):
    extra = ("--killpriv-v2",) if v2 else ()
    with own_directory(pool, "set-id", Options(request_queues=2, extra=extra)) as fs:
        yield fs


class Guest:
    """A Linux guest's kernel: fs/fuse of 6.1, as far as it concerns set-id bits."""

    def __init__(self, fs, v2, user):
        self.fs, self.v2, self.user = fs, v2, user
        self.client = fs.client
        self.nodeid = fs.lookup(b"file")
        self.kills = user != ROOT_USER  # no CAP_FSETID

    def flag(self, flag):
        return flag if self.v2 and self.kills else 0

    def without_bits(self):
        """What fuse_setattr() makes of the file's mode; None if nothing is to go."""
        mode = self.client.attr(self.nodeid).mode
        new = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            new &= ~stat.S_ISGID
        return None if new == mode else new & 0o7777

    def remove_privileges(self):
        """file_remove_privs(), which leaves it to the daemon with killpriv-v2."""
        if self.kills and not self.v2:
            mode = self.without_bits()
            if mode is not None:
                self.client.setattr(self.nodeid, mode=mode)

    def opened(self, flags=os.O_RDWR):
        """As root opens it: who opened a file does not matter to who writes."""
        return self.client.open(self.nodeid, flags).fh

    def act(self, operation):
        with self.client.acting_as(*self.user):
            operation(self)


def write(guest):
    fh = guest.opened()
    guest.remove_privileges()
    guest.client.write(guest.nodeid, fh, 0, b"x", flags=guest.flag(abi.FUSE_WRITE_KILL_SUIDGID))
    guest.client.release(guest.nodeid, fh)


def truncate(guest):
    mode = guest.without_bits() if guest.kills and not guest.v2 else None
    guest.client.setattr(guest.nodeid, size=2, mode=mode, extra_valid=guest.flag(abi.FATTR_KILL_SUIDGID))


def truncate_opened(guest):
    fh = guest.opened()
    mode = guest.without_bits() if guest.kills and not guest.v2 else None
    guest.client.setattr(guest.nodeid, size=2, fh=fh, mode=mode, extra_valid=guest.flag(abi.FATTR_KILL_SUIDGID))
    guest.client.release(guest.nodeid, fh)


def open_truncating(guest):
    opened = guest.client.open(guest.nodeid, os.O_WRONLY | os.O_TRUNC, open_flags=guest.flag(abi.FUSE_OPEN_KILL_SUIDGID))
    guest.client.release(guest.nodeid, opened.fh)


def create_truncating(guest):
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    _entry, opened = guest.client.create(guest.fs.dir, b"file", 0o600, flags, open_flags=guest.flag(abi.FUSE_OPEN_KILL_SUIDGID))
    guest.client.release(guest.nodeid, opened.fh)


def allocate(guest):
    fh = guest.opened()
    guest.client.fallocate(guest.nodeid, fh, 0, 100)
    guest.client.release(guest.nodeid, fh)


def copy(guest):
    fh = guest.opened()
    assert guest.client.copy_file_range((guest.nodeid, fh, 3), (guest.nodeid, fh, 0), 2) == 2
    guest.client.release(guest.nodeid, fh)


def with_file(flags, call):
    def run():
        fd = os.open("reference", flags)
        call(fd)
        os.close(fd)

    return run


# What the guest does: what a process of the host does.
CONTENTS = {
    write: with_file(os.O_WRONLY, lambda fd: os.pwrite(fd, b"x", 0)),
    truncate: lambda: os.truncate("reference", 2),
    truncate_opened: with_file(os.O_WRONLY, lambda fd: os.ftruncate(fd, 2)),
    open_truncating: with_file(os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    create_truncating: with_file(os.O_WRONLY | os.O_CREAT | os.O_TRUNC, lambda fd: None),
    allocate: with_file(os.O_WRONLY, lambda fd: os.posix_fallocate(fd, 0, 100)),
    copy: with_file(os.O_RDWR, lambda fd: os.copy_file_range(fd, fd, 2, 3, 0)),
}
DECIDED_BY_THE_GUEST = (write, truncate, truncate_opened)  # without killpriv-v2, by a SETATTR before or with it


def make_files(fs, mode, *, capability=False):
    """Two files alike: one for the guest, one for the host."""
    for name in ("file", "reference"):
        path = fs.put(name, b"content", mode=0o600)
        os.chown(path, OWNER[0], FILE_GROUP)
        os.chmod(path, mode)
        if capability:
            os.setxattr(path, b"security.capability", CAPABILITY)


def mode_of(fs):
    return stat.S_IMODE(os.stat(fs.path("file")).st_mode)


def outcome(fs, name):
    """The mode of a file, and whether it has capabilities."""
    path = fs.path(name)
    return oct(stat.S_IMODE(os.stat(path).st_mode)), "security.capability" in os.listxattr(path)


@pytest.mark.parametrize("user", [ROOT_USER, STRANGER], ids=["root", "a stranger"])
@pytest.mark.parametrize("mode", [SUID, SGID, BOTH, SGID_WITHOUT_EXEC], ids=oct)
@pytest.mark.parametrize("operation", CONTENTS)
def test_changing_contents_leaves_the_mode_the_host_would(fs, v2, operation, mode, user):
    make_files(fs, mode)
    guest = Guest(fs, v2, user)
    guest.act(operation)
    assert as_user(*user, CONTENTS[operation], inside=fs.host) == 0
    if mode == SGID_WITHOUT_EXEC and guest.kills and not v2 and operation in DECIDED_BY_THE_GUEST:
        assert mode_of(fs) == mode  # FUSE in the guest leaves the bit, where the host's kernel has a stricter rule
    else:
        assert outcome(fs, "file") == outcome(fs, "reference")
    assert fs.get("file") == fs.get("reference")


@pytest.mark.parametrize("user", [ROOT_USER, STRANGER], ids=["root", "a stranger"])
@pytest.mark.parametrize("operation", CONTENTS)
def test_changing_contents_takes_capabilities_away_whoever_does_it(fs, v2, operation, user):
    make_files(fs, 0o777, capability=True)
    assert outcome(fs, "file") == ("0o777", True)
    Guest(fs, v2, user).act(operation)
    assert as_user(*user, CONTENTS[operation], inside=fs.host) == 0
    assert outcome(fs, "file") == outcome(fs, "reference") == ("0o777", False)


@pytest.mark.parametrize("v2", [True], ids=["killpriv-v2"], indirect=True)
@pytest.mark.parametrize("operation", CONTENTS)
def test_a_set_group_id_bit_without_execution_goes_also_for_a_member_of_the_group(fs, v2, operation):
    """A limit: no request tells the groups of who writes, so whoever is not root is a stranger."""
    make_files(fs, SGID_WITHOUT_EXEC)
    Guest(fs, v2, (3000, FILE_GROUP)).act(operation)
    assert outcome(fs, "file")[0] == "0o767"


# Owner and mode


def give_to(uid, gid):
    def change(guest):
        """chown_common() and fuse_setattr(): also root's takes the bits away."""
        mode = None if guest.v2 else guest.without_bits()
        extra = abi.FATTR_KILL_SUIDGID if guest.v2 else 0
        guest.client.setattr(guest.nodeid, uid=uid, gid=gid, mode=mode, extra_valid=extra)

    return change


@pytest.mark.parametrize(("user", "uid", "gid"), [(ROOT_USER, 77, None), (ROOT_USER, None, 77), (ROOT_USER, 77, 78), (OWNER, None, 4000)])
@pytest.mark.parametrize("mode", [SUID, SGID, BOTH, SGID_WITHOUT_EXEC], ids=oct)
def test_a_change_of_owner_leaves_the_mode_the_host_would(fs, v2, mode, user, uid, gid):
    make_files(fs, mode, capability=True)
    Guest(fs, v2, user).act(give_to(uid, gid))
    new = (-1 if uid is None else uid, -1 if gid is None else gid)
    assert as_user(*user, lambda: os.chown("reference", *new), inside=fs.host, groups=[FILE_GROUP, 4000]) == 0
    assert outcome(fs, "file") == outcome(fs, "reference")


def test_a_mode_that_comes_with_an_owner_or_a_size_is_the_final_one(fs):
    make_files(fs, 0o644)
    nodeid = fs.lookup(b"file")
    assert stat.S_IMODE(fs.client.setattr(nodeid, mode=0o6755, uid=5, gid=6, size=3).attr.mode) == 0o6755
    assert stat.S_IMODE(fs.client.setattr(nodeid, mode=0o755, uid=7).attr.mode) == 0o755
    assert stat.S_IMODE(fs.client.setattr(nodeid, mode=0o4711, size=0).attr.mode) == 0o4711
    assert outcome(fs, "file")[0] == "0o4711"


# While the file is open


@pytest.fixture
def queues(fs):
    """The session's client on each of two queues: a worker each."""
    clients = []
    for queue in (1, 2):
        client = FuseClient(fs.client.device)
        client.queue = queue
        client._unique = queue << 40
        clients.append(client)
    return clients


def test_bits_stay_whichever_worker_writes(fs, queues):
    fs.put("file", mode=0o6755)
    nodeid = fs.lookup(b"file")
    fh = queues[0].open(nodeid, os.O_RDWR).fh
    for round_, client in enumerate(queues * 3):
        client.write(nodeid, fh, round_, b"x")
        assert mode_of(fs) == 0o6755
        assert client.getattr(nodeid, fh).attr.mode & 0o7777 == 0o6755
    fs.client.release(nodeid, fh)


def test_bits_that_are_set_while_the_file_is_open_stay(fs, queues):
    fs.put("file", mode=0o755)
    nodeid = fs.lookup(b"file")
    fh = queues[0].open(nodeid, os.O_WRONLY).fh
    queues[0].write(nodeid, fh, 0, b"x")
    queues[1].setattr(nodeid, mode=0o4755)
    queues[0].write(nodeid, fh, 0, b"x")
    assert mode_of(fs) == 0o4755
    fs.client.release(nodeid, fh)


def test_bits_that_are_taken_away_while_the_file_is_open_do_not_come_back(fs, queues):
    fs.put("file", mode=0o6755)
    nodeid = fs.lookup(b"file")
    fh = queues[0].open(nodeid, os.O_WRONLY).fh
    queues[1].setattr(nodeid, mode=0o755)
    queues[0].write(nodeid, fh, 0, b"x")
    assert mode_of(fs) == 0o755
    queues[1].setattr(nodeid, mode=0o6755)
    queues[1].setattr(nodeid, uid=1000)
    queues[0].write(nodeid, fh, 0, b"x")
    assert mode_of(fs) == 0o755
    fs.client.release(nodeid, fh)


def test_a_new_file_keeps_its_bits(fs, queues):
    entry, opened = queues[0].create(fs.dir, b"file", 0o4755)
    for client in queues:
        client.write(entry.nodeid, opened.fh, 0, b"x")
        assert mode_of(fs) == 0o4755
    fs.client.release(entry.nodeid, opened.fh)


def test_what_the_guest_writes_back_from_its_cache_takes_nothing_away(fs):
    """Its kernel decided when the program wrote."""
    fs.put("file", mode=0o4755)
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid, os.O_RDWR).fh
    with fs.client.acting_as(*STRANGER):
        fs.client.write(nodeid, fh, 0, b"x", flags=abi.FUSE_WRITE_CACHE)
    assert mode_of(fs) == 0o4755
    fs.client.release(nodeid, fh)


def test_bits_stay_through_many_writes_in_flight(fs, queues):
    fs.put("file", mode=0o4755)
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid, os.O_RDWR).fh
    for _ in range(20):
        writes = [queues[0].send_write(nodeid, fh, i * 4096, bytes(4096)) for i in range(40)]
        queues[0].finish_all(writes)
        assert oct(mode_of(fs)) == oct(0o4755)
    fs.client.release(nodeid, fh)


def test_putting_bits_back_does_not_undo_a_change_of_mode_that_is_made_at_the_same_time(fs, queues):
    """A write that is under way while set-id bits are given may still take them (decision 0007); it never brings any back."""
    fs.put("file", mode=0o4755)
    nodeid = fs.lookup(b"file")
    fh = fs.client.open(nodeid, os.O_RDWR).fh
    for round_ in range(60):
        final = (0o4700, 0o4755, 0o711, 0o4711)[round_ % 4]
        writes = [queues[0].send_write(nodeid, fh, i, b"x") for i in range(4)]
        queues[1].setattr(nodeid, mode=final)
        queues[0].finish_all(writes)
        assert oct(mode_of(fs) & 0o777) == oct(final & 0o777)
        assert mode_of(fs) & ~final == 0
    fs.client.release(nodeid, fh)


@pytest.mark.parametrize("v2", [True], ids=["killpriv-v2"], indirect=True)
def test_killpriv_is_agreed_on_only_if_the_guest_offers_it(fs, v2):
    fs.client.destroy()
    assert fs.client.init(flags=LINUX_INIT_FLAGS).flags & abi.FUSE_HANDLE_KILLPRIV_V2
    fs.client.destroy()
    assert not fs.client.init(flags=LINUX_INIT_FLAGS & ~abi.FUSE_HANDLE_KILLPRIV_V2).flags & abi.FUSE_HANDLE_KILLPRIV_V2
