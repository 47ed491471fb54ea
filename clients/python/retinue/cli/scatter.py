"""`retinue scatter`: one question to all shards of a pool."""

from __future__ import annotations

import base64
import json as json_text
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retinue.cli import common, failures
from retinue.cli.app import Branch
from retinue.cli.common import DURATION, Server, asynchronous, server_options
from retinue.client.pool import Answer, Pool, Reply
from retinue.scattergather.v1 import topology_pb2 as topology_pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.duration_pb2 import Duration

    from retinue.scattergather.v1 import scattergather_service_pb2 as api

    Question = Mapping[str, Any]


class _Scatter(Branch):
    """`scatter POOL` is `scatter ask POOL`, so that a pool may have the name of a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            args = ["ask", "--help"]
        elif args[0] not in self.list_commands(ctx):
            args = ["ask", *args]
        return super().parse_args(ctx, args)


scatter = _Scatter(
    {
        "ask": ("scatter:ask", "Ask the shards of a pool."),
        "recent": ("recent:recent", "What became of past requests."),
    },
    name="scatter",
    help="Ask the shards of a pool; see what became of past requests.",
)


class _Ask(click.Command):
    """Its usage is the short form."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        formatter.write_usage("retinue scatter", "[ask] POOL [OPTIONS]")


class _ContentType(click.ParamType[Any]):
    """A text, `@FILE` or `-` for standard input."""

    name = "TEXT|@FILE|-"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, bytes):
            return value
        if value == "-":
            return sys.stdin.buffer.read()
        if not value.startswith("@"):
            return str(value).encode()
        try:
            return Path(value[1:]).read_bytes()
        except OSError as error:
            self.fail(f"cannot read {value[1:]}: {error.strerror}", param, ctx)


class _JsonType(_ContentType):
    """The same, of JSON."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return json_text.loads(super().convert(value, param, ctx))
        except ValueError as error:
            self.fail(f"not JSON: {error}", param, ctx)


class _InputsType(_JsonType):
    """A JSON object: shard -> input."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not isinstance(found, dict):
            self.fail('must be an object of shards and their inputs: {"a": {...}, "b": {...}}', param, ctx)
        return found


class _HeaderType(click.ParamType[tuple[str, str]]):
    """Metadata, `NAME:VALUE`."""

    name = "NAME:VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, text = value.partition(":")
        if not separator:
            self.fail(f"{value!r} is not of the form NAME:VALUE", param, ctx)
        return key.strip().lower(), text.strip()


@click.command(cls=_Ask)
@click.argument("pool_id", metavar="POOL")
@click.option("--json", type=_JsonType(), help="What each leaf gets: JSON.")
@click.option("--payload", type=_ContentType(), help="What each leaf gets: bytes.")
@click.option("--inputs", type=_InputsType(), help="A JSON object: for each shard its own input. Asks these shards.")
@click.option("--shard", "shards", multiple=True, metavar="SHARD", help="Only this shard; may be repeated.")
@click.option("--key", "keys", multiple=True, help="Only the shard to which this key belongs; may be repeated.")
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    help="The part of the leaves that is enough, such as 0.9; default: 1.",
)
@click.option("--min-shards", type=click.IntRange(min=0), default=0, help="How many shards must have answered.")
@click.option("--soft-deadline", type=DURATION, help="Once the minimum is met, wait for the rest until then.")
@click.option("--first-k", type=click.IntRange(min=0), default=0, help="Once so many shards answered, and enough, end.")
@click.option("--no-hedge", is_flag=True, help="No second call beside a slow one.")
@click.option(
    "--header", "headers", type=_HeaderType(), multiple=True, help="Metadata for the leaves, if the pool lets it."
)
@click.option("--explain", is_flag=True, help="Ask nobody: tell who would be asked, and how.")
@click.option("--raw", is_flag=True, help="Print the answer alone, as it is.")
@server_options
@asynchronous
async def ask(
    server: Server,
    *,
    pool_id: str,
    no_hedge: bool,
    headers: tuple[tuple[str, str], ...],
    explain: bool,
    raw: bool,
    **options: Any,
) -> int:
    """Ask the shards of POOL and print one answer; all of them must answer unless you say what is enough.

    \b
    retinue scatter search --json '{"text": "sea"}'
    retinue scatter search --json @question.json --min-coverage 0.9 --soft-deadline 50ms
    retinue scatter users --key ada --payload ada --explain
    retinue scatter search --json - --raw < question.json | jq '.[0]'

    \b
    Exit codes:
      0  complete: every shard answered, and completely
      6  partial: enough answered, what is missing is told
      7  failed: too few answered, or their replies can't be merged
      4  refused, by the root or by a leaf    3  the root can't be reached

    \b
    retinue scatter recent [POOL|ID]   what became of past requests
    retinue scatter ask recent         asks a pool that is named like a command
    """
    given = {name: value for name, value in options.items() if value is not None}
    question = given | {"hedge": not no_hedge}
    if sum(name in given for name in ("json", "payload", "inputs")) > 1:
        raise click.UsageError("give one of --json, --payload and --inputs")
    async with pool_of(server, pool_id) as pool:
        if explain:
            _show_plan(await pool.explain(**question), server)
            return 0
        question["metadata"] = dict(headers)
        live = sys.stdout.isatty() and not raw and not common.as_json(server.output)
        answer = await _watched(pool, question) if live else await pool.scatter(**question)
    _show(answer, server, raw=raw)
    return 0 if answer.complete else failures.PARTIAL


