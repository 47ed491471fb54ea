"""The part of the work queue that lives by time: due tasks, lapsed leases, retention, idle blobs.

It touches the engine at least once a second, and so is the one to know whether the engine can serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from retinue_server.runtime.errors import RetinueError

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.workqueue.core.queue import WorkQueue

_log = logging.getLogger(__name__)
_BLOB_INTERVAL_S = 600.0
_PAUSE_AFTER_ERROR_S = 1.0


class Sweeper:
    """Sweeps when the queue's alarm rings; recovers leases before that."""

    def __init__(self, queue: WorkQueue, blob_idle_ms: int) -> None:
        self._queue, self._blob_idle_ms = queue, blob_idle_ms
        self._sweeping: asyncio.Task[None] | None = None
        self._next_blobs = 0.0
        """On the loop's clock, once started."""
        self._healthy = False
        self._listeners: list[Callable[[bool], None]] = []

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """See dispatch.Health."""
        self._listeners.append(listener)
        listener(self._healthy)

    async def start(self) -> None:
        await self._queue.recover()
        await self._queue.count()
        self._tell(healthy=True)
        self._next_blobs = asyncio.get_running_loop().time() + _BLOB_INTERVAL_S
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        sweeping, self._sweeping = self._sweeping, None
        if sweeping is not None:
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping

    async def _sweep(self) -> None:
        while True:
            try:
                await self._queue.sweep()
                await self._queue.look_again()
                await self._queue.count()
                await self._collect_blobs()
                self._tell(healthy=True)
                await self._queue.sweep_is_due()
            except Exception as error:  # noqa: BLE001 - without it no lease would ever lapse again
                self._fail(error)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    def _fail(self, error: Exception) -> None:
        """Says so once, not at every try."""
        if self._healthy:
            cause = error.__cause__ if isinstance(error, RetinueError) else error
            _log.warning("cannot sweep: %s; trying again", error, exc_info=cause)
        self._tell(healthy=False)

    def _tell(self, *, healthy: bool) -> None:
        if healthy != self._healthy:
            self._healthy = healthy
            for listener in self._listeners:
                listener(healthy)

    async def _collect_blobs(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._next_blobs:
            self._next_blobs = now + _BLOB_INTERVAL_S
            await self._queue.collect_blobs(self._blob_idle_ms)
