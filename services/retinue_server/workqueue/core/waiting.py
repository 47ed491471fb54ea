"""Who waits for what: workers for a queue to have something, callers for a task to end; first come, first woken."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from retinue_server.workqueue.engine import WAITING, Instant, State, TaskRow

K = TypeVar("K", bound=Hashable)

_READY, _LEASED = State.READY, State.LEASED
"""Looking a member of an enum up takes as long as the rest of a turn of a loop over rows."""


class Waiters(Generic[K]):
    """Waiters by key. Waking is a hint: who wakes looks again, and what it leaves it passes on by waking the next."""

    def __init__(self) -> None:
        self._waiting: dict[K, deque[asyncio.Event]] = {}

    @contextmanager
    def waiting(self, key: K) -> Iterator[asyncio.Event]:
        """Enrols a waiter; its event is set by a wake-up that comes after this, and must be cleared before looking."""
        event = asyncio.Event()
        line = self._waiting.setdefault(key, deque())
        line.append(event)
        try:
            yield event
        except Exception:
            event.set()  # what it was woken for and could not take is there for another
            raise
        finally:
            line.remove(event)
            if event.is_set():
                self.wake(key, 1)
            if not line and self._waiting.get(key) is line:
                del self._waiting[key]

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def waited_for(self) -> list[K]:
        """The keys that somebody waits for."""
        return list(self._waiting)

    def wake(self, key: K, count: int) -> None:
        """Wakes up to `count` waiters that sleep, the first come first."""
        for event in self._waiting.get(key, ()):
            if count <= 0:
                return
            if not event.is_set():
                event.set()
                count -= 1

    def wake_all(self) -> None:
        """Wakes everybody (stopping, or a queue that was resumed)."""
        for line in self._waiting.values():
            for event in line:
                event.set()


class Patience:
    """How long a caller still waits; it limits the waiting, not the looking, so that nothing is granted too late."""

    def __init__(self, wait_ms: int) -> None:
        self._clock = asyncio.get_running_loop().time
        begun = 1 if wait_ms else 0  # uvloop's clock shows the millisecond that has begun: nobody's wait ends too early
        self._until = self._clock() + (wait_ms + begun) / 1000

    async def until(self, woken: asyncio.Event) -> bool:
        """True when woken, False when patience is at an end."""
        left = self._until - self._clock()
        if left <= 0:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                await woken.wait()
        was_woken = woken.is_set()
        woken.clear()
        return was_woken


class Alarm:
    """Knows when there will be something to sweep: what the store said, or an earlier time that a change brought."""

    LONGEST_S = 1.0
    """It rings at least this often, so that a wall clock that was set forward is noticed."""

    def __init__(self) -> None:
        self._due_ms: int | None = None
        self._lapse_ms: int | None = None
        self._earlier = asyncio.Event()

    def clear(self) -> None:
        """Forgets; from here on every time counts."""
        self._due_ms = self._lapse_ms = None
        self._earlier.clear()

    def set(self, times: tuple[int | None, int | None]) -> None:
        """Takes over what the store said: next wall time, next lease time."""
        self._due_ms, self._lapse_ms = _earliest(self._due_ms, times[0]), _earliest(self._lapse_ms, times[1])

    def note(self, rows: Sequence[TaskRow]) -> None:
        """Takes changed tasks' times into account."""
        due_ms, lapse_ms = self._due_ms, self._lapse_ms
        for row in rows:
            state = row.state
            if state is _READY:
                if row.expire_ms is not None:
                    due_ms = _earliest(due_ms, row.expire_ms)
            elif state is _LEASED:
                lapse_ms = _earliest(lapse_ms, row.lease_until)
            elif state in WAITING:
                due_ms = _earliest(_earliest(due_ms, row.ready_ms), row.expire_ms)
        if (due_ms, lapse_ms) != (self._due_ms, self._lapse_ms):
            self._due_ms, self._lapse_ms = due_ms, lapse_ms
            self._earlier.set()

    async def rings(self, clock: Callable[[], Instant]) -> None:
        """Returns when the time has come."""
        while (left := self._left_s(clock())) > 0:
            self._earlier.clear()
            try:
                async with asyncio.timeout(left):
                    await self._earlier.wait()
            except TimeoutError:
                return

    def _left_s(self, now: Instant) -> float:
        due = self.LONGEST_S if self._due_ms is None else (self._due_ms - now.wall_ms) / 1000
        lapse = self.LONGEST_S if self._lapse_ms is None else (self._lapse_ms - now.lease_ms) / 1000
        return min(due, lapse, self.LONGEST_S)


def _earliest(time_ms: int | None, other_ms: int | None) -> int | None:
    if time_ms is None or other_ms is None:
        return other_ms if time_ms is None else time_ms
    return min(time_ms, other_ms)
