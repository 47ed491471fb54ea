"""`retinue topology`: the pools of a root, what is expected of them, and whom it found."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING

import click

from retinue.cli import common
from retinue.cli.app import Branch
from retinue.cli.common import Server, asynchronous, server_options
from retinue.cli.scatter import endpoint_row, merge_name, pool_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from retinue.scattergather.v1 import topology_pb2 as pb

topology = Branch(
    {
        "ls": ("topology:ls", "All pools of the root."),
        "show": ("topology:show", "A pool's shards and who serves them."),
        "watch": ("topology:watch", "The same, as it changes."),
    },
    name="topology",
    help="""The pools of a root: the shards that are expected, and who serves them.

    \b
    retinue topology ls
    retinue topology show search
    retinue topology watch search
    """,
    no_args_is_help=True,
)

pool_argument = click.argument("pool_id", metavar="POOL")


@click.command()
@server_options
@asynchronous
async def ls(server: Server) -> None:
    """All pools of the root. A shard is reachable if the root is connected to somebody who serves it."""
    async with pool_of(server) as pool:
        rows = [
            {
                "pool": one.pool_id,
                "merge": merge_name(one.merge),
                "shards": one.shards,
                "reachable_shards": one.reachable_shards,
                "endpoints": one.endpoints,
                "topology_version": one.topology_version,
                "method": one.method,
                "calls": one.method.rpartition(".")[2],
            }
            async for one in pool.pools()
        ]
    server.show(rows, ["pool", "merge", "shards", "reachable_shards", "endpoints", "calls"])


@click.command()
@pool_argument
@server_options
@asynchronous
async def show(server: Server, *, pool_id: str) -> None:
    """The shards of POOL, and who serves each. A shard that nobody serves is expected all the same."""
    async with pool_of(server, pool_id) as pool:
        found = await pool.topology()
    if common.as_json(server.output):
        common.emit(common.plain(found))
        return
    once = "" if found.idempotent else "  asks each leaf once, and never answers in part"
    k = f" {found.top_k}" if found.top_k else ""
    timeout = found.timeout_duration.ToTimedelta().total_seconds()
    click.echo(f"{found.pool_id}  topology {found.topology_version}  merges by {merge_name(found.merge)}{k}{once}")
    click.echo(f"calls {found.method} for {common.spent(timeout)} at most")
    server.show(_rows(found), ["shard", "weight", "endpoint", "state", "in_flight", "latency"])


def _rows(pool: pb.Pool) -> Iterator[common.Row]:
    for shard in pool.shards:
        row = {"shard": shard.shard_id, "weight": shard.weight}
        if not shard.endpoints:
            yield row | {"endpoint": "nobody"}
        for endpoint in shard.endpoints:
            yield row | endpoint_row(endpoint)


@click.command()
@pool_argument
@server_options
@asynchronous
async def watch(server: Server, *, pool_id: str) -> None:
    """POOL now, and each change of its shards, endpoints or their connection, until Ctrl-C."""
    before: dict[str, str] = {}
    async with pool_of(server, pool_id) as pool:
        async for found in pool.watch():
            if common.as_json(server.output):
                common.emit(common.plain(found))
            else:
                now = _states(found)
                _show_change(found, before, now)
                before = now
            sys.stdout.flush()


def _states(pool: pb.Pool) -> dict[str, str]:
    """What is said of each endpoint of each shard."""
    found = {}
    for shard in pool.shards:
        if not shard.endpoints:
            found[shard.shard_id] = "nobody"
        for endpoint in shard.endpoints:
            found[f"{shard.shard_id} {endpoint.address}"] = "connected" if endpoint.connected else "away"
    return found


def _show_change(pool: pb.Pool, before: dict[str, str], now: dict[str, str]) -> None:
    reachable = sum(any(endpoint.connected for endpoint in shard.endpoints) for shard in pool.shards)
    head = f"topology {pool.topology_version}, {reachable} of {len(pool.shards)} shards reachable"
    click.echo(f"{datetime.now():%H:%M:%S}  {head}")  # noqa: DTZ005 - local, for a person
    for name, state in now.items():
        if before.get(name) != state:
            colour = {"connected": "green", "nobody": "red"}.get(state, "yellow")
            click.echo(f"          {name} {click.style(state, fg=colour)}")
    for name in before.keys() - now.keys():
        click.echo(f"          {name} {click.style('gone', fg='red')}")
