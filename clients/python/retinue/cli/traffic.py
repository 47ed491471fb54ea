"""The counts of upstreams: a live table on a terminal, else lines of JSON."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Self

from retinue.cli import common

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from retinue.ambassador.v1 import stats_pb2 as pb

_COUNTS = ("requests", "errors", "retries", "retries_denied", "timeouts", "overflows", "rate_limited", "ejections")
_BYTES_AND_MOMENT = ("received_bytes", "sent_bytes", "active_connections", "active_requests")
_HALF, _MOST = 0.5, 0.99
_Mark = tuple[float, int]


class Traffic:
    """Shows snapshots; a context."""

    def __init__(self, *, live: bool) -> None:
        self._is_live = live
        self._stack = contextlib.ExitStack()
        self._marks: dict[str, _Mark] = {}

    def __enter__(self) -> Self:
        if self._is_live:
            from rich.live import Live  # noqa: PLC0415 - for terminals only

            self._live = self._stack.enter_context(Live(auto_refresh=False))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, snapshot: Sequence[pb.UpstreamStats]) -> None:
        """What is known now."""
        if self._is_live:
            self._live.update(self._table(snapshot), refresh=True)
            return
        for stats in snapshot:
            common.emit(row(stats))

    def _table(self, snapshot: Sequence[pb.UpstreamStats]) -> Table:
        from rich.table import Table  # noqa: PLC0415 - for terminals only

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("UPSTREAM", no_wrap=True)
        for column in ("PER SECOND", "REQUESTS", "ERRORS", "RETRIES", "REFUSED", "OPEN", "P50", "P99"):
            table.add_column(column, justify="right", no_wrap=True)
        for cells, style in self._rows(snapshot):
            table.add_row(*cells, style=style)
        return table

    def _rows(self, snapshot: Sequence[pb.UpstreamStats]) -> Iterator[tuple[list[str], str]]:
        for stats in snapshot:
            refused = stats.overflows + stats.rate_limited
            counts = (stats.requests, stats.errors, stats.retries, refused, stats.active_connections)
            times = [_time(quantile(stats.latency, share)) for share in (_HALF, _MOST)]
            rate = self._rate(stats.upstream_id, stats.requests)
            yield [stats.upstream_id, rate, *(f"{count:,}" for count in counts), *times], "bold"
            for one in stats.endpoints:
                rate = self._rate(f"{stats.upstream_id} {one.address}", one.requests)
                words = ["", "", f"{one.active_connections:,}", "", "" if one.healthy else "kept off"]
                numbers = [f"{one.requests:,}", f"{one.errors:,}"]
                yield [f"  {one.address}", rate, *numbers, *words], "" if one.healthy else "red"

    def _rate(self, name: str, count: int) -> str:
        """Since the snapshot before; counts that began anew have none."""
        now = time.monotonic()
        began, before = self._marks.get(name, (now, count))
        self._marks[name] = (now, count)
        return f"{(count - before) / (now - began):,.1f}" if now > began and count >= before else ""


def row(stats: pb.UpstreamStats) -> common.Row:
    """As JSON has it: all counts, each endpoint's share, and the latency in seconds."""
    found: common.Row = {"upstream_id": stats.upstream_id, "start_time": stats.start_time.ToJsonString()}
    found |= {name: getattr(stats, name) for name in (*_COUNTS, *_BYTES_AND_MOMENT)}
    if stats.HasField("latency"):
        found["p50_seconds"], found["p99_seconds"] = (quantile(stats.latency, share) for share in (_HALF, _MOST))
    names = ("address", "requests", "errors", "active_connections", "healthy")
    found["endpoints"] = [{name: getattr(one, name) for name in names} for one in stats.endpoints]
    return found


def quantile(latency: pb.LatencyHistogram, share: float) -> float | None:
    """The upper bound, in seconds, of the bucket that has it; None where nothing was counted, or it has no bound."""
    wanted, seen = share * sum(latency.counts), 0
    for bound, count in zip(latency.bounds_seconds, latency.counts, strict=False):
        seen += count
        if seen and seen >= wanted:
            return bound
    return None


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"≤{common.spent(seconds)}"
