"""A lease of this server in etcd."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retinue_server.leaderelection.engines.etcd.client import Client


class Lease:
    """A lease of one length: made when it is needed, made anew when etcd has lost it."""

    def __init__(self, client: Client, asked_s: int, lease_id: int = 0) -> None:
        self._client, self._asked_s = client, asked_s
        self.ttl_s = asked_s
        """Its length."""
        self.id = lease_id
        """Of the present one; 0 = there is none yet."""
        self._next: asyncio.Task[int] | None = None
        """The keep-alive that has not been sent yet."""
        self._turn = asyncio.Lock()

    async def refresh(self) -> int:
        """Begins the lease again, after this was called; its id. Many callers share one keep-alive."""
        if self._next is None:
            self._next = asyncio.create_task(self._send())
            self._next.add_done_callback(_heeded)
        return await asyncio.shield(self._next)

    async def _send(self) -> int:
        async with self._turn:
            self._next = None  # who comes from now on needs a later one
            ttl_s = await self._client.keep_alive(self.id) if self.id else 0
            if ttl_s <= 0:
                self.id = 0
                self.id, ttl_s = await self._client.grant(self._asked_s)
            self.ttl_s = ttl_s
            return self.id


def _heeded(task: asyncio.Task[int]) -> None:
    """Every caller may have been cancelled: then nobody asks how it went."""
    if not task.cancelled():
        task.exception()
