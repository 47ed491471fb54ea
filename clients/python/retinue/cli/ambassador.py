"""`retinue ambassador`: what stands behind localhost, and waiting for it."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from retinue.ambassador.v1 import upstream_pb2 as pb
from retinue.cli import common
from retinue.cli.app import Branch
from retinue.cli.common import DURATION, Server, asynchronous, server_options
from retinue.client.ambassador import PATTERN, Ambassador, NotActive, state_name, why_not_active
from retinue.client.channel import Connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

NOT_ACTIVE = 1

ambassador = Branch(
    {
        "ls": ("ambassador:ls", "All upstreams, where they listen, and how they are."),
        "show": ("ambassador:show", "An upstream: what is declared, and who serves it."),
        "wait": ("ambassador:wait", "Until upstreams are active: exit code 0, or 1 at --timeout."),
        "stats": ("ambassador:stats", "Live counts of upstreams and their endpoints."),
        "declare": ("ambassador:declare", "Declare the upstreams of a file (operator)."),
        "drain": ("ambassador:drain", "Let an upstream take no new connections (operator)."),
        "rm": ("ambassador:rm", "Drain an upstream and forget it (operator)."),
    },
    name="ambassador",
    help="""What stands behind localhost.

    \b
    retinue ambassador declare -f upstreams.yaml
    retinue ambassador wait db cache --timeout 1m && exec ./app
    retinue ambassador stats
    """,
    no_args_is_help=True,
)

_COLUMNS = ["upstream_id", "protocol", "state", "address", "endpoints", "healthy", "connections", "data_plane", "note"]

name_argument = click.argument("name", metavar="NAME")
names_argument = click.argument("names", metavar="[NAME]...", nargs=-1)


@contextlib.asynccontextmanager
async def _ambassador(server: Server, *, operator: bool = False) -> AsyncIterator[Ambassador]:
    connection = server.for_operators() if operator else server.for_apps(PATTERN)
    try:
        yield Ambassador(connection=connection, timeout=server.timeout)
    finally:
        await connection.close()


def _row(found: pb.Upstream) -> common.Row:
    status = found.status
    return {
        "upstream_id": found.upstream_id,
        "protocol": pb.Protocol.Name(found.protocol).removeprefix("PROTOCOL_").lower(),
        "state": state_name(found),
        "address": status.address,
        "endpoints": len(status.endpoints),
        "healthy": sum(endpoint.healthy for endpoint in status.endpoints),
        "connections": status.active_connections,
        "data_plane": pb.DataPlaneKind.Name(status.data_plane).removeprefix("DATA_PLANE_KIND_").lower(),
        "note": _note(found),
    }


def _note(found: pb.Upstream) -> str:
    """What is out of the ordinary."""
    standalone = found.status.mode == pb.UPSTREAM_MODE_STANDALONE
    refused = f"refused: {found.status.rejection.message}" if found.status.HasField("rejection") else ""
    nobody = "" if found.status.endpoints_resolved else "nobody serves it"
    return "; ".join(word for word in ("STANDALONE" if standalone else "", refused, nobody) if word)


@click.command()
@server_options
@asynchronous
async def ls(server: Server) -> None:
    """All upstreams, where they listen, and how they are."""
    async with _ambassador(server) as one:
        server.show([_row(found) async for found in one.list()], _COLUMNS)


@click.command()
@name_argument
@server_options
@asynchronous
async def show(server: Server, *, name: str) -> None:
    """NAME as it is declared, with all defaults, and who serves it."""
    async with _ambassador(server) as one:
        found = await one.get(name)
    if common.as_json(server.output):
        common.emit(common.plain(found))
        return
    server.show([_row(found)], _COLUMNS)
    click.echo()
    server.show(map(_endpoint_row, found.status.endpoints), ["endpoint", "weight", "state", "reason"])


def _endpoint_row(one: pb.EndpointStatus) -> common.Row:
    state = "healthy" if one.healthy else "unhealthy"
    return {"endpoint": one.address, "weight": one.weight, "state": state, "reason": one.reason}


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@server_options
@asynchronous
async def wait(server: Server, *, names: Sequence[str]) -> int:
    """Until every NAME is active: exit code 0; at --timeout 1, and why not. Prints nothing else.

    Neither the server nor the upstreams need to be there yet: put it in front of an app that dials at its start.
    """
    connection = Connection(server.address, pattern=PATTERN)
    try:
        await Ambassador(connection=connection, timeout=server.timeout).wait(*names)
    except NotActive as error:
        for name, why in error.reasons.items():
            click.echo(f"not active: {name}: {why}", err=True)
        return NOT_ACTIVE
    finally:
        await connection.close()
    return 0


@click.command()
@names_argument
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="How often.")
@click.option("--once", is_flag=True, help="Once, and end.")
@server_options
@asynchronous
async def stats(server: Server, *, names: Sequence[str], interval: float, once: bool) -> None:
    """The counts of each NAME, or of all, until Ctrl-C: a live table on a terminal, else a JSON line for each."""
    from retinue.cli.traffic import Traffic  # noqa: PLC0415 - for this command only

    async with _ambassador(server) as one, contextlib.aclosing(one.stats(*names, interval=interval)) as snapshots:
        with Traffic(live=not common.as_json(server.output)) as traffic:
            async for snapshot in snapshots:
                traffic.show(snapshot)
                sys.stdout.flush()
                if once:
                    return


@click.command()
@click.option("-f", "--file", "file", type=click.File(), required=True, help="YAML or JSON; - is standard input.")
@click.option(
    "--check", "check_only", is_flag=True, help="Only check it, as far as that can be done without serving it."
)
@click.option(
    "--wait", "wait_for", type=DURATION, default="10s", show_default=True, help="For each, until it is active."
)
@server_options
@asynchronous
async def declare(server: Server, *, file: TextIO, check_only: bool, wait_for: float) -> int:
    """Declare the upstreams of a file, in its order (operator). It has what the server's own file has:

    \b
    upstreams:
      - upstream_id: db
        protocol: TCP
        listen: {port: 5432}
        dns: {hostname: db.prod.svc, port: 5432}

    What the file does not name stays. Ends with 1 if one is not active when it was waited for.
    """
    from retinue.cli.upstreamfile import parse  # noqa: PLC0415 - for this command only

    rows, missing = [], 0
    async with _ambassador(server, operator=True) as one:
        for wanted in parse(file.read(), file.name):
            found = await one.declare(wanted, validate_only=check_only, wait=wait_for)
            if check_only:
                continue
            rows.append(_row(found))
            missing += bool(why_not_active(found))
    if not check_only:
        server.show(rows, _COLUMNS)
    return NOT_ACTIVE if missing else 0


@click.command()
@name_argument
@click.option("--drain", "drain_for", type=DURATION, help="Cut what is open after so long.  [default: 30s]")
@click.option("--wait", "wait_for", type=DURATION, default=0.0, help="For the last connection, up to 1m.")
@server_options
@asynchronous
async def drain(server: Server, *, name: str, drain_for: float | None, wait_for: float) -> None:
    """Let NAME take no new connections, and the open ones end (operator). To declare it again ends the drain."""
    async with _ambassador(server, operator=True) as one:
        server.show([_row(await one.drain(name, drain=drain_for, wait=wait_for))], _COLUMNS)


@click.command()
@name_argument
@click.option("--drain", "drain_for", type=DURATION, help="Cut what is open after so long.  [default: 30s]")
@server_options
@asynchronous
async def rm(server: Server, *, name: str, drain_for: float | None) -> int:
    """Drain NAME and forget it (operator). Ends with 1 if there was none."""
    async with _ambassador(server, operator=True) as one:
        removed = await one.remove(name, drain=drain_for)
    result: dict[str, Any] = {"upstream_id": name, "removed": removed}
    server.show([result], ["upstream_id", "removed"])
    return 0 if removed else NOT_ACTIVE
