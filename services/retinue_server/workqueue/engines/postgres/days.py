"""The partitions of history: one for each day on which something is to be forgotten. Past ones are dropped whole."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import psycopg

from retinue_server.workqueue.engines.postgres import records
from retinue_server.workqueue.engines.postgres.statements import DAYS_LOCK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from retinue_server.workqueue.engine import QueueRow
    from retinue_server.workqueue.engines.postgres.session import Session
    from retinue_server.workqueue.engines.postgres.statements import Statements

_log = logging.getLogger(__name__)
_NAME = re.compile(r"history_d(\d+)$")


def keep_days(session: Session, statements: Statements) -> frozenset[int]:
    """Makes the partitions that will be needed until tomorrow, drops those that are past; which there are."""
    queues = [records.queue(row) for row in session.run([(statements["queues"], ())])]
    [(_, now_ms)] = session.run([(statements["clock"], ())])
    today = now_ms // records.DAY_MS
    known = _known(session, statements)
    for day in sorted(_needed(queues, now_ms) - known):
        _attach(session, statements, day)
    for day in sorted(day for day in known if day < today):
        _drop(session, statements, day)
    return frozenset(day for day in _known(session, statements) if day >= today)


def _needed(queues: Iterable[QueueRow], now_ms: int) -> set[int]:
    settings = [queue.settings for queue in queues]
    kept = {ms for one in settings for ms in (one.retention_ms, one.dead_retention_ms) if ms >= records.SHORT_MS}
    return {(now_ms + ms) // records.DAY_MS + later for ms in kept for later in (0, 1)}


def _known(session: Session, statements: Statements) -> set[int]:
    sql = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = '{schema}.history'::regclass"
    names = [row[0] for row in session.run([(statements.fill(sql), ())])]
    return {int(found[1]) for name in names if (found := _NAME.search(name))}


def _attach(session: Session, statements: Statements, day: int) -> None:
    """Made aside and attached, which leaves readers and writers of history alone."""
    table = f"{{schema}}.history_d{day}"
    [(statistics,)] = session.run([(statements["statistics"], ())])
    _quickly(
        session,
        statements.fill(f"CREATE TABLE IF NOT EXISTS {table} (LIKE {{schema}}.history INCLUDING STORAGE)"),
        statements.fill(f"ALTER TABLE {table} {statistics}"),
        statements.fill(
            f"ALTER TABLE {{schema}}.history ATTACH PARTITION {table} FOR VALUES FROM ({day}) TO ({day + 1})"
        ),
    )


def _drop(session: Session, statements: Statements, day: int) -> None:
    _quickly(session, statements.fill(f"DROP TABLE IF EXISTS {{schema}}.history_d{day}"))


def _quickly(session: Session, *changes: str) -> None:
    """Changes tables, or leaves it for the next time if somebody uses them: whoever came after would wait, too."""
    begin = [
        ("BEGIN", ()),
        ("SELECT set_config('lock_timeout', '300ms', true)", ()),
        (_ONE_AT_A_TIME, (str(DAYS_LOCK),)),
    ]
    try:
        session.run(begin)
        for change in changes:
            session.connection.execute(change, prepare=False)
        session.run([("COMMIT", ())])
    except psycopg.Error as error:
        session.rollback()
        _log.info("cannot change the days of history just now: %s", str(error).strip())


_ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock($1::integer, 0)"
