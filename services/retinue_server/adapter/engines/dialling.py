"""Connections to apps: the address is looked up, each result checked against the endpoint policy, and that one
dialled."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retinue_server.adapter.engine import SourceError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable

    Objection = Callable[[str], str]
    """Why `IP:PORT` may not be dialled; empty = it may."""

_CREDENTIALS_BYTES = 4096


@asynccontextmanager
async def connected(
    host: str, port: int, objection: Objection, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the first address that answers; raises SourceError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SourceError(f"cannot look up {host}: {error.strerror or error}") from None
    why = ""
    for *_, address in found:
        shown = f"[{address[0]}]:{port}" if ":" in str(address[0]) else f"{address[0]}:{port}"
        why = objection(shown)
        if why:
            why = f"the endpoint policy forbids {shown}: {why}"
            continue
        try:
            reader, writer = await asyncio.open_connection(
                str(address[0]), port, ssl=tls, server_hostname=host if tls else None, limit=1 << 16
            )
        except OSError as error:
            why = f"cannot connect to {shown}: {error.strerror or error}"
            continue
        try:
            yield reader, writer
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise SourceError(f"{shown} broke the connection: {error or type(error).__name__}") from None
        finally:
            writer.close()
        return
    raise SourceError(why or f"{host} has no address")


async def credentials(path: str) -> str:
    """What the file has now, without the line's end; raises SourceError."""
    try:
        text = await asyncio.to_thread(Path(path).read_bytes)
    except OSError as error:
        raise SourceError(f"cannot read the credentials file: {error.strerror or error}") from None
    if len(text) > _CREDENTIALS_BYTES:
        raise SourceError("the credentials file is too large")
    return text.decode(errors="replace").strip()
