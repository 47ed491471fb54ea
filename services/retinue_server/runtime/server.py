"""The gRPC listeners: one grpc.aio server per role, as grpcio doesn't tell by which listener a call came."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import msgspec
from grpc import aio

from retinue_server.runtime import addresses
from retinue_server.runtime.addresses import StartError, Tcp, Unix
from retinue_server.runtime.codec import MAX_REQUEST_BYTES, Codec
from retinue_server.runtime.dispatch import Role
from retinue_server.runtime.errors import Code
from retinue_server.runtime.status import DETAILS_KEY, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from retinue_server.runtime.addresses import Address, OwnedSocket
    from retinue_server.runtime.dispatch import Method
    from retinue_server.runtime.interceptors import Endpoint

_CANCELLATION_S = 1.0
"""A write that fails is soon followed by the cancellation of its handler, which handlers know how to meet."""
_STATUS = {code.value[0]: code for code in grpc.StatusCode}
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # finds callers that vanished without closing
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # lets callers do the same
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.bdp_probe", 0),  # a ping and its answer for most messages of a quiet connection
    ("grpc.http2.lookahead_bytes", 1024 * 1024),  # instead of what the probe would find out, for links with latency
    ("grpc.max_send_message_length", -1),  # the codec checks, and says more
    # gRPC cuts calls off at random, as CANCELLED, when 1,000 wait to be taken up; the gates refuse in words.
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
)


class Route(msgspec.Struct, frozen=True):
    """A method as one listener serves it."""

    method: Method
    endpoint: Endpoint
    codec: Codec


class GrpcCall:
    """The `dispatch.Call` of a grpc.aio call."""

    __slots__ = ("_codec", "_context", "metadata", "role", "trailing")

    def __init__(self, context: Any, codec: Codec) -> None:
        self._context = context
        self._codec = codec
        self.role = Role.APP
        self.trailing: list[tuple[str, str | bytes]] = []
        pairs = context.invocation_metadata() or ()
        self.metadata: Mapping[str, str] = {k: v for k, v in pairs if not k.endswith("-bin")}

    def time_remaining(self) -> float | None:
        remaining: float | None = self._context.time_remaining()
        return remaining

    async def read(self) -> Any:
        data = await self._context.read()
        if data is not aio.EOF:
            return self._codec.decode(data)
        # A cancelled stream first reads as ended, as if the caller had sent all. Reading once more lets the
        # cancellation, which is behind it in the completion queue, come through.
        await self._context.read()
        return None

    async def write(self, response: Any) -> None:
        data = self._codec.encode(response)
        try:
            await self._context.write(data)
        except (aio.InternalError, aio.UsageError, grpc.RpcError) as error:
            await asyncio.sleep(_CANCELLATION_S)
            raise Refusal(Code.CANCELLED, "cannot write: the caller has gone") from error

    def set_trailing_metadata(self, key: str, value: str | bytes) -> None:
        self.trailing.append((key, value))

    def finish(self) -> None:
        """Hands the trailing metadata over; after the last write."""
        if self.trailing:
            self._context.set_trailing_metadata(tuple(self.trailing))

    async def abort(self, refusal: Refusal) -> NoReturn:
        """Ends the call with a status."""
        trailing = (*self.trailing, *refusal.trailing)
        if refusal.status:
            trailing = (*trailing, (DETAILS_KEY, refusal.status))
        await self._context.abort(_STATUS[refusal.code], refusal.message, trailing)
        raise AssertionError("abort returned")


def _behaviour(route: Route) -> Any:
    """What grpc.aio calls; every kind gets bytes, and its streams by the context's read and write."""
    endpoint, codec = route.endpoint, route.codec

    async def unary(data: bytes, context: Any) -> bytes | None:
        return await _serve(endpoint, GrpcCall(context, codec), data)

    async def streaming(_: Any, context: Any) -> bytes | None:
        return await _serve(endpoint, GrpcCall(context, codec), None)

    return streaming if route.method.client_streaming else unary


async def _serve(endpoint: Endpoint, call: GrpcCall, data: bytes | None) -> bytes | None:
    try:
        reply = await endpoint(call, data)
    except Refusal as refusal:
        await call.abort(refusal)
    call.finish()
    return reply


def _handler(route: Route) -> grpc.RpcMethodHandler[Any, Any]:
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[route.method.client_streaming, route.method.server_streaming]
    handler: grpc.RpcMethodHandler[Any, Any] = make(_behaviour(route))
    return handler


def _generic_handlers(routes: Iterable[Route]) -> list[grpc.GenericRpcHandler]:
    ordered = sorted(routes, key=lambda route: route.method.service)
    groups = itertools.groupby(ordered, key=lambda route: route.method.service)
    return [
        grpc.method_handlers_generic_handler(name, {route.method.name: _handler(route) for route in group})
        for name, group in groups
    ]


class GrpcListener:
    """The listeners of one role: TCP addresses and Unix sockets of one grpc.aio server."""

    def __init__(
        self,
        listen: Sequence[Address],
        routes: Sequence[Route],
        *,
        name: str,
        socket_mode: int,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._listen = listen
        self._routes = routes
        self.name = name
        self._option = f"--{name}"
        self._mode = socket_mode
        self._credentials = credentials
        self._server: aio.Server | None = None
        self._sockets: list[OwnedSocket] = []
        self.bound: list[str] = []
        """The addresses with their actual ports."""

    async def start(self) -> None:
        """Binds every address and serves; raises StartError when one can't be taken."""
        self._server = aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers(_generic_handlers(self._routes))
        try:
            for address in self._listen:
                await self._bind(self._server, address)
            await self._server.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self, grace: float | None = None) -> None:
        """Takes no new calls, waits `grace` seconds for the open ones, then cancels them."""
        server, self._server = self._server, None
        sockets, self._sockets = self._sockets, []
        for owned in sockets:
            owned.unlink()
        if server is not None:
            await server.stop(grace)

    async def _bind(self, server: aio.Server, address: Address) -> None:
        if isinstance(address, Unix):
            self._bind_unix(server, address)
            return
        port = address.port
        for numeric in await addresses.resolve(address):
            port = self._bind_tcp(server, Tcp(numeric.host, port))

    def _bind_unix(self, server: aio.Server, address: Unix) -> None:
        def bind(path: str) -> None:
            try:
                server.add_insecure_port(f"unix:{path}")
            except RuntimeError:
                raise StartError(f"cannot listen on {address}: the directory takes no socket") from None

        self._sockets.append(addresses.claim_unix(address, self._mode, self._option, bind))
        self.bound.append(str(address))

    def _bind_tcp(self, server: aio.Server, address: Tcp) -> int:
        addresses.check_free(address, self._option)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(str(address))
            else:
                port = server.add_secure_port(str(address), self._credentials)
        except RuntimeError as error:
            raise StartError(f"cannot listen on {address}: {error}; choose another with {self._option}") from None
        self.bound.append(str(Tcp(address.host, port)))
        return port
