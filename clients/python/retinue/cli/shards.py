"""The table of shards on a terminal, while they answer, and the answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import rich.live
from rich.console import Console, Group
from rich.json import JSON
from rich.table import Table
from rich.text import Text

from retinue.cli.common import spent
from retinue.client.pool import Answer, ScatterFailed, ShardFailure, ShardReply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retinue.client.pool import Event
    from retinue.scattergather.v1 import scattergather_service_pb2 as api

_ROOM = 8
"""Lines of the terminal that the rows leave free."""
_RANKS = {"failed": 0, "in part": 1, "asked": 2, "left": 3, "answered": 4}
_STYLES = {"failed": "red", "in part": "yellow", "asked": "cyan", "left": "bright_black", "answered": "green"}


class _Row:
    """What is known of a shard."""

    def __init__(self, shard_id: str, place: int) -> None:
        self.shard_id, self.place = shard_id, place
        self.state = "asked"
        self.elapsed: float | None = None
        self.attempts = 1
        self.note = ""

    def rank(self) -> tuple[int, float, int]:
        """What is to be seen first, if not all can be."""
        return _RANKS[self.state], -(self.elapsed or 0), self.place


class Shards:
    """Shows what becomes of each shard, until the answer is there; a context."""

    def __init__(self, pool_id: str, plan: api.ExplainScatterResponse) -> None:
        self._pool_id, self._began = pool_id, time.monotonic()
        self._rows = {shard.shard_id: _Row(shard.shard_id, place) for place, shard in enumerate(plan.shards)}
        self._over = False
        self._console = Console()
        self._live = rich.live.Live(get_renderable=self._shown, console=self._console, refresh_per_second=12)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, _: object, error: object, __: object) -> None:
        if isinstance(error, ScatterFailed):
            self._end(error.failures)
        self._over = True
        self._live.stop()

    def show(self, event: Event) -> None:
        """What happened."""
        if isinstance(event, ShardReply):
            self._replied(event)
        elif isinstance(event, ShardFailure):
            self._failed(event)
        else:
            self._end(event.failures)

    def _replied(self, reply: ShardReply) -> None:
        row = self._rows[reply.shard_id]
        row.state, row.elapsed, row.attempts = "answered", reply.elapsed, reply.attempts
        row.note = reply.address
        if not reply.coverage.complete:
            row.state, row.note = "in part", f"{reply.address}, {reply.coverage}"

    def _failed(self, failure: ShardFailure) -> None:
        row = self._rows[failure.shard_id]
        row.state, row.elapsed, row.attempts = "failed", time.monotonic() - self._began, failure.attempts
        row.note = f"{failure.code.name} {failure.message}"

    def _end(self, failures: Sequence[ShardFailure]) -> None:
        """Of those that neither replied nor failed nobody waits any more."""
        for failure in failures:
            row = self._rows[failure.shard_id]
            if row.state == "asked" and failure.code.name not in ("OK", "CANCELLED"):
                self._failed(failure)
        for row in self._rows.values():
            if row.state == "asked":
                row.state, row.elapsed = "left", time.monotonic() - self._began

    def _shown(self) -> Group:
        room = max(self._console.height - _ROOM, 3)
        rows = list(self._rows.values())
        chosen = rows if len(rows) <= room else sorted(sorted(rows, key=_Row.rank)[:room], key=lambda row: row.place)
        parts: list[Any] = [self._head(), self._table(chosen)]
        if len(chosen) < len(rows):
            parts.append(Text(f"... and {len(rows) - len(chosen):,} more", style="bright_black"))
        return Group(*parts)

    def _head(self) -> Text:
        answered = sum(row.state in ("answered", "in part") for row in self._rows.values())
        failed = sum(row.state == "failed" for row in self._rows.values())
        line = Text.assemble((self._pool_id, "bold"), f"  {answered:,} of {len(self._rows):,} shards answered")
        if failed:
            line.append(f"  {failed:,} failed", style="red")
        if not self._over:
            line.append(f"  {time.monotonic() - self._began:.1f}s", style="bright_black")
        return line

    def _table(self, rows: Sequence[_Row]) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
        for column in ("SHARD", "STATE", "TIME", "CALLS"):
            table.add_column(column, justify="left" if column in ("SHARD", "STATE") else "right", no_wrap=True)
        table.add_column("BY", overflow="ellipsis", no_wrap=True, ratio=1)
        for row in rows:
            took = "" if row.elapsed is None else spent(row.elapsed)
            state = Text(row.state, style=_STYLES[row.state])
            table.add_row(row.shard_id, state, took, str(row.attempts), row.note)
        return table


def cost(stats: api.ScatterStats) -> str:
    """What a request cost, in words."""
    words = [f"{stats.attempts:,} calls"]
    if stats.hedges:
        words.append(f"hedges {stats.hedges:,}, of which {stats.hedges_won:,} won")
    if stats.retries:
        words.append(f"retries {stats.retries:,}")
    return ", ".join([*words, f"{stats.gathered_bytes:,} bytes"])


def print_answer(answer: Answer) -> None:
    """How good it is, what it cost, and what it says."""
    console, stats, coverage = Console(), answer.message.stats, answer.coverage
    state = Text("complete", style="green") if answer.complete else Text("partial", style="yellow")
    words = f", {coverage} in {spent(answer.elapsed)}: {cost(stats)}  "
    console.print(state + words + Text(answer.scatter_id, style="bright_black"))
    if answer.message.WhichOneof("output") == "collected":
        for reply in answer.replies:
            console.print(Text(f"{reply.shard_id}:", style="bold"), _printed(reply.payload))
    else:
        console.print(_printed(answer.payload))


def _printed(content: bytes) -> JSON | Text:
    try:
        return JSON(content.decode(), indent=2 if len(content) > 80 else None)  # noqa: PLR2004 - columns
    except UnicodeDecodeError:
        return Text(f"{len(content):,} bytes; see them with --raw", style="bright_black")
    except ValueError:
        return Text(content.decode())
