"""Serves requests that must not be done twice: by their slots (reply_slots.py), each is done once, whoever asks how often."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from vfsd.broker.answer_files import answer_again
from vfsd.broker.answers import Answer, Call
from vfsd.broker.reply_slots import Again, Stored
from vfsd.broker.share import Share
from vfsd.wire import broker_messages as wire

if TYPE_CHECKING:
    from vfsd.broker.worker_link import Outcome, Task, WorkerLink

Answerer = Callable[["Task"], Answer | None]


class Once:
    """`attempt(task, answer)` turns what an answerer gives or raises into an outcome; `post` sends one to whoever waited."""

    def __init__(self, attempt: Callable[[Task, Answerer], Outcome | None], post: Callable[[WorkerLink, list[Outcome]], None]) -> None:
        self._attempt = attempt
        self._post = post

    def serve(self, share: Share, task: Task, asked: wire.Slot, answer: Answerer) -> Outcome | None:
        """The outcome; None if another thread is at it: then it is posted when that is done."""
        slots = share.reply_slots
        slot = slots.begin(task, asked)
        if isinstance(slot, Again):
            return None if slot.stored is None else self._repeat(share, task, slot.stored)
        if slot.undo:
            share.store.forget(slot.undo, task.session)
        outcome = self._attempt(task, answer)
        rest = slots.finish(slot, outcome)
        if rest is not None:
            share.store.forget(rest.undo, task.session)
            if rest.waiter is not None and slot.stored is not None:
                repeated = self._repeat(share, rest.waiter, slot.stored)
                self._post(rest.waiter.link, [] if repeated is None else [repeated])
        return outcome

    def _repeat(self, share: Share, task: Task, stored: Outcome | Stored) -> Outcome | None:
        """The same to another link, by another request id."""
        if isinstance(stored, Stored):
            return self._attempt(task, partial(_open_again, share, stored))
        return stored._replace(request_id=task.request_id)


def _open_again(share: Share, stored: Stored, task: Task) -> Answer:
    return answer_again(share, Call(task.session, task.link.index), stored)
