"""One connection to PostgreSQL, used by one thread at a time; statements go in pipelines, so that a round trip is rare.

Nothing lives in the session but prepared statements, which can be switched off: what is set, is set for the
transaction, so that PgBouncer may give every transaction another connection of the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from retinue_server.runtime.errors import Reason, ResourceExhausted, RetinueError, Unavailable

if TYPE_CHECKING:
    from retinue_server.runtime.postgres import Address

Statement = tuple[str, Sequence[Any]]

CONNECT_SECONDS = 3


class Session:
    """A connection that is opened when it is needed, and again when it was lost."""

    def __init__(self, where: Address, name: str, *, prepared: bool) -> None:
        self._where, self._name, self._prepared = where, name, prepared
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None

    @property
    def connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The open connection; connects if there is none."""
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        connection = psycopg.connect(
            autocommit=True,
            prepare_threshold=0 if self._prepared else None,
            cursor_factory=psycopg.RawCursor,
            **self._where.parameters(connect_timeout=CONNECT_SECONDS, application_name=self._name),
        )
        connection.prepared_max = 1_000
        return connection

    def run(self, statements: Sequence[Statement]) -> list[tuple[Any, ...]]:
        """Runs them in one round trip; the rows of the last one, or its status in one row."""
        return _rows(self._run(statements)[-1])

    def first_rows(self, statements: Sequence[Statement]) -> list[tuple[Any, ...]]:
        """Runs them in one round trip; the first row of each, or its status."""
        return [_rows(cursor)[0] for cursor in self._run(statements)]

    def _run(self, statements: Sequence[Statement]) -> list[psycopg.Cursor[tuple[Any, ...]]]:
        connection = self.connection
        if len(statements) == 1:
            return [self._execute(connection, *statements[0])]
        with connection.pipeline():
            return [self._execute(connection, *statement) for statement in statements]

    @staticmethod
    def _execute(
        connection: psycopg.Connection[tuple[Any, ...]], sql: str, values: Sequence[Any]
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        cursor = connection.cursor(binary=True)
        cursor.execute(sql, values or None)
        return cursor

    def rollback(self) -> None:
        """Ends the transaction, if there is one; a connection that can't do that is dropped."""
        connection = self._connection
        if connection is None or connection.closed:
            return
        try:
            if connection.info.transaction_status != TransactionStatus.IDLE:
                self.run([("ROLLBACK", ())])
        except psycopg.Error:
            self.close()

    def close(self) -> None:
        """Closes the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()

    @property
    def lost(self) -> bool:
        """Whether there is no connection (any more)."""
        return self._connection is None or self._connection.closed


def _rows(cursor: psycopg.Cursor[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return cursor.fetchall() if cursor.description else [(cursor.statusmessage,)]


AGAIN = (
    errors.UniqueViolation,
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.LockNotAvailable,
    errors.CheckViolation,
)
"""Another transaction was faster: what is run again sees what that one did. (CheckViolation: a partition is gone.)"""


def translated(error: BaseException) -> RetinueError:
    """As callers are told."""
    told: RetinueError
    if isinstance(error, errors.DiskFull):
        told = ResourceExhausted(
            "cannot write: the database's disk is full; nothing was changed", reason=Reason.DISK_FULL, retry_ms=5_000
        )
    else:
        told = Unavailable(
            "cannot go on: the database is away or failed; see the server's log",
            reason=Reason.ENGINE_UNAVAILABLE,
            retry_ms=1_000,
        )
    told.__cause__ = error
    return told
