"""Descriptors: with file handles a fixed number whatever the guest looks up; without, a budget, and ENFILE beyond it."""

import errno
import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.frontend.checks import eventually, eventually_stable, raises
from tests.support.frontend.daemon import Options, vfsd
from tests.support.frontend.fuse_client import ROOT
from tests.support.frontend.serving import start

FULL = os.environ.get("VFSD_TEST_FULL") == "1"
LOW_LIMIT = 256
PER_DIRECTORY = 500
LISTING_BYTES = 32768
# Remembered directories are an eighth of the limit; the rest is what requests hold for a moment, and the mount's descriptor.
FIXED = LOW_LIMIT // 8 + 8
MORE_THAN_FIT = 400


def with_hard_limit(share, socket, options):
    """As a service manager with a low limit starts it; vfsd asks for more and cannot have it."""
    return ["prlimit", f"--nofile={LOW_LIMIT}:{LOW_LIMIT}", *vfsd(share, socket, options)]


@pytest.fixture(params=["hard limit", "option"])
def serve_with_few(request, serve):
    """Start a daemon that has 256 descriptors, in both ways; arguments as for Options."""

    def serve_with_few(**options):
        if request.param == "option":
            served = serve(Options(**options, extra=(f"--rlimit-nofile={LOW_LIMIT}",)))
        else:
            served = serve(Options(**options), command=with_hard_limit)
            served.expect_log("hard limit of 256 is used")
        served.expect_log("a request fails with ENFILE")
        return served

    return serve_with_few


