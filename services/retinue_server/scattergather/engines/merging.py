"""Calls to the user's MergeService."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from grpc import aio

from retinue.scattergather.v1 import merge_service_pb2 as pb
from retinue.scattergather.v1.coverage_pb2 import Coverage
from retinue.scattergather.v1.merge_service_pb2_grpc import MergeServiceStub
from retinue_server.runtime.errors import Code, Reason, RetinueError
from retinue_server.scattergather.engines.grpc import open_channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.scattergather.engine import UserMerge

_MAX_BYTES = 64 * 1024 * 1024
_PASSED_ON = (Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED)


class Fail(Protocol):
    """Makes the error of a merge that failed."""

    def __call__(self, code: Code, message: str, *, reason: Reason) -> RetinueError: ...


class MergeCalls:
    """A part: one channel for each service."""

    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._channels: dict[str, aio.Channel] = {}

    def begin(self, address: str, pool_id: str, payload: bytes, *, timeout_s: float, stream: bool) -> UserMerge:
        if address not in self._channels:
            self._channels[address] = open_channel(address, None, _MAX_BYTES)
        stub: Any = MergeServiceStub(self._channels[address])
        failed = self._failed
        if stream:
            return _Streamed(stub, pb.MergeStart(pool_id=pool_id, payload=payload), timeout_s, failed)
        return _AtOnce(stub, pb.MergeRequest(pool_id=pool_id, payload=payload), timeout_s, failed)

    def _failed(self, error: aio.AioRpcError) -> RetinueError:
        code = Code(error.code().value[0])
        said = code if code in _PASSED_ON else Code.INTERNAL
        return self._fail(said, f"cannot merge the replies: {code.name}: {error.details()}", reason=Reason.MERGE_FAILED)

    async def start(self) -> None:
        """Channels are opened when they are used."""

    async def stop(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()


class _AtOnce:
    """All replies in one request."""

    def __init__(
        self, stub: Any, request: pb.MergeRequest, timeout_s: float, failed: Callable[[aio.AioRpcError], RetinueError]
    ) -> None:
        self._stub, self._request, self._failed = stub, request, failed
        self._deadline = asyncio.get_running_loop().time() + timeout_s

    def add(self, shard_id: str, payload: bytes) -> None:
        self._request.replies.add(shard_id=shard_id, payload=payload)

    async def finish(self, expected: int, answered: int, *, complete: bool) -> bytes:
        self._request.coverage.CopyFrom(Coverage(expected=expected, answered=answered, complete=complete))
        try:
            left = max(self._deadline - asyncio.get_running_loop().time(), 0.001)
            reply: pb.MergeResponse = await self._stub.Merge(self._request, timeout=left)
        except aio.AioRpcError as error:
            raise self._failed(error) from error
        return reply.payload

    def cancel(self) -> None:
        """The call ends with the task that awaits it."""


class _Streamed:
    """Each reply as it comes."""

    def __init__(
        self, stub: Any, start: pb.MergeStart, timeout_s: float, failed: Callable[[aio.AioRpcError], RetinueError]
    ) -> None:
        self._queue: asyncio.Queue[pb.MergeStreamRequest | None] = asyncio.Queue()
        self._queue.put_nowait(pb.MergeStreamRequest(start=start))
        self._failed = failed
        self._call = stub.MergeStream(self._requests(), timeout=timeout_s)

    async def _requests(self) -> Any:
        while (request := await self._queue.get()) is not None:
            yield request

    def add(self, shard_id: str, payload: bytes) -> None:
        self._queue.put_nowait(pb.MergeStreamRequest(reply=pb.LeafReply(shard_id=shard_id, payload=payload)))

    async def finish(self, expected: int, answered: int, *, complete: bool) -> bytes:  # noqa: ARG002 - UserMerge has it
        self._queue.put_nowait(None)
        try:
            reply: pb.MergeStreamResponse = await self._call
        except aio.AioRpcError as error:
            raise self._failed(error) from error
        return reply.payload

    def cancel(self) -> None:
        self._call.cancel()
