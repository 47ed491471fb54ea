"""The metrics listener: `/metrics`, what a pattern has beneath it, and `/healthz` over HTTP/1.1, and nothing else.

It may bind any address in plaintext, because Prometheus and kubelets dial the pod's; so it takes only GET,
reads no body, and closes each connection after one answer.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from retinue_server.runtime import addresses
from retinue_server.runtime.addresses import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from retinue_server.runtime.addresses import Tcp
    from retinue_server.runtime.metrics import Exposition

log = logging.getLogger(__name__)

_HEAD_BYTES = 16 * 1024
_TIMEOUT_S = 10.0
"""For a whole exchange; a connection that stalls is closed."""
_CONNECTIONS = 64
_TEXT = "text/plain; charset=utf-8"
_NOT_HERE = HTTPStatus.NOT_FOUND, _TEXT, b"here are /metrics and /healthz\n"


class MonitorListener:
    """Serves the exposition, and 200 or 503 by the process's health."""

    name = "metrics"

    def __init__(self, address: Tcp, exposition: Exposition, healthy: Callable[[], bool]) -> None:
        self._address = address
        self._exposition = exposition
        self._healthy = healthy
        self._servers: list[asyncio.Server] = []
        self._open: set[asyncio.Task[Any]] = set()
        self.bound: list[str] = []

    async def start(self) -> None:
        """Raises StartError for a taken port or a missing package."""
        if importlib.util.find_spec("prometheus_client") is None:
            raise StartError(
                "cannot serve --metrics: prometheus-client is missing; run `pip install 'retinue-server[metrics]'`"
            )
        for sock in await addresses.listen_everywhere(self._address, "--metrics"):
            self.bound.append(str(addresses.of_socket(sock)))
            self._servers.append(await asyncio.start_server(self._serve, sock=sock, limit=_HEAD_BYTES))

    async def stop(self, grace: float | None = None) -> None:  # noqa: ARG002 - an answer takes no time
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        for task in list(self._open):
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) <= _CONNECTIONS:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._exchange(reader, writer)
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the caller's affair
        except asyncio.CancelledError:
            pass  # we stop
        finally:
            self._open.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004 - method, target, version
            status, kind, body = HTTPStatus.BAD_REQUEST, _TEXT, b"this is HTTP/1.1\n"
        else:
            status, kind, body = self._answer(words[0], words[1].partition("?")[0], _accept(head))
        allow = "allow: GET\r\n" if status == HTTPStatus.METHOD_NOT_ALLOWED else ""
        writer.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {kind}\r\n{allow}"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
        )
        writer.write(body)  # not in one piece with its head: it may have MiB
        await writer.drain()

    def _answer(self, verb: str, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        if path not in ("/metrics", "/healthz") and not path.startswith("/metrics/"):
            return _NOT_HERE
        if verb != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"use GET\n"
        if path != "/healthz":
            return self._metrics(path.removeprefix("/metrics").removeprefix("/"), accept)
        if self._healthy():
            return HTTPStatus.OK, _TEXT, b"serving\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"not serving\n"

    def _metrics(self, name: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        try:
            found = self._exposition.page(name, accept)
        except Exception:
            log.exception("cannot collect metrics")
            return HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"cannot collect metrics: the log says why\n"
        return (HTTPStatus.OK, *found) if found else _NOT_HERE


def _accept(head: bytes) -> str:
    """What the caller takes."""
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return ",".join(value.decode("latin-1") for name, _, value in lines if name.strip().lower() == b"accept")
