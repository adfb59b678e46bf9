"""Making files as the guest's user: one thread, for one block, and the broker ends rather than serve on as somebody else."""

import errno
import os
import stat
import threading

import pytest

from vfsd.broker import credentials as module
from vfsd.broker.credentials import CAP_DAC_OVERRIDE, EXIT_CREDENTIALS_LOST, Caller, Credentials
from vfsd.sandbox import capabilities, filecalls

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


def as_user(credentials, uid, gid, call):
    def run():
        before = status()
        with credentials.of_caller(Caller(uid, gid)):
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
        for name in ("set_thread_gid", "set_thread_uid", "set_thread_effective_capabilities"):
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


@pytest.mark.parametrize("lost", [("set_thread_uid", 0), ("set_thread_gid", 0), ("set_thread_effective_capabilities", 3, 3)])
def test_a_thread_that_cannot_return_ends_the_broker(monkeypatch, lost):
    kernel = Kernel(monkeypatch, fail=[lost])
    with pytest.raises(SystemExit), Credentials(0b11).of_caller(Caller(1000, 1001)):
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
        def settable(self, uid, gid):
            assert (uid, gid) == (70000, 70001)
            return OWN

    kernel = Kernel(monkeypatch)
    with Credentials(0b11, OWN, Squash()).of_caller(Caller(70000, 70001)):
        assert kernel.calls[:2] == [("set_thread_gid", 1001), ("set_thread_uid", 1000)]
