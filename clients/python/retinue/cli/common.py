"""What the commands share: options, values as people write them, and answers as tables or JSON lines."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from retinue.client import address as addresses
from retinue.client.channel import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from google.protobuf.message import Message

    from retinue.client.queue import Queue

Row = dict[str, Any]

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_INTEGERS = frozenset(
    {"lease_epoch", "size_bytes", "max_tasks", "max_payload_bytes", "max_blob_bytes"}
    | {"expected", "answered", "topology_version", "gathered_bytes", "reply_bytes"}
    | {"generation", "active_generation", "active_connections"}
    | {"count", "cumulative_count", "points", "received", "dropped", "max_bytes"}
)


class DurationType(click.ParamType[float]):
    """Seconds, or `1h30m`, `250ms`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float | int):
            return float(value)
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value)
        if not re.fullmatch(f"(?:{_PART.pattern})+", value):
            self.fail(f"{value!r} is not a duration such as 90, 1.5s, 1h30m or 250ms", param, ctx)
        return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value))


class InstantType(click.ParamType[datetime]):
    """An ISO 8601 time; without a zone it is local."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a time such as 2027-01-31T09:00 or 2027-01-31T09:00:00Z", param, ctx)
        return found.astimezone(UTC)


class PairType(click.ParamType[tuple[str, str]]):
    """A label, `key=value`."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, text = value.partition("=")
        if not key or not separator:
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        return key, text


class HeaderType(click.ParamType[tuple[str, str]]):
    """Metadata, `NAME:VALUE`."""

    name = "NAME:VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, separator, text = value.partition(":")
        if not separator:
            self.fail(f"{value!r} is not of the form NAME:VALUE", param, ctx)
        return key.strip().lower(), text.strip()


DURATION, INSTANT, PAIR, HEADER = DurationType(), InstantType(), PairType(), HeaderType()


@dataclass(frozen=True)
class Server:
    """Which server a command talks to, how long a call may take in seconds, and how its answer is shown."""

    address: str | None
    timeout: float
    output: str | None

    def queue(self, queue_id: str = "") -> Queue:
        from retinue.client.queue import Queue  # noqa: PLC0415 - other patterns need none of it

        return Queue(queue_id, address=self.address, timeout=self.timeout, patient=False)

    def for_apps(self, pattern: str = "workqueue") -> Connection:
        return Connection(self.address, pattern=pattern, patient=False)

    def for_operators(self) -> Connection:
        """To the address given, the control socket, or else the apps' address, which will say what is missing."""
        return Connection(self.address or addresses.control_address(), patient=False)

    def show(self, rows: Iterable[Row], columns: Sequence[str]) -> None:
        show(rows, self.output, columns)


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--address, --timeout and --output, as a Server in front of the command's own options."""

    @functools.wraps(function)
    def run(*, address: str | None, timeout: float, output: str | None, **own: Any) -> Any:
        return function(Server(address, timeout, output), **own)

    for option in (
        click.option(
            "--output", type=click.Choice(["table", "json"]), help="Default: a table on a terminal, else JSON lines."
        ),
        click.option("--timeout", type=DURATION, default="10s", show_default=True, help="How long a call may take."),
        click.option("--address", metavar="ADDRESS", help="The server: HOST:PORT, unix:PATH or a socket's path."),
    ):
        run = option(run)
    return run


def asynchronous(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Lets a coroutine be a command."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return asyncio.run(function(*args, **kwargs))

    return run


def as_json(output: str | None) -> bool:
    return output == "json" or (output is None and not sys.stdout.isatty())


def emit(row: Row) -> None:
    """One JSON line."""
    click.echo(json.dumps(row, ensure_ascii=False, default=str))


def show(rows: Iterable[Row], output: str | None, columns: Sequence[str]) -> None:
    """Rows as JSON lines, or these columns of them as a table."""
    if as_json(output):
        for row in rows:
            emit(row)
    else:
        _table(list(rows), columns)


def _table(rows: list[Row], columns: Sequence[str]) -> None:
    from rich.console import Console  # noqa: PLC0415 - costs 50 ms, for terminals only
    from rich.table import Table  # noqa: PLC0415 - the same

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column.upper().replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    Console().print(table if rows else "[dim]none[/dim]")


_COLOURS = {
    "succeeded": "green",
    "active": "green",
    "serving": "green",
    "dead": "red",
    "not_serving": "red",
    "retrying": "yellow",
    "paused": "yellow",
    "draining": "yellow",
    "leased": "cyan",
    "leads": "green",
    "steps_down": "yellow",
    "connected": "green",
    "complete": "green",
    "answered": "green",
    "partial": "yellow",
    "nobody": "red",
    "failed": "red",
    "rejected": "red",
    "pending": "yellow",
    "healthy": "green",
    "unhealthy": "red",
    "up": "green",
    "degraded": "yellow",
    "limited": "yellow",
    "stale": "yellow",
    "down": "red",
    "misconfigured": "red",
}


def _cell(value: Any) -> Any:
    from rich.text import Text  # noqa: PLC0415 - for terminals only

    if isinstance(value, dict):
        value = " ".join(f"{key}={text}" for key, text in value.items())
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return Text(text, style=_COLOURS.get(text, ""))


def plain(message: Message) -> Row:
    """A message as a row, fields named as in the contract, 64-bit numbers as numbers."""
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - not needed to enqueue

    return _with_integers(MessageToDict(message, preserving_proto_field_name=True))


def _with_integers(row: Row) -> Row:
    for key, value in row.items():
        if isinstance(value, dict):
            _with_integers(value)
        elif isinstance(value, list):
            _ = [_with_integers(item) for item in value if isinstance(item, dict)]
        elif key in _INTEGERS and isinstance(value, str):
            row[key] = int(value)
    return row


def since(moment: datetime) -> str:
    """How long ago, roughly."""
    seconds = max((datetime.now(UTC) - moment).total_seconds(), 0)
    return duration_text(seconds)


def spent(seconds: float) -> str:
    """A short time, to three digits: 850µs, 12.3ms, 1.25s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            number = seconds / size
            return f"{number:.{max(2 - int(math.log10(number)), 0)}f}{unit}"
    return f"{seconds * 1e6:.0f}µs"


def duration_text(seconds: float) -> str:
    """Seconds as people say them: 850ms, 12s, 3m20s, 2h5m, 3d4h."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            rest = int(seconds % size // part)
            return f"{int(seconds // size)}{unit}" + (f"{rest}{smaller}" if rest else "")
    return f"{seconds:.0f}s"
