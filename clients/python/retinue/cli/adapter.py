"""`retinue adapter`: the apps that are collected, and what they say in one form."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import TYPE_CHECKING, Any

import click

from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.adapter.v1 import target_pb2 as pb
from retinue.cli import common
from retinue.cli.app import Branch
from retinue.cli.common import DURATION, Server, asynchronous, server_options
from retinue.cli.failures import OUT_OF_TIME
from retinue.client.adapter import PATTERN, Adapter, declaration, state_name, target
from retinue.client.errors import AlreadyExists

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from retinue.adapter.v1 import adapter_service_pb2 as api

NONE_THERE, NOT_COLLECTED = 1, OUT_OF_TIME
KINDS = [name.removeprefix("TARGET_KIND_").lower() for name in pb.TargetKind.keys()[1:]]
OURS = frozenset({"instance", "kind", "service", "target"})
"""Labels that every series has."""
_LABEL = re.compile(r'(?P<name>\w+)="(?:[^"\\]|\\.)*"')
_COLLECTED = (pb.TARGET_STATE_UP, pb.TARGET_STATE_DEGRADED, pb.TARGET_STATE_LIMITED)

adapter = Branch(
    {
        "targets": ("adapter:targets", "The apps that are collected, and how they do."),
        "signals": ("adapter_read:signals", "Live golden signals: requests, errors, duration, saturation."),
        "watch": ("adapter_read:watch", "Live metrics, of whatever source, as they change."),
        "metrics": ("adapter_read:metrics", "The latest metrics, or with --describe what there is."),
        "test": ("adapter:test", "Collect once and keep nothing: raw beside normalised (operator)."),
        "create": ("adapter:create", "Begin to collect an app (operator)."),
        "delete": ("adapter:delete", "Forget a target and its metrics (operator)."),
    },
    name="adapter",
    help="""One monitoring interface for apps of any kind.

    \b
    retinue adapter test cache redis 127.0.0.1:6379        see what would come of it
    retinue adapter create cache redis 127.0.0.1:6379      the same words: collect it
    retinue adapter signals                                how all apps do, live
    retinue adapter watch 'redis_command_calls{command=get}'
    retinue adapter metrics 'redis_memory_*' --target cache

    \b
    What counts as a request of an app of yours, and where its numbers are, is said by
    a rule pack. `retinue-server --check-pack FILE` looks one over without a server.
    """,
    no_args_is_help=True,
)

_COLUMNS = ["target_id", "kind", "state", "endpoint", "series", "collected", "note"]


@contextlib.asynccontextmanager
async def adapter_of(server: Server, *, operator: bool = False) -> AsyncIterator[Adapter]:
    """To the adapter, for apps or for operators."""
    connection = server.for_operators() if operator else server.for_apps(PATTERN)
    try:
        yield Adapter(connection=connection, timeout=server.timeout)
    finally:
        await connection.close()


def declares(function: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments and options that declare a target; the command gets them as `wanted`."""

    @functools.wraps(function)
    def run(server: Server, *, name: str, kind: str | None, endpoint: str, **said: Any) -> Any:
        own = {key: said.pop(key) for key in list(said) if key not in _DECLARED}
        limits = pb.TargetLimits(**{key: said.pop(key) or 0 for key in ("max_bytes", "max_series", "max_labels")})
        fields = {key: said[key] for key in ("rule_pack", "service", "credentials_file") if said[key]}
        if limits.ByteSize():
            fields["limits"] = limits
        times = {"interval": said["interval"], "timeout": said["collect_timeout"]}
        if kind is None and (fields or any(value is not None for value in times.values())):
            raise click.UsageError("KIND must be given with options that declare a target")
        wanted = pb.Target(target_id=name)
        if kind is not None:
            wanted = target(name, kind.upper(), endpoint, **times, **fields)
        return function(server, wanted=wanted, **own)

    for option in (
        click.option("--max-labels", type=int, help="Labels of a series.  [default: 30]"),
        click.option("--max-series", type=int, help="Series; what is over it is left out.  [default: 10,000]"),
        click.option("--max-bytes", type=int, help="Bytes of one collection.  [default: 10 MiB]"),
        click.option("--credentials-file", metavar="PATH", help="At the server: a file with the password or token."),
        click.option("--service", metavar="NAME", help="The label `service`.  [default: NAME]"),
        click.option("--rule-pack", metavar="PACK", help="What makes metrics and signals of it; json needs one."),
        click.option("--collect-timeout", type=DURATION, help="How long a collection may take.  [default: 5s]"),
        click.option("--interval", type=DURATION, help="How often it is collected.  [default: 10s]"),
    ):
        run = option(run)
    return run


