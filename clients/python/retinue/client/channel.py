"""One connection to a server: channel defaults, credentials, and unary calls that are repeated when that is
safe.

The environment says how: `RETINUE_TOKEN_FILE` holds a bearer token (read again whenever the file changes),
`RETINUE_TLS_CA_FILE` turns TLS on, `RETINUE_TLS_CERT_FILE` and `RETINUE_TLS_KEY_FILE` add a client
certificate. A token is never sent in plaintext off this machine.
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from retinue.client import address as addresses
from retinue.client import errors, trace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

Response = TypeVar("Response")

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", 4 << 20),
    # Servers that are not told otherwise cut connections that ping more often than every 5 minutes. Calls
    # don't rely on this: long polls have deadlines, and the worker's stream asks for an answer every 10 s.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A server that restarts is found again soon, and a dead one is not hammered.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
)
DEFAULT_TIMEOUT = 30.0
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0


class ConfigurationError(Exception):
    """The environment contradicts itself; the message says what to change."""


class Token:
    """The bearer token of a file, read again when the file changes, so that it can be rotated."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        self._stamp: tuple[int, int] | None = None
        self._value = ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        if self._path is None:
            return ()
        self._refresh(self._path)
        return (("authorization", f"Bearer {self._value}"),)

    def _refresh(self, path: Path) -> None:
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino)
            if stamp != self._stamp:
                self._value, self._stamp = path.read_text().strip(), stamp
        except OSError as error:
            raise ConfigurationError(f"cannot read the token: {error}; check RETINUE_TOKEN_FILE") from error


class Connection:
    """A server's address with what it takes to call it. The channel is made on first use; close() is safe to repeat.

    Unless it is `patient`, a server that was never reached is not waited for: for people at a prompt. `reconnect_ms` is
    the longest wait between attempts to find a server again.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        pattern: str = "workqueue",
        patient: bool = True,
        reconnect_ms: int = 2_000,
    ) -> None:
        trace.configure()
        self.address = addresses.target(address) if address else addresses.app_address(pattern)
        self._credentials = _tls()
        self._token = Token(os.environ.get("RETINUE_TOKEN_FILE"))
        self._channel: grpc.aio.Channel | None = None
        self.patient = patient
        """Whether a server that was never reached is waited for."""
        self._options = [*OPTIONS, ("grpc.max_reconnect_backoff_ms", reconnect_ms)]
        if self._token.metadata() and not self._credentials and not addresses.is_local(self.address):
            raise ConfigurationError(
                f"cannot send a token in plaintext to {self.address}: name the server's CA in RETINUE_TLS_CA_FILE"
            )

    @property
    def channel(self) -> grpc.aio.Channel:
        """The asyncio channel, for stubs."""
        if self._channel is None:
            self._channel = self._open(grpc.aio)
        return self._channel

    def sync_channel(self) -> grpc.Channel:
        """A new blocking channel, for threads; the caller closes it."""
        channel: grpc.Channel = self._open(grpc)
        return channel

    def _open(self, face: Any) -> Any:
        if self._credentials is None:
            return face.insecure_channel(self.address, options=self._options)
        return face.secure_channel(self.address, self._credentials, options=self._options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries: the token and the trace context."""
        current = trace.current()
        return self._token.metadata() + ((("traceparent", current),) if current else ())

    async def call(
        self,
        method: Callable[..., Awaitable[Response]],
        request: object,
        *,
        timeout: float = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - gRPC sends it along
        repeatable: bool = True,
    ) -> Response:
        """Makes one unary call within `timeout` seconds in all.

        With `repeatable`, UNAVAILABLE and what carries RetryInfo are tried again with backoff and jitter
        until the time is over; then the last error is raised.
        """
        loop = asyncio.get_running_loop()
        end, waits = loop.time() + timeout, backoff()
        while True:
            try:
                response = await method(request, timeout=end - loop.time(), metadata=self.metadata())
            except grpc.aio.AioRpcError as raw:
                error = errors.from_rpc_error(raw)
                wait = max(next(waits), error.retry_after or 0)
                hopeful = self.patient or bool(error.reason)
                if not (repeatable and hopeful and is_transient(error)) or loop.time() + wait >= end:
                    raise error from raw
                await asyncio.sleep(wait)
            else:
                self.patient = True
                return response

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


def is_transient(error: errors.RetinueError) -> bool:
    """Whether the same call may succeed soon without anybody doing anything."""
    return isinstance(error, errors.Unavailable) or error.retry_after is not None


def backoff() -> Iterator[float]:
    """Seconds to wait, doubling up to 2 s; each between half and all of its ceiling, so that clients spread
    out.
    """
    ceiling = _FIRST_WAIT
    while True:
        yield ceiling * random.uniform(0.5, 1)  # noqa: S311 - spreads load, hides nothing
        ceiling = min(ceiling * 2, _LONGEST_WAIT)


def _tls() -> grpc.ChannelCredentials | None:
    names = ("RETINUE_TLS_CA_FILE", "RETINUE_TLS_KEY_FILE", "RETINUE_TLS_CERT_FILE")
    authority, key, certificate = (_content(name) for name in names)
    if authority is None and key is None:
        return None
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _content(name: str) -> bytes | None:
    path = os.environ.get(name)
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise ConfigurationError(f"cannot read {name}: {error}") from error
