"""Scatter/gather, from the side of those who ask: one question to all shards of a pool, one answer back.

    async with Pool("search") as pool:
        answer = await pool.scatter(json={"text": "sea"}, min_coverage=0.9)
        print(answer.json)
        if not answer.complete:
            print(f"only {answer.coverage} answered;", *(failure.shard_id for failure in answer.failures))

All shards, or `ScatterFailed`, unless the call says what else is enough. Times are seconds or `timedelta`. `leaf.py`
has what answers.
"""

from __future__ import annotations

import asyncio
import json as json_text
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from retinue.client import errors
from retinue.client.channel import DEFAULT_TIMEOUT, Connection, backoff, is_transient
from retinue.client.values import plain
from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1 import scattergather_service_pb2_grpc as rpc
from retinue.scattergather.v1 import topology_pb2 as topology_pb
from retinue.scattergather.v1 import topology_service_pb2 as topology_api
from retinue.scattergather.v1 import topology_service_pb2_grpc as topology_rpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

    from google.protobuf.message import Message

    from retinue.scattergather.v1 import coverage_pb2

Seconds: TypeAlias = float | timedelta
Payload: TypeAlias = "bytes | Message"
"""What leaves get as it is: bytes, or a message to serialise."""

PATTERN = "scattergather"
_UNSET: Any = object()
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Coverage(NamedTuple):
    """How much an answer stands for, in leaves. As text: `2 of 3`."""

    answered: int
    expected: int
    complete: bool
    """Whether all answered, and each of them completely."""

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.answered / self.expected if self.expected else 0.0

    def __str__(self) -> str:
        return f"{self.answered} of {self.expected}"


class ShardFailure(NamedTuple):
    """A shard that is missing, or answered in part."""

    shard_id: str
    code: grpc.StatusCode
    """OK of one that answered in part; CANCELLED of one that was not waited for."""
    message: str
    attempts: int
    coverage: Coverage | None
    """What it stands for; None if it is missing."""


class _Output:
    """Bytes or JSON, as they came."""

    _output: api.CollectedReply | api.ScatterResponse

    @property
    def is_json(self) -> bool:
        """Whether it came as JSON."""
        return self._output.WhichOneof("output") == "json"

    @property
    def payload(self) -> bytes:
        """The bytes; of JSON, and of what was collected, the text of `json`."""
        if self._output.WhichOneof("output") in ("payload", None):
            return self._output.payload
        return json_text.dumps(self.json, ensure_ascii=False).encode()

    @property
    def json(self) -> Any:
        """The JSON value; of bytes what they are as JSON. Raises ValueError if they are none."""
        if self.is_json:
            return plain(self._output.json)
        return json_text.loads(self._output.payload)


class Reply(_Output):
    """The reply of one shard."""

    def __init__(self, message: api.CollectedReply) -> None:
        self._output = message
        self.shard_id = message.shard_id


class ShardReply(Reply):
    """The reply of one shard, as an event of `Pool.stream`; without its bytes if they were to be left out."""

    def __init__(self, message: api.ShardReply) -> None:
        super().__init__(message.reply)
        self.attempts = message.outcome.attempts
        self.coverage = _coverage(message.outcome.coverage)
        self.elapsed = _seconds(message.elapsed_duration)
        """Seconds since the request came."""
        self.address = message.address
        """Who gave it."""


class Answer(_Output):
    """What was merged of the replies, and how much of the pool it stands for."""

    def __init__(self, message: api.ScatterResponse) -> None:
        self.message = self._output = message
        """All that the server said: `stats`, `failed_by_code`, `topology_version`."""
        self.coverage = _coverage(message.coverage)
        self.scatter_id = message.scatter_id

    @property
    def complete(self) -> bool:
        """Whether every selected shard answered, and completely: look here before you trust it."""
        return self.coverage.complete

    @property
    def failures(self) -> list[ShardFailure]:
        """The shards that are missing or answered in part, at most 16 of them; `message.failed_by_code` counts all."""
        return [_failure(one) for one in self.message.failures]

    @property
    def replies(self) -> list[Reply]:
        """Of pools that collect: each reply, in the pool's order of shards. Of others none."""
        return [Reply(one) for one in self.message.collected.replies]

    @property
    def json(self) -> Any:
        """The merged JSON value; of bytes what they are as JSON; of pools that collect, a dict by shard."""
        if self.message.WhichOneof("output") == "collected":
            return {reply.shard_id: reply.json for reply in self.replies}
        return super().json

    @property
    def elapsed(self) -> float:
        """Seconds from the request to the answer, at the root."""
        return _seconds(self.message.stats.elapsed_duration)


Event: TypeAlias = ShardReply | ShardFailure | Answer


