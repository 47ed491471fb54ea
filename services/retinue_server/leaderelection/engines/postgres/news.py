"""How servers hear of each other's changes: LISTEN on a connection of its own.

Whether it works is proved by a word to oneself: behind a pooler of transactions LISTEN seems to succeed, and nothing is
ever heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING, Protocol

import psycopg

from retinue_server.leaderelection.engines.postgres.pool import PATIENCE_S, connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.leaderelection.engines.postgres.pool import Connection, Pool
    from retinue_server.runtime.postgres import Address

_log = logging.getLogger(__name__)
_AWAY_S = 1.0
_DEAF_S = 30.0
_PROVE_S = 10.0
"""How often to prove that one hears."""


class Hearing(Protocol):
    """See News."""

    def __call__(self, *, hearing: bool) -> None:
        """Whether news comes, from now."""


class _DeafError(Exception):
    """LISTEN succeeded, but nothing comes."""


class News:
    """`hear` is told the name of an election that changed, or None when any may have; `hearing` whether news comes."""

    def __init__(
        self, where: Address, pool: Pool, schema: str, hear: Callable[[str | None], None], hearing: Hearing
    ) -> None:
        self._where, self._pool, self._hear, self._hearing = where, pool, hear, hearing
        self.channel = f"retinue:{schema}"
        self.me = secrets.token_hex(4)
        self._running: asyncio.Task[None] | None = None
        self._complained = False

    def payload(self, election_id: str) -> str:
        """What the others are told."""
        return f"{self.me} {election_id}"

    async def start(self) -> None:
        """Begins; returns when it is known whether anything can be heard."""
        known = asyncio.Event()
        self._running = asyncio.create_task(self._keep_listening(known))
        await known.wait()

    async def stop(self) -> None:
        """Ends it."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def _keep_listening(self, known: asyncio.Event) -> None:
        while True:
            away_s = _AWAY_S
            try:
                await self._listen(known)
            except _DeafError:
                self._complain("LISTEN hears nothing; with a pooler, set listen_url to a way past it")
                away_s = _DEAF_S
            except psycopg.Error as error:
                self._complain(str(error).strip())
            self._hearing(hearing=False)
            known.set()
            await asyncio.sleep(away_s)

    def _complain(self, why: str) -> None:
        if not self._complained:
            _log.warning("cannot hear of other servers, so looking more often: %s", why)
        self._complained = True

    async def _listen(self, known: asyncio.Event) -> None:
        connection = await connect(self._where, "retinue leaderelection listener", prepared=False)
        try:
            await connection.execute(f'LISTEN "{self.channel}"')
            await self._prove(connection)
            self._complained = False
            self._hearing(hearing=True)
            self._hear(None)
            known.set()
            while True:
                await self._until(connection, _PROVE_S)
                await self._prove(connection)
        finally:
            await connection.close()

    async def _prove(self, connection: Connection) -> None:
        word = f"{self.me} ?{secrets.token_hex(4)}"
        await self._pool.run("SELECT pg_notify($1::text, $2::text)", (self.channel, word))
        if not await self._until(connection, PATIENCE_S, word):
            raise _DeafError

    async def _until(self, connection: Connection, seconds: float, wanted: str = "") -> bool:
        """Takes what comes for so long, or until what is wanted came; whether it did."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        came = False
        while not came and (left := end - loop.time()) > 0:
            async for notice in connection.notifies(timeout=left, stop_after=1):  # to its end: several may come at once
                came = came or notice.payload == wanted
                self._take(notice.payload)
        return came

    def _take(self, payload: str) -> None:
        sender, _, election_id = payload.partition(" ")
        if sender != self.me:
            self._hear(election_id)
