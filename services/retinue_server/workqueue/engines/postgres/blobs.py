"""Blobs in tables, in pieces of one size, so that every coordinator has them all; see engine.BlobStore."""

from __future__ import annotations

import asyncio
import queue as queues
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

from retinue_server.runtime.errors import NotFound, Reason, Unavailable
from retinue_server.workqueue.engine import BlobStat
from retinue_server.workqueue.engines.content import Content
from retinue_server.workqueue.engines.postgres.session import Session, Statement, translated

if TYPE_CHECKING:
    from retinue_server.workqueue.engines.postgres.statements import Statements

T = TypeVar("T")

PIECE = 256 * 1024
"""Bytes of a piece; part of the schema."""
_CONNECTIONS = 2


class PostgresBlobs:
    """See the module. Its connections are its own, so that large content does not hold up leases."""

    def __init__(self, sessions: Callable[[str], Session], statements: Statements, max_bytes: int) -> None:
        self._make, self.sql, self.max_bytes = sessions, statements, max_bytes
        self._sessions: queues.SimpleQueue[Session] = queues.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        self._threads = ThreadPoolExecutor(_CONNECTIONS, "workqueue-blobs")
        for _ in range(_CONNECTIONS):
            self._sessions.put(self._make("blobs"))
        await self.run([(self.sql["drop_old_uploads"], ())])

    async def stop(self) -> None:
        threads, self._threads = self._threads, None
        if threads is not None:
            await asyncio.to_thread(threads.shutdown)
            for _ in range(_CONNECTIONS):
                self._sessions.get().close()

    async def run(self, statements: list[Statement]) -> list[tuple[Any, ...]]:
        """Runs them as one transaction; the rows of the last."""
        if self._threads is None:
            raise Unavailable("cannot reach blobs: the engine is stopped", reason=Reason.ENGINE_UNAVAILABLE)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, statements)

    def _run(self, statements: list[Statement]) -> list[tuple[Any, ...]]:
        session = self._sessions.get()
        try:
            return session.run(statements)
        except psycopg.Error as error:
            raise translated(error) from error
        finally:
            session.rollback()
            self._sessions.put(session)

    def upload(self) -> _Upload:
        return _Upload(self)

    async def stat(self, blob_id: str) -> BlobStat | None:
        for size, create_ms in await self.run([(self.sql["stat_blob"], (blob_id,))]):
            return BlobStat(blob_id, size, create_ms)
        return None

    async def read(self, blob_id: str, offset: int, size: int) -> bytes:
        first = offset // PIECE
        last = (offset + size - 1) // PIECE
        pieces = await self.run([(self.sql["read_blob"], (blob_id, str(first), str(last)))])
        if not pieces:
            raise NotFound(f"cannot find blob {blob_id}", reason=Reason.BLOB_NOT_FOUND, blob_id=blob_id)
        begin = offset - first * PIECE
        return b"".join(data for (data,) in pieces if data is not None)[begin : begin + size]

    async def idle(self, age_ms: int, limit: int) -> list[str]:
        await self.run([(self.sql["drop_old_uploads"], ())])
        return [row[0] for row in await self.run([(self.sql["idle_blobs"], (str(age_ms), str(limit)))])]

    async def room(self) -> None:
        """The database's disk is not seen from here."""

    async def delete(self, blob_id: str, age_ms: int) -> None:
        await self.run([(self.sql["delete_blob"], (blob_id, str(age_ms)))])


class _Upload:
    """See engine.BlobWriter."""

    def __init__(self, blobs: PostgresBlobs) -> None:
        self._blobs = blobs
        self._name = secrets.token_hex(16)
        self._content = Content(blobs.max_bytes)
        self._number = 0
        self._rest = bytearray()
        self._done = False

    async def write(self, data: bytes) -> None:
        self._content.admit(len(data))
        self._content.update(data)
        self._rest += data
        while len(self._rest) >= PIECE:
            await self._put()

    async def _put(self) -> None:
        """Sends the next piece; it is durable, but nobody's."""
        sql = self._blobs.sql
        begin: list[Statement] = [] if self._number else [(sql["begin_upload"], (self._name,))]
        piece = bytes(self._rest[:PIECE])
        await self._blobs.run([*begin, (sql["put_piece"], (self._name, str(self._number), piece))])
        self._number += 1
        del self._rest[:PIECE]

    async def commit(self, expected_id: str, expected_size: int) -> BlobStat:
        blob_id = self._content.checked(expected_id, expected_size)
        if self._rest or not self._number:
            await self._put()
        return await self._publish(blob_id)

    async def _publish(self, blob_id: str) -> BlobStat:
        sql = self._blobs.sql
        statements: list[Statement] = [
            (sql["end_upload"], (self._name,)),
            (sql["keep_blob"], (blob_id, self._name, str(self._content.size))),
        ]
        [(upload, size, create_ms)] = await self._blobs.run(statements)
        self._done = upload == self._name
        return BlobStat(blob_id, size, create_ms)

    async def abort(self) -> None:
        if self._done or not self._number:
            return
        self._done = True
        sql = self._blobs.sql
        await self._blobs.run([(sql["end_upload"], (self._name,)), (sql["drop_pieces"], (self._name,))])
