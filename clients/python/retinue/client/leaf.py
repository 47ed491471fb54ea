"""Scatter/gather, from the side of those who answer: leaves and merges, which you supply.

    def search(query):                               # or a coroutine function
        return index.find(query.json["text"])        # JSON; or bytes

    serve_leaf(search, listen="0.0.0.0:9000")        # until SIGTERM or Ctrl-C

A handler returns what goes to the merge: bytes and messages as they are, every other value as JSON; `Partial` says that
it stands for a part. It raises `Refusal` to say why there is none; every other exception is INTERNAL to the root, which
asks another replica, and told in full in the log here. A coroutine function runs on the loop and is cancelled when
nobody waits any more; a plain one runs in a thread and may look at `query.stopping` and `query.remaining`.

`LeafServer` does the same inside a program; `LeafService` and `MergeService` go into any `grpc.aio` server.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json as json_text
import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeAlias, TypeVar

import grpc
import grpc.aio

from retinue.client import trace
from retinue.client.pool import Coverage, as_bytes
from retinue.scattergather.v1 import coverage_pb2 as coverage_pb
from retinue.scattergather.v1 import leaf_service_pb2 as leaf_pb
from retinue.scattergather.v1 import leaf_service_pb2_grpc as leaf_rpc
from retinue.scattergather.v1 import merge_service_pb2 as merge_pb
from retinue.scattergather.v1 import merge_service_pb2_grpc as merge_rpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

DEFAULT_GRACE = 10.0
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # a second server on the port must fail
    ("grpc.max_receive_message_length", -1),  # what a merge gets is bounded by the pool's byte budget
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.bdp_probe", 0),
)


class Refusal(Exception):
    """There is no answer, and why.

    INVALID_ARGUMENT, UNAUTHENTICATED and PERMISSION_DENIED: no leaf could answer it, and the whole request ends with
    the same. RESOURCE_EXHAUSTED: this replica has too much to do; it is not asked again for this request. UNAVAILABLE
    and INTERNAL: another replica may be asked.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Partial(NamedTuple):
    """An answer that stands for `answered` of the `expected` leaves, or other parts, of the shard."""

    content: Any
    answered: int
    expected: int


class _Asked:
    """What was asked, and by when."""

    def __init__(self, payload: bytes, seconds: float | None, metadata: Mapping[str, str]) -> None:
        self.payload = payload
        self.metadata = metadata
        """What the pool lets through, and the root's own."""
        self.stopping = threading.Event()
        """Set when nobody waits for the answer any more."""
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def json(self) -> Any:
        """The payload as JSON. Raises Refusal (INVALID_ARGUMENT) if it is none."""
        try:
            return json_text.loads(self.payload)
        except ValueError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"the payload is no JSON: {error}") from None

    @property
    def remaining(self) -> float | None:
        """Seconds until nobody waits any more; None if there is no deadline."""
        return None if self._end is None else max(self._end - time.monotonic(), 0)


class Query(_Asked):
    """A question to a leaf."""

    def __init__(self, request: leaf_pb.QueryRequest, seconds: float | None, metadata: Mapping[str, str]) -> None:
        super().__init__(request.payload, seconds, metadata)
        self.message = request
        """All that the root said."""
        self.attempt = request.attempt
        """1 for the first call for the shard, 2 for the second."""

    @property
    def shard_id(self) -> str:
        """The shard; of a batch the first."""
        return self.message.shard_id or next(iter(self.inputs), "")

    @property
    def inputs(self) -> dict[str, bytes]:
        """The shards that this call is for, each with its input: one, or several where the pool batches."""
        if not self.message.shards:
            return {self.message.shard_id: self.payload}
        own = ((one.shard_id, one.payload if one.HasField("payload") else self.payload) for one in self.message.shards)
        return dict(own)

    @property
    def accepts_partial(self) -> bool:
        """Whether a part is better than nothing."""
        return self.message.parent.accept_partial


