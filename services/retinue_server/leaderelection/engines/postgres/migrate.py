"""Brings the schema up to date. Many servers may start at once: one migrates, the others wait and find it done."""

from __future__ import annotations

import secrets
from importlib.resources import files
from typing import TYPE_CHECKING

import psycopg

from retinue_server.leaderelection.engines.postgres.statements import SYSTEMS, TIMELINES
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.postgres import MIGRATION_LOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue_server.leaderelection.engines.postgres.pool import Connection, Row
    from retinue_server.leaderelection.engines.postgres.statements import Statements

VERSION = 1
"""What this server makes and needs."""
_MIN_SERVER = 13_00_00
_WAIT = "30s"
"""For another server's migration."""


async def prepare(connection: Connection, statements: Statements) -> None:
    """Makes or upgrades the schema, and finds out how to ask for the era.

    Raises StartError for a database or a schema that can't be used.
    """
    if connection.info.server_version < _MIN_SERVER:
        raise StartError("cannot use the database: PostgreSQL 13 or later is needed")
    async with connection.transaction():
        await _run(connection, f"SET LOCAL lock_timeout = '{_WAIT}'")
        await _run(connection, f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
        await _migrate(connection, statements)
        await _mark_home(connection, statements)
    system = await _first_that_works(connection, SYSTEMS)
    statements.find_era_by(system, await _first_that_works(connection, TIMELINES))


async def _migrate(connection: Connection, statements: Statements) -> None:
    version = await _version(connection, statements)
    if version > VERSION:
        raise StartError(
            f"cannot use the schema {statements.schema}: its elections are version {version}, newer than {VERSION}; "
            "use a newer server"
        )
    for number in range(version + 1, VERSION + 1):
        await _apply(connection, statements, number)


async def _version(connection: Connection, statements: Statements) -> int:
    """0 = there is nothing yet."""
    table = f"{statements.schema}.leaderelection_version"
    [(known,)] = await _run(connection, "SELECT to_regclass($1::text)::text", (table,))
    if known is None:
        return 0
    [(version,)] = await _run(connection, f"SELECT max(version) FROM {table}")  # noqa: S608 - a schema's name
    return int(version)


async def _apply(connection: Connection, statements: Statements, number: int) -> None:
    if number == 1:
        [(known,)] = await _run(connection, "SELECT to_regnamespace($1::text)::text", (statements.schema,))
        if known is None:  # who may only use the schema need not be allowed to make one
            await _run(connection, statements.fill("CREATE SCHEMA {schema}"))
        log = "CREATE TABLE {schema}.leaderelection_version (version integer PRIMARY KEY, at timestamptz DEFAULT now())"
        await _run(connection, statements.fill(log))
    text = files(__package__).joinpath(f"migrations/{number:04}.sql").read_text()
    await connection.execute(statements.fill(text), prepare=False)
    note = statements.fill("INSERT INTO {schema}.leaderelection_version (version) VALUES ($1::integer)")
    await _run(connection, note, (str(number),))


async def _mark_home(connection: Connection, statements: Statements) -> None:
    """Gives the table an id; another one if it was made anew, as by restoring a dump."""
    home = statements.fill("'{schema}.leaderelection_election'::regclass::oid")
    if await _run(connection, statements.fill(f"SELECT FROM {{schema}}.leaderelection_meta WHERE home = {home}")):
        return
    await _run(connection, statements.fill("DELETE FROM {schema}.leaderelection_meta"))
    mark = statements.fill(f"INSERT INTO {{schema}}.leaderelection_meta VALUES ($1::text, {home})")  # noqa: S608 - constants
    await _run(connection, mark, (secrets.token_hex(6),))


async def _first_that_works(connection: Connection, ways: Sequence[str]) -> str:
    """Roles and services differ in what they may ask."""
    for way in ways[:-1]:
        try:
            await _run(connection, f"SELECT {way}")
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.FeatureNotSupported, psycopg.ProgrammingError):
            continue
        return way
    return ways[-1]


async def _run(connection: Connection, sql: str, values: Sequence[str] = ()) -> list[Row]:
    cursor = await connection.execute(sql, values or None, prepare=False)
    return await cursor.fetchall() if cursor.description is not None else []
