"""PostgreSQL by the queries of a rule pack: read-only, one connection, its own limit of time."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.engine import Answer, SourceError
from retinue_server.adapter.engines.dialling import connected, credentials
from retinue_server.runtime.errors import Reason, Unimplemented

if TYPE_CHECKING:
    from retinue_server.adapter.core.packs import Pack
    from retinue_server.adapter.core.spec import Spec
    from retinue_server.adapter.engines.dialling import Objection

_MAX_ROWS = 10_000


class PostgresSource:
    """One database. A query that fails, since its table is not there, costs its own metrics alone."""

    def __init__(self, spec: Spec, pack: Pack | None, objection: Objection) -> None:
        try:
            import psycopg  # noqa: PLC0415 - for targets of this kind
        except ImportError:
            raise Unimplemented(
                "cannot collect PostgreSQL: psycopg is missing; run `pip install 'retinue-server[postgres]'`",
                reason=Reason.CAPABILITY_MISSING,
                capability="POSTGRESQL",
            ) from None
        self._psycopg = psycopg
        self._spec, self._objection = spec, objection
        self.use(pack)
        self.reject = Reject()
        self._connection: Any = None

    async def collect(self) -> Answer:
        try:
            if self._connection is None or self._connection.closed:
                self._connection = await self._connect()
            document = await self._asked()
        except BaseException as error:
            await self.close()  # also when the time is over: what the server still does ends with the connection
            if isinstance(error, self._psycopg.Error):
                raise SourceError(f"PostgreSQL says: {_first_line(error)}") from None
            raise
        return Answer(document=document)

    async def _asked(self) -> dict[str, Any]:
        """The rows of all queries that succeed; raises the last failure if none does."""
        document: dict[str, Any] = {}
        failed: Exception | None = None
        for name, query in self._queries.items():
            try:
                document[name] = await self._rows(query)
            except self._psycopg.Error as error:
                if self._connection.closed:
                    raise
                failed = error
                self.reject("query_failed", f"{name}: {_first_line(error)}")
        if failed is not None and not document:
            raise failed
        return document

    def use(self, pack: Pack | None) -> None:
        """The queries from now on."""
        self._queries = dict(pack.queries) if pack else {}

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connect(self) -> Any:
        said: dict[str, Any] = self._psycopg.conninfo.conninfo_to_dict(self._spec.endpoint)
        host, port = str(said.get("host", "127.0.0.1")), int(said.get("port", 5432))
        async with connected(host, port, self._objection) as (
            _,
            writer,
        ):  # which of its addresses may be dialled, and answers
            said["hostaddr"] = writer.get_extra_info("peername")[0]
        if self._spec.credentials_file:
            said["password"] = await credentials(self._spec.credentials_file)
        milliseconds = max(int(self._spec.timeout_s * 1000), 1)
        said["options"] = f"-c default_transaction_read_only=on -c statement_timeout={milliseconds}"
        said["application_name"] = "retinue-adapter"
        return await self._psycopg.AsyncConnection.connect(**said, autocommit=True, prepare_threshold=None)

    async def _rows(self, query: str) -> list[dict[str, Any]]:
        async with self._connection.cursor(row_factory=self._psycopg.rows.dict_row) as cursor:
            await cursor.execute(query)
            rows = await cursor.fetchmany(_MAX_ROWS)
        return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else "nothing"


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return value if isinstance(value, int | float | str | None) else str(value)
