"""A TCP proxy that does to connections what networks do, when it is told to.

It runs on a thread of its own. What a mode does holds for connections that are open and for those that come.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from enum import Enum
from typing import Self, TypeVar

T = TypeVar("T")
_PIECE = 64 * 1024
_DROP = 7
_PATIENCE_S = 60.0


class Mode(Enum):
    """What becomes of bytes."""

    PASS = "pass"
    DELAY = "delay"
    """Every piece waits."""
    LATE_REPLIES = "late replies"
    """What the server sends waits."""
    TRICKLE = "trickle"
    """A few bytes at a time."""
    REPLIES_ONLY = "replies only"
    """What clients send is kept back until the mode changes; what the server sends passes."""
    REQUESTS_ONLY = "requests only"
    """The other way round: the server works on, and its answers are kept back."""
    HALF_OPEN = "half-open"
    """Nothing passes, and nobody is told: as when a cable is pulled."""
    REFUSE = "refuse"
    """New connections are reset; those that are open go on."""
    STALL = "first byte, then nothing"
    """Of what the server sends on a connection the first byte passes, and no more until the mode changes."""


class Proxy:
    """Listens on 127.0.0.1 and forwards to HOST:PORT; a context that ends it."""

    def __init__(self, upstream: str, delay_s: float = 0.05) -> None:
        self._host, _, port = upstream.rpartition(":")
        self._port, self._delay_s = int(port), delay_s
        self._mode = Mode.PASS
        self._changed = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._links: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.address = ""
        self.refused = 0
        """How many connections were reset as they came."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.close()

    def set(self, mode: Mode) -> None:
        """From now on."""
        self._do(self._set(mode))

    def cut(self) -> int:
        """Resets all connections that are open, and says how many; new ones are taken."""
        return self._do(self._cut())

    def refuse(self) -> None:
        """Resets all connections and refuses others, until `accept`."""
        self._do(self._refuse())

    def accept(self) -> None:
        """Takes connections again, on the same port."""
        self._do(self._listen(self.address))

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    def _do(self, what: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(_PATIENCE_S)

    # On the loop

    async def _listen(self, address: str = "127.0.0.1:0") -> None:
        host, _, port = address.rpartition(":")
        self._server = await asyncio.start_server(self._take, host, int(port))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        links = list(self._links)
        await self._cut()
        await asyncio.gather(*links, return_exceptions=True)

    async def _refuse(self) -> None:
        self._server.close()
        await self._cut()

    async def _set(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()
        self._changed = asyncio.Event()

    async def _cut(self) -> int:
        for link in self._links:
            link.cancel()
        return len(self._links)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode is Mode.REFUSE:
            self.refused += 1
            writer.transport.abort()
            return
        link = self._loop.create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forwards until one side ends or the link is cut; then both are reset."""
        writers = [writer]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                answers, requests = await asyncio.open_connection(self._host, self._port)
                writers.append(requests)
                pumps = [
                    asyncio.ensure_future(self._pump(reader, requests, Mode.REPLIES_ONLY)),
                    asyncio.ensure_future(self._pump(answers, writer, Mode.REQUESTS_ONLY)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                for end in writers:
                    end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, blocked_by: Mode) -> None:
        began = False
        while piece := await reader.read(_PIECE):
            while piece:
                while self._mode in (blocked_by, Mode.HALF_OPEN) or (began and self._mode is Mode.STALL):
                    await self._changed.wait()
                began = self._mode is Mode.STALL and blocked_by is Mode.REQUESTS_ONLY
                size = await self._slowed(len(piece), replies=blocked_by is Mode.REQUESTS_ONLY)
                writer.write(piece[:size])
                await writer.drain()
                piece = piece[size:]

    async def _slowed(self, size: int, *, replies: bool) -> int:
        """How many bytes may go at once, after the wait that the mode asks for."""
        if self._mode == Mode.DELAY or (self._mode == Mode.LATE_REPLIES and replies):
            await asyncio.sleep(self._delay_s)
        if self._mode == Mode.TRICKLE:
            await asyncio.sleep(0.001)
            return _DROP
        if self._mode == Mode.STALL and replies:
            return 1
        return size
