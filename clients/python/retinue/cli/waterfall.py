"""A past request on a terminal: its calls to leaves over time, and beneath them what they did."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retinue.cli.common import spent
from retinue.cli.recent import CODES, Node, end
from retinue.cli.scatter import seconds
from retinue.cli.shards import cost
from retinue.scattergather.v1 import coverage_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from retinue.scattergather.v1 import scattergather_service_pb2 as api

_STYLES = {"complete": "green", "partial": "yellow", "won": "green", "lost": "bright_black", "open": "cyan"}
_FAILED = "red"
_BARS = {pb.ATTEMPT_KIND_PRIMARY: "━", pb.ATTEMPT_KIND_HEDGE: "╍", pb.ATTEMPT_KIND_RETRY: "═"}
_MOST_BAR, _LEAST_BAR = 60, 12
_OTHERS = 62
"""Columns of the terminal that all but the bars take."""


class _Line(NamedTuple):
    """A line of the waterfall."""

    label: str
    address: str
    start: float
    """Seconds since the request at the top came."""
    took: float
    end: str
    size: int | None
    bar: str


def print_tree(tree: Node) -> None:
    """Prints it."""
    console = Console()
    _head(console, tree.scatter)
    lines = list(_lines(tree, 0.0, ""))
    whole = max([seconds(tree.scatter.stats.elapsed_duration), *(line.start + line.took for line in lines)])
    width = min(max(console.width - _OTHERS, _LEAST_BAR), _MOST_BAR)
    table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
    table.add_column("SHARD", no_wrap=True, overflow="ellipsis")
    table.add_column(_axis(whole, width), no_wrap=True, width=width)
    table.add_column("TIME", no_wrap=True, justify="right")
    table.add_column("END", no_wrap=True)
    table.add_column("BYTES", no_wrap=True, justify="right")
    table.add_column("ASKED", no_wrap=True, overflow="ellipsis", ratio=1)
    for line in lines:
        table.add_row(*_cells(line, whole, width))
    console.print(table)
    _foot(console, tree)


def _head(console: Console, scatter: api.RecentScatter) -> None:
    stats, coverage, how = scatter.stats, scatter.coverage, end(scatter)
    line = Text.assemble((scatter.pool_id, "bold"), f"  {scatter.scatter_id}  ", (how, _STYLES.get(how, _FAILED)))
    line.append(f"  {coverage.answered} of {coverage.expected} leaves  {spent(seconds(stats.elapsed_duration))}  ")
    line.append(f"{scatter.start_time.ToDatetime(tzinfo=UTC).astimezone():%Y-%m-%d %H:%M:%S}", style="bright_black")
    console.print(line)
    console.print(Text(f"{stats.shards} shards, {cost(stats)}", style="bright_black"))
    for label, known in (("trace", scatter.trace_id), ("parent", scatter.parent_scatter_id)):
        if known:
            console.print(Text(f"{label} {known}", style="bright_black"))


def _foot(console: Console, tree: Node) -> None:
    for node in _nodes(tree):
        if node.scatter.omitted_attempts:
            console.print(f"{node.scatter.scatter_id} made {node.scatter.omitted_attempts:,} more calls.")
    unknown = {address: why for node in _nodes(tree) for address, why in node.unknown.items()}
    if unknown:
        console.print(Text(f"Of {len(unknown)} addresses it is not known whether they are roots:", style="yellow"))
    for address, why in unknown.items():
        console.print(Text(f"  {address}: {why}", style="bright_black"), no_wrap=True, overflow="ellipsis")


def _nodes(tree: Node) -> Iterator[Node]:
    yield tree
    for below in tree.below.values():
        yield from _nodes(below)


def _lines(tree: Node, origin: float, indent: str) -> Iterator[_Line]:
    """The calls of each shard together, in the order of their first."""
    attempts = tree.scatter.attempts
    for places in _by_shard(attempts):
        for nth, place in enumerate(places):
            attempt = attempts[place]
            line = _line(attempt, origin, indent, first=not nth)
            yield line
            below = tree.below.get(place)
            if below is not None:
                # Clocks differ: what is beneath is put in the middle of the call.
                slack = max(line.took - seconds(below.scatter.stats.elapsed_duration), 0)
                yield from _lines(below, line.start + slack / 2, indent + "  ")


def _by_shard(attempts: Sequence[api.RecentAttempt]) -> list[list[int]]:
    places: dict[str, list[int]] = {}
    for place, attempt in enumerate(attempts):
        places.setdefault(attempt.shard_id, []).append(place)
    return list(places.values())


def _line(attempt: api.RecentAttempt, origin: float, indent: str, *, first: bool) -> _Line:
    kind = pb.AttemptKind.Name(attempt.kind).removeprefix("ATTEMPT_KIND_").lower()
    name = attempt.shard_id + (f" +{attempt.shards - 1}" if attempt.shards > 1 else "")
    if attempt.kind != pb.ATTEMPT_KIND_PRIMARY:
        name = f"{name} {kind}" if first else f"└ {kind}"
    return _Line(
        label=indent + name,
        address=attempt.address,
        start=origin + seconds(attempt.start_duration),
        took=seconds(attempt.elapsed_duration),
        end=_end(attempt),
        size=attempt.reply_bytes or None,
        bar=_BARS.get(attempt.kind, "━"),
    )


def _end(attempt: api.RecentAttempt) -> str:
    match attempt.outcome:
        case pb.ATTEMPT_OUTCOME_WON:
            return "won"
        case pb.ATTEMPT_OUTCOME_LOST:
            return "lost"
        case pb.ATTEMPT_OUTCOME_FAILED:
            return CODES.get(attempt.code, "failed")
    return "open"


def _axis(whole: float, width: int) -> str:
    last = spent(whole)
    return "0" + last.rjust(width - 1)


def _cells(line: _Line, whole: float, width: int) -> list[Text]:
    style = _STYLES.get(line.end, _FAILED)
    scale = width / whole if whole else 0.0
    at = min(int(line.start * scale), width - 1)
    long = min(max(round(line.took * scale), 1), width - at)
    return [
        Text(line.label),
        Text(" " * at + line.bar * long, style=style),
        Text(spent(line.took)),
        Text(line.end, style=style),
        Text("" if line.size is None else f"{line.size:,}"),
        Text(line.address, style="bright_black"),
    ]
