"""Fault by moment: what the guest sees of it. Rows of docs/faults.md, each tried by a test that is marked with its name. Pure data."""

from __future__ import annotations

from typing import NamedTuple

from vfsd.faults.catalogue import POINTS


class Cell(NamedTuple):
    """`name`: what a test's marker says. `example`: an expression of its kind."""

    name: str
    example: str
    moment: str
    guest_sees: str


_MOMENTS = {f"{point.role}:{point.name}": point.moment for point in POINTS}
_PAUSE = "a pause: another worker does it, once"
_DONE_ONCE = "a pause: what is done is not done again, the broker gives its stored answers, appends are looked for in the file"
_SHOWN = "nothing, or one call more than it needs"
_END = "the device is gone: vfsd ends within a second with a clear last line, the mount answers no more"

_OPERATIONS = (
    Cell("operation:error", "READ:error=EIO", "a request begins", "that errno; nothing was done"),
    Cell("operation:delay", "FSYNC:delay=50ms", "a request begins", "that request takes longer, others do not; EINTR when the queue is stopped"),
    Cell("operation:hang", "LOOKUP:hang", "a request begins", "no answer; EINTR when the queue is stopped"),
    Cell("operation:short", "WRITE:short=512", "a request begins", "fewer bytes than it asked for, as from a disk that is full or a file that ends"),
    Cell("operation:drop", "MKDIR:drop", "a request is done", "no answer, though it was done; the answer when the queue is stopped"),
    Cell("operation:duplicate", "GETATTR:duplicate", "a request is done", "its completion twice: Linux stops using the queue (“is not a head”)"),
    Cell("operation:corrupt", "READ:corrupt", "a request is done", "one byte of the answer is another"),
)  # fmt: skip
_CALLS = (
    Cell("broker.call:error", "broker.open_by_handle:error=ESTALE", "the call is made", "that errno, or what vfsd makes of it"),
    Cell("broker.call:delay", "broker.fsync:delay=1s", "the call is made", "that request takes longer; others are served by other threads"),
    Cell("worker.call:error", "worker.pwritev2:error=ENOSPC", "the call is made", "that errno, or a short count if part was done"),
    Cell("worker.call:delay", "worker.preadv2:delay=20ms", "the call is made", "all requests of that queue take longer: the ring's thread waits"),
)  # fmt: skip
_WORKER_KILLED = {
    "after-pop": _PAUSE,
    "before-ask": _PAUSE,
    "after-ask": _DONE_ONCE,
    "before-publish": _DONE_ONCE,
    "after-link": _DONE_ONCE,
    "before-clear": _SHOWN,
    "after-publish": _SHOWN,
    "now": _PAUSE,
}
_WORKER = (
    *(
        Cell(f"worker:kill:{point}", f"worker:kill:at={point}", _MOMENTS[f"worker:{point}"], sees)
        for point, sees in _WORKER_KILLED.items()
    ),
    Cell("worker:hang", "worker:hang:at=after-pop", "any of those", "a pause of some ten seconds: the supervisor replaces a worker that does not answer"),
    Cell("worker:delay", "worker:delay=20ms:at=after-pop", "any of those", "its queues take longer"),
)  # fmt: skip
_OTHERS = (
    Cell("broker:kill:before-request", "broker:kill:at=before-request:message=MkDir", _MOMENTS["broker:before-request"], _END),
    Cell("broker:kill:after-request", "broker:kill:at=after-request:message=MkDir", _MOMENTS["broker:after-request"], _END + "; what was done is done"),
    Cell("broker:kill:now", "broker:kill:at=now", _MOMENTS["broker:now"], _END),
    Cell("broker:hang", "broker:hang:at=before-request:message=MkDir", "any of those", "no answer to that request; others are served by other threads (at=now: a worker that dies is not replaced)"),
    Cell("broker:delay", "broker:delay=50ms:at=after-request", "any of those", "that request takes longer"),
    Cell("control:kill:before-message", "control:kill:at=before-message:message=GET_VRING_BASE", _MOMENTS["control:before-message"], _END),
    Cell("control:kill:before-reply", "control:kill:at=before-reply:message=GET_VRING_BASE", _MOMENTS["control:before-reply"], _END),
    Cell("control:kill:now", "control:kill:at=now", _MOMENTS["control:now"], _END),
    Cell("control:hang", "control:hang:at=before-message", "any of those", "nothing; the frontend waits for its answer, and with it what it has to do for the guest"),
    Cell("control:delay", "control:delay=50ms:at=before-reply", "any of those", "nothing; the frontend waits a little"),
)  # fmt: skip
_SIGNALS = (
    Cell("kick:lose", "kick:lose:times=1", "the driver kicks", "its requests wait until something else wakes that ring"),
    Cell("call:lose", "call:lose:times=1", "the driver is to be called", "completions that it does not notice until it looks, or is called again"),
    Cell("send_fds:truncate", "send_fds:truncate:times=1", "a packet with descriptors arrives in a worker", "a pause: the worker ends, another one asks again"),
    Cell("send_fds:error", "send_fds:error=ETOOMANYREFS:times=3", "the broker sends descriptors", "opening a file takes up to half a second longer"),
    Cell("frontend:close:before-message", "frontend:close:at=before-message:message=SET_VRING_ADDR", _MOMENTS["control:before-message"], "the device is gone; vfsd ends with status 0, as when a frontend leaves"),
    Cell("frontend:close:before-reply", "frontend:close:at=before-reply:message=GET_VRING_BASE", _MOMENTS["control:before-reply"], "the same"),
    Cell("frontend:close:now", "frontend:close:at=now", _MOMENTS["control:now"], "the same"),
)  # fmt: skip
MATRIX = (*_OPERATIONS, *_CALLS, *_WORKER, *_OTHERS, *_SIGNALS)
