"""Brings the schema up to date. Many coordinators may start at once: one migrates, the others wait and find it done."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.postgres import MIGRATION_LOCK

if TYPE_CHECKING:
    from retinue_server.workqueue.engines.postgres.session import Session
    from retinue_server.workqueue.engines.postgres.statements import Statements

VERSION = 3
"""What this server makes and needs."""


def migrate(session: Session, statements: Statements) -> None:
    """Makes or upgrades the schema in one transaction; raises StartError for one that a newer server made."""
    try:
        session.run([("BEGIN", ()), ("SELECT pg_advisory_xact_lock($1)", (MIGRATION_LOCK,))])
        version = _version(session, statements)
        if version > VERSION:
            raise StartError(
                f"cannot use the schema {statements.schema}: it is version {version}, newer than {VERSION};"
                " use a newer server"
            )
        for number in range(version + 1, VERSION + 1):
            _apply(session, statements, number)
        session.run([("COMMIT", ())])
    finally:
        session.rollback()


def _version(session: Session, statements: Statements) -> int:
    """0 = there is nothing yet."""
    [(known,)] = session.run([("SELECT to_regclass($1)::text", (f"{statements.schema}.schema_version",))])
    if known is None:
        return 0
    [(version,)] = session.run([(statements.fill("SELECT max(version) FROM {schema}.schema_version"), ())])
    return int(version)


def _apply(session: Session, statements: Statements, number: int) -> None:
    if number == 1:
        make = "CREATE SCHEMA IF NOT EXISTS {schema}"
        log = "CREATE TABLE {schema}.schema_version (version integer PRIMARY KEY, at timestamptz DEFAULT now())"
        session.run([(statements.fill(make), ()), (statements.fill(log), ())])
    text = files(__package__).joinpath(f"migrations/{number:04}.sql").read_text()
    session.connection.execute(statements.fill(text), prepare=False)
    session.run(
        [(statements.fill("INSERT INTO {schema}.schema_version (version) VALUES ($1::integer)"), (str(number),))]
    )
