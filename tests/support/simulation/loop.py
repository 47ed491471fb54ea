"""An event loop in simulated time: nothing waits, and what is ready runs in an order that the seed chooses.

Every callback belongs to the node in whose context it was scheduled. A stalled node's callbacks are held (SIGSTOP), a
killed one's dropped: no `finally` and no `except` runs in it any more, as after SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any, TypeVar

from support.simulation.chance import Chance

T = TypeVar("T")
_NODE: contextvars.ContextVar[Node | None] = contextvars.ContextVar("node", default=None)
_OUTSIDE = contextvars.Context()


class Handle(asyncio.TimerHandle):
    """A callback that waits for its turn."""

    __slots__ = ("call", "given", "home", "over")

    def __init__(  # no super().__init__(): it does what nobody here needs
        self, when: float, call: Callable[..., object], given: tuple[object, ...], home: contextvars.Context
    ) -> None:
        self._when, self.call, self.given, self.home, self.over = when, call, given, home, False

    def cancel(self) -> None:
        self.over = True

    def cancelled(self) -> bool:
        return self.over

    def when(self) -> float:
        return self._when


class Node:
    """A process in the world. Its name is told in the trace."""

    def __init__(self, loop: SimulatedLoop, name: str) -> None:
        self.name, self.dead, self.stalled = name, False, False
        self.held: list[Handle] = []
        self._loop = loop
        self._context = contextvars.copy_context()
        self._context.run(_NODE.set, self)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts work that runs in this node."""
        return self._loop.create_task(work, context=self._context)

    def later(self, delay: float, call: Callable[..., object], *args: object) -> Handle:
        """Runs a callback in this node after so many seconds."""
        return self._loop.call_later(delay, call, *args, context=self._context)

    def kill(self) -> None:
        """Nothing runs in it any more."""
        self.dead = True
        self.held.clear()

    def stall(self) -> None:
        """Nothing runs in it until `resume`."""
        self.stalled = True

    def resume(self) -> None:
        """What was held runs."""
        self.stalled = False
        held, self.held = self.held, []
        self._loop.again(held)


class SimulatedLoop(asyncio.AbstractEventLoop):
    """See the module. `shuffled`: ready callbacks run in any order, not first come first run."""

    def __init__(self, chance: Chance, *, shuffled: bool) -> None:
        self._chance, self._shuffled = chance, shuffled
        self._now = 0.0
        self._ready: list[Handle] = []
        self._timers: list[tuple[float, int, Handle]] = []
        self._count = itertools.count()
        self._tasks: list[tuple[asyncio.Task[Any], Node | None]] = []
        self._closed = False
        self.finished = False
        """Set to end the run."""
        self.steps = 0
        """Callbacks run so far."""

    # What asyncio asks of a loop

    def time(self) -> float:
        """Seconds since the world began."""
        return self._now

    def call_soon(
        self, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(self._now, callback, args, contextvars.copy_context() if context is None else context)
        if not self._closed:
            self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: object, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(when, callback, args, contextvars.copy_context() if context is None else context)
        if not self._closed:
            heapq.heappush(self._timers, (when, next(self._count), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=name or "", context=context)
        self._tasks.append((task, (contextvars.copy_context() if context is None else context).get(_NODE)))
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What nobody awaited any more; `failure` tells of tasks that failed by themselves."""

    # Running

    def outside(self, delay: float, callback: Callable[..., object], *args: object) -> None:
        """Runs a callback in no node after so many seconds: wires, power and people neither stall nor die."""
        self.call_later(delay, callback, *args, context=_OUTSIDE)

    def again(self, handles: list[Handle]) -> None:
        """Makes them ready once more."""
        self._ready += handles

    def run(self, longest: float) -> bool:
        """Runs until `finished` (True), or until `longest` seconds of simulated time have passed (False)."""
        asyncio._set_running_loop(self)
        try:
            while not self.finished:
                if not self._run_one() or self._now > longest:
                    return False
            return True
        finally:
            asyncio._set_running_loop(None)

    def _run_one(self) -> bool:
        """One callback; False if there will never be one."""
        if not self._ready and not self._advance():
            return False
        ready = self._ready
        index = int(self._chance.fraction() * len(ready)) if self._shuffled and len(ready) > 1 else 0
        handle = ready.pop(index)
        if handle.over:
            return True
        node = handle.home.get(_NODE)
        if node is not None and node.stalled:
            node.held.append(handle)
        elif node is None or not node.dead:
            self.steps += 1
            handle.home.run(handle.call, *handle.given)
        return True

    def _advance(self) -> bool:
        """Time passes to the next timer."""
        timers = self._timers
        while timers and timers[0][2].over:
            heapq.heappop(timers)
        if not timers:
            return False
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(timers)[2])
        return True

    def failure(self) -> BaseException | None:
        """What ended a task that nobody looked at, if any did; the dead can't look."""
        for task, node in self._tasks:
            if node is not None and node.dead:
                continue
            if task.done() and not task.cancelled() and task._log_traceback:
                return task.exception()
        return None

    def close(self) -> None:
        """Ends the world, so that nothing of it runs in another."""
        self._closed = True
        self._ready.clear()
        self._timers.clear()
        for task, _ in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined] # C tasks have it
                with suppress(RuntimeError):  # an `async with` that would await on its way out
                    task.get_coro().close()
        self._tasks.clear()
