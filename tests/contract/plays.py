"""Leaves and a MergeService that tests play: real gRPC servers on ports of their own, in a thread of this process.

A test has a `Play` whose name is in all that it sends, so that tests do not hear of each other's calls.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from contract.pools import LAYOUT, MERGER, NOBODY
from grpc import aio

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1 import merge_service_pb2 as merging

WAIT_S = 60.0
_REMEMBERED = 1000
_NAME = re.compile(rb"play-[0-9a-f]{32}")
_QUERY = "/retinue.scattergather.v1.LeafService/Query"
_QUERY_STREAM = "/retinue.scattergather.v1.LeafService/QueryStream"
_MERGE = "/retinue.scattergather.v1.MergeService/Merge"
_MERGE_STREAM = "/retinue.scattergather.v1.MergeService/MergeStream"


@dataclass(frozen=True)
class Fail:
    """A leaf that answers with an error."""

    code: str
    message: str = ""


@dataclass(frozen=True)
class Raw:
    """A leaf that answers with these bytes, no message; on a stream they stand beside the query's number."""

    data: bytes


class Gate:
    """Where calls wait until the test opens it; one that nobody opens is a leaf that hangs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, then: Any) -> None:
        self.then = then
        self._loop, self._event = loop, asyncio.Event()

    def open(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)

    async def passed(self) -> None:
        await self._event.wait()


Says = Any
"""Bytes, a QueryResponse, Fail, Raw or Gate; a list of them: for the first call, the second, and all further ones; or
what gives one for a Call."""


@dataclass
class Call:
    """A call to a leaf."""

    at: str
    """Whose it was: one of LAYOUT."""
    method: str
    query: leaf.QueryRequest
    data: bytes
    metadata: Mapping[str, str]
    time_remaining: float
    ended: str = ""
    """OK, the code of its error, or CANCELLED when the root gave it up."""

    @property
    def shard(self) -> str:
        """Of a batch, its first."""
        named = self.query.shard_id or "".join(s.shard_id for s in self.query.shards[:1])
        return self.metadata.get("retinue-shard", "") or named


@dataclass
class Play:
    """What leaves say in one test, and what they heard."""

    loop: asyncio.AbstractEventLoop
    name: str = field(default_factory=lambda: f"play-{uuid.uuid4().hex}")
    says: dict[str, Says] = field(default_factory=dict)
    """By shard; `shard@replica` goes before, and `*` is said where nothing else is."""
    calls: list[Call] = field(default_factory=list)
    merge_requests: list[Any] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def payload(self) -> bytes:
        """What to ask, so that the leaves know by whom they are asked."""
        return self.name.encode()

    def gate(self, then: Any = b"") -> Gate:
        """A wait that the test ends."""
        return Gate(self.loop, then)

    def to(self, shard: str) -> list[Call]:
        """The calls for a shard."""
        with self.changed:
            return [call for call in self.calls if call.shard == shard]

    def await_calls(self, count: int) -> list[Call]:
        """When so many have come."""
        self._await(lambda: len(self.calls) >= count)
        return list(self.calls)

    def await_end(self, ended: str, count: int = 1) -> None:
        """When so many have ended so."""
        self._await(lambda: [call.ended for call in self.calls].count(ended) >= count)

    def await_quiet(self) -> None:
        """When none of the calls that have come is open any more: what hangs ends by cancellation alone."""
        self._await(lambda: all(call.ended for call in self.calls))

    def _await(self, what: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(what, WAIT_S), f"it did not come to it: {self.calls}"

    # On the leaves' loop

    def heard(self, call: Call) -> None:
        with self.changed:
            self.calls.append(call)
            del self.calls[:-_REMEMBERED]
        self.told()

    def told(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def answer(self, call: Call) -> Any:
        """What is said to this call."""
        at_once = f"{call.shard}@{call.at}"
        key = next((key for key in (at_once, call.shard, "*") if key in self.says), "")
        said = self.says.get(key, b"")
        if callable(said):
            return said(call)
        if not isinstance(said, list):
            return said
        number = sum(one.shard == call.shard and (key != at_once or one.at == call.at) for one in self.calls)
        return said[min(number, len(said)) - 1]


class Leaves:
    """All of LAYOUT, served."""

    def __init__(self, address: Callable[[str], str] | None = None) -> None:
        self._asked = address or (lambda _: "127.0.0.1:0")
        self._plays: dict[bytes, Play] = {}
        self._servers: list[aio.Server] = []
        self._addresses: dict[str, str] = {}
        self._nobody = socket.socket()
        self.loop = asyncio.new_event_loop()
        self.nobodys = Play(self.loop)
        """Says something to whoever names no play."""
        self._thread = threading.Thread(target=self.loop.run_forever, name="leaves", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result(WAIT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()
        self._nobody.close()

    def at(self, name: str) -> str:
        """The address of one of LAYOUT."""
        return self._addresses[name]

    def play(self) -> Play:
        """A new play."""
        made = Play(self.loop)
        self._plays[made.name.encode()] = made
        return made

    async def _start(self) -> None:
        for name in LAYOUT:
            host, _, port = self._asked(name).rpartition(":")
            if name == NOBODY:  # bound and not listened at: whoever dials is refused, and nobody else takes the port
                self._nobody.bind((host, int(port)))
                self._addresses[name] = f"{host}:{self._nobody.getsockname()[1]}"
                continue
            server = aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)])
            server.add_generic_rpc_handlers([_Handler(self, name)])
            self._addresses[name] = f"{host}:{server.add_insecure_port(f'{host}:{port}')}"
            await server.start()
            self._servers.append(server)

    async def _stop(self) -> None:
        await asyncio.gather(*(server.stop(0) for server in self._servers))

    def play_of(self, data: bytes) -> Play:
        """Whose call it is."""
        found = _NAME.search(data)
        return self._plays.get(found[0], self.nobodys) if found else self.nobodys


class _Handler(grpc.GenericRpcHandler):
    """Serves any method, as bytes."""

    def __init__(self, leaves: Leaves, at: str) -> None:
        self._leaves, self._at = leaves, at

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = str(handler_call_details.method)
        if method == _QUERY_STREAM:
            return grpc.stream_stream_rpc_method_handler(self._query_stream)
        if method == _MERGE_STREAM:
            return grpc.stream_unary_rpc_method_handler(self._merge_stream)
        if method == _MERGE:
            return grpc.unary_unary_rpc_method_handler(self._merge)

        async def ask(data: bytes, context: Any) -> bytes:
            return await self._ask(method, data, context)

        return grpc.unary_unary_rpc_method_handler(ask)

    async def _ask(self, method: str, data: bytes, context: Any) -> bytes:
        query = leaf.QueryRequest.FromString(data) if method == _QUERY else leaf.QueryRequest()
        metadata = {str(k): str(v) for k, v in context.invocation_metadata() or ()}
        call = Call(self._at, method, query, data, metadata, context.time_remaining())
        said = await self._hear(call)
        if isinstance(said, Fail):
            await context.abort(grpc.StatusCode[said.code], said.message)
        if isinstance(said, Raw):
            return said.data
        return _response(said).SerializeToString() if method == _QUERY else bytes(said)

    async def _hear(self, call: Call) -> Any:
        """What is said to a call, when it is time."""
        play = self._leaves.play_of(call.data)
        play.heard(call)
        try:
            said = play.answer(call)
            while isinstance(said, Gate):
                await said.passed()
                said = said.then
        except asyncio.CancelledError:
            call.ended = "CANCELLED"
            raise
        else:
            call.ended = said.code if isinstance(said, Fail) else "OK"
        finally:
            play.told()
        return said

    async def _query_stream(self, _: Any, context: Any) -> None:
        tasks: dict[int, asyncio.Task[None]] = {}
        try:
            while (data := await context.read()) is not aio.EOF:
                request = leaf.QueryStreamRequest.FromString(data)
                if not request.cancel:
                    tasks[request.query_id] = asyncio.create_task(self._answer(request, context))
                elif request.query_id in tasks:
                    tasks[request.query_id].cancel()
        finally:
            for task in tasks.values():
                task.cancel()

    async def _answer(self, request: leaf.QueryStreamRequest, context: Any) -> None:
        query, left = request.query, request.timeout_micros / 1e6
        said = await self._hear(Call(self._at, _QUERY_STREAM, query, query.SerializeToString(), {}, left))
        response, raw = leaf.QueryStreamResponse(query_id=request.query_id), b""
        if isinstance(said, Fail):
            response.code, response.message = _number(said.code), said.message
        elif isinstance(said, Raw):
            raw = said.data
        else:
            response.response.CopyFrom(_response(said))
        await context.write(response.SerializeToString() + raw)

    async def _merge(self, data: bytes, context: Any) -> bytes:
        play, request = self._leaves.play_of(data), merging.MergeRequest.FromString(data)
        play.merge_requests.append(request)
        payload = await self._merged(play, request.replies, context)
        return merging.MergeResponse(payload=payload).SerializeToString()

    async def _merge_stream(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        messages, play = [], None
        async for data in requests:
            messages.append(merging.MergeStreamRequest.FromString(data))
            play = play or self._leaves.play_of(data)
            play.merge_requests.append(messages[-1])
            play.told()
            if play.says.get(MERGER) == "early":
                break
        assert play is not None
        payload = await self._merged(play, [message.reply for message in messages[1:]], context)
        return merging.MergeStreamResponse(payload=payload).SerializeToString()

    async def _merged(self, play: Play, replies: Sequence[Any], context: Any) -> bytes:
        """The shards and what they said, unless the play has something else to say."""
        said = play.says.get(MERGER)
        if isinstance(said, Gate):
            await said.passed()
        if isinstance(said, Fail):
            await context.abort(grpc.StatusCode[said.code], said.message)
        return b",".join(reply.shard_id.encode() + b"=" + reply.payload for reply in replies)


def _response(said: bytes | leaf.QueryResponse) -> leaf.QueryResponse:
    return said if isinstance(said, leaf.QueryResponse) else leaf.QueryResponse(payload=said)


def _number(code: str) -> int:
    return int(code) if code.lstrip("-").isdigit() else int(grpc.StatusCode[code].value[0])