class ScatterFailed(errors.RetinueError):
    """Leaves were asked, and there is no answer: `reason` is COVERAGE_NOT_MET, LEAF_REFUSED, GATHER_TOO_LARGE or
    MERGE_FAILED, `code` what it came of.
    """

    coverage: Coverage
    """How much had answered."""
    failures: Sequence[ShardFailure]
    """Shards that are missing, at most 16, those that failed first; CANCELLED are those not waited for any more."""
    failed_by_code: Mapping[str, int]
    scatter_id: str

    @classmethod
    def of(cls, error: errors.RetinueError, failure: api.ScatterFailure) -> Self:
        """What the server said of it."""
        found = cls(error.code, error.message, reason=error.reason, metadata=error.metadata)
        found.coverage = _coverage(failure.coverage)
        found.failures = [_failure(one) for one in failure.failures]
        found.failed_by_code = dict(failure.failed_by_code)
        found.scatter_id = failure.scatter_id
        return found


class Pool:
    """One pool of one root. Cheap; a connection given by the caller is shared and stays open.

    The root is waited for unless the pool is not `patient`. What it refuses before it asked a leaf, because it has too
    much to do, is asked again when it says; all within `timeout` seconds. What may have reached a leaf is asked once.
    """

    def __init__(
        self,
        pool_id: str,
        *,
        address: str | None = None,
        connection: Connection | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        patient: bool = True,
    ) -> None:
        self.pool_id = pool_id
        self.timeout = timeout
        self._owned = connection is None
        self.connection = connection or Connection(address, pattern=PATTERN, patient=patient)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection if it was opened here. Safe to repeat."""
        if self._owned:
            await self.connection.close()

    # Asking

    def request(
        self,
        *,
        json: Any = _UNSET,
        payload: Payload | None = None,
        inputs: Mapping[str, Any] | None = None,
        shards: Sequence[str] = (),
        keys: Sequence[str] = (),
        min_coverage: float | None = None,
        min_shards: int = 0,
        soft_deadline: Seconds | None = None,
        first_k: int = 0,
        hedge: bool = True,
    ) -> api.ScatterRequest:
        """What `scatter`, `stream` and `explain` take.

        What leaves get is one of: `json`, a value of which they get the text; `payload`; `inputs`, for each shard its
        own (bytes and messages as they are, other values as JSON), which also selects them. `shards` selects by name,
        `keys` those to which keys belong. `min_coverage` (0 to 1) and `min_shards` are what is enough;
        `soft_deadline` and `first_k` give an answer that is enough without waiting for the rest. Raises ValueError for
        more than one input.
        """
        if (json is not _UNSET) + (payload is not None) + (inputs is not None) > 1:
            raise ValueError("cannot scatter: give one of json, payload and inputs")
        policy = api.ScatterPolicy(
            min_coverage=min_coverage,
            min_shards=min_shards,
            soft_deadline_duration=_duration(soft_deadline),
            first_k=first_k,
            no_hedge=not hedge,
        )
        request = api.ScatterRequest(pool_id=self.pool_id, route_keys=keys, shard_ids=shards, policy=policy)
        if json is not _UNSET:
            request.payload = _json(json)
        elif payload is not None:
            request.payload = as_bytes(payload)
        elif inputs is not None:
            request.shard_inputs.SetInParent()
            for shard_id, content in inputs.items():
                request.shard_inputs.inputs.add(shard_id=shard_id, payload=as_bytes(content))
        return request

    async def scatter(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC sends it along
        metadata: Mapping[str, str] | None = None,
        **question: Any,
    ) -> Answer:
        """Asks; takes what request() takes. `metadata` reaches the leaves as far as the pool lets it through.

        Raises ScatterFailed, and RetinueError for what the root refused or where it can't be reached.
        """
        request, tries = self.request(**question), self._tries(timeout)
        stub = rpc.ScatterGatherServiceStub(self.connection.channel)
        while True:
            try:
                return Answer(await stub.Scatter(request, **self._options(tries.left, metadata)))
            except grpc.aio.AioRpcError as raw:
                await tries.again(self._error(raw), raw)

    async def stream(
        self,
        *,
        omit_payloads: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC sends it along
        metadata: Mapping[str, str] | None = None,
        **question: Any,
    ) -> AsyncGenerator[Event]:
        """Asks as scatter() does, and gives a ShardReply or ShardFailure as each comes, and the Answer at last.

        Leaving it early cancels what is under way: use `contextlib.aclosing` to do so at once. Raises as scatter().
        """
        request = api.ScatterStreamRequest(request=self.request(**question), omit_payloads=omit_payloads)
        stub, tries = rpc.ScatterGatherServiceStub(self.connection.channel), self._tries(timeout)
        while True:
            call: Any = stub.ScatterStream(request, **self._options(tries.left, metadata))
            try:
                async for response in call:
                    tries.over = True  # a leaf was asked
                    yield _event(response)
            except grpc.aio.AioRpcError as raw:
                await tries.again(self._error(raw), raw)
            else:
                return
            finally:
                call.cancel()

    async def explain(self, *, timeout: float | None = None, **question: Any) -> api.ExplainScatterResponse:  # noqa: ASYNC109 - gRPC sends it along
        """What scatter() would do now; asks no leaf. `timeout` is what the question would have."""
        stub = rpc.ScatterGatherServiceStub(self.connection.channel)
        request = api.ExplainScatterRequest(request=self.request(**question))
        return await self.connection.call(stub.ExplainScatter, request, timeout=self._time(timeout))

    def _options(self, seconds: float, metadata: Mapping[str, str] | None) -> dict[str, Any]:
        """Of a call. One that waits for the root is sent once: none is repeated that may have reached a leaf."""
        return {
            "timeout": max(seconds, 0),
            "metadata": (*self.connection.metadata(), *(metadata or {}).items()),
            "wait_for_ready": self.connection.patient,
        }

    def _time(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else timeout

    def _tries(self, timeout: float | None) -> _Tries:
        return _Tries(self._time(timeout))

    def _error(self, raw: grpc.aio.AioRpcError) -> errors.RetinueError:
        error, failure = errors.from_rpc_error(raw), api.ScatterFailure()
        if errors.unpack(raw, failure):
            return ScatterFailed.of(error, failure)
        ready = self.connection.channel.get_state() is grpc.ChannelConnectivity.READY
        if isinstance(error, errors.DeadlineExceeded) and not ready:
            return errors.Unavailable(grpc.StatusCode.UNAVAILABLE, f"cannot reach {self.connection.address} in time")
        return error

    # Looking

    async def topology(self) -> topology_pb.Pool:
        """The pool's shards, who serves them, and whom the root is connected to. Raises NotFound."""
        request = topology_api.GetTopologyRequest(pool_id=self.pool_id)
        return (await self.connection.call(self._topology.GetTopology, request, timeout=self.timeout)).pool

    async def watch(self) -> AsyncGenerator[topology_pb.Pool]:
        """The same now and after each change; slow readers get the latest. Goes on over lost connections."""
        begun, waits = False, backoff()
        request = topology_api.WatchTopologyRequest(pool_id=self.pool_id)
        while True:
            call: Any = self._topology.WatchTopology(request, metadata=self.connection.metadata())
            try:
                async for response in call:
                    begun, waits = True, backoff()
                    yield response.pool
            except grpc.aio.AioRpcError as raw:
                error = errors.from_rpc_error(raw)
                hopeful = begun or self.connection.patient or error.reason
                if not (is_transient(error) and hopeful):
                    raise error from raw
            finally:
                call.cancel()
            await asyncio.sleep(next(waits))

    async def pools(self) -> AsyncIterator[topology_api.PoolSummary]:
        """All pools of the root by name, not this one alone."""
        request = topology_api.ListPoolsRequest()
        async for page in self._pages(self._topology.ListPools, request):
            for pool in page.pools:
                yield pool

    async def recent(self, scatter_id: str = "", *, page_size: int = 0) -> AsyncIterator[api.RecentScatter]:
        """The latest requests to the pool (to any if it has no name), the latest first; with `scatter_id` that one."""
        stub = rpc.ScatterGatherServiceStub(self.connection.channel)
        request = api.ListRecentScattersRequest(pool_id=self.pool_id, scatter_id=scatter_id, page_size=page_size)
        async for page in self._pages(stub.ListRecentScatters, request):
            for scatter in page.scatters:
                yield scatter

    @property
    def _topology(self) -> topology_rpc.TopologyServiceAsyncStub:
        return topology_rpc.TopologyServiceStub(self.connection.channel)

    async def _pages(self, method: Any, request: Any) -> AsyncIterator[Any]:
        while True:
            page = await self.connection.call(method, request, timeout=self.timeout)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