def broker_of(daemon):
    return next(pid for pid in daemon.pids() if b"vfsd.broker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def fds_of(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def make_tree(share, files):
    for first in range(0, files, PER_DIRECTORY):
        directory = share / f"d{first}"
        directory.mkdir()
        for number in range(PER_DIRECTORY):
            (directory / f"f{number}").touch()


def look_up_all(served, broker, top=ROOT):
    """Look everything up as find(1) does and forget nothing: how many inodes, and the most descriptors that the broker had."""
    client, found, most = served.client, 0, 0
    for entry in client.list(top, size=LISTING_BYTES, plus=True):
        if entry.entry is None or not entry.entry.nodeid:
            continue
        assert stat.S_ISDIR(entry.entry.attr.mode)
        inner = client.list(entry.entry.nodeid, size=LISTING_BYTES, plus=True)
        found += 1 + sum(bool(one.entry and one.entry.nodeid) for one in inner)
        most = max(most, fds_of(broker))
    return found, most


def look_up_until_enfile(client, parent, names):
    """name → nodeid of those that fit. A refusal is ENFILE: EMFILE would say that the broker itself had none left."""
    known = {}
    with raises(errno.ENFILE):
        for name in names:
            known[name] = client.lookup(parent, name).nodeid
    return known


def forget_all(client, nodeids):
    client.batch_forget([(nodeid, 1) for nodeid in nodeids])


def test_property_08_looking_up_with_handles_takes_a_fixed_number_of_descriptors(serve):
    served = serve(Options(handles="mandatory", extra=("--rlimit-nofile=1024",)))
    files = 1_000_000 if FULL else 10_000
    make_tree(served.share, files)
    broker = broker_of(served.daemon)
    before = served.daemon.fd_count()
    found, most = look_up_all(served, broker)
    assert found == files + files // PER_DIRECTORY
    assert most <= fds_of(broker) + 1024 // 8 + 8
    after = eventually_stable(served.daemon.fd_count, 2.0)
    assert after <= before + 2, "all that stays is the mount's descriptor"


def test_property_08_looking_up_without_handles_takes_one_descriptor_each(serve):
    served = serve(Options(handles="never"))
    make_tree(served.share, PER_DIRECTORY)
    broker = broker_of(served.daemon)
    before = eventually_stable(lambda: fds_of(broker))
    found, _most = look_up_all(served, broker)
    assert eventually_stable(lambda: fds_of(broker)) == before + found
    served.new_session()
    assert eventually(lambda: fds_of(broker) == before)


def test_property_50_with_handles_256_descriptors_suffice_for_find(serve_with_few):
    served = serve_with_few(handles="mandatory")
    files = 100_000 if FULL else 20_000
    make_tree(served.share, files)
    broker = broker_of(served.daemon)
    before = fds_of(broker)
    found, most = look_up_all(served, broker)
    assert found == files + files // PER_DIRECTORY
    assert most <= before + FIXED
    assert served.unexpected_log() == []


def test_property_50_without_handles_the_guest_gets_enfile_until_it_forgets(serve_with_few):
    served = serve_with_few(handles="never")
    client = served.client
    names = [b"file-%d" % number for number in range(MORE_THAN_FIT)]
    for name in names:
        (served.share / os.fsdecode(name)).touch()
    fh = client.opendir(ROOT).fh
    before = eventually_stable(served.daemon.fd_census, 2.0)  # a directory just used is held for a second
    for _ in range(3):
        known = look_up_until_enfile(client, ROOT, names)
        assert 50 < len(known) < LOW_LIMIT
        assert client.attr(next(iter(known.values()))).nlink == 1, "what is known still works"
        assert client.lookup(ROOT, names[0]).nodeid == known[names[0]], "and is found again"
        client.forget(known[names[0]])
        forget_all(client, known.values())
        served.daemon.wait_for_census(before)
    client.releasedir(ROOT, fh)
    assert served.daemon.running
    assert served.unexpected_log() == []


def test_property_50_a_listing_names_what_it_could_not_look_up(serve_with_few):
    served = serve_with_few(handles="never")
    client = served.client
    names = {b"file-%d" % number for number in range(MORE_THAN_FIT)}
    for name in names:
        (served.share / os.fsdecode(name)).touch()
    for _ in range(2):
        listed = {entry.name: entry.entry.nodeid for entry in client.list(ROOT, size=LISTING_BYTES, plus=True)}
        assert listed.keys() == names | {b".", b".."}
        known = [listed[name] for name in names if listed[name]]
        assert 50 < len(known) < LOW_LIMIT
        missing = [name for name in names if not listed[name]]
        assert len(look_up_until_enfile(client, ROOT, missing)) <= 1, "the directory's own descriptor was given back"
        forget_all(client, known)
        assert client.lookup(ROOT, missing[-1]).nodeid
        served.new_session()
    assert served.unexpected_log() == []


def test_property_50_many_at_once_beyond_the_budget_are_enfile_too(serve_with_few):
    served = serve_with_few(handles="never")
    client = served.client
    for number in range(MORE_THAN_FIT):
        (served.share / f"file-{number}").touch()
    outcomes = set()
    for first in range(0, MORE_THAN_FIT, 20):
        pending = [client.send(1, ROOT, b"file-%d\0" % number, 128, kick=False) for number in range(first, first + 20)]
        client.device.rings[client.queue].kick()
        client.finish_all(pending)
        for one in pending:
            try:
                client.result(one)
                outcomes.add(0)
            except OSError as error:
                outcomes.add(error.errno)
    assert outcomes == {0, errno.ENFILE}
    assert served.daemon.running


def test_property_50_open_files_are_of_the_same_budget(serve_with_few):
    """Opened again and again, one file takes a descriptor each time; then ENFILE, and a release makes room."""
    served = serve_with_few(handles="mandatory")
    client = served.client
    (served.share / "file").write_bytes(b"content")
    nodeid = client.lookup(ROOT, b"file").nodeid
    fhs = []
    with raises(errno.ENFILE):
        while len(fhs) < MORE_THAN_FIT:
            fhs.append(client.open(nodeid).fh)
    assert {client.read(nodeid, fh, 0, 100) for fh in fhs} == {b"content"}, "also through those whose copies the worker gave up"
    client.release(nodeid, fhs.pop())
    fhs.append(client.open(nodeid).fh)
    for fh in fhs:
        client.release(nodeid, fh)
    assert served.unexpected_log() == []


def test_the_mounts_of_an_ended_session_are_given_back(tmp_path):
    files = 1_000_000 if FULL else 5_000
    sub = tmp_path / "share" / "sub"
    sub.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "vfsd-test", sub], check=True)
    try:
        make_tree(sub, files)
        served = start(tmp_path, Options(handles="mandatory"))
        try:
            broker = broker_of(served.daemon)
            look_up_all(served, broker, served.client.lookup(ROOT, b"sub").nodeid)
            assert any(path.startswith("/sub") for path in open_paths(broker)), "the guest knows its inodes"
            served.new_session()
            assert eventually(lambda: not any(path.startswith("/sub") for path in open_paths(broker)))
        finally:
            served.close()
    finally:
        subprocess.run(["umount", "-l", sub], check=False, capture_output=True)


def open_paths(pid):
    """What a process has open, as it sees it itself."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def test_a_new_session_has_the_whole_budget_at_once(serve):
    """What the old one left may not be closed yet, but it is not in the way of the new one."""
    served = serve(Options(handles="never", extra=("--rlimit-nofile=1024",)))
    names = [b"file-%d" % number for number in range(1200)]
    for name in names:
        (served.share / os.fsdecode(name)).touch()
    most = len(look_up_until_enfile(served.client, ROOT, names))
    for _ in range(5):
        served.new_session()
        assert len(look_up_until_enfile(served.client, ROOT, names)) == most
