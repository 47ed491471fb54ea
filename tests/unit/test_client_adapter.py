"""What the adapter's client does by itself: reports in parts, watches that begin anew."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import adapter_service_pb2_grpc as rpc
from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.adapter.v1 import target_pb2 as pb
from retinue.client import Adapter, InvalidArgument
from retinue.client.adapter import batches, counter, declaration, gauge, match, target

MIB = 1 << 20


def metric(count: int, size: int = 0, name: str = "rows") -> metric_pb.Metric:
    series = [metric_pb.Series(labels={"row": str(n), "pad": "x" * size}, number=n) for n in range(count)]
    return metric_pb.Metric(name=name, type=metric_pb.METRIC_TYPE_GAUGE, unit="ms", help="Rows.", series=series)


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [metric(1)],
        [metric(1000)],
        [metric(1001)],
        [metric(5000)],
        [metric(600, name="a"), metric(600, name="b")],
        [gauge("a", n, row=str(n)) for n in range(2500)],
        [metric(500, 10_000)],
        [metric(2, 2 * MIB)],
        [metric(0)],
    ],
    ids=lambda metrics: f"{len(metrics)} of {sum(len(one.series) for one in metrics)}",
)
def test_reports_are_not_too_large_and_lose_nothing(metrics: list[metric_pb.Metric]) -> None:
    found = list(batches(metrics))
    for batch in found:
        assert sum(len(one.series) for one in batch) <= 1000
        assert api.ReportMetricsRequest(metrics=batch).ByteSize() < 3.5 * MIB
    told = [(one.name, one.unit, one.type, series) for batch in found for one in batch for series in one.series]
    assert told == [(one.name, one.unit, one.type, series) for one in metrics for series in one.series]


def test_small_reports_go_together() -> None:
    assert len(list(batches([gauge("a", n, row=str(n)) for n in range(1000)]))) == 1


def test_points_and_declarations_are_what_is_said() -> None:
    [series] = counter("orders", 3, unit="By", kind="guest").series
    assert series == metric_pb.Series(number=3, labels={"kind": "guest"})
    assert counter("orders", 3).type == metric_pb.METRIC_TYPE_COUNTER
    assert gauge("carts", 3).type == metric_pb.METRIC_TYPE_GAUGE
    wanted = target("a", "REDIS", "127.0.0.1:1", interval=1.5, timeout=timedelta(seconds=1), service="shop")
    assert (wanted.kind, wanted.service) == (pb.TARGET_KIND_REDIS, "shop")
    assert wanted.interval_duration.ToMilliseconds() == 1500
    known = pb.Target(etag="1", status=pb.TargetStatus(series=3))
    known.MergeFrom(wanted)
    assert declaration(known) == wanted
    assert not target("a", "REPORT").HasField("interval_duration")
    assert match("a*", labels={"x": "1"}) == api.Match(name="a*", labels={"x": "1"})


class Script(rpc.AdapterServiceServicer):
    """A server whose streams say what stands in a script and break; the last is refused."""

    def __init__(self, *streams: list[api.WatchMetricsResponse]) -> None:
        self.left = list(streams)

    async def WatchMetrics(self, request: api.WatchMetricsRequest, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - the contract's name
        if not self.left:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no more")
        for response in self.left.pop(0):
            yield response
        if self.left:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    @asynccontextmanager
    async def serve(self, where: Path) -> AsyncIterator[str]:
        server = grpc.aio.server()
        rpc.add_AdapterServiceServicer_to_server(self, server)
        address = f"unix:{where}/adapter.sock"
        server.add_insecure_port(address)
        await server.start()
        try:
            yield address
        finally:
            await server.stop(0)


async def test_a_watch_begins_anew_after_a_break_and_after_an_end_and_says_so(tmp_path: Path) -> None:
    synced, change = api.WatchMetricsResponse(synced=True), api.WatchMetricsResponse(coalesced=2)
    part = api.WatchMetricsResponse()
    script = Script([part, synced, change], [synced], [synced])  # type: ignore[abstract] # its other RPCs stay UNIMPLEMENTED
    async with script.serve(tmp_path) as address, Adapter(address) as app, aclosing(app.watch()) as changes:
        told = [await anext(changes) for _ in range(5)]
        with pytest.raises(InvalidArgument):
            await anext(changes)
    shown = [(one.begins, one.synced, one.coalesced) for one in told]
    assert shown == [(True, False, 0), (False, True, 0), (False, False, 2), (True, True, 0), (True, True, 0)]
