"""Invoke: one HTTP request through an upstream's own listener."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import h11

from retinue_server.runtime.errors import Reason, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BODY_BYTES = 3 * 1024 * 1024
_CHUNK = 65536
_OURS = frozenset({"connection", "content-length", "transfer-encoding", "upgrade", "keep-alive", "te", "trailer"})
"""Headers that govern a connection."""


class Answer(NamedTuple):
    """What the upstream said."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


def is_ours(header: str) -> bool:
    """Whether a caller may not set it."""
    return header.lower() in _OURS


class Asked(NamedTuple):
    """What is sent."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    body: bytes


async def invoke(address: str, upstream_id: str, asked: Asked) -> Answer:
    """Raises UPSTREAM_UNHEALTHY if the listener or what is behind it does not answer, MESSAGE_TOO_LARGE."""
    try:
        reader, writer = await _connect(address)
    except OSError as error:
        raise _unhealthy(upstream_id, f"nobody listens on {address}") from error
    try:
        connection = h11.Connection(h11.CLIENT)
        for event in (_head(asked, upstream_id), h11.Data(data=asked.body), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await writer.drain()
        return await _answer(connection, reader, upstream_id)
    except (OSError, h11.RemoteProtocolError) as error:
        raise _unhealthy(upstream_id, "the connection broke off") from error
    finally:
        writer.close()


def _head(asked: Asked, upstream_id: str) -> h11.Request:
    host = [] if any(name.lower() == "host" for name, _ in asked.headers) else [("host", upstream_id)]
    ours = [("content-length", str(len(asked.body))), ("connection", "close")]
    return h11.Request(method=asked.method, target=asked.path, headers=[*host, *asked.headers, *ours])


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _answer(connection: h11.Connection, reader: asyncio.StreamReader, upstream_id: str) -> Answer:
    head: Any = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise ResourceExhausted(
                    f"cannot give the answer of {upstream_id}: it is over {MAX_BODY_BYTES} bytes; dial its listener",
                    reason=Reason.MESSAGE_TOO_LARGE,
                )
        elif isinstance(event, h11.EndOfMessage):
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers]
            return Answer(head.status_code, headers, bytes(body))
        elif isinstance(event, h11.ConnectionClosed):
            raise _unhealthy(upstream_id, "the connection was closed")


def _unhealthy(upstream_id: str, why: str) -> Unavailable:
    return Unavailable(
        f"cannot reach upstream {upstream_id}: {why}",
        reason=Reason.UPSTREAM_UNHEALTHY,
        retry_ms=500,
        upstream_id=upstream_id,
    )
