"""Connections, and how long to wait for them: who asks gets an answer or an error within seconds, whatever hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors

if TYPE_CHECKING:
    from retinue_server.runtime.postgres import Address

Row = tuple[Any, ...]
Connection = psycopg.AsyncConnection[Row]

PATIENCE_S = 2.0
"""For a free connection, and again for connecting and the statement together."""
_TRIES = 4
_AGAIN = (errors.SerializationFailure, errors.DeadlockDetected, errors.UniqueViolation)
"""Another transaction was faster: what is run again sees what that one did."""


async def connect(where: Address, name: str, *, prepared: bool) -> Connection:
    """A connection to where one may write."""
    return await psycopg.AsyncConnection[Row].connect(
        autocommit=True,
        prepare_threshold=0 if prepared else None,
        cursor_factory=psycopg.AsyncRawCursor,
        **where.parameters(connect_timeout=int(PATIENCE_S), application_name=name, target_session_attrs="read-write"),
    )


class Pool:
    """At most so many statements at a time, each on a connection of its own, which is kept for the next.

    All statements are safe to repeat, so one whose connection was lost is repeated on a new one.
    """

    def __init__(self, where: Address, name: str, size: int, *, prepared: bool) -> None:
        self._where, self._name, self._prepared = where, name, prepared
        self._slots = asyncio.Semaphore(size)
        self._idle: list[Connection] = []
        self._working: set[asyncio.Task[None]] = set()

    async def run(self, sql: str, values: Sequence[Any]) -> list[Row]:
        """The rows; raises psycopg.Error, then what came of the statement is not known."""
        await self._slot()
        answer: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
        work = asyncio.create_task(self._work(sql, values, answer))
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        timer = asyncio.get_running_loop().call_later(PATIENCE_S, _give_up, work, answer)

        def over(answer: asyncio.Future[list[Row]]) -> None:
            timer.cancel()
            self._slots.release()
            answer.exception()  # the caller may be gone

        answer.add_done_callback(over)
        return await asyncio.shield(answer)

    async def _slot(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._slots.acquire()
        except TimeoutError:
            raise psycopg.OperationalError("all connections are busy") from None

    async def _work(self, sql: str, values: Sequence[Any], answer: asyncio.Future[list[Row]]) -> None:
        """Answers; when it is cancelled nobody waits any more, and psycopg asks the server to cancel the statement."""
        try:
            rows = await self._tried(sql, values)
        except asyncio.CancelledError:
            if not answer.done():
                answer.set_exception(psycopg.OperationalError("the engine was stopped"))
        except Exception as error:  # noqa: BLE001 - the caller gets it
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(rows)

    async def _tried(self, sql: str, values: Sequence[Any]) -> list[Row]:
        for _ in range(_TRIES):
            used = bool(self._idle)
            connection = self._idle.pop() if used else await connect(self._where, self._name, prepared=self._prepared)
            try:
                return await self._executed(connection, sql, values)
            except _AGAIN:
                continue
            except psycopg.OperationalError:
                if not (used and connection.closed):
                    raise
                await self._close_idle()  # what cut one has probably cut them all
        raise psycopg.OperationalError("others were faster, again and again")

    async def _executed(self, connection: Connection, sql: str, values: Sequence[Any]) -> list[Row]:
        """Runs it; the connection is kept unless it failed in a way that may be the connection's fault."""
        keep = False
        try:
            cursor = connection.cursor(binary=True)
            await cursor.execute(sql, values)
            rows = await cursor.fetchall()
            keep = True
        except _AGAIN:
            keep = True
            raise
        finally:
            if keep:
                self._idle.append(connection)
            else:
                await _close(connection)
        return rows

    async def _close_idle(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            await _close(connection)

    async def close(self) -> None:
        """Ends what runs, and closes the connections."""
        for work in list(self._working):
            work.cancel()
        if self._working:
            await asyncio.wait(self._working)
        await self._close_idle()


def _give_up(work: asyncio.Task[None], answer: asyncio.Future[list[Row]]) -> None:
    if not answer.done():
        answer.set_exception(psycopg.OperationalError(f"no answer within {PATIENCE_S:g} s"))
        work.cancel()


async def _close(connection: Connection) -> None:
    with suppress(psycopg.Error):
        await connection.close()
