"""SETLKWs that the broker has not answered. Each keeps a place in its ring, so only a part of them may be waiting.

A ring that is to be stopped cannot wait for other people's locks: the broker is told to end the waits, and answers each by
EAGAIN, or by the lock if it was granted just then. Only if the broker does not answer at all is a request given up; a lock
that comes for it later is given back.
"""

from __future__ import annotations

from typing import Any, Protocol

from vfsd.fds import TempFd
from vfsd.wire import broker_messages as wire
from vfsd.worker.broker_client import Asker, BrokerClient
from vfsd.worker.ring import Ring

_F_UNLCK = 2
_QUEUE_PART = 4  # a quarter of a queue may wait for locks: who has them must find room to unlock


class LockOperation(Asker, Protocol):
    """What dispatch.Operation is to this module."""

    ring: Ring
    replied: bool


class _NobodyAsks:
    def answered(self, error: int, fields: list[Any], donated: TempFd | None) -> None:
        pass


_NOBODY_ASKS = _NobodyAsks()


class LockWaits:
    """The ring thread's alone."""

    def __init__(self, broker: BrokerClient) -> None:
        self._broker = broker
        self._waits: dict[int, _LockWait] = {}  # by request id

    def ask(self, operation: LockOperation, message: wire.SetLock) -> bool:
        """Ask for a lock; False if as many requests of that ring wait as may."""
        waiting = sum(wait.operation.ring is operation.ring for wait in self._waits.values())
        if waiting >= max(1, operation.ring.queue.size // _QUEUE_PART):
            return False
        wait = _LockWait(self, operation, message)
        wait.request_id = self._broker.ask(message, wait)
        self._waits[wait.request_id] = wait
        return True

    def cancel(self, ring: Ring) -> None:
        """Have the broker answer all that waits of this ring."""
        for request_id, wait in self._waits.items():
            if wait.operation.ring is ring:
                self._broker.tell(wire.CancelLock(request_id))

    def answered(self, wait: _LockWait, *, granted: bool) -> None:
        del self._waits[wait.request_id]
        if wait.operation.replied and granted:
            self._broker.ask(wait.message._replace(kind=_F_UNLCK, wait=0), _NOBODY_ASKS)


class _LockWait:
    """Between an operation and the broker."""

    __slots__ = ("_waits", "message", "operation", "request_id")

    def __init__(self, waits: LockWaits, operation: LockOperation, message: wire.SetLock) -> None:
        self._waits = waits
        self.operation = operation
        self.message = message
        self.request_id = 0

    def answered(self, error: int, fields: list[Any], donated: TempFd | None) -> None:
        self._waits.answered(self, granted=not error)
        self.operation.answered(error, fields, donated)