class _Tries:
    """The time that a question has, and whether it may be asked once more."""

    def __init__(self, seconds: float) -> None:
        self._now = asyncio.get_running_loop().time
        self._end = self._now() + seconds
        self._waits = backoff()
        self.over = False

    @property
    def left(self) -> float:
        """In seconds."""
        return self._end - self._now()

    async def again(self, error: errors.RetinueError, raw: BaseException) -> None:
        """Waits, if the root said that it asked nobody and when to come again; raises the error if not."""
        wait = max(next(self._waits), error.retry_after or 0)
        if self.over or error.retry_after is None or wait >= self.left:
            raise error from raw
        await asyncio.sleep(wait)


def as_bytes(content: Any) -> bytes:
    """Bytes and messages as they are, every other value as the text of JSON. Raises TypeError, ValueError."""
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    if hasattr(content, "SerializeToString"):
        return bytes(content.SerializeToString())
    return _json(content)


def _json(content: Any) -> bytes:
    return json_text.dumps(content, ensure_ascii=False, allow_nan=False).encode()


def _event(response: api.ScatterStreamResponse) -> Event:
    match response.WhichOneof("event"):
        case "reply":
            return ShardReply(response.reply)
        case "failure":
            return _failure(response.failure)
    return Answer(response.answer)


def _coverage(known: coverage_pb2.Coverage) -> Coverage:
    return Coverage(known.answered, known.expected, known.complete)


def _failure(known: coverage_pb2.ShardOutcome) -> ShardFailure:
    code = _CODES.get(known.code, grpc.StatusCode.UNKNOWN)
    part = _coverage(known.coverage) if known.HasField("coverage") else None
    return ShardFailure(known.shard_id, code, known.message, known.attempts, part)


def _seconds(known: Duration) -> float:
    return known.seconds + known.nanos / 1e9


def _duration(value: Seconds | None) -> Duration | None:
    if value is None:
        return None
    found = Duration()
    found.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    return found
