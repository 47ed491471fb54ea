"""A session: one candidate of one election, as the server knows it, and what it is to be told."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from retinue_server.leaderelection.core.requests import Event, IsDead, Liveness, OnDisconnect, Standing

if TYPE_CHECKING:
    from retinue_server.leaderelection.engine import EndReason

if TYPE_CHECKING:
    from retinue_server.runtime.errors import RetinueError

_ROOM = 64
"""How many events wait for a slow reader before its messages are no longer read."""


class Outbox:
    """Events on their way to one stream; replaced when a session is resumed."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.closed = False
        self.error: RetinueError | None = None
        """Why it was closed, if that is somebody's fault."""

    def put(self, event: Event) -> None:
        """Appends one; lost if it is closed."""
        if self.closed:
            return
        self._events.append(event)
        self._news.set()
        if len(self._events) >= _ROOM:
            self._room.clear()

    def close(self, error: RetinueError | None = None) -> None:
        """No more come; those that are there can still be taken."""
        self.closed, self.error = True, error
        self._news.set()

    @property
    def empty(self) -> bool:
        """Whether none waits."""
        return not self._events

    async def take(self) -> list[Event]:
        """All that wait, at least one; empty at the end."""
        while not self._events and not self.closed:
            self._news.clear()
            await self._news.wait()
        events = list(self._events)
        self._events.clear()
        self._room.set()
        return events

    async def room(self) -> None:
        """Waits while too many wait to be taken."""
        await self._room.wait()


class Session:
    """What is known of a candidate; `contest.py` decides what follows from it. Times are boot milliseconds."""

    def __init__(self, asked: Standing, session_id: str, now_ms: int, is_dead: IsDead | None) -> None:
        self.asked = asked
        self.session_id = session_id
        self.value = asked.value
        self.is_dead = is_dead
        self.outbox: Outbox | None = None
        """The stream that is attached; None = the app can't be told."""
        self.healthy = True
        self.heard_ms = now_ms
        """When the server read the latest sign of life."""
        self.sequence = 0
        """Of that sign."""
        self.not_before_ms = 0
        """When it may stand again after it gave up leadership."""
        self.leaving: EndReason | None = None
        """It has resigned, or its stream has ended and it wants nothing kept."""
        self.is_of_former_process = False
        """It began under an earlier process of this server, which may have told its app a deadline."""
        self.owed_ms = 0
        """The release delay that it has to wait if a claim succeeded whose answer was lost."""
        self.introduced = False
        """Its stream has been told where it stands."""

    def hear(self, sequence: int, now_ms: int, *, healthy: bool) -> None:
        """A sign of life."""
        self.sequence, self.heard_ms, self.healthy = sequence, now_ms, healthy

    @property
    def alive_until_ms(self) -> int:
        """Until when its last sign of life counts."""
        return self.heard_ms + self.asked.app_lease_ms

    def is_alive(self, now_ms: int) -> bool:
        """Whether it shows signs of life."""
        return self.by_stream or now_ms < self.alive_until_ms

    @property
    def by_stream(self) -> bool:
        """Whether its open stream is its sign of life."""
        return self.asked.liveness is Liveness.STREAM and self.outbox is not None

    @property
    def releases_on_disconnect(self) -> bool:
        """Whether nothing is kept when its stream ends."""
        return self.asked.liveness is Liveness.STREAM or self.asked.on_disconnect is OnDisconnect.RELEASE

    def is_able(self, now_ms: int) -> bool:
        """Whether it could lead."""
        return self.leaving is None and self.healthy and self.is_alive(now_ms)

    def may_stand(self, now_ms: int) -> bool:
        """Whether it waits to be elected: its stream is there to be told."""
        return self.outbox is not None and now_ms >= self.not_before_ms and self.is_able(now_ms)

    def tell(self, event: Event) -> None:
        """Sends an event, if anybody listens."""
        if self.outbox is not None:
            self.outbox.put(event)
