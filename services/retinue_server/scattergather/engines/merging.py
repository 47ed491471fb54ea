"""Calls to the user's MergeService."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from grpc import aio

from retinue.scattergather.v1 import merge_service_pb2 as pb
from retinue.scattergather.v1.coverage_pb2 import Coverage
from retinue.scattergather.v1.merge_service_pb2_grpc import MergeServiceStub
from retinue_server.runtime import telemetry
from retinue_server.runtime.errors import Code, Reason, RetinueError
from retinue_server.scattergather.engines.grpc import open_channel

if TYPE_CHECKING:
    from retinue_server.runtime.telemetry import Span
    from retinue_server.scattergather.engine import Metadata, UserMerge

_MAX_BYTES = 64 * 1024 * 1024
_SERVICE = "retinue.scattergather.v1.MergeService"
_PASSED_ON = (Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED)


class Fail(Protocol):
    """Makes the error of a merge that failed."""

    def __call__(self, code: Code, message: str, *, reason: Reason) -> RetinueError: ...


class MergeCalls:
    """A part: one channel for each service."""

    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._channels: dict[str, aio.Channel] = {}
        self._stubs: dict[str, Any] = {}

    def begin(self, address: str, pool_id: str, payload: bytes, *, timeout_s: float, stream: bool) -> UserMerge:
        if address not in self._channels:
            self._channels[address] = channel = open_channel(address, None, _MAX_BYTES)
            self._stubs[address] = MergeServiceStub(channel)
        stub = self._stubs[address]
        if stream:
            return _Streamed(stub, pb.MergeStart(pool_id=pool_id, payload=payload), timeout_s, self._fail)
        return _AtOnce(stub, pb.MergeRequest(pool_id=pool_id, payload=payload), timeout_s, self._fail)

    async def start(self) -> None:
        """Channels are opened when they are used."""

    async def stop(self) -> None:
        channels, self._channels = self._channels, {}
        self._stubs.clear()
        for channel in channels.values():
            await channel.close()


def _span(method: str) -> Span:
    """Of the call; what it says goes with it."""
    attributes = {"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method}
    return telemetry.tracer().span(f"{_SERVICE}/{method}", attributes=attributes, kind="client")


def _metadata(span: Span) -> Metadata:
    return (("traceparent", span.traceparent),) if span.traceparent else ()


def _failed(error: aio.AioRpcError, fail: Fail) -> RetinueError:
    code = Code(error.code().value[0])
    said = code if code in _PASSED_ON else Code.INTERNAL
    return fail(said, f"cannot merge the replies: {code.name}: {error.details()}", reason=Reason.MERGE_FAILED)


class _AtOnce:
    """All replies in one request."""

    def __init__(self, stub: Any, request: pb.MergeRequest, timeout_s: float, fail: Fail) -> None:
        self._stub, self._request, self._fail = stub, request, fail
        self._ends = asyncio.get_running_loop().time() + timeout_s

    def add(self, shard_id: str, payload: bytes) -> None:
        self._request.replies.add(shard_id=shard_id, payload=payload)

    async def finish(self, expected: int, answered: int, *, complete: bool) -> bytes:
        self._request.coverage.CopyFrom(Coverage(expected=expected, answered=answered, complete=complete))
        left = max(0, self._ends - asyncio.get_running_loop().time())
        with _span("Merge") as span:
            try:
                reply: pb.MergeResponse = await self._stub.Merge(self._request, timeout=left, metadata=_metadata(span))
            except aio.AioRpcError as error:
                raise _failed(error, self._fail) from error
        return reply.payload

    def cancel(self) -> None:
        """The call ends with the task that awaits it."""


class _Streamed:
    """Each reply as it comes."""

    def __init__(self, stub: Any, start: pb.MergeStart, timeout_s: float, fail: Fail) -> None:
        self._queue: asyncio.Queue[pb.MergeStreamRequest | None] = asyncio.Queue()
        self._queue.put_nowait(pb.MergeStreamRequest(start=start))
        self._fail = fail
        self._span = _span("MergeStream")
        self._all_sent = self._ended = False
        self._call = stub.MergeStream(self._requests(), timeout=timeout_s, metadata=_metadata(self._span))

    async def _requests(self) -> Any:
        while (request := await self._queue.get()) is not None:
            yield request
        self._all_sent = True

    def add(self, shard_id: str, payload: bytes) -> None:
        self._queue.put_nowait(pb.MergeStreamRequest(reply=pb.LeafReply(shard_id=shard_id, payload=payload)))

    async def finish(self, expected: int, answered: int, *, complete: bool) -> bytes:  # noqa: ARG002 - UserMerge has it
        self._queue.put_nowait(None)
        try:
            reply: pb.MergeStreamResponse = await self._call
        except aio.AioRpcError as error:
            self._end(error.code().name)
            raise _failed(error, self._fail) from error
        if not self._all_sent:
            self._end(Code.INTERNAL.name)
            text = "cannot merge the replies: the MergeService answered before the last of them"
            raise self._fail(Code.INTERNAL, text, reason=Reason.MERGE_FAILED)
        self._end()
        return reply.payload

    def _end(self, error: str = "") -> None:
        if not self._ended:
            self._ended = True
            self._span.end(error=error)

    def cancel(self) -> None:
        self._call.cancel()
        self._end()
