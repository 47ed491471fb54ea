"""The port over PostgreSQL; see the package."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import psycopg
from msgspec.structs import replace
from psycopg import errors

from retinue_server.leaderelection.engine import (
    TERMS_KEPT,
    Capabilities,
    Claim,
    EndReason,
    Granted,
    Hold,
    Record,
    Refused,
    Scope,
    Term,
)
from retinue_server.leaderelection.engines.postgres.migrate import prepare
from retinue_server.leaderelection.engines.postgres.news import News
from retinue_server.leaderelection.engines.postgres.pool import Pool, Row, connect
from retinue_server.leaderelection.engines.postgres.statements import Statements
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Reason, ResourceExhausted, RetinueError, Unavailable
from retinue_server.runtime.postgres import Address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

_HEARING_MS, _DEAF_MS = 1_000, 250
"""How often to look again, with news and without."""
_CONNECTIONS = 2
"""For all but renewals, which have one of their own: they must not stand behind a crowd of claims."""
_NAME = "retinue leaderelection"


class PostgresEngine:
    """See engine.Engine. `url` is what libpq takes; a wrong one is a ValueError."""

    def __init__(
        self,
        url: str,
        *,
        password_file: Path | None = None,
        schema: str = "retinue",
        prepared_statements: bool = True,
        listen_url: str = "",
    ) -> None:
        self.capabilities = Capabilities("postgres", Scope.CLUSTER, poll_ms=_DEAF_MS)
        self._statements = Statements(schema)
        self._where, self._prepared = Address(url, password_file), prepared_statements
        self._direct = Address(listen_url or url, password_file)
        self._told: Callable[[str], None] = lambda _: None
        self._watched: set[str] = set()
        self._pool: Pool | None = None
        self._renewals: Pool | None = None
        self._news: News | None = None

    async def start(self) -> None:
        try:
            await self._prepare()
        except psycopg.Error as error:
            raise StartError(f"cannot use the database: {str(error).strip()}") from error
        self._pool = Pool(self._where, _NAME, _CONNECTIONS, prepared=self._prepared)
        self._renewals = Pool(self._where, f"{_NAME} renewals", 1, prepared=self._prepared)
        self._news = News(self._direct, self._pool, self._statements.schema, self._hear, self._set_hearing)
        await self._news.start()

    async def _prepare(self) -> None:
        connection = await connect(self._where, f"{_NAME} start", prepared=False)
        try:
            await prepare(connection, self._statements)
            [(fsync,)] = await (await connection.execute("SELECT current_setting('fsync')")).fetchall()
        finally:
            await connection.close()
        if fsync != "on":
            _log.warning("the database has fsync=%s: after a power loss two apps may lead under one token", fsync)

    async def stop(self) -> None:
        news, self._news = self._news, None
        if news is not None:
            await news.stop()
        pools = self._pool, self._renewals
        self._pool = self._renewals = None
        for pool in pools:
            if pool is not None:
                await pool.close()

    def listen(self, told: Callable[[str], None]) -> None:
        self._told = told

    def watch(self, election_id: str) -> None:
        self._watched.add(election_id)

    def unwatch(self, election_id: str) -> None:
        self._watched.discard(election_id)

    def _hear(self, election_id: str | None) -> None:
        names = list(self._watched) if election_id is None else [election_id]
        for name in names:
            if name in self._watched:
                self._told(name)

    def _set_hearing(self, *, hearing: bool) -> None:
        self.capabilities = replace(self.capabilities, poll_ms=_HEARING_MS if hearing else _DEAF_MS)

    async def claim(self, claim: Claim, watched: str | None = None) -> Granted | Refused:
        rows = await self._run(
            "claim",
            claim.election_id,
            claim.candidate_id,
            claim.session_id,
            claim.value.encode(),
            str(claim.lease_ms),
            str(claim.release_delay_ms),
            str(claim.wall_ms),
            watched,
            str(int(EndReason.EXPIRED)),
            str(TERMS_KEPT),
            *self._news_of(claim.election_id),
        )
        for granted, wait_ms, *record in rows:
            return Granted(_record(record), wait_ms) if granted else Refused(_record(record))
        return Refused(await self.read(claim.election_id))  # another was faster, while this one waited for the row

    async def withdraw(self, election_id: str, session_id: str) -> None:
        """There is no line."""

    async def renew(self, holds: Sequence[Hold]) -> Sequence[Record | None]:
        if not holds:
            return []
        elections, sessions, epochs = ([str(part) for part in parts] for parts in zip(*holds, strict=True))
        rows = await self._run("renew", elections, sessions, epochs, pool=self._renewals)
        renewed = {_held(record): record for record in map(_record, rows)}
        return [renewed.get(hold) for hold in holds]

    async def release(self, hold: Hold, reason: EndReason, wall_ms: int) -> bool:
        ended = str(int(reason)), str(wall_ms)
        return bool(await self._run("release", *_values(hold), *ended, *self._news_of(hold.election_id)))

    async def proclaim(self, hold: Hold, value: str) -> Record | None:
        return _one(await self._run("proclaim", *_values(hold), value.encode(), *self._news_of(hold.election_id)))

    async def ask_step_down(self, election_id: str, epoch: int) -> Record | None:
        return _one(await self._run("ask_step_down", election_id, str(epoch), *self._news_of(election_id)))

    async def read(self, election_id: str) -> Record | None:
        return _one(await self._run("read", election_id))

    async def records(self, after: str, limit: int) -> Sequence[Record]:
        return [_record(row) for row in await self._run("records", after, str(limit))]

    async def terms(self, election_id: str, before: int | None, limit: int) -> Sequence[Term]:
        upto = (1 << 62) if before is None else before
        return [
            Term(epoch, domain, candidate_id, acquire_ms, end_ms, EndReason(reason))
            for epoch, domain, candidate_id, acquire_ms, end_ms, reason in await self._run(
                "terms", election_id, str(upto), str(limit)
            )
        ]

    def _news_of(self, election_id: str) -> tuple[str, str]:
        if self._news is None:
            raise _stopped()
        return self._news.channel, self._news.payload(election_id)

    async def _run(self, name: str, *values: Any, pool: Pool | None = None) -> list[Row]:
        pool = pool or self._pool
        if pool is None:
            raise _stopped()
        try:
            return await pool.run(self._statements[name], values)
        except psycopg.Error as error:
            raise _translated(error) from error


def _stopped() -> Unavailable:
    return Unavailable("cannot go on: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500)


def _translated(error: psycopg.Error) -> RetinueError:
    if isinstance(error, errors.DiskFull):
        return ResourceExhausted("cannot write: the database's disk is full", reason=Reason.DISK_FULL, retry_ms=5_000)
    _log.info("the database failed: %s", str(error).strip())
    return Unavailable(
        "cannot go on: the engine does not answer; see the server's log",
        reason=Reason.ENGINE_UNAVAILABLE,
        retry_ms=500,
    )


def _values(hold: Hold) -> tuple[str, str, str]:
    return hold.election_id, hold.session_id, str(hold.epoch)


def _held(record: Record) -> Hold:
    return Hold(record.election_id, record.session_id, record.epoch)


def _one(rows: Sequence[Row]) -> Record | None:
    return _record(rows[0]) if rows else None


def _record(row: Sequence[Any]) -> Record:
    election_id, domain, epoch, version, candidate_id, session_id, value, *numbers, step_down = row
    lease_ms, release_delay_ms, acquire_ms = numbers
    return Record(
        election_id=election_id,
        domain=domain,
        epoch=epoch,
        version=version,
        candidate_id=candidate_id,
        session_id=session_id,
        value=value.decode(),
        lease_ms=lease_ms,
        release_delay_ms=release_delay_ms,
        acquire_ms=acquire_ms,
        step_down=step_down,
    )
