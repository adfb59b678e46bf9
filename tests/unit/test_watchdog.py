"""The broker's main thread: what it hears, and when it ticks."""

import os
import resource
import socket
import threading

import pytest

from tests.support.broker import Bench
from vfsd.broker.watchdog import _IDLE_TICKS, Watchdog
from vfsd.channel import Channel, ChannelClosed
from vfsd.errors import ConfigError
from vfsd.fds import OwnedFd
from vfsd.wire.broker_messages import Hello
from vfsd.wire.channel import BROKER_TO_SUPERVISOR, SUPERVISOR_TO_CHILD, AddWorker, AreYouWell, IAmWell, Stop


class Pool:
    """In place of the pool: says what the test wants."""

    def __init__(self):
        self.stuck = 0
        self.may_sleep = True
        self.asleep = threading.Event()
        self.ticks = 0
        self.hanging = False

    def promote_if_stuck(self, _now):
        self.ticks += 1
        self.stuck -= 1
        return self.stuck >= 0

    def all_hang(self):
        return self.hanging

    def let_watchdog_sleep(self):
        if self.may_sleep:
            self.asleep.set()
        return self.may_sleep


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def supervisor(bench):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(theirs, SUPERVISOR_TO_CHILD)
    watchdog = Watchdog(channel, bench.server)
    supervisor = Channel(ours, BROKER_TO_SUPERVISOR)
    yield supervisor, watchdog
    channel.close()
    supervisor.close()
    os.close(watchdog._wake_fd)


def test_a_worker_whose_socket_could_not_be_received_ends_it_with_what_to_do(supervisor):
    channel, watchdog = supervisor
    own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with own, OwnedFd(theirs.detach()) as fd:
        channel.send(AddWorker(1), [fd])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # all of which are taken
        try:
            with pytest.raises(ConfigError, match="--rlimit-nofile"):
                watchdog.watch(Pool())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_stop_ends_it(supervisor):
    channel, watchdog = supervisor
    channel.send(Stop())
    watchdog.watch(Pool())


def test_a_supervisor_that_is_gone_ends_it(supervisor):
    channel, watchdog = supervisor
    channel.close()
    with pytest.raises(ChannelClosed):
        watchdog.watch(Pool())


def test_a_worker_it_is_given_is_served(supervisor, bench):
    channel, watchdog = supervisor
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with OwnedFd(theirs.detach()) as fd:
        channel.send(AddWorker(4), [fd])
    channel.send(Stop())
    watchdog.watch(Pool())
    assert set(bench.server.links.by_index) == {4}
    worker = bench.add(5)
    assert worker.errno_of(Hello(1)) == 0
    ours.close()


def test_it_sleeps_after_a_while_without_work_and_is_woken(supervisor):
    channel, watchdog = supervisor
    pool = Pool()
    watching = threading.Thread(target=watchdog.watch, args=(pool,))
    watching.start()
    assert pool.asleep.wait(20)
    assert pool.ticks == _IDLE_TICKS
    pool.asleep.clear()
    watchdog.wake()
    assert pool.asleep.wait(20), "woken, it ticked again until it slept again"
    assert pool.ticks == 2 * _IDLE_TICKS
    channel.send(Stop())
    watching.join(20)
    assert not watching.is_alive()


def test_it_goes_on_ticking_while_there_is_something_to_watch(supervisor):
    channel, watchdog = supervisor
    pool = Pool()
    pool.stuck = 3 * _IDLE_TICKS
    watching = threading.Thread(target=watchdog.watch, args=(pool,))
    watching.start()
    assert pool.asleep.wait(20)
    assert pool.ticks == 4 * _IDLE_TICKS
    channel.send(Stop())
    watching.join(20)
    assert not watching.is_alive()


def test_it_has_the_leader_say_that_it_is_well(supervisor, bench):
    """That this thread runs says little: the answer comes from the one that serves, in its next turn."""
    channel, watchdog = supervisor
    for _ in range(3):
        channel.send(AreYouWell())
    channel.send(Stop())
    watchdog.watch(Pool())
    assert channel.receive() is None
    worker = bench.add(1)
    assert worker.errno_of(Hello(1)) == 0  # takes a turn
    assert channel.receive().message == IAmWell()
    assert channel.receive() is None, "what was asked three times before a turn is answered once"


def test_when_every_thread_hangs_in_the_host_it_says_so_itself(supervisor):
    """Ending vfsd would not mend the host's file systems, but take the guest's mount away."""
    channel, watchdog = supervisor
    pool = Pool()
    pool.hanging = True
    channel.send(AreYouWell())
    channel.send(Stop())
    watchdog.watch(pool)
    assert channel.receive().message == IAmWell()


def test_the_leader_does_each_of_several_wishes_once(bench):
    """Between two packets, in the order of asking; asked for twice before its turn it is still one, afterwards a new one."""
    done = []
    first, second = (lambda: done.append("first")), (lambda: done.append("second"))
    for wish in (first, second, first):
        bench.server.have_leader_call(wish)
    assert done == []
    bench.pump()
    assert done == ["first", "second"]
    bench.server.have_leader_call(first)
    bench.pump()
    assert done == ["first", "second", "first"]