_DECLARED = frozenset(
    {"interval", "collect_timeout", "rule_pack", "service", "credentials_file"}
    | {"max_bytes", "max_series", "max_labels"}
)
_ENDPOINTS = """

    \b
    prometheus, json, nginx   http://HOST:PORT/PATH
    redis, memcached          HOST:PORT
    postgresql                postgresql://USER@HOST:PORT/DATABASE
    statsd                    udp:HOST:PORT or unixgram:/PATH, where the server listens
    report                    none: the app tells by itself
    """


def row(found: pb.Target) -> common.Row:
    """A target as a row."""
    status = found.status
    return {
        "target_id": found.target_id,
        "kind": pb.TargetKind.Name(found.kind).removeprefix("TARGET_KIND_").lower(),
        "state": state_name(found),
        "endpoint": status.address,
        "every": common.duration_text(found.interval_duration.ToTimedelta().total_seconds()),
        "series": status.series,
        "refused": sum(one.points for one in status.rejections),
        "collected": _ago(found),
        "note": _note(found),
    }


def _ago(found: pb.Target) -> str:
    if not found.status.HasField("last_success_time"):
        return "never"
    from datetime import UTC  # noqa: PLC0415 - for this column only

    return common.since(found.status.last_success_time.ToDatetime(tzinfo=UTC)) + " ago"


def _note(found: pb.Target) -> str:
    dropped = found.status.datagrams.dropped
    lost = f"the kernel dropped {dropped:,} datagrams" if dropped else ""
    return "; ".join(word for word in (found.status.message, lost) if word)


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@server_options
@asynchronous
async def targets(server: Server, *, names: Sequence[str]) -> None:
    """All targets and how they do, or each NAME with why points of it were refused.

    \b
    pending        nothing has been heard of it yet
    up             the last collection succeeded
    degraded       it did, and some points were refused
    limited        it did, and more came than its limits allow
    stale          it failed; what was collected before stands
    down           it failed for so long that nothing is shown any more
    misconfigured  it answers, but not what its kind or its rule pack expects
    """
    async with adapter_of(server) as one:
        found = [await one.get(name) for name in names] if names else [known async for known in one.list()]
    if names and common.as_json(server.output):
        for known in found:
            common.emit(common.plain(known))
        return
    server.show(map(row, found), _COLUMNS)
    refused = [_refused(known, why) for known in found for why in known.status.rejections] if names else []
    if refused:
        click.echo()
        server.show(refused, ["target_id", "reason", "points", "such_as"])


def _refused(found: pb.Target, why: pb.Rejection) -> common.Row:
    return {"target_id": found.target_id, "reason": why.reason, "points": why.points, "such_as": why.example}


@click.command(
    help="""Begin to collect an app, as NAME, and wait for the first collection (operator). Ends with 5 if that failed.

    The same again is safe. With --replace a target of that name becomes what is said here, all of it."""
    + _ENDPOINTS
)
@click.argument("name", metavar="NAME")
@click.argument("kind", metavar="KIND", type=click.Choice(KINDS[:-1], case_sensitive=False))
@click.argument("endpoint", metavar="[ENDPOINT]", default="")
@click.option("--replace", is_flag=True, help="Change the target of that name, if there is one.")
@click.option("--wait", "wait_for", type=DURATION, default="10s", show_default=True, help="For the first collection.")
@server_options
@declares
@asynchronous
async def create(server: Server, *, wanted: pb.Target, replace: bool, wait_for: float) -> int:
    async with adapter_of(server, operator=True) as one:
        try:
            made = await one.create(wanted, wait=wait_for)
        except AlreadyExists:
            if not replace:
                raise
            made = await one.update(wanted)
    server.show([row(made)], _COLUMNS)
    return 0 if made.status.state in (*_COLLECTED, pb.TARGET_STATE_PENDING) else NOT_COLLECTED