def pool_of(server: Server, pool_id: str = "") -> Pool:
    """A pool on a connection of its own."""
    return Pool(pool_id, address=server.address, timeout=server.timeout, patient=False)


async def _watched(pool: Pool, question: Question) -> Answer:
    """With a table of the shards while they answer."""
    from retinue.cli.shards import Shards  # noqa: PLC0415 - needs rich, for terminals only

    asked = {name: value for name, value in question.items() if name != "metadata"}
    with Shards(pool.pool_id, await pool.explain(**asked)) as table:
        async with aclosing(pool.stream(omit_payloads=True, **question)) as events:
            async for event in events:
                table.show(event)
                if isinstance(event, Answer):
                    return event
    raise AssertionError  # a stream ends with an answer or an error


def _show(answer: Answer, server: Server, *, raw: bool) -> None:
    if raw:
        sys.stdout.buffer.write(_raw(answer))
        sys.stdout.buffer.flush()
    elif common.as_json(server.output):
        common.emit(answer_row(answer))
    else:
        from retinue.cli.shards import print_answer  # noqa: PLC0415 - needs rich, for people only

        print_answer(answer)
    if not answer.complete and (raw or not common.as_json(server.output)):
        for failure in answer.failures:
            failures.tell_missing(failure)


def _raw(answer: Answer) -> bytes:
    """The bytes, or the JSON in a line; of replies each in a line."""
    kind = answer.message.WhichOneof("output")
    if kind == "collected":
        return b"".join(reply.payload.rstrip(b"\n") + b"\n" for reply in answer.replies)
    return answer.payload + (b"\n" if kind == "json" else b"")


def answer_row(answer: Answer) -> common.Row:
    """An answer as a row."""
    message, coverage = answer.message, answer.coverage
    row: common.Row = {"complete": coverage.complete, "answered": coverage.answered, "expected": coverage.expected}
    if message.WhichOneof("output") == "collected":
        row["replies"] = [{"shard_id": reply.shard_id} | _content(reply) for reply in answer.replies]
    else:
        row |= _content(answer)
    row["failures"] = [common.plain(one) for one in message.failures]
    row["failed_by_code"] = dict(message.failed_by_code)
    return row | {"scatter_id": answer.scatter_id, "topology_version": message.topology_version} | _stats(message.stats)


def _content(output: Answer | Reply) -> common.Row:
    """JSON; bytes as `text` if they are, or else in base 64 as `payload`."""
    if output.is_json:
        return {"json": output.json}
    try:
        return {"text": output.payload.decode()}
    except UnicodeDecodeError:
        return {"payload": base64.b64encode(output.payload).decode()}


def _stats(stats: api.ScatterStats) -> common.Row:
    return {
        "elapsed_seconds": seconds(stats.elapsed_duration),
        "slowest_seconds": seconds(stats.slowest_duration),
        "slowest_shard_id": stats.slowest_shard_id,
        "shards": stats.shards,
        "attempts": stats.attempts,
        "hedges": stats.hedges,
        "hedges_won": stats.hedges_won,
        "retries": stats.retries,
        "gathered_bytes": stats.gathered_bytes,
    }


def _show_plan(plan: api.ExplainScatterResponse, server: Server) -> None:
    if common.as_json(server.output):
        common.emit(common.plain(plan))
        return
    hedge = common.spent(seconds(plan.hedge_delay_duration)) if plan.HasField("hedge_delay_duration") else "never"
    timeout, leaf = seconds(plan.timeout_duration), seconds(plan.leaf_timeout_duration)
    click.echo(f"calls      {plan.method}, topology {plan.topology_version}")
    click.echo(f"merges by  {merge_name(plan.merge)}")
    click.echo(f"time       {common.spent(timeout)}, of which leaves have {common.spent(leaf)}")
    click.echo(f"hedges     after: {hedge}; the budget allows {plan.budget:.0f} hedges and retries now")
    server.show([_planned(shard) for shard in plan.shards], ["shard", "weight", "asks", "state", "latency", "or_else"])


def _planned(shard: topology_pb.Shard) -> common.Row:
    if not shard.endpoints:
        return {"shard": shard.shard_id, "weight": shard.weight, "asks": "nobody"}
    first, *others = shard.endpoints
    return {
        "shard": shard.shard_id,
        "weight": shard.weight,
        "or_else": " ".join(one.address for one in others),
        **endpoint_row(first, "asks"),
    }


def endpoint_row(endpoint: topology_pb.Endpoint, where: str = "endpoint") -> common.Row:
    """A replica as a row."""
    latency = common.spent(seconds(endpoint.latency_duration)) if endpoint.HasField("latency_duration") else ""
    state = "connected" if endpoint.connected else "away"
    return {where: endpoint.address, "state": state, "in_flight": endpoint.in_flight, "latency": latency}


def merge_name(merge: topology_pb.Merge.ValueType) -> str:
    """As the pool file has it."""
    return topology_pb.Merge.Name(merge).removeprefix("MERGE_").lower()


def seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.seconds + duration.nanos / 1e9
