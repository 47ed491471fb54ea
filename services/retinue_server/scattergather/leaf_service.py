"""LeafService of a root that is a leaf of another: what is asked of it, it asks its own leaves."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue_server.runtime.errors import Code, FailedPrecondition, Reason, RetinueError, Violation
from retinue_server.runtime.status import shorten, unexpected
from retinue_server.scattergather import framing, translate
from retinue_server.scattergather.asking import From, Requests, trace
from retinue_server.scattergather.core import limits
from retinue_server.scattergather.core.requests import STRICT, Policy
from retinue_server.scattergather.core.scatter import ScatterError

if TYPE_CHECKING:
    from retinue_server.runtime.dispatch import Call
    from retinue_server.scattergather.core.requests import Ask
    from retinue_server.scattergather.core.root import Root

LEAF = leaf.DESCRIPTOR.services_by_name["LeafService"]

_ANY = 1e-9
"""Something, however little."""
_MAX_NAME_CHARS = 300
"""Of what roots above call themselves and their requests."""
_UNWRITTEN = 64
"""Answers of a stream that wait for their turn; while they are more, its queries wait, too."""


class LeafService:
    """See the contract; `leaf_pool` is asked for roots above that name none."""

    def __init__(self, root: Root, leaf_pool: str) -> None:
        self._root, self._leaf_pool = root, leaf_pool
        self._requests = Requests(root)

    async def Query(self, request: leaf.QueryRequest, call: Call) -> leaf.QueryResponse:
        ask = self._ask(request, call)
        try:
            return await self._root.scatter(ask, [], translate.leaf_response, trace)
        except ScatterError as error:
            translate.add_failure(error)
            raise

    def _ask(self, request: leaf.QueryRequest, call: Call) -> Ask:
        limits.refuse(_violations(request), "answer as a leaf")
        pool_id, above = self._pool_id(request.parent), From(tuple(request.parent.path), request.parent.scatter_id)
        partly = request.parent.accept_partial and self._root.topology(pool_id).pool.idempotent
        policy = Policy(min_coverage=_ANY) if partly else STRICT
        return self._requests.made(pool_id, framing.Inputs(_payload(request)), None, policy, call, above=above)

    def _pool_id(self, parent: leaf.ParentQuery) -> str:
        pool_id = parent.pool_id or self._leaf_pool
        if not pool_id:
            raise FailedPrecondition(
                "cannot answer as a leaf: say the shard's pool in the pool file above, or scattergather.leaf_pool here",
                reason=Reason.POOL_NOT_FOUND,
            )
        return pool_id

    async def QueryStream(self, call: Call) -> None:
        await _Queries(self, call).serve()


def _payload(request: leaf.QueryRequest) -> bytes:
    for one in request.shards:
        if one.HasField("payload"):
            return one.payload
    return request.payload


def _violations(request: leaf.QueryRequest) -> list[Violation]:
    found: list[Violation] = []
    parent = request.parent
    if len(request.shards) > 1:
        text = "must be at most one, since a root is one shard; leave out `batch` in the pool above"
        found.append(Violation("shards", text))
    if parent.pool_id:
        limits.check_pool_id(parent.pool_id, found, "parent.pool_id")
    if any(len(name) > _MAX_NAME_CHARS for name in parent.path):
        found.append(Violation("parent.path", f"must be of at most {_MAX_NAME_CHARS} characters each"))
    if len(parent.scatter_id) > _MAX_NAME_CHARS:
        found.append(Violation("parent.scatter_id", f"must be at most {_MAX_NAME_CHARS} characters"))
    return found


class _Queries:
    """The queries of one stream: each is a task; one that is cancelled is told nothing."""

    def __init__(self, service: LeafService, call: Call) -> None:
        self._service, self._call = service, call
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._unwritten = 0

    async def serve(self) -> None:
        try:
            while (request := await self._call.read()) is not None:
                self._take(request)
                while self._unwritten > _UNWRITTEN:
                    async with self._turn:
                        """Some of them have been written by now."""
            while self._tasks:
                await asyncio.wait(self._tasks)
        except RetinueError:
            await self._end_asked()
            raise
        finally:
            for task in self._tasks:
                task.cancel()

    async def _end_asked(self) -> None:
        """Gives up all but what is being written: the status waits for it, and for half a message it waits forever."""
        for task in self._asked.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _take(self, request: leaf.QueryStreamRequest) -> None:
        limits.refuse(self._violations(request), "answer on this stream")
        query_id = request.query_id
        if not request.cancel:
            self._asked[query_id] = task = asyncio.create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(partial(self._forget, query_id))
        elif query_id in self._asked:
            self._asked.pop(query_id).cancel()

    def _violations(self, request: leaf.QueryStreamRequest) -> list[Violation]:
        found: list[Violation] = []
        if request.cancel == request.HasField("query"):
            found.append(Violation("query", "must be there, unless `cancel` is set"))
        if request.query_id in self._asked and not request.cancel:
            found.append(Violation("query_id", "must be another for each query that is open"))
        if request.timeout_micros < 0:
            found.append(Violation("timeout_micros", "must be 0 or more"))
        return found

    def _forget(self, query_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._asked.get(query_id) is task:  # it never began
            del self._asked[query_id]
        if not task.cancelled():
            task.exception()  # the caller has gone, as the stream will learn, too

    async def _answer(self, request: leaf.QueryStreamRequest) -> None:
        response = await self._response(request)
        self._asked.pop(
            request.query_id, None
        )  # from here on it can't be cancelled: half a message would break the stream
        self._unwritten += 1
        try:
            async with self._turn:  # a stream takes one message at a time
                await self._call.write(response)
        finally:
            self._unwritten -= 1

    async def _response(self, request: leaf.QueryStreamRequest) -> leaf.QueryStreamResponse:
        query_id = request.query_id
        try:
            found = await self._service.Query(request.query, _OneOfMany(self._call, request.timeout_micros / 1_000_000))
        except RetinueError as error:
            return _failed(query_id, error.code, error.message)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever is raised becomes a status
            refused = unexpected(error, "a query on a stream")
            return _failed(query_id, refused.code, refused.message)
        return leaf.QueryStreamResponse(query_id=query_id, response=found)


def _failed(query_id: int, code: Code, message: str) -> leaf.QueryStreamResponse:
    return leaf.QueryStreamResponse(query_id=query_id, code=int(code), message=shorten(message))


class _OneOfMany:
    """The call of one query on a stream."""

    def __init__(self, call: Call, timeout_s: float) -> None:
        self.role, self.metadata = call.role, call.metadata
        self._call, self._timeout_s = call, timeout_s

    def time_remaining(self) -> float | None:
        of_stream = self._call.time_remaining()
        if not self._timeout_s:
            return of_stream
        return self._timeout_s if of_stream is None else min(self._timeout_s, of_stream)

    async def read(self) -> None:
        """There is one message, and it has been read."""

    async def write(self, response: object) -> None:
        await self._call.write(response)

    def set_trailing_metadata(self, key: str, value: str | bytes) -> None:
        """Streams have one trailer, at their end."""
