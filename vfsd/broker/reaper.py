"""Frees what an ended session held, bit by bit, while the next one is served already.

A bit takes a fraction of a millisecond; after it the thread sleeps as long as it took, without the interpreter's lock: a
thread that waits for that lock at every system call would otherwise wait for the reaper each time. A descriptor whose close
waits for a server holds up this thread alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NoReturn

_SHORTEST_PAUSE_SECONDS = 0.0005


class Reaper:
    """One thread; `start` it before the filter is loaded, `wake` it when there is something to free.

    `crashed` is told of an exception of the work, and does not return.
    """

    def __init__(self, crashed: Callable[[BaseException], NoReturn]) -> None:
        self._crashed = crashed
        self._work: Callable[[], bool] = lambda: False
        self._awake = threading.Semaphore(0)
        self._never = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._live, name="reaper", daemon=True).start()

    def wake(self, work: Callable[[], bool]) -> None:
        """`work` frees a bit; False if there was nothing left."""
        self._work = work
        self._awake.release()

    def _live(self) -> None:
        try:
            while True:
                self._awake.acquire()
                self._free_all()
        except BaseException as error:  # noqa: BLE001  # the interpreter would print a traceback, which opens files
            self._crashed(error)

    def _free_all(self) -> None:
        while True:
            started = time.monotonic()
            if not self._work():
                return
            self._never.wait(max(_SHORTEST_PAUSE_SECONDS, time.monotonic() - started))
