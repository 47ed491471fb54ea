"""A stateless relay: forwards every call of a service, as bytes, to an upstream whose credentials it holds.

What goes through unchanged: messages, deadline, cancellation, text metadata, the status with its details
and the trailing metadata. The caller's authorization stays here; the upstream sees the relay's.
"""

from __future__ import annotations

import asyncio
import logging
import re
import stat
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc import aio

from retinue_server.runtime import tls
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import Code, Reason, Unavailable
from retinue_server.runtime.status import DETAILS_KEY, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

    from retinue_server.runtime.config import Upstream
    from retinue_server.runtime.dispatch import Call

log = logging.getLogger(__name__)

Pairs = tuple[tuple[str, str | bytes], ...]

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5000),
    ("grpc.keepalive_time_ms", 30_000),  # finds a dead upstream under an idle stream
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_send_message_length", -1),
)
_RETRY_MS = 1000
_LOCAL = re.compile(
    r"grpc-.*|connect-.*|sec-.*|accept.*|content-.*|x-forwarded-.*|authorization|cookie|user-agent|te|host|origin"
    r"|referer|connection|keep-alive|transfer-encoding|upgrade|trailer|proxy-.*"
)
"""What belongs to the hop, to the browser or to this relay's authority."""
_KEY = re.compile(r"[0-9a-z_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")


class UpstreamChannel:
    """The connection to the upstream: a part, and the health of the pattern that is relayed."""

    def __init__(self, settings: Upstream) -> None:
        self.address = settings.address
        self._settings = settings
        self._token = _TokenText(settings.token_file) if settings.token_file else None
        self._channel: aio.Channel | None = None
        self._watching: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[bool], None]] = []
        self._healthy = False
        self._told = False

    @property
    def channel(self) -> aio.Channel:
        """Between `start` and `stop` only."""
        assert self._channel is not None, "the relay has not started"
        return self._channel

    def authorization(self) -> Pairs:
        """The metadata that shows the upstream who we are."""
        return (("authorization", f"Bearer {self._token.read()}"),) if self._token else ()

    def subscribe(self, listener: Callable[[bool], None]) -> None:
        """As `dispatch.Health`: healthy while the upstream is connected."""
        self._listeners.append(listener)
        listener(self._healthy)

    async def start(self) -> None:
        """Connects in the background; an upstream that is down keeps nothing from starting."""
        if self._channel is not None:
            return
        self.authorization()
        self._channel = self._open()
        self._watching = asyncio.create_task(self._watch(self._channel))

    async def stop(self) -> None:
        """Cancels what is still open."""
        channel, self._channel = self._channel, None
        if channel is None or self._watching is None:
            return
        self._watching.cancel()
        await asyncio.wait({self._watching})
        await channel.close()

    def _open(self) -> aio.Channel:
        settings = self._settings.tls
        if settings is None:
            return aio.insecure_channel(self.address, options=_OPTIONS)
        name = (("grpc.ssl_target_name_override", settings.server_name),) if settings.server_name else ()
        return aio.secure_channel(self.address, tls.channel_credentials(settings), options=(*_OPTIONS, *name))

    async def _watch(self, channel: aio.Channel) -> None:
        while True:
            state = channel.get_state(try_to_connect=True)
            self._set(state is grpc.ChannelConnectivity.READY)
            await channel.wait_for_state_change(state)

    def _set(self, healthy: bool) -> None:  # noqa: FBT001 - one thing to say
        if healthy == self._healthy:
            return
        self._healthy = healthy
        self._told = False
        log.info("%s the upstream %s", "connected to" if healthy else "lost", self.address)
        for listener in self._listeners:
            listener(healthy)

    def failed(self, cause: str) -> None:
        """Logs why calls fail, once until the connection changes: callers retry many times a second."""
        if not self._told:
            self._told = True
            log.warning("cannot reach the upstream %s: %s", self.address, cause)


