"""`retinue scatter recent`: what became of past requests, the calls to leaves over time, and what was beneath them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC
from typing import TYPE_CHECKING, NamedTuple

import click
import grpc
import grpc.aio

from retinue.cli import common
from retinue.cli.common import Server, asynchronous, server_options
from retinue.cli.scatter import pool_of, seconds
from retinue.client import address as addresses
from retinue.client import errors
from retinue.client.channel import OPTIONS
from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1 import scattergather_service_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from retinue.client.pool import Pool

_ANSWER_S = 2.0
"""How long a leaf has to tell whether it is a root."""
_AT_ONCE = 16
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass
class Node:
    """A request with those that its leaves made of it."""

    scatter: api.RecentScatter
    below: dict[int, Node] = field(default_factory=dict)
    """By the place of the attempt."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Addresses that could not be asked whether they are roots, and why."""


@click.command()
@click.argument("what", metavar="[POOL|ID]", required=False)
@click.option("--list", "as_list", is_flag=True, help="The requests one a line, also with POOL.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many at most in a list.")
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="How many levels of roots beneath to ask; 0 = none.",
)
@server_options
@asynchronous
async def recent(server: Server, *, what: str | None, as_list: bool, limit: int, depth: int) -> None:
    """What became of past requests: of ID, of the latest to POOL, or a list of all.

    The root remembers some hundred. One is shown as its calls to leaves over time. A leaf that is a root itself is
    asked what it did, at the address that its parent knows; no collector is needed.

    \b
    retinue scatter recent                    the latest, one a line
    retinue scatter recent search             the latest to the pool search
    retinue scatter recent 901b5e28-13        that one
    """
    async with pool_of(server, (what or "") if as_list else "") as pool:
        if what is None or as_list:
            _show_list(await _first(pool, limit), server)
            return
        tree = await _tree(await _one(pool, what), depth)
    if common.as_json(server.output):
        common.emit(_nested(tree))
        return
    from retinue.cli.waterfall import print_tree  # noqa: PLC0415 - needs rich, for people only

    print_tree(tree)


async def _first(pool: Pool, limit: int, scatter_id: str = "") -> list[api.RecentScatter]:
    found = []
    async for scatter in pool.recent(scatter_id, page_size=min(limit, 100)):
        found.append(scatter)
        if len(found) == limit:
            break
    return found


async def _one(pool: Pool, what: str) -> api.RecentScatter:
    """By its id, or else the latest to the pool of that name."""
    found = await _first(pool, 1, what)
    if not found:
        pool.pool_id = what
        found = await _first(pool, 1)
    if not found:
        message = f"cannot find {what}: the root remembers no request of that name, and none to a pool of that name"
        raise errors.NotFound(grpc.StatusCode.NOT_FOUND, message)
    return found[0]


def _show_list(found: Sequence[api.RecentScatter], server: Server) -> None:
    if common.as_json(server.output):
        for scatter in found:
            common.emit(common.plain(scatter))
        return
    columns = ["scatter_id", "pool", "age", "end", "leaves", "took", "calls", "extra", "slowest"]
    server.show([_line(scatter) for scatter in found], columns)


def _line(scatter: api.RecentScatter) -> common.Row:
    stats = scatter.stats
    return {
        "scatter_id": scatter.scatter_id,
        "pool": scatter.pool_id,
        "age": common.since(scatter.start_time.ToDatetime(tzinfo=UTC)),
        "end": end(scatter),
        "leaves": f"{scatter.coverage.answered} of {scatter.coverage.expected}",
        "took": common.spent(seconds(stats.elapsed_duration)),
        "calls": stats.attempts,
        "extra": stats.hedges + stats.retries,
        "slowest": stats.slowest_shard_id,
    }


def end(scatter: api.RecentScatter) -> str:
    """How a request ended: complete, partial, or the name of its code."""
    if scatter.code:
        return CODES.get(scatter.code, str(scatter.code))
    return "complete" if scatter.coverage.complete else "partial"


def _nested(tree: Node) -> common.Row:
    """As a row; each attempt that was a request of another root has it as `scatter`."""
    row = common.plain(tree.scatter)
    for place, below in tree.below.items():
        row["attempts"][place]["scatter"] = _nested(below)
    if tree.unknown:
        row["not_asked"] = tree.unknown
    return row


# What was beneath


async def _tree(scatter: api.RecentScatter, depth: int) -> Node:
    node = Node(scatter)
    if not depth:
        return node
    said = await _below({attempt.address for attempt in scatter.attempts}, scatter.scatter_id)
    node.unknown = {address: found for address, found in said.items() if isinstance(found, str)}
    children = {address: found for address, found in said.items() if not isinstance(found, str)}
    for place, child in _paired(scatter.attempts, children):
        node.below[place] = await _tree(child, depth - 1)
    return node


def _paired(
    attempts: Sequence[api.RecentAttempt], children: Mapping[str, Sequence[api.RecentScatter]]
) -> Iterable[tuple[int, api.RecentScatter]]:
    """Which attempt was which request: those at one address in the order of their beginning, since clocks differ."""
    for address, found in children.items():
        places = [place for place, attempt in enumerate(attempts) if attempt.address == address]
        yield from zip(places, sorted(found, key=lambda one: one.start_time.ToNanoseconds()), strict=False)


async def _below(asked: Iterable[str], scatter_id: str) -> dict[str, list[api.RecentScatter] | str]:
    """What each address did for a request; empty of a plain leaf, a text of one that could not be asked."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def ask(address: str) -> list[api.RecentScatter] | str:
        async with gate:
            return await _ask(address, scatter_id)

    ordered = sorted(asked)
    return dict(zip(ordered, await asyncio.gather(*map(ask, ordered)), strict=True))


class _Leaf(NamedTuple):
    """A leaf that may be a root."""

    stub: rpc.ScatterGatherServiceAsyncStub

    async def children(self, scatter_id: str) -> list[api.RecentScatter]:
        """What it did for a request above it."""
        found: list[api.RecentScatter] = []
        request = api.ListRecentScattersRequest(page_size=100)
        while True:
            page = await self.stub.ListRecentScatters(request, timeout=_ANSWER_S)
            found += [one for one in page.scatters if one.parent_scatter_id == scatter_id]
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token


async def _ask(address: str, scatter_id: str) -> list[api.RecentScatter] | str:
    # No token goes there: a leaf is not the root that it is for.
    async with grpc.aio.insecure_channel(addresses.target(address), options=OPTIONS) as channel:
        try:
            return await _Leaf(rpc.ScatterGatherServiceStub(channel)).children(scatter_id)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return []
            return f"{error.code().name} {error.details()}"
