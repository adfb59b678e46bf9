"""The links to the workers: which there are, who is to be heard next, who has room for an answer.

A link is read while its worker is owed little, and waited for while packets wait for room. The thread that leads the pool polls;
links are changed and posted to from any thread, but only the leader takes one away, since it may be receiving from it.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

from vfsd.broker.portions import take_portion
from vfsd.broker.worker_link import Outcome, Task, WorkerLink
from vfsd.fds import OwnedFd
from vfsd.wire import broker_messages as wire


class Links:
    """`make(index, sock)` makes a link of a worker's socket."""

    def __init__(self, make: Callable[[int, socket.socket], WorkerLink]) -> None:
        self._make = make
        self._epoll = select.epoll()
        self._by_fd: dict[int, WorkerLink] = {}
        self.by_index: dict[int, WorkerLink] = {}
        self._ready: deque[tuple[int, int]] = deque()
        self._unfinished: deque[int] = deque()  # descriptors of links with the rest of a packet to be done
        self._interest: dict[int, int] = {}
        self._successors: dict[int, WorkerLink] = {}  # of workers that died, whose last packets are not read yet
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    def __len__(self) -> int:
        return len(self._by_fd)

    def all(self) -> list[WorkerLink]:
        return list(self.by_index.values())

    # --- coming and going ----------------------------------------------------------------------------------------------

    def add(self, index: int, fd: OwnedFd) -> None:
        """Hear another worker; in place of one that died only when all that one had sent is done."""
        link = self._make(index, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd.detach()))
        with self._lock:
            if index not in self.by_index:
                self._listen_to(link)
                return
            superseded = self._successors.pop(index, None)
            self._successors[index] = link
        if superseded is not None:  # it died as well, before it could say a word
            superseded.close()

    def _listen_to(self, link: WorkerLink) -> None:
        """Under the lock."""
        self._by_fd[link.fileno()] = link
        self.by_index[link.index] = link
        self._interest[link.fileno()] = select.EPOLLIN
        self._epoll.register(link.fileno(), select.EPOLLIN)

    def remove(self, link: WorkerLink) -> bool:
        """Close it, and hear its successor. The leader's alone. False if it was closed before."""
        with self._lock:
            if link.closed:
                return False
            fd = link.fileno()
            del self._by_fd[fd]
            del self._interest[fd]
            if self.by_index.get(link.index) is link:
                del self.by_index[link.index]
            self._epoll.unregister(fd)
            link.close()
            link.rest = deque()
            successor = self._successors.pop(link.index, None)
            if successor is not None:
                self._listen_to(successor)
        return True

    # --- in ------------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Have `next_event` return, from any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def poll(self, seconds: float) -> None:
        """Wait for events; -1: for ever."""
        self._ready.extend(self._epoll.poll(0 if self._unfinished else seconds))
        while self._unfinished:  # after everybody who has come meanwhile
            self._ready.append((self._unfinished.popleft(), 0))

    def next_event(self) -> tuple[WorkerLink | None, int] | None:
        """The next link and its epoll events, 0: the rest of its packet; (None, 0): `wake` was called. None: nothing is ready."""
        while self._ready:
            fd, events = self._ready.popleft()
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)
                return None, 0
            link = self._by_fd.get(fd)
            if link is not None:
                return link, events
        return None

    def next_portion(self, link: WorkerLink) -> deque[Task]:
        """Of the rest of its packet. Nothing while the worker must read first."""
        with self._lock:
            link.waits_with_rest = bool(link.rest) and link.clogged and not link.closed
            if link.waits_with_rest:
                return deque()
        portion = take_portion(link.rest)
        if link.rest:
            self._unfinished.append(link.fileno())
        return portion

    # --- out -----------------------------------------------------------------------------------------------------------

    def post(self, link: WorkerLink, outcomes: list[Outcome], notices: list[wire.Notice]) -> None:
        link.post(outcomes, notices)
        self._update_interest(link)

    def notify(self, workers: int, notice: wire.Notice) -> None:
        """Queue a notice to the workers whose bits are set."""
        for index, link in list(self.by_index.items()):
            if workers >> index & 1:
                self.post(link, [], [notice])

    def flush(self, link: WorkerLink) -> None:
        """Send it what waits for room."""
        link.flush()
        self._update_interest(link)

    def _update_interest(self, link: WorkerLink) -> None:
        """Read unless it is congested, wait for room if packets wait."""
        with self._lock:
            # Looked at under the lock: whoever changes the queue comes here after it, so the last one sees how it is.
            writable = select.EPOLLOUT if link.has_queue and not link.starved else 0
            wanted = (0 if link.congested else select.EPOLLIN) | writable
            if not link.closed and self._interest[link.fileno()] != wanted:
                self._epoll.modify(link.fileno(), wanted)
                self._interest[link.fileno()] = wanted
            if link.waits_with_rest and not link.clogged:
                link.waits_with_rest = False
                self._unfinished.append(link.fileno())
                self.wake()