class MergeReply(NamedTuple):
    """The reply of a shard; of a batch that of its first."""

    shard_id: str
    payload: bytes

    @property
    def json(self) -> Any:
        """The payload as JSON. Raises ValueError if it is none."""
        return json_text.loads(self.payload)


class Merging(_Asked):
    """Replies to be merged. `payload` and `json` are what the leaves were asked.

    `async for reply in merging` gives them as they come, where the pool is commutative; a plain function has all of
    them in `replies`.
    """

    def __init__(
        self, pool_id: str, payload: bytes, seconds: float | None, source: AsyncIterator[MergeReply] | None = None
    ) -> None:
        super().__init__(payload, seconds, {})
        self.pool_id = pool_id
        self.replies: list[MergeReply] = []
        """Those that have come, in the pool's order of shards unless the pool is commutative."""
        self.coverage: Coverage | None = None
        """Of what the replies stand for; None while they come."""
        self._source = source

    async def __aiter__(self) -> AsyncIterator[MergeReply]:
        for reply in self.replies:
            yield reply
        if self._source is not None:
            async for reply in self._source:
                self.replies.append(reply)
                yield reply

    async def gather(self) -> None:
        """Waits for all of them."""
        async for _ in self:
            pass


Handler: TypeAlias = "Callable[[Query], Awaitable[Any]] | Callable[[Query], Any]"
MergeHandler: TypeAlias = "Callable[[Merging], Awaitable[Any]] | Callable[[Merging], Any]"


