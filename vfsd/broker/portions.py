"""How much of one worker's packet is done before the other workers get their turn.

A packet may hold 256 requests, and listings with thousands of names: an honest worker sends little at once, a hostile one
would keep all others waiting for a good part of a second. What is left of a packet is done when everybody who has something
has had a turn. Imported by the server only.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from vfsd.wire.broker_messages import Forget, LookupMany

if TYPE_CHECKING:
    from vfsd.broker.worker_link import Task

PORTION = 64  # requests, or names that are looked up; the one that exceeds it is done to its end
_FORGETS_LIKE_A_REQUEST = 16


def take_portion(rest: deque[Task]) -> deque[Task]:
    """The next portion of a packet, taken out of its rest."""
    portion: deque[Task] = deque()
    size = 0
    while rest and size < PORTION:
        task = rest.popleft()
        portion.append(task)
        size += _size_of(task.message)
    return portion


def _size_of(message: Any) -> int:
    if isinstance(message, LookupMany):
        return len(message.names)
    if isinstance(message, Forget):
        return 1 + len(message.pairs) // (2 * _FORGETS_LIKE_A_REQUEST)
    return 1
