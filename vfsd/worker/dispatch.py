"""From a chain to its reply: decode, hand to the handler, wait where it waits, reply exactly once.

**The boundary.** Whatever a handler raises becomes one request's errno here: ReplyErrno and OSError are the guest's, anything
else is a bug of ours, logged and answered EIO. A request that is owed a reply gets one.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from vfsd.errors import ReplyErrno, drop_traceback
from vfsd.fds import TempFd
from vfsd.shortages import Shortages
from vfsd.wire import broker_messages as wire
from vfsd.wire.fuse_abi import FUSE_INIT
from vfsd.worker.file_system import FileSystem, Given, NoReply, Outcome, Placed
from vfsd.worker.io_pool import IoPool, Job
from vfsd.worker.lock_waits import LockWaits
from vfsd.worker.opcodes import HANDLERS, WITHOUT_REPLY
from vfsd.worker.request import Request
from vfsd.worker.ring import Ring
from vfsd.worker.virtqueue import Chain

# A request of 1 MiB is some 260 views of guest memory, about 100 KiB of ours; the heap is 64 MiB and does not grow.
MOST_WAITING_BYTES = 256 << 20


class Operation:
    """A request whose handler waits: for the broker (Asker) or for the pool (io_pool.Waiter)."""

    __slots__ = ("_dispatcher", "_handler", "on_pool", "replied", "request", "ring")

    def __init__(self, dispatcher: Dispatcher, ring: Ring, request: Request, handler: Generator[wire.Request | Job, Any, Outcome]) -> None:
        self._dispatcher = dispatcher
        self._handler = handler
        self.ring = ring
        self.request = request
        self.on_pool = False
        self.replied = False

    def answered(self, error: int, fields: list[Any], donated: TempFd | None) -> None:
        if self.replied:  # given up meanwhile
            if donated is not None:
                donated.close()
            return
        self.request.chain.runs(True)
        if error:
            self.advance(None, ReplyErrno(error))
        else:
            self.advance(Given(fields, donated), None)

    def finished(self, result: Any, error: Exception | None) -> None:
        self.on_pool = False
        self.advance(result, error)

    def give_up(self) -> None:
        """The chain goes back to the guest: the handler must not run on, it would touch what is no longer ours."""
        self.replied = True
        self._handler.close()

    def advance(self, value: Any, error: Exception | None) -> None:
        """Run the handler until it waits again or is done."""
        try:
            wish = self._handler.send(value) if error is None else self._handler.throw(error)
        except StopIteration as stop:
            self._dispatcher.complete(self, 0, stop.value)
        except Exception as raised:  # noqa: BLE001  # sorted out by errno_of
            self._dispatcher.complete(self, self._dispatcher.errno_of(raised), b"")
        else:
            self._dispatcher.wait(self, wish)


def _slot_of(operation: Operation) -> wire.Slot:
    chain = operation.request.chain
    return wire.Slot(wire.place_of(operation.ring.index, chain.head), chain.number)


class Dispatcher:
    """The ring thread's alone."""

    def __init__(self, fs: FileSystem, pool: IoPool) -> None:
        self._fs = fs
        self._pool = pool
        self._shortages = Shortages(fs.log)
        self._lock_waits = LockWaits(fs.broker)
        self._waiting: set[Operation] = set()
        self._waiting_bytes = 0

    @property
    def saturated(self) -> bool:
        """Whether what waits holds as many views of guest memory as this process has memory for."""
        return self._waiting_bytes > MOST_WAITING_BYTES

    def handle(self, ring: Ring, chain: Chain) -> None:
        """Serve one request, or begin to."""
        request = Request(chain)
        if not request.has_header:
            ring.queue.push(chain.head, 0)  # nothing to reply to: it has no unique
            return
        try:
            request.decode()
            outcome = self._run(request)
        except Exception as raised:  # noqa: BLE001  # sorted out by errno_of
            self._reply(ring, request, self.errno_of(raised), b"")
            return
        if isinstance(outcome, Generator):
            Operation(self, ring, request, outcome).advance(None, None)
        else:
            self._reply(ring, request, 0, outcome)

    def refuse(self, ring: Ring, chain: Chain) -> None:
        """Answer EIO without running the request; one that is owed no answer is dropped."""
        request = Request(chain)
        if not request.has_header:
            ring.queue.push(chain.head, 0)
            return
        with suppress(ReplyErrno):
            request.decode()
        self._reply(ring, request, errno.EIO, b"")

    def _run(self, request: Request) -> Any:
        handler = HANDLERS.get(request.opcode)
        if handler is None:
            raise ReplyErrno(errno.ENOSYS)
        if not self._fs.active and request.opcode != FUSE_INIT:
            raise ReplyErrno(errno.EIO)
        return handler(self._fs, request)

    def errno_of(self, raised: Exception) -> int:
        """The errno a request fails with; what nobody foresaw is logged."""
        if isinstance(raised, MemoryError):
            number: int | None = errno.ENOMEM
        else:
            number = raised.errno if isinstance(raised, (ReplyErrno, OSError)) else None
        if number and not isinstance(raised, ReplyErrno):  # what the broker answered it has told of itself
            self._shortages.note(number)
        elif not number:
            self._fs.log.bug("a request handler", raised)
        drop_traceback(raised)
        return number or errno.EIO

    def wait(self, operation: Operation, wish: wire.Request | Job) -> None:
        if operation not in self._waiting:
            self._waiting.add(operation)
            self._waiting_bytes += operation.request.buffer_bytes
        if isinstance(wish, Job):
            operation.on_pool = True
            self._pool.submit(wish, operation)
            return
        operation.request.chain.runs(False)  # however long that takes, and however many workers it outlives
        if isinstance(wish, wire.SetLock) and wish.wait:
            if not self._lock_waits.ask(operation, wish):
                operation.advance(None, ReplyErrno(errno.ENOLCK))
        elif isinstance(wish, wire.Forget):
            self._fs.broker.forget(wish.pairs, _slot_of(operation), operation)
        elif isinstance(wish, wire.Release):
            self._fs.broker.tell(wish, operation)
        else:
            self._fs.broker.ask(wish, operation, _slot_of(operation) if type(wish) in wire.ONCE else None)

    def complete(self, operation: Operation, error: int, outcome: Outcome) -> None:
        self._forget(operation)
        self._reply(operation.ring, operation.request, error, outcome)

    def _forget(self, operation: Operation) -> None:
        if operation in self._waiting:
            self._waiting.remove(operation)
            self._waiting_bytes -= operation.request.buffer_bytes

    def _reply(self, ring: Ring, request: Request, error: int, outcome: Outcome) -> None:
        if isinstance(outcome, NoReply) or request.opcode in WITHOUT_REPLY:
            written = 0
        elif isinstance(outcome, Placed):
            written = request.reply(error, placed=outcome.length)
        else:
            written = request.reply(error, outcome)
        request.data = []
        ring.queue.push(request.chain.head, written)

    def end_lock_waits(self, ring: Ring) -> None:
        """What waits for a lock on this ring is answered at once: EAGAIN, if it has not got the lock by then."""
        self._lock_waits.cancel(ring)

    def give_up(self, ring: Ring) -> bool:
        """Fail with EIO what waits on this ring for the broker, or for its turn on the pool; what it made is wiped with the session.

        False if a pool thread is still inside the guest's memory: that cannot be taken back.
        """
        for operation in [waiting for waiting in self._waiting if waiting.ring is ring]:
            if operation.on_pool and not self._pool.withdraw(operation):
                continue
            operation.on_pool = False
            operation.give_up()
            self._forget(operation)
            self._reply(ring, operation.request, errno.EIO, b"")
        return not any(waiting.ring is ring and waiting.on_pool for waiting in self._waiting)
