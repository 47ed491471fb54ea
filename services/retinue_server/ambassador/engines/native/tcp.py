"""Raw TCP: bytes to and fro, with flow control, half-closed connections, and another endpoint for one that is away."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from retinue_server.ambassador.engines.native.backends import Backend
    from retinue_server.ambassador.engines.native.listening import Served

_MAX_TRIES = 3
"""Endpoints that are dialled for one connection: nothing has been sent yet."""
_MAX_AHEAD = 65536
"""Bytes that are taken of an app before its endpoint is there."""


class Front(asyncio.Protocol):
    """A connection from an app."""

    def __init__(self, served: Served, context: Callable[[], ssl.SSLContext | None]) -> None:
        self._served, self._context = served, context
        self._transport: asyncio.Transport | None = None
        self._back: Back | None = None
        self._ahead = bytearray()
        self.has_ended = False
        """Whether the app has said all."""
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        served = self._served
        self._transport = transport
        served.count.requests += 1
        if served.bucket is not None and not served.bucket.take(served.now()):
            served.count.rate_limited += 1
            transport.abort()
            return
        if sum(one.active for one in served.backends.all) >= _most(served):
            served.count.overflows += 1
            transport.abort()
            return
        served.open.add(transport)
        self._connecting = served.loop.create_task(self._connect())

    async def _connect(self) -> None:
        tried: list[Backend] = []
        while len(tried) < _MAX_TRIES and (backend := self._served.backends.choose(tried)) is not None:
            tried.append(backend)
            if await self._dial(backend):
                return
        self._served.count.errors += 1
        assert self._transport is not None
        self._transport.abort()

    async def _dial(self, backend: Backend) -> bool:
        served, began = self._served, self._served.now()
        backend.counts.requests += 1
        backend.active += 1
        back = Back(self, served, backend)
        try:
            async with asyncio.timeout(served.assignment.spec.policy.timeouts.connect_s):
                await connect(served, backend, back, self._context())
        except (OSError, TimeoutError) as error:
            back.abandon()
            served.count.timeouts += isinstance(error, TimeoutError)
            served.backends.failed(backend)
            return False
        except asyncio.CancelledError:  # the app has gone
            back.abandon()
            raise
        served.backends.succeeded(backend)
        served.took(served.now() - began)
        self._join(back)
        return True

    def _join(self, back: Back) -> None:
        self._back = back
        assert self._transport is not None
        if self._transport.is_closing() or back.transport.is_closing():
            back.transport.abort()
            self._transport.close()
            return
        self._transport.resume_reading()
        if self._ahead:
            back.transport.write(self._ahead)  # which may pause the reading again
            self._ahead = bytearray()
        if self.has_ended:
            back.end()
        back.watch_idle()

    @property
    def transport(self) -> asyncio.Transport:
        """To the app."""
        assert self._transport is not None
        return self._transport

    def data_received(self, data: bytes) -> None:
        self._served.count.received_bytes += len(data)
        if self._back is not None:
            self._back.last = self._served.now()
            self._back.transport.write(data)
            return
        self._ahead += data
        if len(self._ahead) > _MAX_AHEAD:
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.has_ended = True
        if self._back is not None:
            self._back.end()
        return True

    def pause_writing(self) -> None:
        if self._back is not None:
            self._back.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._back is not None and not self._back.transport.is_closing():
            self._back.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._served.open.discard(self.transport)
        if self._connecting is not None:
            self._connecting.cancel()
        if self._back is not None and error is not None:
            self._back.transport.abort()
        elif self._back is not None:
            self._back.transport.close()

    def end(self) -> None:
        """The endpoint has said all; the app may still say something, unless it has said all too."""
        with contextlib.suppress(OSError, RuntimeError):
            if self.has_ended:
                self.transport.close()
            else:
                self.transport.write_eof()


class Back(asyncio.Protocol):
    """A connection to an endpoint."""

    def __init__(self, front: Front, served: Served, backend: Backend) -> None:
        self._front, self._served, self._backend = front, served, backend
        self._transport: asyncio.Transport | None = None
        self._is_over = False
        self._has_ended = False
        self._timer: asyncio.TimerHandle | None = None
        self.last = served.now()

    @property
    def transport(self) -> asyncio.Transport:
        """To the endpoint."""
        assert self._transport is not None
        return self._transport

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._served.count.sent_bytes += len(data)
        self.last = self._served.now()
        self._front.transport.write(data)

    def eof_received(self) -> bool:
        self._has_ended = True
        self._front.end()
        return True

    def pause_writing(self) -> None:
        self._front.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._front.transport.is_closing():
            self._front.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_done()
        if self._timer is not None:
            self._timer.cancel()
        if error is not None:
            self._front.transport.abort()
        else:
            self._front.transport.close()

    def _is_done(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._backend.active -= 1

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self._is_done()
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        """The app has said all; the endpoint may still answer, unless it has said all too."""
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
            if self.transport.can_write_eof() and not self._has_ended:
                self.transport.write_eof()
            else:  # TLS can't be closed by halves
                self.transport.close()

    def watch_idle(self) -> None:
        """Ends it when nothing has passed for as long as the policy says."""
        idle_s = self._served.assignment.spec.policy.timeouts.idle_s
        if idle_s is None or self.transport.is_closing():
            return
        left = self.last + idle_s - self._served.now()
        if left <= 0:
            self.transport.abort()
            self._front.transport.abort()
            return
        self._timer = self._served.loop.call_later(left, self.watch_idle)


def _most(served: Served) -> int:
    return served.assignment.spec.policy.circuit_breaker.max_connections


async def connect(served: Served, backend: Backend, back: asyncio.Protocol, context: ssl.SSLContext | None) -> None:
    """Connects a protocol to an endpoint; raises OSError, of TLS too."""
    tls, address = served.assignment.spec.tls, backend.address
    name = tls.server_name if tls and context else None
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        await served.loop.create_unix_connection(lambda: back, path, ssl=context, server_hostname=name)
        return
    host, _, port = address.rpartition(":")
    await served.loop.create_connection(lambda: back, host.strip("[]"), int(port), ssl=context, server_hostname=name)
