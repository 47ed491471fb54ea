"""Who asks: one at a time on a connection of each protocol, at a steady pace, and writes down what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
from typing import NamedTuple, Protocol

import h11
import psycopg
from grpc import aio

from support.ambassador_faults.checks import PATIENCE_NS
from support.ambassador_faults.history import Recorder, Sent, Told
from support.history.recorder import boot_ns
from support.upstreams import Browser, check

_PACE_S = 0.025
_KEYS = 40
_CHANNEL = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))
_calls = itertools.count(1)
_connections = itertools.count(1)


class Wrong(Exception):
    """An answer that says that something failed."""


class NobodyThere(Wrong):
    """No connection was accepted."""


class Heard(NamedTuple):
    """An answer."""

    server: str = ""
    value: str = ""


class Line(Protocol):
    """A connection to an upstream, made when it is asked; a failure ends it, and the next question makes it anew."""

    async def ask(self, key: str) -> Heard: ...

    async def close(self) -> None: ...


class Web:
    """HTTP/1.1."""

    def __init__(self, port: int) -> None:
        self._browser = Browser(port)

    async def ask(self, key: str) -> Heard:
        answer = await self._browser.get(f"/{key}")
        if answer.status != 200:
            raise Wrong(f"HTTP {answer.status} {answer.text}")
        return Heard(answer.text)

    async def close(self) -> None:
        self._browser.close()


class Rpc:
    """gRPC; a channel makes its connections itself."""

    def __init__(self, port: int) -> None:
        self._channel = aio.insecure_channel(f"127.0.0.1:{port}", options=_CHANNEL)

    async def ask(self, key: str) -> Heard:
        try:
            return Heard(await check(self._channel))
        except aio.AioRpcError as error:
            text = f"{error.code().name} {error.details()}"
            raise (NobodyThere if "failed to connect to all addresses" in text else Wrong)(text) from None

    async def close(self) -> None:
        await self._channel.close()


class _Stream:
    """A connection of raw bytes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def say(self, data: bytes) -> asyncio.StreamReader:
        """Who is to answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(data)
        return reader

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Text(_Stream):
    """Lines of raw TCP."""

    async def ask(self, key: str) -> Heard:
        answer = (await (await self.say(f"{key}\n".encode())).readline()).decode().split()
        if answer[1:] != [key]:
            raise Wrong(f"it was closed, or says {answer}")
        return Heard(answer[0])


class Cache(_Stream):
    """memcached: stores, then reads."""

    async def ask(self, key: str) -> Heard:
        value = f"{key}={next(_calls)}".encode()
        reader = await self.say(b"set %s 0 0 %d\r\n%s\r\nget %s\r\n" % (key.encode(), len(value), value, key.encode()))
        if (stored := await reader.readline()) != b"STORED\r\n":
            raise Wrong(f"it says {stored!r}")
        found = b""
        while (line := await reader.readline()) != b"END\r\n":
            if not line or line.startswith((b"SERVER_ERROR", b"CLIENT_ERROR", b"ERROR")):
                raise Wrong(f"it says {line!r}")
            found = line
        return Heard(value=found.decode().strip())


class Sql:
    """A session of PostgreSQL."""

    def __init__(self, port: int) -> None:
        self._url = f"postgresql://retinue@127.0.0.1:{port}/postgres?sslmode=disable&connect_timeout=10"
        self._session: psycopg.AsyncConnection | None = None

    async def ask(self, key: str) -> Heard:
        if self._session is None:
            self._session = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
        found = await (await self._session.execute("SELECT host(inet_server_addr())")).fetchone()
        assert found is not None
        return Heard(found[0])

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


LINES: dict[str, type[Web | Rpc | Text | Cache | Sql]] = {
    "http": Web,
    "grpc": Rpc,
    "tcp": Text,
    "memcached": Cache,
    "postgresql": Sql,
}
_PINNED = frozenset({"tcp", "postgresql"})
_FAILED = (OSError, Wrong, TimeoutError, psycopg.Error, h11.RemoteProtocolError, asyncio.IncompleteReadError)


class Caller:
    """Asks one upstream, on a connection that stays or on a new one each time."""

    def __init__(self, notes: Recorder, upstream: str, protocol: str, port: int, *, stays: bool) -> None:
        self._notes, self._port, self._stays = notes, port, stays
        self.upstream, self.protocol = upstream, protocol
        self._line: Line | None = None
        self._name = ""

    async def run(self, over: asyncio.Event) -> None:
        """Until it is over."""
        for number in itertools.count():
            if over.is_set():
                break
            await self.ask(f"k{number % _KEYS}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _PACE_S)
        await self.hang_up()

    async def ask(self, key: str) -> None:
        """Once."""
        if self._line is None:
            self._line = LINES[self.protocol](self._port)
            self._name = f"{self.protocol} {next(_connections)}"
        call = next(_calls)
        name = self._name if self._stays else ""
        self._notes.add(Sent(boot_ns(), call, self.upstream, name, self.protocol in _PINNED, key))
        try:
            async with asyncio.timeout(PATIENCE_NS / 1e9):
                heard = await self._line.ask(key)
        except _FAILED as error:
            self._notes.add(Told(boot_ns(), call, f"{type(error).__name__} {error}", self._was_refused(error)))
            await self.hang_up()
            return
        self._notes.add(Told(boot_ns(), call, server=heard.server, value=heard.value))
        if not self._stays:
            await self.hang_up()

    def _was_refused(self, error: Exception) -> bool:
        """Also a new connection that was in the queue of a listener that closed: the kernel resets it."""
        in_queue = isinstance(error, ConnectionResetError) and error.errno == errno.ECONNRESET and not self._stays
        return in_queue or isinstance(error, ConnectionRefusedError | NobodyThere)

    async def hang_up(self) -> None:
        """The next question is asked on another connection."""
        if self._line is not None:
            line, self._line = self._line, None
            await line.close()