class _Calls(Generic[Answer]):
    """Calls a handler, on the loop or on a thread, and makes a message of what it returns."""

    def __init__(self, handler: Callable[[Any], Any], encode: Callable[[Any], Answer], threads: int | None) -> None:
        self._handler, self._encode = handler, encode
        self.on_loop = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)
        self._threads = None if self.on_loop else ThreadPoolExecutor(threads, "retinue-leaf")

    async def __call__(self, asked: _Asked, method: str, traceparent: str, **attributes: str | int) -> Answer:
        """The answer; raises Refusal."""
        with trace.answering(method, traceparent, **attributes):
            try:
                return await self._run(asked)
            except Refusal:
                raise
            except Exception as error:
                log.exception("cannot answer %s", method)
                name = type(error).__name__
                raise Refusal(grpc.StatusCode.INTERNAL, f"the handler failed with {name}: see its log") from error

    async def _run(self, asked: _Asked) -> Answer:
        if self._threads is None:
            return self._encode(await self._handler(asked))
        run = contextvars.copy_context().run
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run, self._answer, asked)
        except asyncio.CancelledError:
            asked.stopping.set()
            raise

    def _answer(self, asked: _Asked) -> Answer:
        return self._encode(self._handler(asked))

    def close(self) -> None:
        """What has not begun will not."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


class LeafService(leaf_rpc.LeafServiceServicer):
    """A handler as a servicer: `add_LeafServiceServicer_to_server(LeafService(search), server)`.

    `threads` is how many plain functions run at once (None = Python's choice); others wait, and are not begun when
    nobody waits for them any more.
    """

    def __init__(self, handler: Handler, *, threads: int | None = None) -> None:
        self._calls = _Calls(handler, _response, threads)
        self._streams: set[_Stream] = set()

    async def Query(self, request: leaf_pb.QueryRequest, context: Any) -> leaf_pb.QueryResponse:  # noqa: N802 - the same
        """One question."""
        metadata = _text(context.invocation_metadata())
        try:
            return await self.answer(request, context.time_remaining(), metadata)
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.message)
            raise

    async def QueryStream(  # noqa: N802 - the contract's name
        self, request_iterator: AsyncIterator[leaf_pb.QueryStreamRequest], context: Any
    ) -> AsyncIterator[leaf_pb.QueryStreamResponse]:
        """Many questions, each a task."""
        stream = _Stream(self, _text(context.invocation_metadata()))
        self._streams.add(stream)
        try:
            async with aclosing(stream.answers(request_iterator)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self._streams.discard(stream)

    async def answer(
        self, request: leaf_pb.QueryRequest, seconds: float | None, metadata: Mapping[str, str]
    ) -> leaf_pb.QueryResponse:
        """What the handler says; raises Refusal."""
        query = Query(request, seconds, metadata)
        parent = metadata.get("traceparent", "")
        method = "retinue.scattergather.v1.LeafService/Query"
        return await self._calls(query, method, parent, shard_id=query.shard_id, attempt=query.attempt)

    def stop(self) -> None:
        """Takes no more from streams; what is open on them is answered."""
        for stream in self._streams:
            stream.stop()

    def close(self) -> None:
        """Begins nothing more."""
        self._calls.close()


def _response(content: Any) -> leaf_pb.QueryResponse:
    if not isinstance(content, Partial):
        return leaf_pb.QueryResponse(payload=as_bytes(content))
    whole = content.answered >= content.expected
    part = coverage_pb.Coverage(expected=content.expected, answered=content.answered, complete=whole)
    return leaf_pb.QueryResponse(payload=as_bytes(content.content), coverage=part)


class _Stream:
    """A stream of queries."""

    def __init__(self, service: LeafService, metadata: Mapping[str, str]) -> None:
        self._service, self._metadata = service, metadata
        self._queries: dict[int, asyncio.Task[None]] = {}
        self._answers: asyncio.Queue[leaf_pb.QueryStreamResponse | None] = asyncio.Queue()
        self._reading: asyncio.Task[None] | None = None

    async def answers(
        self, requests: AsyncIterator[leaf_pb.QueryStreamRequest]
    ) -> AsyncGenerator[leaf_pb.QueryStreamResponse]:
        """As they come, until the root ends the stream, or this server stops, and nothing is open."""
        self._reading = asyncio.create_task(self._read(requests))
        self._reading.add_done_callback(self._end)
        try:
            while (answer := await self._answers.get()) is not None:
                yield answer
        finally:
            for task in (self._reading, *self._queries.values()):
                task.cancel()

    def stop(self) -> None:
        """Reads no more."""
        if self._reading is not None:
            self._reading.cancel()

    def _end(self, _: object) -> None:
        if self._reading is not None and self._reading.done() and not self._queries:
            self._answers.put_nowait(None)

    async def _read(self, requests: AsyncIterator[leaf_pb.QueryStreamRequest]) -> None:
        async for request in requests:
            if request.cancel and (task := self._queries.get(request.query_id)):
                task.cancel()
            elif request.HasField("query"):
                self._begin(request)

    def _begin(self, request: leaf_pb.QueryStreamRequest) -> None:
        seconds = request.timeout_micros / 1_000_000 or None
        task = asyncio.create_task(self._answer(request, seconds))
        self._queries[request.query_id] = task
        timer = asyncio.get_running_loop().call_later(seconds, task.cancel) if seconds else None

        def end(_: object) -> None:
            del self._queries[request.query_id]
            if timer is not None:
                timer.cancel()
            self._end(None)

        task.add_done_callback(end)

    async def _answer(self, request: leaf_pb.QueryStreamRequest, seconds: float | None) -> None:
        answer = leaf_pb.QueryStreamResponse(query_id=request.query_id)
        try:
            answer.response.CopyFrom(await self._service.answer(request.query, seconds, self._metadata))
        except Refusal as refusal:
            answer.code, answer.message = refusal.code.value[0], refusal.message
        self._answers.put_nowait(answer)


class MergeService(merge_rpc.MergeServiceServicer):
    """A handler as a servicer: `add_MergeServiceServicer_to_server(MergeService(fuse), server)`."""

    def __init__(self, handler: MergeHandler, *, threads: int | None = None) -> None:
        self._calls = _Calls(handler, as_bytes, threads)

    async def Merge(self, request: merge_pb.MergeRequest, context: Any) -> merge_pb.MergeResponse:  # noqa: N802 - the contract's name
        """All replies at once."""
        merging = Merging(request.pool_id, request.payload, context.time_remaining())
        merging.replies.extend(MergeReply(one.shard_id, one.payload) for one in request.replies)
        known = request.coverage
        merging.coverage = Coverage(known.answered, known.expected, known.complete)
        return merge_pb.MergeResponse(payload=await self._merge(merging, "Merge", context))

    async def MergeStream(self, _: object, context: Any) -> merge_pb.MergeStreamResponse:  # noqa: N802 - the contract's name
        """Replies as they come."""
        first = await context.read()
        if first is grpc.aio.EOF or first.WhichOneof("message") != "start":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be `start`")
        merging = Merging(first.start.pool_id, first.start.payload, context.time_remaining(), _replies(context))
        if not self._calls.on_loop:
            await merging.gather()
        return merge_pb.MergeStreamResponse(payload=await self._merge(merging, "MergeStream", context))

    async def _merge(self, merging: Merging, method: str, context: Any) -> bytes:
        parent = _text(context.invocation_metadata()).get("traceparent", "")
        try:
            return await self._calls(merging, f"retinue.scattergather.v1.MergeService/{method}", parent)
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.message)
            raise

    def close(self) -> None:
        """Begins nothing more."""
        self._calls.close()


async def _replies(context: Any) -> AsyncIterator[MergeReply]:
    while (message := await context.read()) is not grpc.aio.EOF:
        if message.WhichOneof("message") == "reply":
            yield MergeReply(message.reply.shard_id, message.reply.payload)


class LeafServer:
    """Serves a leaf, a merge, or both: `async with LeafServer(search, listen="127.0.0.1:0") as server: server.address`.

    `listen` is HOST:PORT (port 0 = a free one) or unix:PATH. It is plaintext unless there are `credentials`.
    """

    def __init__(
        self,
        handler: Handler | None = None,
        *,
        merge: MergeHandler | None = None,
        listen: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        threads: int | None = None,
    ) -> None:
        trace.configure()
        self.address = listen
        self._credentials = credentials
        self._leaf = LeafService(handler, threads=threads) if handler else None
        self._merge = MergeService(merge, threads=threads) if merge else None
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(0)

    async def start(self) -> None:
        """Listens; `address` says where. Raises OSError."""
        self._server = server = grpc.aio.server(options=_OPTIONS)
        if self._leaf is not None:
            leaf_rpc.add_LeafServiceServicer_to_server(self._leaf, server)
        if self._merge is not None:
            merge_rpc.add_MergeServiceServicer_to_server(self._merge, server)
        try:
            port = self._bind(server)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.address}: {error}") from None
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
        await server.start()

    def _bind(self, server: grpc.aio.Server) -> int:
        if self._credentials is None:
            return server.add_insecure_port(self.address)
        return server.add_secure_port(self.address, self._credentials)

    async def stop(self, grace: float = DEFAULT_GRACE) -> None:
        """Takes no more queries; those under way have `grace` seconds. Safe to repeat."""
        server, self._server = self._server, None
        if server is None:
            return
        if self._leaf is not None:
            self._leaf.stop()
        await server.stop(grace)
        for service in (self._leaf, self._merge):
            if service is not None:
                service.close()


def serve_leaf(
    handler: Handler, listen: str = "127.0.0.1:9000", *, grace: float = DEFAULT_GRACE, **options: Any
) -> None:
    """Serves a leaf until SIGTERM or SIGINT, then drains; takes the options of LeafServer. For the main thread."""
    asyncio.run(_serve(LeafServer(handler, listen=listen, **options), grace))


def serve_merge(
    handler: MergeHandler, listen: str = "127.0.0.1:9001", *, grace: float = DEFAULT_GRACE, **options: Any
) -> None:
    """Serves a merge until SIGTERM or SIGINT, then drains; takes the options of LeafServer. For the main thread."""
    asyncio.run(_serve(LeafServer(merge=handler, listen=listen, **options), grace))


async def _serve(server: LeafServer, grace: float) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await server.start()
    log.info("serving at %s", server.address)
    await told.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)  # the second ends it at once
    await server.stop(grace)


def _text(metadata: Any) -> dict[str, str]:
    return {key: value for key, value in metadata or () if isinstance(value, str)}
