"""The inode store against a model that is plain dictionaries: any order of lookups, forgets, pins and sessions."""

import errno
import stat
import threading
from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vfsd.broker.inode_store import ROOT_NODEID, Identity, InodeStore
from vfsd.errors import ReplyErrno

MOST = 6
FILES = st.integers(1, 8)


class Inode:
    def __init__(self, number, by_fd, fd):
        self.number = number
        self.by_fd = by_fd
        self.fd = fd
        self.lookups = 1
        self.pins = 0
        self.wiped = False  # its session ended before it was free, and what that left has not been fetched


class Comparison(RuleBasedStateMachine):
    pins = Bundle("pins")

    def __init__(self):
        super().__init__()
        self.released = []
        self.store = InodeStore(threading.Lock(), self.released.extend, max_inodes=MOST)
        self.store.insert_root(Identity(b"root", b"root", 1, 1, stat.S_IFDIR), fd=1000, held_mount=True)
        self.model = {}  # every nodeid ever given → Inode, freed ones as None
        self.session = 0
        self.next_fd = 2000

    def alive(self, nodeid):
        inode = self.model.get(nodeid)
        return inode is not None and inode.lookups > 0

    def found(self, number, has_handle):
        for nodeid, inode in self.model.items():
            if inode is not None and inode.lookups and inode.number == number and (inode.by_fd or has_handle):
                return nodeid
        return None

    def identity(self, number, has_handle):
        handle = b"handle%d" % number if has_handle else None
        return Identity(handle, b"ids%d" % number, 7, 99, stat.S_IFREG)

    def expect(self, number, call, *arguments):
        with pytest.raises(ReplyErrno) as caught:
            call(*arguments)
        assert caught.value.errno == number

    def forgotten(self, nodeid, count):
        inode = self.model[nodeid]
        inode.lookups -= min(count, inode.lookups)
        self.settle(nodeid)

    def settle(self, nodeid):
        inode = self.model[nodeid]
        if not inode.lookups and not inode.pins and not inode.wiped:
            expected = (nodeid, inode.fd, 7, not inode.by_fd)
            assert expected in self.released
            self.released.remove(expected)
            self.model[nodeid] = None

    @rule(number=FILES, has_handle=st.booleans())
    def look_up(self, number, has_handle):
        nodeid = self.store.count_lookup(self.identity(number, has_handle), self.session)
        assert nodeid == self.found(number, has_handle)
        if nodeid is not None:
            self.model[nodeid].lookups += 1

    @rule(number=FILES, has_handle=st.booleans())
    def insert(self, number, has_handle):
        self.next_fd += 1
        fd = -1 if has_handle else self.next_fd
        expected = self.found(number, has_handle)
        full = 1 + sum(inode is not None for inode in self.model.values()) >= MOST
        arguments = self.identity(number, has_handle), self.session
        if expected is None and full:
            self.expect(errno.ENFILE, lambda: self.store.insert(*arguments, fd=fd, held_mount=has_handle))
            return
        nodeid, inserted = self.store.insert(*arguments, fd=fd, held_mount=has_handle)
        assert inserted == (expected is None)
        if inserted:
            assert nodeid not in self.model, "a nodeid was used again"
            self.model[nodeid] = Inode(number, not has_handle, fd)
        else:
            assert nodeid == expected
            self.model[nodeid].lookups += 1

    @rule(data=st.data(), counts=st.lists(st.integers(0, 4), min_size=1, max_size=3))
    def forget(self, data, counts):
        nodeids = st.sampled_from([ROOT_NODEID, 0, 77, 2**64 - 1, *self.model])
        pairs = [(data.draw(nodeids), count) for count in counts]
        self.store.forget([number for pair in pairs for number in pair], self.session)
        for nodeid, count in pairs:
            if self.alive(nodeid):
                self.forgotten(nodeid, count)

    @rule(data=st.data())
    def forget_in_another_session(self, data):
        self.store.forget([data.draw(st.sampled_from([ROOT_NODEID, *self.model])), 1], self.session + 1)

    @rule(target=pins, data=st.data())
    def pin(self, data):
        nodeid = data.draw(st.sampled_from([ROOT_NODEID, *self.model]))
        stack = ExitStack()
        if nodeid == ROOT_NODEID:
            stack.enter_context(self.store.pin(nodeid, self.session))
        elif self.alive(nodeid):
            pin = stack.enter_context(self.store.pin(nodeid, self.session))
            assert (pin.nodeid, pin.fd) == (nodeid, self.model[nodeid].fd)
            self.model[nodeid].pins += 1
        else:
            self.expect(errno.EBADF, self.store.pin, nodeid, self.session)
            nodeid = None
        return nodeid, stack

    @rule(pinned=consumes(pins))
    def unpin(self, pinned):
        nodeid, stack = pinned
        stack.close()
        if nodeid in self.model:
            self.model[nodeid].pins -= 1
            self.settle(nodeid)

    @rule()
    def begin_session(self):
        self.expect(errno.ESTALE, self.store.pin, ROOT_NODEID, self.session + 1)
        self.session += 1
        self.store.begin_session(self.session)
        for nodeid in self.model:
            if self.alive(nodeid):
                self.model[nodeid].wiped = True
                self.forgotten(nodeid, self.model[nodeid].lookups)

    @rule()
    def fetch_what_ended_sessions_left(self):
        left = [inode for inode in self.model.values() if inode is not None and inode.wiped]
        idle = [inode for inode in left if not inode.pins]
        fds, mounts = [], Counter()
        while (some := self.store.take_wiped()) is not None:
            fds += some.fds
            mounts += some.mounts
            self.store.settle_wiped(some)
        assert sorted(fds) == sorted(inode.fd for inode in idle if inode.by_fd)
        assert mounts == Counter({7: sum(not inode.by_fd for inode in idle)})
        for inode in left:
            inode.wiped = False  # a pinned one goes with its pin
        self.model = {nodeid: None if inode in idle else inode for nodeid, inode in self.model.items()}

    @invariant()
    def the_same_are_alive(self):
        assert self.released == [], "something was freed that should not have been"
        held = [inode for inode in self.model.values() if inode is not None]
        assert self.store.held == 1 + len(held)
        assert self.store.fd_count == 1 + sum(inode.by_fd for inode in held)
        for nodeid in self.model:
            assert self.store.alive(nodeid) == self.alive(nodeid)
        assert self.store.alive(ROOT_NODEID)


Comparison.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestInodeStoreAgainstAModel = Comparison.TestCase
