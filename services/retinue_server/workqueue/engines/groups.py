"""Steps that wait for a writer, each with the caller who waits for its answer; a group of them shares one commit."""

from __future__ import annotations

import asyncio
import queue as queues
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from retinue_server.workqueue.engine import Transaction

T = TypeVar("T")
Errors = tuple[type[Exception], ...]

GROUP = 256
"""How many steps one commit holds at most."""


class Step:
    """A step with its caller; made on the caller's loop."""

    def __init__(self, step: Callable[[Transaction], Any]) -> None:
        self._step = step
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._result: Any = None
        self.error: BaseException | None = None
        """What it raised, or what failed the group."""

    def run(self, store: Transaction, undoing: Errors = ()) -> None:
        """Runs it, maybe again; what it raises undoes it alone. Errors that undo the whole group are raised."""
        self._result = self.error = None
        try:
            with store.savepoint():
                self._result = self._step(store)
        except undoing:
            raise
        except Exception as error:  # noqa: BLE001 - the caller gets it
            self.error = error

    def fail(self, error: BaseException) -> None:
        """Replaces whatever came of it."""
        self.error = error

    def answer(self) -> None:
        """Tells the caller, on the loop."""
        if self.done.done():
            return
        if self.error is None:
            self.done.set_result(self._result)
        else:
            self.done.set_exception(self.error)
            self.done.exception()


def answer(group: Iterable[Step]) -> None:
    """Tells all callers of a group, on the loop."""
    for step in group:
        step.answer()


class Steps:
    """Those that wait, between an event loop and writer threads."""

    def __init__(self) -> None:
        self._waiting: queues.SimpleQueue[Step | None] = queues.SimpleQueue()

    def do(self, step: Callable[[Transaction], T]) -> asyncio.Future[T]:
        """Hands it to the writers; what comes of it. Cancelling that changes nothing: the step is done."""
        job = Step(step)
        self._waiting.put(job)
        return job.done

    def end(self) -> None:
        """One writer ends when it has done what waits before this."""
        self._waiting.put(None)

    def next_group(self) -> list[Step]:
        """Waits for a step, and takes with it all that wait already; nothing if the writer is to end."""
        first = self._waiting.get()
        group = [first] if first else []
        while first and len(group) < GROUP:
            try:
                step = self._waiting.get_nowait()
            except queues.Empty:
                break
            if step is None:
                self._waiting.put(None)
                break
            group.append(step)
        return group
