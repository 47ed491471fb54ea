"""Envoy's admin interface, over its socket."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import h11
import msgspec

from retinue_server.runtime.errors import Reason, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 65536
_PATIENCE_S = 5.0
_OK = 200


class Admin:
    """One request a connection: it is asked seldom."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def get(self, path: str) -> Any:
        """What it answers, as JSON; raises Unavailable."""
        return msgspec.json.decode(await self._ask("GET", path))

    async def post(self, path: str) -> None:
        """Has it do something; raises Unavailable."""
        await self._ask("POST", path)

    async def _ask(self, method: str, path: str) -> bytes:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._exchange(method, path)
        except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
            raise Unavailable(
                "cannot ask Envoy: its admin socket does not answer", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=500
            ) from error

    async def _exchange(self, method: str, path: str) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [("host", "envoy"), ("connection", "close"), ("content-length", "0")]
            writer.write(connection.send(h11.Request(method=method, target=path, headers=headers)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            body = bytearray()
            while not isinstance(event := connection.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(_CHUNK))
                elif isinstance(event, h11.Response) and event.status_code != _OK:
                    raise h11.RemoteProtocolError(f"it answers {event.status_code}")
                elif isinstance(event, h11.Data):
                    body += event.data
            return bytes(body)
        finally:
            writer.close()
