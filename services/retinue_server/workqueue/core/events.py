"""What happened to tasks: noted by steps, published once they are durable, remembered for watchers for a while.

The memory is a ring, not a log: a watcher that falls out of it is told so and lists anew, as in Kubernetes' watches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from itertools import repeat

from msgspec import Struct

from retinue_server.runtime.errors import OutOfRange, Reason, Unavailable
from retinue_server.workqueue.engine import State, TaskRow

REMEMBERED = 16_384


class EventType(IntEnum):
    """What happened; numbered as TaskEventType in the contract."""

    ENQUEUED = 1
    READY = 2
    LEASED = 3
    SUCCEEDED = 4
    RETRYING = 5
    DEAD = 6
    CANCELLED = 7
    EXPIRED = 8
    LEASE_EXPIRED = 9
    SCHEDULED = 10
    DELETED = 11


class Event(Struct, frozen=True):
    """One thing that happened to one task; the row is as it was after it (before it, for LEASE_EXPIRED and DELETED)."""

    type: EventType
    row: TaskRow
    wall_ms: int


STARTS = frozenset({EventType.ENQUEUED, EventType.READY})
"""After these a task may be there to lease."""
ENDS = frozenset({EventType.SUCCEEDED, EventType.DEAD, EventType.CANCELLED, EventType.EXPIRED, EventType.DELETED})
"""After these nobody need wait for a task any more."""

Noted = tuple[EventType, TaskRow, int]
"""The fields of an Event; it becomes one when a watcher reads it, which is rare."""


class Ledger:
    """Notes what one step does."""

    def __init__(self, wall_ms: int) -> None:
        self.events: list[Noted] = []
        self._wall_ms = wall_ms

    def add(self, event_type: EventType, row: TaskRow) -> None:
        """Notes one event."""
        self.events.append((event_type, row, self._wall_ms))

    def add_all(self, event_type: EventType, rows: Iterable[TaskRow]) -> None:
        """Notes the same event of many tasks."""
        self.events.extend(zip(repeat(event_type), rows, repeat(self._wall_ms)))

    def add_states(self, rows: Iterable[TaskRow]) -> None:
        """Notes the states that tasks came to; a task that was only asked to stop is still LEASED and tells nothing."""
        for row in rows:
            if row.state != State.LEASED:
                self.add(EventType[row.state.name], row)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Forgets, when left by an exception, what was noted inside it."""
        mark = len(self.events)
        try:
            yield
        except BaseException:
            del self.events[mark:]
            raise


class EventRing:
    """The last events, numbered from 1; watchers read on from any number that is still there."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self._events: deque[Noted] = deque(maxlen=size)
        self._last = 0
        self._closed = False
        self._news: asyncio.Event | None = None
        """What watchers wait for, if there are any."""

    @property
    def last(self) -> int:
        """The number of the latest event; 0 before the first."""
        return self._last

    def publish(self, events: list[Noted]) -> None:
        """Appends events and wakes the watchers."""
        if not events:
            return
        self._events.extend(events)
        self._last += len(events)
        self._wake()

    def close(self) -> None:
        """Ends the watches: the server is stopping."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            news.set()

    async def after(self, number: int, limit: int = 512) -> list[Event]:
        """The events after that number, waiting for the first; raises OutOfRange if some of them are forgotten and
        Unavailable when the server stops."""
        while number == self._last:
            if self._closed:
                raise Unavailable(
                    "cannot go on watching: the server is stopping", reason=Reason.SHUTTING_DOWN, retry_ms=500
                )
            self._news = self._news or asyncio.Event()
            await self._news.wait()
        first = self._last - len(self._events) + 1
        if not first - 1 <= number < self._last:
            raise OutOfRange(
                "cannot go on watching: these events are no longer remembered; list the tasks, then watch anew",
                reason=Reason.WATCH_TOKEN_EXPIRED,
            )
        start = number - first + 1
        return [Event(*self._events[i]) for i in range(start, min(start + limit, len(self._events)))]
