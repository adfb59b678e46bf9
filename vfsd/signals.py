"""The signals that end vfsd, as bytes on a socket: a selector hears them between two events, and no handler runs amid one."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def catch_signals(wake: socket.socket) -> Callable[[], None]:
    """Turn the signals that end us into bytes on this socket; returns what undoes it."""
    wake.setblocking(False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    wakeup_fd = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def restore() -> None:
        signal.set_wakeup_fd(wakeup_fd)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    return restore
