"""`retinue adapter signals`, `watch` and `metrics`: tables on a terminal, which live, else lines of JSON."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from functools import partial
from typing import TYPE_CHECKING, Self

import click

from retinue.adapter.v1 import metric_pb2 as pb
from retinue.cli import common
from retinue.cli.adapter import OURS, adapter_of
from retinue.cli.common import DURATION, Server, asynchronous, server_options
from retinue.client.adapter import match, signal_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from rich.table import Table

    from retinue.adapter.v1 import adapter_service_pb2 as api
    from retinue.client.adapter import Change

_HALF, _MOST = 0.5, 0.99
_FULL, _FILLING = 0.9, 0.75
_MATCH = re.compile(r"(?P<name>[^{}]*)(\{(?P<labels>[^{}]*)\})?")
Key = tuple[str, tuple[tuple[str, str], ...]]


class Screen:
    """On a terminal a table, which is drawn anew if it is live, elsewhere lines of JSON; a context."""

    def __init__(self, output: str | None, *, live: bool) -> None:
        self._is_json, self._is_live = common.as_json(output), live
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._is_live and not self._is_json:
            from rich.live import Live  # noqa: PLC0415 - for terminals only

            self._live = self._stack.enter_context(Live(auto_refresh=False))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, rows: Iterable[common.Row], table: Callable[[], Table]) -> None:
        """News as rows, all that is known as a table."""
        if self._is_json:
            for row in rows:
                common.emit(row)
            sys.stdout.flush()
        elif self._is_live:
            self._live.update(table(), refresh=True)
        else:
            from rich.console import Console  # noqa: PLC0415 - for terminals only

            Console().print(table())


# Golden signals


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--once", is_flag=True, help="Once, and end.")
@server_options
@asynchronous
async def signals(server: Server, *, names: Sequence[str], once: bool) -> None:
    """The golden signals of each NAME, or of all targets, until Ctrl-C: a live table on a terminal, else a JSON line
    for each signal whenever one of its target changes.

    \b
    requests    served since the app began to count, and how many a second
    errors      those that failed for a reason of the app's own
    duration    how long requests take: half, and 99 of 100, are not longer
    saturation  how full the fullest resource is

    What a source does not have is absent, and why; never is it shown as zero.
    """
    async with adapter_of(server) as one:
        with Screen(server.output, live=not once) as screen:
            if once:
                found = {told.target_id: told for told in await one.signals(*names)}
                screen.show(_signal_rows(found.values()), lambda: signals_table(found))
                return
            known: dict[str, pb.Signals] = {}
            async with contextlib.aclosing(one.watch_signals(*names)) as news:
                async for told in news:
                    known[told.target_id] = told  # one that is gone has no lines
                    screen.show(_signal_rows([told]), lambda: signals_table(known))


def _signal_rows(found: Iterable[pb.Signals]) -> Iterator[common.Row]:
    for told in found:
        time = told.time.ToJsonString() if told.HasField("time") else None
        if not told.signals:
            yield {"target_id": told.target_id, "signal": None, "gone": True}
        for one in told.signals:
            yield {"target_id": told.target_id, **signal_row(one), "time": time}


def signal_row(one: pb.Signal) -> common.Row:
    """As JSON has it; what is absent has no value."""
    found: common.Row = {"signal": signal_name(one), "value": None}
    match one.WhichOneof("value"):
        case "number":
            found["value"] = common.plain(one)["number"]
        case "histogram":
            found |= {"value": one.histogram.count, "sum_seconds": one.histogram.sum}
            found |= {"p50_seconds": quantile(one.histogram, _HALF), "p99_seconds": quantile(one.histogram, _MOST)}
    if one.HasField("rate"):
        found["per_second"] = one.rate
    return found | {"absent_reason": one.absent_reason, "source": one.source}


def signals_table(found: Mapping[str, pb.Signals]) -> Table:
    """Four lines for each target."""
    from rich.text import Text  # noqa: PLC0415 - for terminals only

    table = _table("TARGET", "SIGNAL", ">VALUE", ">PER SECOND", "FROM")
    for name in sorted(found):
        for index, one in enumerate(found[name].signals):
            value, style = _signal_value(one)
            rate = f"{one.rate:,.1f}" if one.HasField("rate") else ""
            cells = ("" if index else name, signal_name(one), value, rate, one.source or one.absent_reason)
            table.add_row(Text(cells[0], style="bold"), *(Text(cell, style=style) for cell in cells[1:]))
    return table


def _signal_value(one: pb.Signal) -> tuple[str, str]:
    """As people read it, and its colour."""
    if one.absent_reason:
        return "absent", "dim"
    if one.WhichOneof("value") == "histogram":
        return _times(one.histogram), ""
    if one.kind == pb.SIGNAL_KIND_SATURATION:
        style = "red" if one.number >= _FULL else "yellow" if one.number >= _FILLING else "green"
        return f"{one.number:.1%}", style
    is_failing = one.kind == pb.SIGNAL_KIND_ERRORS and one.rate > 0
    return f"{one.number:,.0f}", "yellow" if is_failing else ""


# Metrics

matches_argument = click.argument("matches", metavar="[MATCH]...", nargs=-1)
target_option = click.option("--target", "targets", metavar="NAME", multiple=True, help="Of this target; repeatable.")


@click.command()
@matches_argument
@target_option
@server_options
@asynchronous
async def watch(server: Server, *, matches: Sequence[str], targets: Sequence[str]) -> None:
    """The metrics that any MATCH selects, or all, until Ctrl-C: a live table on a terminal, in which what changed last
    is bold, else a JSON line for each series that changed.

    \b
    http_requests              the metric of that name
    'redis_*'                  those whose names begin so
    '{code=500}'               series with that label, whatever the metric
    'http_requests{code=500}'  both
    """
    known: dict[Key, tuple[pb.Metric, pb.Series]] = {}
    async with adapter_of(server) as one, contextlib.aclosing(one.watch(*selected(matches, targets))) as changes:
        with Screen(server.output, live=True) as screen:
            async for change in changes:
                changed = apply(change, known)
                screen.show(_change_rows(change), partial(metrics_table, known, changed))


def apply(change: Change, known: dict[Key, tuple[pb.Metric, pb.Series]]) -> set[Key]:
    """Brings `known` up to date; what changed."""
    if change.begins:
        known.clear()
    changed = set()
    for metric in change.metrics:
        for series in metric.series:
            key = (metric.name, tuple(sorted(series.labels.items())))
            known.pop(key, None)
            if not series.stale:
                known[key] = metric, series
                changed.add(key)
    return changed


def _change_rows(change: Change) -> Iterator[common.Row]:
    missed = {"coalesced": change.coalesced} if change.coalesced else {}
    for row in _metric_rows(change.metrics):
        yield row | missed


@click.command()
@matches_argument
@target_option
@click.option("--max-age", type=DURATION, help="Refuse what is older.")
@click.option("--stale", is_flag=True, help="Also what is no longer shown on /metrics.")
@click.option("--describe", is_flag=True, help="Names, types, units and help, without values.")
@server_options
@asynchronous
async def metrics(
    server: Server,
    *,
    matches: Sequence[str],
    targets: Sequence[str],
    max_age: float | None,
    stale: bool,
    describe: bool,
) -> None:
    """The latest of the metrics that any MATCH selects, or of all: a table on a terminal, else a JSON line for each
    series. MATCH is as in `watch`.
    """
    wanted = selected(matches, targets)
    async with adapter_of(server) as one:
        if describe:
            found = await one.describe(*wanted)
            rows = [{"name": m.name, "type": _type(m), "unit": m.unit, "help": m.help} for m in found]
            server.show(rows, ["name", "type", "unit", "help"])
            return
        found = await one.metrics(*wanted, max_age=max_age, include_stale=stale)
    known = {(m.name, tuple(sorted(s.labels.items()))): (m, s) for m in found for s in m.series}
    with Screen(server.output, live=False) as screen:
        screen.show(_metric_rows(found), lambda: metrics_table(known))


def selected(texts: Sequence[str], targets: Sequence[str]) -> list[api.Match]:
    """The matches of a command line; raises a usage error."""
    return [_match(text, targets) for text in texts] or ([match(targets=targets)] if targets else [])


def _match(text: str, targets: Sequence[str]) -> api.Match:
    found = _MATCH.fullmatch(text)
    pairs = [pair.partition("=") for pair in (found["labels"] or "").split(",") if pair] if found else []
    if not found or any(not equals for _, equals, _ in pairs):
        raise click.UsageError(f"{text!r} is no match such as NAME, NAME*, {{LABEL=VALUE}} or NAME{{LABEL=VALUE,...}}")
    labels = {name.strip(): value.strip().strip('"') for name, _, value in pairs}
    return match(found["name"], targets=targets, labels=labels)


def _metric_rows(found: Iterable[pb.Metric]) -> Iterator[common.Row]:
    for metric in found:
        for series in metric.series:
            head = {"name": metric.name, "type": _type(metric), "unit": metric.unit}
            yield head | {"labels": {}} | common.plain(series) | {"stale": series.stale}


def _type(metric: pb.Metric) -> str:
    return pb.MetricType.Name(metric.type).removeprefix("METRIC_TYPE_").lower()


def metrics_table(known: Mapping[Key, tuple[pb.Metric, pb.Series]], changed: Collection[Key] = ()) -> Table:
    """A line for each series, by name."""
    table = _table("METRIC", "TARGET", "LABELS", ">VALUE")
    for key in sorted(known):
        metric, series = known[key]
        labels = " ".join(f"{name}={value}" for name, value in sorted(series.labels.items()) if name not in OURS)
        style = "dim" if series.stale else "bold" if key in changed else ""
        table.add_row(metric.name, series.labels["target"], labels, _value(metric, series), style=style)
    return table


def _value(metric: pb.Metric, series: pb.Series) -> str:
    match series.WhichOneof("value"):
        case "histogram":
            return _times(series.histogram) if metric.unit == "seconds" else f"{series.histogram.count:,} observed"
        case "summary":
            return f"{series.summary.count:,} observed"
    if metric.unit == "ratio":
        return f"{series.number:.1%}"
    is_whole = math.isfinite(series.number) and series.number.is_integer()
    return f"{series.number:{',.0f' if is_whole else ',.6g'}} {metric.unit}".rstrip()


def _times(found: pb.Histogram) -> str:
    """Where half of them are, and most."""
    if not found.count:
        return "none"
    largest = max((bucket.upper_bound for bucket in found.buckets if math.isfinite(bucket.upper_bound)), default=0.0)
    bounds = ((word, quantile(found, share)) for word, share in (("p50", _HALF), ("p99", _MOST)))
    return "  ".join(
        f"{word} >{common.spent(largest)}" if bound is None else f"{word} ≤{common.spent(bound)}"
        for word, bound in bounds
    )


def quantile(found: pb.Histogram, share: float) -> float | None:
    """The upper bound of the bucket that has it; None where nothing was observed, or it has no bound."""
    for bucket in found.buckets:
        if found.count and bucket.cumulative_count >= share * found.count:
            return bucket.upper_bound if bucket.upper_bound != float("inf") else None
    return None


def _table(*columns: str) -> Table:
    from rich.table import Table  # noqa: PLC0415 - for terminals only

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table
