"""Making files as the guest's user: one thread, for one block, and the broker ends rather than serve on as somebody else."""

import errno
import os
import stat
import threading

import pytest

from vfsd.broker import credentials as module
from vfsd.broker.credentials import CAP_DAC_OVERRIDE, CAP_FSETID, EXIT_CREDENTIALS_LOST, Caller, Credentials
from vfsd.errors import ReplyErrno
from vfsd.sandbox import capabilities, filecalls
from vfsd.wire.broker_messages import SESSION_ACTIVE, SESSION_POSIX_ACL, SESSION_SUPP_GROUPS
from vfsd.wire.id_map import make_id_maps

NEEDED = ("CHOWN", "DAC_OVERRIDE", "FSETID", "SETUID", "SETGID")


def on_a_thread(call):
    """What `call` returns on a thread of its own; its exception if it raises one."""
    results = []

    def run():
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def status():
    """(effective uid, effective gid, effective capabilities) of this thread."""
    with open("/proc/thread-self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1]), int(fields["CapEff"], 16)


@pytest.fixture
def credentials():
    permitted = capabilities.permitted()
    if permitted & capabilities.mask_of(NEEDED) != capabilities.mask_of(NEEDED):
        pytest.skip("needs the broker's capabilities")
    return Credentials(permitted)


def groups():
    """This thread's supplementary groups."""
    with open("/proc/thread-self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return [int(group) for group in fields["Groups"].split()]


def as_user(credentials, uid, gid, call, tells=()):
    def run():
        before = status()
        with credentials.of_caller(Caller(uid, gid, 0, tells)):
            result = call()
        assert status() == before
        return result

    return on_a_thread(run)


@pytest.mark.root
@pytest.mark.parametrize(("uid", "gid"), [(1000, 1000), (0, 1000), (1000, 0), (0, 0), (2**32 - 2, 2**32 - 2)])
def test_a_file_belongs_to_the_caller(credentials, tmp_path, uid, gid):
    tmp_path.chmod(0o700)

    def make():
        fd = os.open(tmp_path / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(fd)

    assert as_user(credentials, uid, gid, make) is None
    made = (tmp_path / "file").stat()
    assert (made.st_uid, made.st_gid) == (uid, gid)


@pytest.mark.root
def test_inside_the_block_only_dac_override_is_left(credentials):
    assert as_user(credentials, 1000, 1001, status) == (1000, 1001, CAP_DAC_OVERRIDE)


@pytest.mark.root
@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (0, CAP_DAC_OVERRIDE),
        (SESSION_SUPP_GROUPS, 0),
        (SESSION_POSIX_ACL, CAP_DAC_OVERRIDE),
        (SESSION_POSIX_ACL | SESSION_SUPP_GROUPS, CAP_DAC_OVERRIDE),
    ],
    ids=["neither", "groups", "ACLs", "groups and ACLs"],
)
def test_the_host_decides_where_it_knows_all_that_the_guest_went_by(credentials, flags, kept):
    credentials.begin_session(SESSION_ACTIVE | flags)
    assert as_user(credentials, 1000, 1001, status) == (1000, 1001, kept)
    credentials.begin_session(0)
    assert as_user(credentials, 1000, 1001, status) == (1000, 1001, CAP_DAC_OVERRIDE)


@pytest.mark.root
@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("tells", [(7,), tuple(range(5000, 5000 + 4096))], ids=len)
def test_the_callers_groups_are_this_threads_inside_the_block_and_nobodys_afterwards(credentials, uid, tells):
    def run():
        filecalls.set_thread_groups(())  # as the broker's
        inside = as_user(credentials, uid, 0, groups, tells)
        with credentials.of_caller(Caller(uid, 0, 0, tells)):
            here = groups()
        return inside, here, groups()

    before = groups()
    assert on_a_thread(run) == (list(tells), list(tells), [])
    assert groups() == before


@pytest.mark.root
def test_root_of_the_guest_keeps_its_capabilities_whatever_groups_it_has(credentials):
    assert as_user(credentials, 0, 0, status, (7,)) == status()


@pytest.mark.root
def test_without_fsetid_only_that_capability_is_missing_inside_the_block(credentials):
    def run():
        with credentials.without_fsetid():
            return status()

    uid, gid, effective = status()
    assert effective & CAP_FSETID
    assert on_a_thread(run) == (uid, gid, effective & ~CAP_FSETID)

    def after():
        with pytest.raises(OSError, match="inside"), credentials.without_fsetid():
            raise OSError("inside")
        return status()

    assert on_a_thread(after) == (uid, gid, effective)


@pytest.mark.parametrize("permitted", [None, CAP_DAC_OVERRIDE])
def test_a_broker_without_fsetid_has_nothing_to_give_up(monkeypatch, permitted):
    monkeypatch.setattr(filecalls, "set_thread_effective_capabilities", None)
    with Credentials(permitted).without_fsetid():
        pass


def test_translated_callers_become_who_they_are_on_the_host(monkeypatch):
    ids = make_id_maps(["map:0:100:10", "forbid-guest:50:1"], ["map:0:200:10", "forbid-guest:60:1"])
    kernel = Kernel(monkeypatch)
    credentials = Credentials(0b11, ids=ids)
    with credentials.of_caller(Caller(1, 2, 0, [3, 4])):
        entered = kernel.calls.copy()
    assert entered[:3] == [("set_thread_groups", [203, 204]), ("set_thread_gid", 202), ("set_thread_uid", 101)]
    with credentials.of_caller(Caller(0, 0)):  # the guest's root is not the host's
        assert kernel.calls[-2][0] == "set_thread_uid"
    for caller in (Caller(50, 0), Caller(0, 60), Caller(0, 0, 0, [1, 60])):
        with pytest.raises(ReplyErrno) as refused, credentials.of_caller(caller):
            pytest.fail("it became somebody")
        assert refused.value.errno == errno.EPERM


@pytest.mark.root
def test_other_threads_stay_as_they_are(credentials):
    before = status()
    inside, leave, seen = threading.Event(), threading.Event(), []

    def hold():
        with credentials.of_caller(Caller(1000, 1000)):
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(20)
    seen.append(status())
    leave.set()
    thread.join()
    assert seen == [before]


@pytest.mark.root
def test_a_stranger_to_the_group_gets_no_set_group_id_file(credentials, tmp_path):
    """CVE-2022-0358: in a set-group-id directory of another group."""
    os.chown(tmp_path, 0, 2000)
    tmp_path.chmod(0o2777)

    def make():
        os.close(os.open(tmp_path / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o2775))

    as_user(credentials, 1000, 1000, make)
    made = (tmp_path / "file").stat()
    assert made.st_gid == 2000
    assert not made.st_mode & stat.S_ISGID


@pytest.mark.root
def test_an_error_inside_the_block_passes_and_the_thread_returns(credentials, tmp_path):
    error = as_user_error(credentials, tmp_path)
    assert isinstance(error, FileNotFoundError)


def as_user_error(credentials, tmp_path):
    def run():
        before = status()
        try:
            with credentials.of_caller(Caller(1000, 1000)):
                os.mkdir(tmp_path / "missing" / "dir")
        finally:
            assert status() == before

    return on_a_thread(run)


def test_without_the_capabilities_nobody_is_switched(monkeypatch):
    monkeypatch.setattr(filecalls, "set_thread_gid", None)
    monkeypatch.setattr(filecalls, "set_thread_uid", None)
    with Credentials(None).of_caller(Caller(1000, 1000)):
        assert os.geteuid() == os.getuid()


class Kernel:
    """In place of the calls: records them, and fails where it is told to."""

    def __init__(self, monkeypatch, fail=()):
        self.calls = []
        for name in ("set_thread_groups", "set_thread_gid", "set_thread_uid", "set_thread_effective_capabilities"):
            monkeypatch.setattr(filecalls, name, self.call(name, fail))
        monkeypatch.setattr(module.os, "_exit", self.exit)

    def call(self, name, fail):
        def made(*arguments):
            self.calls.append((name, *arguments))
            if (name, *arguments) in fail:
                raise OSError(22, "refused")

        return made

    def exit(self, code):
        self.calls.append(("exit", code))
        raise SystemExit(code)


def test_ids_that_the_host_refuses_are_an_error_and_undone(monkeypatch):
    kernel = Kernel(monkeypatch, fail=[("set_thread_uid", 1000)])
    with pytest.raises(OSError, match="refused"), Credentials(0b11).of_caller(Caller(1000, 1001)):
        pytest.fail("the block was entered")
    assert kernel.calls[-1] == ("set_thread_gid", 0)
    assert ("set_thread_uid", 0) in kernel.calls


def test_groups_that_the_host_refuses_are_an_error_and_undone(monkeypatch):
    kernel = Kernel(monkeypatch, fail=[("set_thread_groups", [7])])
    with pytest.raises(OSError, match="refused"), Credentials(0b11).of_caller(Caller(1000, 1001, 0, [7])):
        pytest.fail("the block was entered")
    assert kernel.calls[-1] == ("set_thread_groups", ())


@pytest.mark.parametrize(
    "lost", [("set_thread_uid", 0), ("set_thread_gid", 0), ("set_thread_effective_capabilities", 3, 3), ("set_thread_groups", ())]
)
def test_a_thread_that_cannot_return_ends_the_broker(monkeypatch, lost):
    kernel = Kernel(monkeypatch, fail=[lost])
    with pytest.raises(SystemExit), Credentials(0b11).of_caller(Caller(1000, 1001, 0, [7])):
        pass
    assert kernel.calls[-1] == ("exit", EXIT_CREDENTIALS_LOST)


def test_a_thread_that_does_not_get_fsetid_back_ends_the_broker(monkeypatch):
    kernel = Kernel(monkeypatch, fail=[("set_thread_effective_capabilities", CAP_FSETID, CAP_FSETID)])
    with pytest.raises(SystemExit), Credentials(CAP_FSETID).without_fsetid():
        pass
    assert kernel.calls[-1] == ("exit", EXIT_CREDENTIALS_LOST)


@pytest.mark.parametrize(("uid", "gid"), [(0xFFFFFFFF, 1000), (1000, 0xFFFFFFFF), (0, 0xFFFFFFFF)])
def test_minus_one_is_nobody_and_not_ourselves(uid, gid):
    """setresuid(2) takes it for "leave it", so what the guest makes would be root's."""
    with pytest.raises(OSError) as refused, Credentials(0).of_caller(Caller(uid, gid)):
        pytest.fail("it became somebody")
    assert refused.value.errno == errno.EINVAL


OWN = (1000, 1001)


def test_a_broker_that_is_not_uid_0_returns_to_its_own_ids(monkeypatch):
    kernel = Kernel(monkeypatch)
    with Credentials(0b11, OWN).of_caller(Caller(5, 6)):
        assert kernel.calls == [("set_thread_gid", 6), ("set_thread_uid", 5), ("set_thread_effective_capabilities", 0b10, 0b11)]
    assert kernel.calls[3:] == [("set_thread_uid", 1000), ("set_thread_effective_capabilities", 0b11, 0b11), ("set_thread_gid", 1001)]


def test_a_broker_that_is_the_guests_user_itself_keeps_only_dac_override_too(monkeypatch):
    """Not root in the guest, so CVE-2022-0358 concerns it."""
    kernel = Kernel(monkeypatch)
    with Credentials(0b11, OWN).of_caller(Caller(*OWN)):
        assert kernel.calls[-1] == ("set_thread_effective_capabilities", 0b10, 0b11)


def test_ids_that_cannot_be_set_are_squashed_before_the_switch(monkeypatch):
    class Squash:
        def settable_groups(self, groups):
            return groups

        def settable(self, uid, gid):
            assert (uid, gid) == (70000, 70001)
            return OWN

    kernel = Kernel(monkeypatch)
    with Credentials(0b11, OWN, Squash()).of_caller(Caller(70000, 70001)):
        assert kernel.calls[:2] == [("set_thread_gid", 1001), ("set_thread_uid", 1000)]


def test_a_caller_who_is_root_only_here_keeps_no_more_than_any_other(monkeypatch):
    """Squashed to the broker's own id, or translated to 0: set-id bits that he may not have must go (CVE-2022-0358)."""

    class Squash:
        def settable_groups(self, groups):
            return groups

        def settable(self, _uid, _gid):
            return 0, 0

    kernel = Kernel(monkeypatch)
    with Credentials(0b11, (0, 0), Squash()).of_caller(Caller(1000, 1000)):
        assert kernel.calls == [("set_thread_gid", 0), ("set_thread_effective_capabilities", 0b10, 0b11)]
    assert kernel.calls[2:] == [("set_thread_effective_capabilities", 0b11, 0b11), ("set_thread_gid", 0)]
