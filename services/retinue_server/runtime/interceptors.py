"""What surrounds every call, wrapped around each method once, when a listener registers it.

In order: the role of the caller, the limit on calls at once, the handler between the codec's decode and
encode, and the one place where an exception becomes a status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TYPE_CHECKING

from retinue_server.runtime import telemetry
from retinue_server.runtime.authority import Authority, check_role
from retinue_server.runtime.dispatch import Call, Role
from retinue_server.runtime.errors import Code, Reason, ResourceExhausted, RetinueError
from retinue_server.runtime.status import Refusal, refusal, unexpected

if TYPE_CHECKING:
    from retinue_server.runtime.codec import Codec
    from retinue_server.runtime.dispatch import Method
    from retinue_server.runtime.metrics import CallStats, Metrics

Endpoint = Callable[[Call, "bytes | None"], Awaitable["bytes | None"]]
"""Serves one call: the request's bytes (None where the client streams) to the reply's (None where the server
streams). Raises Refusal, or CancelledError when the caller has gone."""

_RETRY_MS = 200
"""A place gets free soon, or the server is overloaded for longer; a fifth of a second suits both."""


class Gate:
    """Counts what runs at once and refuses what is over the limit; never makes a call wait."""

    __slots__ = ("_limit", "_what", "used")

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self.used = 0

    def __enter__(self) -> None:
        if self.used >= self._limit:
            raise ResourceExhausted(
                f"cannot take the call: {self._limit} {self._what} are open; try again later",
                reason=Reason.CONCURRENCY_LIMIT,
                retry_ms=_RETRY_MS,
                limit=self._limit,
            )
        self.used += 1

    def __exit__(self, *_: object) -> None:
        self.used -= 1


class Limits:
    """The gates of one process, shared by its listeners."""

    def __init__(self, max_calls: int, max_streams: int) -> None:
        self.calls = Gate(max_calls, "calls")
        self.streams = Gate(max_streams, "streams")

    def gate(self, method: Method) -> Gate:
        """The gate through which calls of a method go."""
        return self.streams if method.client_streaming or method.server_streaming else self.calls


class Interceptors:
    """Wraps the methods of one listener."""

    def __init__(self, authority: Authority, limits: Limits, metrics: Metrics) -> None:
        self._authority = authority
        self._limits = limits
        self._metrics = metrics

    def wrap(self, method: Method, codec: Codec) -> Endpoint:
        """The method as a transport serves it."""
        guarded = _traced(self._guarded(method, codec), method)
        return _measured(_translating_errors(guarded, method.path), self._metrics.method(method))

    def _guarded(self, method: Method, codec: Codec) -> Endpoint:
        gate, authority, handle = self._limits.gate(method), self._authority, _handling(method, codec)

        async def serve(call: Call, data: bytes | None) -> bytes | None:
            call.role = authority.role(call.metadata)
            check_role(call.role, method.role, method.path)
            with gate:
                return await handle(call, data)

        return serve


def unguarded(method: Method, codec: Codec) -> Endpoint:
    """The method without roles and limits, for what must always get through: health and reflection."""
    handle = _handling(method, codec)

    async def serve(call: Call, data: bytes | None) -> bytes | None:
        call.role = Role.APP
        return await handle(call, data)

    return _translating_errors(serve, method.path)


def _measured(endpoint: Endpoint, stats: CallStats) -> Endpoint:
    record = stats.record

    async def serve(call: Call, data: bytes | None) -> bytes | None:
        begun = perf_counter()
        code = int(Code.OK)
        try:
            return await endpoint(call, data)
        except Refusal as refused:
            code = int(refused.code)
            raise
        except asyncio.CancelledError:
            remaining = call.time_remaining()
            code = int(Code.CANCELLED if remaining is None or remaining > 0 else Code.DEADLINE_EXCEEDED)
            raise
        finally:
            record(code, perf_counter() - begun)

    return serve


def _traced(endpoint: Endpoint, method: Method) -> Endpoint:
    """Opens a span where tracing is on; elsewhere the caller's context passes on, to logs and stores."""
    name = method.path[1:]
    attributes = {"rpc.system": "grpc", "rpc.service": method.service, "rpc.method": method.name}

    async def serve(call: Call, data: bytes | None) -> bytes | None:
        tracer, parent = telemetry.tracer(), call.metadata.get("traceparent", "")
        if not parent and not tracer.on:
            return await endpoint(call, data)
        with tracer.span(name, parent, attributes=attributes, kind="server") as span:
            try:
                return await endpoint(call, data)
            except RetinueError as error:
                span.set("rpc.grpc.status_code", error.code)
                raise

    return serve


def _handling(method: Method, codec: Codec) -> Endpoint:
    handler, decode, encode = method.handler, codec.decode, codec.encode

    async def unary(call: Call, data: bytes | None) -> bytes | None:
        return encode(await handler(decode(data or b""), call))

    async def server_stream(call: Call, data: bytes | None) -> None:
        await handler(decode(data or b""), call)

    async def client_stream(call: Call, _: bytes | None) -> bytes | None:
        return encode(await handler(call))

    async def bidi(call: Call, _: bytes | None) -> None:
        await handler(call)

    if method.client_streaming:
        return bidi if method.server_streaming else client_stream
    return server_stream if method.server_streaming else unary


def _translating_errors(endpoint: Endpoint, path: str) -> Endpoint:
    async def serve(call: Call, data: bytes | None) -> bytes | None:
        try:
            return await endpoint(call, data)
        except (Refusal, asyncio.CancelledError):
            raise
        except RetinueError as error:
            raise refusal(error) from None
        except Exception as error:  # noqa: BLE001 - the boundary: whatever a handler raises becomes a status
            raise unexpected(error, path) from None

    return serve
