"""The live line of `retinue work` on a terminal; failures scroll by above it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import rich.live
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from retinue.cli.work import Tally
    from retinue.client.worker import WorkerEvent

_COLOURS = {
    "retrying": "yellow",
    "dead": "red",
    "lost": "magenta",
    "cancelled": "bright_black",
    "disconnected": "yellow",
}
_WINDOW = 5.0


class Live:
    """One line: done, failed, rate, running."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._marks: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self._console = Console()
        self._live = rich.live.Live(get_renderable=self._line, console=self._console, refresh_per_second=8)
        self._live.start()

    def close(self) -> None:
        self._live.stop()

    def show(self, event: WorkerEvent) -> None:
        if event.kind not in _COLOURS:
            return
        where = f"{event.job.task_id} attempt {event.job.attempt}" if event.job else ""
        last = event.message.strip().splitlines()[-1:] or [""]
        words = (event.kind, where, event.reason, last[0])
        self._console.print(Text("  ".join(word for word in words if word), style=_COLOURS[event.kind]))

    def _line(self) -> Text:
        tally, counts = self._tally, self._tally.counts
        line = Text.assemble(
            (tally.queue_id, "bold"),
            "  ",
            (f"{counts['succeeded']:,} done", "green"),
            f"  {counts['retrying']:,} retried  ",
            (f"{counts['dead']:,} dead", "red" if counts["dead"] else ""),
            f"  {tally.running} running  {self._rate():,.1f}/s  {tally.seconds:,.0f}s",
        )
        if not tally.connected:
            line.append("  waiting for the server ...", style="yellow")
        return line

    def _rate(self) -> float:
        now, done = time.monotonic(), self._tally.counts["succeeded"]
        self._marks = [mark for mark in self._marks if mark[0] > now - _WINDOW] or self._marks[-1:]
        self._marks.append((now, done))
        began, before = self._marks[0]
        return (done - before) / max(now - began, 0.1)
