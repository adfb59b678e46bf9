"""What the kernel says of descriptors: kinds, both ends of a socket, one eventfd in two processes."""

import os
import select
import socket
import subprocess
import sys

import pytest

from vfsd.sandbox.fd_census import read_fds, unix_sockets


def fds():
    found = read_fds(os.getpid())
    assert found is not None
    return found


def test_each_kind_is_told_with_what_it_alone_has(tmp_path):
    path = tmp_path / "odd\nname\x1b"
    path.touch()
    eventfd, pidfd, file = os.eventfd(0), os.pidfd_open(os.getpid()), os.open(path, os.O_PATH)
    with select.epoll() as epoll:
        epoll.register(eventfd)
        found = fds()
        assert found[epoll.fileno()].target == "anon_inode:[eventpoll]"
        assert found[epoll.fileno()].watched == (eventfd,)
    assert found[eventfd].eventfd is not None
    assert found[pidfd].process == os.getpid()
    assert found[file].target.endswith("odd\\nname\\x1b")
    assert found[file].flags & os.O_PATH
    assert found[file].inode == path.stat().st_ino
    assert found[file].mount is not None
    for fd in (eventfd, pidfd, file):
        os.close(fd)
        assert fd not in fds()


def test_one_eventfd_under_two_numbers_is_one_and_two_are_two():
    first, second = os.eventfd(0), os.eventfd(0)
    copy = os.dup(first)
    found = fds()
    assert found[first].eventfd == found[copy].eventfd != found[second].eventfd
    for fd in (first, second, copy):
        os.close(fd)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_both_ends_of_a_socket_know_each_other(kind):
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        found, sockets = fds(), unix_sockets()
        inode, peer = (found[each.fileno()].inode for each in (ours, theirs))
        assert (sockets[inode].kind, sockets[inode].peer, sockets[inode].listens) == (kind, peer, False)
        assert sockets[peer].peer == inode
        theirs.close()
        assert unix_sockets()[inode].peer is None
    assert inode not in unix_sockets()


@pytest.mark.root
def test_sockets_of_another_network_are_told_by_a_process_in_it():
    """The kernel tells those of one namespace only; asking leaves us where we are."""
    script = (
        "import os, socket, sys; s = socket.socketpair(); print(*(os.fstat(e.fileno()).st_ino for e in s), flush=True); sys.stdin.read()"
    )
    command = ["unshare", "--net", sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        ours = os.readlink("/proc/thread-self/ns/net")
        inode, peer = (int(word) for word in other.stdout.readline().split())
        assert inode not in unix_sockets()
        assert unix_sockets(network_of=other.pid)[inode].peer == peer
        assert os.readlink("/proc/thread-self/ns/net") == ours
        other.stdin.close()
    with pytest.raises(FileNotFoundError):
        unix_sockets(network_of=other.pid)


def test_what_kind_of_socket_it_is_is_told_of_every_one():
    with socket.socket(socket.AF_UNIX) as stream, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets, socket.socket() as tcp:
        found = fds()
        assert found[stream.fileno()].protocol.startswith("UNIX")
        assert found[packets.fileno()].protocol == "UNIX"
        assert found[tcp.fileno()].protocol == "TCP"
    file = os.memfd_create("file")
    assert fds()[file].protocol is None
    os.close(file)


def test_a_socket_that_listens_is_told(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        assert unix_sockets()[fds()[listener.fileno()].inode].listens


def test_more_sockets_than_one_packet_holds_are_all_there():
    pairs = [socket.socketpair() for _ in range(1500)] if hard_limit() > 4000 else []
    if not pairs:
        pytest.skip("the limit of open files is too low")
    try:
        sockets = unix_sockets()
        assert all(os.fstat(each.fileno()).st_ino in sockets for pair in pairs for each in pair)
    finally:
        for pair in pairs:
            for each in pair:
                each.close()


def hard_limit():
    import resource  # noqa: PLC0415

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4001 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