@click.command()
@click.argument("name", metavar="NAME")
@server_options
@asynchronous
async def delete(server: Server, *, name: str) -> int:
    """Forget NAME and its metrics (operator). Ends with 1 if there was none."""
    async with adapter_of(server, operator=True) as one:
        deleted = await one.delete(name)
    server.show([{"target_id": name, "deleted": deleted}], ["target_id", "deleted"])
    return 0 if deleted else NONE_THERE


@click.command(
    help="""Collect once and keep nothing: what the app says beside what becomes of it, what is refused and why, and the
    golden signals (operator). Ends with 5 if the collection failed.

    It takes what `create` does; NAME alone tries the target that there is."""
    + _ENDPOINTS
)
@click.argument("name", metavar="NAME")
@click.argument("kind", metavar="[KIND]", type=click.Choice(KINDS[:6], case_sensitive=False), required=False)
@click.argument("endpoint", metavar="[ENDPOINT]", default="")
@click.option("--refused", "refused_only", is_flag=True, help="Only the points that are refused.")
@server_options
@declares
@asynchronous
async def test(server: Server, *, wanted: pb.Target, refused_only: bool) -> int:
    async with adapter_of(server, operator=True) as one:
        if wanted.kind == pb.TARGET_KIND_UNSPECIFIED:
            wanted = declaration(await one.get(wanted.target_id))
        found = await one.test(wanted)
    if common.as_json(server.output):
        common.emit(_tested(found))
    else:
        _show(found, refused_only=refused_only)
    return NOT_COLLECTED if found.failure else 0


def _tested(found: api.TestTargetResponse) -> common.Row:
    """Every field, empty ones too, so that a script finds them."""
    from retinue.cli.adapter_read import signal_row  # noqa: PLC0415 - for this command only

    names = ("raw", "normalised", "rejection")
    points = [{name: getattr(point, name) for name in names} for point in found.points]
    signals = [signal_row(one) for one in found.signals]
    omitted = found.omitted_points
    return {"failure": found.failure, "points": points, "omitted_points": omitted, "signals": signals}


def _show(found: api.TestTargetResponse, *, refused_only: bool) -> None:
    from rich.console import Console  # noqa: PLC0415 - for terminals only
    from rich.table import Table  # noqa: PLC0415 - the same
    from rich.text import Text  # noqa: PLC0415 - the same

    from retinue.cli.adapter_read import signals_table  # noqa: PLC0415 - for this command only

    console = Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("RAW", overflow="fold", ratio=2)
    table.add_column("NORMALISED", overflow="fold", ratio=3)
    for raw, normalised, style in _pairs(found, refused_only=refused_only):
        table.add_row(Text(raw), Text(normalised, style=style))
    if table.row_count:
        console.print(table)
    if found.omitted_points:
        console.print(f"[dim]and {found.omitted_points:,} more[/dim]")
    refused = sum(bool(point.rejection) for point in found.points)
    console.print(f"\n{len(found.points) + found.omitted_points:,} points, {refused:,} refused\n")
    if found.failure:
        console.print(Text(f"not collected: {found.failure}", style="red"))
    elif found.signals:
        console.print(signals_table({"": metric_pb.Signals(signals=found.signals)}))


def _pairs(found: api.TestTargetResponse, *, refused_only: bool) -> Iterator[tuple[str, str, str]]:
    for point in found.points:
        if point.rejection:
            yield point.raw, f"refused: {point.rejection}", "red"
        elif not refused_only:
            lines = "\n".join(map(_without_ours, point.normalised.splitlines()))
            yield point.raw, lines or "no rule wants it", "" if lines else "dim"


def _without_ours(sample: str) -> str:
    """A line of `/metrics` without the labels that all of them have."""
    name, brace, rest = sample.partition("{")
    inside, _, value = rest.rpartition("} ")
    kept = ",".join(found[0] for found in _LABEL.finditer(inside) if found["name"] not in OURS)
    return f"{name}{{{kept}}} {value}" if kept else f"{name} {value}" if brace else sample
