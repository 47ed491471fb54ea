"""One connection to PostgreSQL, used by one thread at a time; statements go in pipelines, so that a round trip is rare.

Nothing lives in the session but prepared statements, which can be switched off: what is set, is set for the
transaction, so that PgBouncer may give every transaction another connection of the server.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors
from psycopg.adapt import Transformer
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus

from retinue_server.runtime.errors import Reason, ResourceExhausted, RetinueError, Unavailable

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from retinue_server.runtime.postgres import Address

Statement = tuple[str, Sequence[Any]]

CONNECT_SECONDS = 3


class Session:
    """A connection that is opened when it is needed, and again when it was lost."""

    def __init__(self, where: Address, name: str, *, prepared: bool) -> None:
        self._where, self._name, self._prepared = where, name, prepared
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._line: _Line

    @property
    def connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The open connection; connects if there is none."""
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
            self._line = _Line(self._connection, prepared=self._prepared)
        return self._connection

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            autocommit=True,
            prepare_threshold=None,
            cursor_factory=psycopg.RawCursor,
            **self._where.parameters(connect_timeout=CONNECT_SECONDS, application_name=self._name),
        )

    def run(self, statements: Sequence[Statement]) -> list[tuple[Any, ...]]:
        """Runs them in one round trip; the rows of the last one, or its status in one row."""
        results = self._run(statements)
        return self._line.rows(results[-1])

    def first_rows(self, statements: Sequence[Statement]) -> list[tuple[Any, ...]]:
        """Runs them in one round trip; the first row of each, or its status."""
        return [self._line.rows(result)[0] for result in self._run(statements)]

    def _run(self, statements: Sequence[Statement]) -> list[PGresult]:
        connection = self.connection
        told = [(sql, _parameters(values)) for sql, values in statements]
        try:
            return self._line.run(told)
        except _Broken as broken:
            connection.close()
            raise broken.error from broken

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


class _Broken(Exception):
    """The connection is of no use any more."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Line:
    """An open connection, spoken to by libpq's own calls: five statements take 30 µs, and 200 by psycopg's cursors."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]], *, prepared: bool) -> None:
        self._libpq = connection.pgconn
        self._transformer = Transformer(connection)
        self._names: dict[str, bytes] = {}
        """What is prepared."""
        self._numbers = count()
        self._most = _MOST_PREPARED if prepared else 0
        self._arrived, self._either = select.poll(), select.poll()
        self._arrived.register(self._libpq.socket, select.POLLIN)
        self._either.register(self._libpq.socket, select.POLLIN | select.POLLOUT)

    def run(self, statements: Sequence[tuple[str, _Parameters]]) -> list[PGresult]:
        """Runs them in one round trip; raises the error of the first that fails."""
        asked: list[str] = []
        results = self._talked(statements, asked)
        failed = [result for result in results if result.status not in _FINE]
        if failed:
            for sql, result in zip(asked, results, strict=True):
                if sql and result.status not in _FINE:
                    del self._names[sql]
            raise errors.error_from_result(failed[0])
        if len(results) > len(statements):
            return [result for sql, result in zip(asked, results, strict=True) if not sql]
        return results

    def _talked(self, statements: Sequence[tuple[str, _Parameters]], asked: list[str]) -> list[PGresult]:
        """What came of all that is `asked`: of SQL to prepare, or "" for a statement to run."""
        results: list[PGresult] = []
        try:
            self._libpq.enter_pipeline_mode()
            for sql, parameters in statements:
                self._ask(sql, *parameters, asked)
            self._libpq.pipeline_sync()
            self._send()
            self._receive(results)
            self._libpq.exit_pipeline_mode()
        except Exception as error:
            told = [errors.error_from_result(result) for result in results if result.status not in _FINE]
            raise _Broken(told[0] if told else error) from error
        return results

    def _ask(self, sql: str, values: _Values, formats: _Formats, asked: list[str]) -> None:
        if sql not in self._names and len(self._names) < self._most:
            self._names[sql] = f"s{next(self._numbers)}".encode()
            self._libpq.send_prepare(self._names[sql], sql.encode())
            asked.append(sql)
        if name := self._names.get(sql):
            self._libpq.send_query_prepared(name, values, formats, _BINARY)
        else:
            self._libpq.send_query_params(sql.encode(), values, None, formats, _BINARY)
        asked.append("")

    def _send(self) -> None:
        while self._libpq.flush():
            for _, events in self._either.poll():
                if events & ~select.POLLOUT:  # or it waits for us to take its answers
                    self._libpq.consume_input()

    def _receive(self, results: list[PGresult]) -> None:
        """All up to where the pipeline ends."""
        while True:
            while self._libpq.is_busy():
                self._arrived.poll()
                self._libpq.consume_input()
            result = self._libpq.get_result()
            if result is None:  # the end of what one statement gave
                if self._libpq.status != ConnStatus.OK:
                    raise psycopg.OperationalError("the connection is lost")
            elif result.status == ExecStatus.PIPELINE_SYNC:
                return
            else:
                results.append(result)

    def rows(self, result: PGresult) -> list[tuple[Any, ...]]:
        """What a statement gave, or its status in one row."""
        if not result.nfields:
            return [((result.command_status or b"").decode(),)]
        self._transformer.set_pgresult(result)
        return self._transformer.load_rows(0, result.ntuples, tuple)


_MOST_PREPARED = 1_000
_BINARY = 1
_FINE = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK, ExecStatus.EMPTY_QUERY)

_Values = list[bytes | None] | None
_Formats = list[int] | None
_Parameters = tuple[_Values, _Formats]
"""Values, and which of them are no text."""


def _parameters(values: Sequence[Any]) -> _Parameters:
    if not values:
        return None, None
    told = [value if value is None or isinstance(value, bytes) else _text(str(value)) for value in values]
    formats = [_BINARY if isinstance(value, bytes) else 0 for value in values] if bytes in map(type, values) else None
    return told, formats


def _text(value: str) -> bytes:
    if "\x00" in value:  # libpq would take it for the end
        raise psycopg.DataError("a text with NUL is no parameter")
    return value.encode()


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