class _TokenText:
    """The token in a file, read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = (0, 0)
        self._text = ""

    def read(self) -> str:
        """Raises StartError for a file that can't be read, or that every user may read."""
        try:
            found = self._path.stat()
            if (found.st_mtime_ns, found.st_ino) != self._stamp:
                if found.st_mode & stat.S_IRWXO:
                    raise StartError(f"cannot use {self._path}: every user may open it; run `chmod o= {self._path}`")
                self._text = self._path.read_text().strip()
                self._stamp = (found.st_mtime_ns, found.st_ino)
        except (OSError, UnicodeDecodeError) as error:
            if not self._text:
                raise StartError(f"cannot read the upstream's token file {self._path}: {error}") from None
        return self._text


class RelayServicer:
    """Serves every method of a service by the upstream; its requests and replies are bytes."""

    raw = True

    def __init__(self, descriptor: ServiceDescriptor, upstream: UpstreamChannel) -> None:
        for method in descriptor.methods:
            setattr(self, method.name, _relay(method, upstream))


def _relay(method: MethodDescriptor, upstream: UpstreamChannel) -> Callable[..., Awaitable[Any]]:
    service = method.containing_service
    assert service is not None
    path = f"/{service.full_name}/{method.name}"

    def open_call(kind: str, call: Call, *request: bytes) -> Any:
        metadata = (*_forwarded(call), *upstream.authorization())
        start = getattr(upstream.channel, kind)(path)
        return start(*request, timeout=call.time_remaining(), metadata=metadata)

    async def unary(request: bytes, call: Call) -> bytes:
        return await _reply(open_call("unary_unary", call, request), call, upstream)

    async def server_stream(request: bytes, call: Call) -> None:
        await _replies(open_call("unary_stream", call, request), call, upstream)

    async def client_stream(call: Call) -> bytes:
        up = open_call("stream_unary", call)
        async with _Pump(call, up):
            return await _reply(up, call, upstream)

    async def bidi(call: Call) -> None:
        up = open_call("stream_stream", call)
        async with _Pump(call, up):
            await _replies(up, call, upstream)

    if method.client_streaming:
        return bidi if method.server_streaming else client_stream
    return server_stream if method.server_streaming else unary


def _forwarded(call: Call) -> Pairs:
    pairs = call.metadata.items()
    return tuple((k, v) for k, v in pairs if not _LOCAL.fullmatch(k) and _KEY.fullmatch(k) and _VALUE.fullmatch(v))


async def _reply(up: Any, call: Call, upstream: UpstreamChannel) -> bytes:
    try:
        reply: bytes = await up
    except aio.AioRpcError as error:
        _refuse(error, upstream)
    finally:
        up.cancel()
    _pass_trailing(call, await up.trailing_metadata())
    return reply


async def _replies(up: Any, call: Call, upstream: UpstreamChannel) -> None:
    try:
        while (reply := await up.read()) is not aio.EOF:
            await call.write(reply)
    except aio.AioRpcError as error:
        _refuse(error, upstream)
    finally:
        up.cancel()
    _pass_trailing(call, await up.trailing_metadata())


class _Pump:
    """Sends the caller's stream up while the body of the `async with` waits for what comes down."""

    def __init__(self, call: Call, up: Any) -> None:
        self._call = call
        self._up = up

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        try:
            while (request := await self._call.read()) is not None:
                await self._up.write(request)
            await self._up.done_writing()
        except (aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the upstream has ended the call; who reads from it learns how
        except BaseException:
            self._up.cancel()
            raise


def _refuse(error: aio.AioRpcError, upstream: UpstreamChannel) -> NoReturn:
    """Ends the call as the upstream did, or says that there is none."""
    trailing = tuple(error.trailing_metadata() or ())
    status = next((value for key, value in trailing if key == DETAILS_KEY), b"")
    if error.code() is grpc.StatusCode.UNAVAILABLE and not status:
        upstream.failed(error.details() or "no cause is known")
        raise Unavailable(
            f"cannot reach the upstream {upstream.address}; it is down, or its address or certificate is wrong",
            reason=Reason.UPSTREAM_UNAVAILABLE,
            retry_ms=_RETRY_MS,
        ) from None
    refusal = Refusal(Code(error.code().value[0]), error.details() or "", bytes(status))
    refusal.trailing = tuple((key, value) for key, value in trailing if key != DETAILS_KEY)
    raise refusal


def _pass_trailing(call: Call, trailing: Any) -> None:
    for key, value in trailing or ():
        call.set_trailing_metadata(key, value)
