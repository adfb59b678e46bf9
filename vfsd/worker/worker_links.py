"""Control's sockets: one to the supervisor, one to each worker; requests to workers are asked here and waited for.

Who controls the bytes: workers may be hostile, their answers come through the channel codec and change nothing but the
answer's number; the supervisor is trusted. Waiting is bounded, and the supervisor's Stop is heard meanwhile.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Sequence

from vfsd.channel import Channel, ChannelClosed, close_all
from vfsd.errors import ChildBreach
from vfsd.fds import OwnedFd
from vfsd.log import decode_text
from vfsd.wire.channel import (
    WORKER_TO_CONTROL,
    AddWorker,
    ChannelMessage,
    Connection,
    Done,
    InflightGiven,
    KillWorker,
    NeedInflight,
    NeedWorker,
    Refused,
    RingBroken,
    Stop,
    bounded,
)

# A worker that hangs should be found out by the supervisor first, and replaced. A frontend's main loop waits for us meanwhile.
ANSWER_SECONDS = 20.0
# To the first answer of one that may still be starting: whether that takes too long the supervisor decides (START_SECONDS there), and
# then another one comes. On a machine that has no time to spare, 20 s are not much for an interpreter.
FIRST_ANSWER_SECONDS = 40.0
REPLACED_SECONDS = 10.0  # for a worker's death and its successor's start: Python's, on a busy machine
_SEQ_MASK = 2**32 - 1


class StopAsked(Exception):
    """The supervisor wants this process to end."""


class WorkerRefused(Exception):
    """A worker answered that it cannot do this; the text says why."""


class WorkerFailed(Exception):
    """A worker does not answer, or what it says cannot be: the device cannot go on."""


class WorkerSilent(WorkerFailed):
    """A worker has not answered in the time it had."""


class WorkerLost(WorkerFailed):
    """A worker closed its socket: it died, and the supervisor knows, or will know in a moment. The link is gone."""


class WorkerLink:
    """The socket to one worker."""

    def __init__(self, index: int, channel: Channel) -> None:
        self.index = index
        self.channel = channel
        self.answered = False
        self._seq = 0

    def next_seq(self) -> int:
        self._seq = (self._seq + 1) & _SEQ_MASK
        return self._seq


class WorkerLinks:
    """All links, and the supervisor's channel. `on_broken(queue_index, text)` hears of rings that a worker gave up."""

    def __init__(self, supervisor: Channel) -> None:
        self.supervisor = supervisor
        self.on_broken: Callable[[int, str], None] = ignore
        self.connection: OwnedFd | None = None  # handed over, not yet taken by the main loop
        self._given: OwnedFd | None = None  # memory that was asked for
        self.arrived: set[int] = set()  # workers that nobody has looked at yet; some may replace a dead one
        self._links: dict[int, WorkerLink] = {}
        self._asked_for: set[int] = set()
        self._killed: set[int] = set()  # at our wish, and not replaced yet

    def __iter__(self) -> Iterator[WorkerLink]:
        return iter(list(self._links.values()))

    def need(self, index: int) -> None:
        """Ask the supervisor for a worker, once; it answers with AddWorker. Worker 0 it starts by itself."""
        if index > 0 and index not in self._links and index not in self._asked_for:
            if not self.supervisor.send(NeedWorker(index)):
                raise WorkerFailed("the supervisor does not read its channel")
            self._asked_for.add(index)

    def get(self, index: int) -> WorkerLink:
        """The link to this worker, waited for if it has been asked for only now, or is being replaced."""
        self.need(index)
        killed = index in self._killed
        deadline = time.monotonic() + (REPLACED_SECONDS if killed else ANSWER_SECONDS)
        what = f"worker {index} was killed, and does not die" if killed else f"worker {index} was not started"
        while index not in self._links:
            self._wait([self.supervisor.fileno()], deadline, what)
            self.hear_supervisor()
        return self._links[index]

    def replace(self, index: int, why: str) -> None:
        """Have a worker killed, and its successor come: only when the kernel says that the worker has ended. `get` waits for that."""
        self.arrived.discard(index)
        self._killed.add(index)
        link = self._links.pop(index, None)
        if link is not None:
            link.channel.close()
        if not self.supervisor.send(KillWorker(index, bounded(why))):
            raise WorkerFailed("the supervisor does not read its channel")

    def inflight_memory(self) -> OwnedFd:
        """Fresh memory for the in-flight tables of all queues. The supervisor gives it once for each frontend."""
        if not self.supervisor.send(NeedInflight()):
            raise WorkerFailed("the supervisor does not read its channel")
        deadline = time.monotonic() + ANSWER_SECONDS
        while self._given is None:
            self._wait([self.supervisor.fileno()], deadline, "the supervisor gave no memory")
            self.hear_supervisor()
        given, self._given = self._given, None
        return given

    def ask(
        self, link: WorkerLink, make: Callable[[int], ChannelMessage], fds: Sequence[OwnedFd] = (), seconds: float | None = None
    ) -> int:
        """Send `make(seq)` and wait for its answer's number. Raises WorkerRefused, WorkerFailed or StopAsked."""
        seq = link.next_seq()
        message = make(seq)
        what = f"worker {link.index} did not answer {type(message).__name__} in time"
        try:
            if not link.channel.send(message, fds):
                raise WorkerFailed(f"worker {link.index} does not read its control socket")
        except ChannelClosed:
            raise self._lost(link) from None
        most = ANSWER_SECONDS if link.answered else FIRST_ANSWER_SECONDS
        deadline = time.monotonic() + (most if seconds is None else seconds)
        while True:
            ready = self._wait([link.channel.fileno(), self.supervisor.fileno()], deadline, what)
            if self.supervisor.fileno() in ready:
                self.hear_supervisor()
                if self._links.get(link.index) is not link:  # the supervisor was faster than its socket
                    raise WorkerLost(f"worker {link.index} is gone")
            if link.channel.fileno() in ready:
                answer = self._next_answer(link)
                if answer is not None:
                    return _value(link, answer, seq)

    def hear(self, link: WorkerLink) -> None:
        """What a worker says unasked. An answer now has no question."""
        answer = self._next_answer(link)
        if answer is not None:
            raise WorkerFailed(f"worker {link.index} answered what was not asked")

    def hear_supervisor(self) -> None:
        """One message of the supervisor. Raises StopAsked, also when it is gone."""
        try:
            received = self.supervisor.receive()
        except ChannelClosed:
            raise StopAsked from None
        if received is None:
            return
        match received.message:
            case AddWorker(index):
                if index in self._links:
                    self._links[index].channel.close()
                self._links[index] = WorkerLink(index, Channel.from_fd(received.fds[0], WORKER_TO_CONTROL))
                self.arrived.add(index)
                self._killed.discard(index)
            case Connection() if self.connection is None:
                self.connection = received.fds[0]
            case InflightGiven() if self._given is None:
                self._given = received.fds[0]
            case Stop():
                raise StopAsked
            case _:
                close_all(received.fds)

    def close(self) -> None:
        for link in self:
            link.channel.close()
        self._links.clear()
        for fd in (self.connection, self._given):
            if fd is not None:
                fd.close()

    def _next_answer(self, link: WorkerLink) -> Done | Refused | None:
        """One message of this worker: an answer is returned, a RingBroken passed on. None if there was no answer."""
        try:
            received = link.channel.receive()
        except ChannelClosed:
            raise self._lost(link) from None
        except ChildBreach as error:
            raise WorkerFailed(f"worker {link.index} broke the protocol of its control socket: {error}") from error
        match received.message if received is not None else None:
            case Done() | Refused() as answer:
                link.answered = True
                return answer
            case RingBroken(queue_index, text):
                self.on_broken(queue_index, decode_text(text))
        return None

    def _lost(self, link: WorkerLink) -> WorkerLost:
        """It is no longer waited for; another one may come by the same index."""
        link.channel.close()
        if self._links.get(link.index) is link:
            del self._links[link.index]
        return WorkerLost(f"worker {link.index} is gone")

    def _wait(self, fds: list[int], deadline: float, what: str) -> set[int]:
        """Those of the descriptors that are readable, at least one."""
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            ready = {fd for fd, _ in poller.poll(left * 1000)}
            if ready:
                return ready
        raise WorkerSilent(what)


def _value(link: WorkerLink, answer: Done | Refused, seq: int) -> int:
    if answer.seq != seq:
        raise WorkerFailed(f"worker {link.index} answered what was not asked")
    if isinstance(answer, Refused):
        raise WorkerRefused(decode_text(answer.text))
    return answer.value


def ignore(_queue_index: int, _text: str) -> None:
    """There is no device that could have a broken ring."""
