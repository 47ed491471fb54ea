"""Runs the echo pattern in the test's own loop, and calls it without generated stubs."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc import aio

from retinue_server.runtime import wiring
from retinue_server.runtime.config import Settings
from support import echo
from support.echo import Echo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from retinue_server.runtime.dispatch import Pattern
    from retinue_server.runtime.lifecycle import Process


def settings(tmp_path: Path, **more: Any) -> Settings:
    """A free port, a control socket and a short drain, unless told otherwise."""
    chosen: dict[str, Any] = {
        "listen": ("127.0.0.1:0",),
        "control": f"unix:{tmp_path}/c.sock",
        "drain_seconds": 2.0,
    }
    return Settings(**chosen | more)


@asynccontextmanager
async def running(where: Settings, servicer: echo.EchoServicer, **pattern: Any) -> AsyncIterator[Process]:
    """The echo pattern, served."""
    async with serving(where, [echo.pattern(servicer, **pattern)]) as process:
        try:
            yield process
        finally:
            servicer.release.set()


@asynccontextmanager
async def serving(where: Settings, patterns: list[Pattern]) -> AsyncIterator[Process]:
    """Starts and stops a process."""
    process = await wiring.build(where, patterns)
    await process.start()
    try:
        yield process
    finally:
        await process.stop()


class Client:
    """Typed calls without generated stubs."""

    def __init__(self, channel: aio.Channel) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        method = echo.DESCRIPTOR.methods_by_name[name]
        sides = (method.client_streaming, method.server_streaming)
        kind = "_".join("stream" if streams else "unary" for streams in sides)
        return getattr(self._channel, kind)(
            f"/{echo.SERVICE}/{name}",
            request_serializer=Echo.SerializeToString,
            response_deserializer=Echo.FromString,
        )


@asynccontextmanager
async def dial(address: str) -> AsyncIterator[Client]:
    async with aio.insecure_channel(address) as channel:
        yield Client(channel)


def details(error: aio.AioRpcError) -> tuple[Status, dict[str, Any]]:
    """The google.rpc.Status of an error, and its details by name."""
    metadata = dict(error.trailing_metadata())
    status = Status.FromString(metadata["grpc-status-details-bin"])
    kinds = [kind for kind in vars(error_details_pb2).values() if hasattr(kind, "FromString")]
    known = {kind.DESCRIPTOR.full_name: kind for kind in kinds}
    found = {}
    for detail in status.details:
        name = detail.type_url.rpartition("/")[2]
        found[name.removeprefix("google.rpc.")] = known[name].FromString(detail.value)
    return status, found
