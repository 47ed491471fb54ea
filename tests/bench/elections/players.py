"""What players share: channels to servers, and figures of many times."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc.aio

from bench.figures import percentile

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

T = TypeVar("T")
Figures: TypeAlias = dict[str, float]


_runner = asyncio.Runner()


def run(work: Coroutine[Any, Any, T]) -> T:
    """On one event loop for all cells: gRPC's poller keeps waking loops that it has seen."""
    return _runner.run(work)


def times(seconds: Sequence[float], prefix: str = "") -> Figures:
    """Percentiles and the longest, in milliseconds."""
    found = {"p50_ms": percentile(seconds, 0.5), "p99_ms": percentile(seconds, 0.99), "longest_ms": max(seconds)}
    return {prefix + name: value * 1000 for name, value in found.items()}


@asynccontextmanager
async def channels(*addresses: str) -> AsyncIterator[list[grpc.aio.Channel]]:
    """One to each."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(grpc.aio.insecure_channel(address)) for address in addresses]
