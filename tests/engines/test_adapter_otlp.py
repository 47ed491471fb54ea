"""Claims about OTLP: what a real SDK pushes is a target, and what is collected goes out by OTLP."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from collector import collecting
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as otlp
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import MetricsServiceStub
from opentelemetry.proto.metrics.v1 import metrics_pb2 as otlp_metrics
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from servers import RunningServer, start_server

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.adapter.v1 import target_pb2 as pb
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub
from retinue_server.adapter import otlp as ingestion
from retinue_server.adapter import wiring

_PATIENCE_S = 30.0
DELTA = AggregationTemporality.DELTA


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(tmp_path_factory.mktemp("a"), "adapter", env={"RETINUE_ADAPTER__MAX_TARGETS": "8"})
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as made:
        yield made


@pytest.fixture
def adapter(channel: grpc.Channel) -> Any:
    return AdapterServiceStub(channel)


@pytest.fixture
def push(channel: grpc.Channel) -> Callable[..., Any]:
    """Pushes metrics as no SDK would, and gives the answer."""
    stub = MetricsServiceStub(channel)  # type: ignore[no-untyped-call]

    def pushed(service: str, *metrics: otlp_metrics.Metric) -> Any:
        request = otlp.ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="service.name").value.string_value = service
        resource.scope_metrics.add().metrics.extend(metrics)
        return stub.Export(request)

    return pushed


@contextlib.contextmanager
def meter(
    server: RunningServer,
    service: str,
    *,
    delta: bool = False,
    views: tuple[View, ...] = (),
    attributes: Mapping[str, str] = {},
) -> Iterator[Any]:
    """A meter of the SDK, whose metrics are pushed by `flush` and at the end."""
    preferred = {Counter: DELTA, Histogram: DELTA} if delta else {}
    exporter = OTLPMetricExporter(endpoint=server.address, insecure=True, preferred_temporality=preferred)  # type: ignore[arg-type]
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
    resource = Resource.create({"service.name": service, **attributes})
    provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False, views=views)
    made = provider.get_meter("shop")
    made.flush = provider.force_flush  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        provider.shutdown()


def metrics_of(adapter: Any, target: str) -> dict[str, metric_pb.Metric]:
    matches = [api.Match(target_ids=[target])]
    return {one.name: one for one in adapter.GetMetrics(api.GetMetricsRequest(matches=matches)).metrics}


def until(read: Callable[[], Any]) -> Any:
    """What is read, as soon as it is something."""
    end = time.monotonic() + _PATIENCE_S
    while not (found := read()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def number(metrics: Mapping[str, metric_pb.Metric], name: str) -> float:
    return sum(series.number for series in metrics[name].series) if name in metrics else -1.0


def test_what_an_sdk_pushes_is_a_target_of_its_own(server: RunningServer, adapter: Any) -> None:
    attributes = {"service.instance.id": "i-1", "deployment.environment": "test"}
    with meter(server, "Shop Front", attributes=attributes) as shop:
        requests = shop.create_counter("orders", unit="{order}", description="Orders.")
        requests.add(3, {"kind": "new"})
        shop.create_up_down_counter("open.baskets").add(2)
        shop.create_gauge("queue.delay", unit="ms").set(1500)
        times = shop.create_histogram(
            "http.server.request.duration", unit="s", explicit_bucket_boundaries_advisory=[1, 5]
        )
        for seconds, status in ((0.5, 200), (3, 200), (9, 503)):
            times.record(seconds, {"http.response.status_code": status})
    found = until(lambda: metrics_of(adapter, "shop-front"))
    [orders] = found["orders"].series
    assert (found["orders"].type, orders.number, found["orders"].help) == (metric_pb.METRIC_TYPE_COUNTER, 3, "Orders.")
    assert dict(orders.labels) == {
        "kind": "otlp",
        "exported_kind": "new",
        "service": "Shop Front",
        "target": "shop-front",
        "instance": "shop-front",
        "service_instance_id": "i-1",
    }
    assert orders.HasField("start_time")
    assert found["open_baskets"].type == metric_pb.METRIC_TYPE_GAUGE
    assert number(found, "open_baskets") == 2
    assert number(found, "queue_delay_seconds") == 1.5
    failed = next(
        series.histogram
        for series in found["http_server_request_duration_seconds"].series
        if series.labels["http_response_status_code"] == "503"
    )
    assert [(one.upper_bound, one.cumulative_count) for one in failed.buckets] == [(1, 0), (5, 0), (float("inf"), 1)]
    assert (failed.sum, failed.count) == (9, 1)
    [info] = found["target"].series
    assert info.labels["deployment_environment"] == "test"
    [target] = [one for one in adapter.ListTargets(api.ListTargetsRequest()).targets if one.target_id == "shop-front"]
    assert (target.kind, target.status.state) == (pb.TARGET_KIND_OTLP, pb.TARGET_STATE_UP)
    [signals] = adapter.GetSignals(api.GetSignalsRequest(target_ids=["shop-front"])).signals
    assert [one.number for one in signals.signals[:2]] == [3, 1]
    assert signals.signals[2].histogram.count == 3
    assert signals.signals[3].absent_reason


def test_deltas_are_added_up(server: RunningServer, adapter: Any) -> None:
    with meter(server, "delta", delta=True) as app:
        jobs = app.create_counter("jobs")
        times = app.create_histogram("job.time", unit="ms", explicit_bucket_boundaries_advisory=[100, 1000])
        for _ in range(3):
            jobs.add(2)
            times.record(250)
            app.flush()
        jobs.add(4)
    found = until(lambda: number(metrics_of(adapter, "delta"), "jobs") == 10 and metrics_of(adapter, "delta"))
    [series] = found["job_time_seconds"].series
    assert series.histogram.count == 3
    assert [(one.upper_bound, one.cumulative_count) for one in series.histogram.buckets] == [
        (pytest.approx(0.1), 0),
        (1, 3),
        (float("inf"), 3),
    ]
    assert series.histogram.sum == pytest.approx(0.75)


def summed(value: float, *, at: int, start: int = 1, temporality: int = 1, name: str = "sent") -> otlp_metrics.Metric:
    metric = otlp_metrics.Metric(name=name)
    metric.sum.aggregation_temporality = temporality  # type: ignore[assignment]
    metric.sum.is_monotonic = True
    metric.sum.data_points.add(as_double=value, time_unix_nano=at * 10**9, start_time_unix_nano=start * 10**9)
    return metric


def test_a_delta_that_is_sent_twice_counts_once(push: Callable[..., Any], adapter: Any) -> None:
    assert not push("twice", summed(5, at=10)).partial_success.rejected_data_points
    again = push("twice", summed(5, at=10)).partial_success
    assert (again.rejected_data_points, again.error_message) == (1, "old_point: 1, such as sent")
    assert not push("twice", summed(1, at=20, start=10)).partial_success.rejected_data_points
    found = until(lambda: number(metrics_of(adapter, "twice"), "sent") == 6 and metrics_of(adapter, "twice"))
    [series] = found["sent"].series
    assert series.start_time.seconds == 1


def test_a_restart_is_told_by_the_start_time(push: Callable[..., Any], adapter: Any) -> None:
    push("restarted", summed(9, at=10, start=1, temporality=2))
    push("restarted", summed(2, at=30, start=20, temporality=2))
    found = until(lambda: number(metrics_of(adapter, "restarted"), "sent") == 2 and metrics_of(adapter, "restarted"))
    assert found["sent"].series[0].start_time.seconds == 20


def test_what_cannot_be_taken_is_named_and_the_rest_is_taken(push: Callable[..., Any], adapter: Any) -> None:
    exponential = otlp_metrics.Metric(name="spread")
    exponential.exponential_histogram.data_points.add(count=1)
    exponential.exponential_histogram.data_points.add(count=2)
    told = push(
        "partly",
        exponential,
        summed(1, at=5, temporality=0, name="odd"),
        otlp_metrics.Metric(name="none"),
        summed(1, at=5),
    ).partial_success
    assert told.rejected_data_points == 3
    assert told.error_message == "type_unsupported: 2, such as spread; no_temporality: 1, such as odd"
    found = until(lambda: metrics_of(adapter, "partly"))
    assert number(found, "sent") == 1
    target = adapter.GetTarget(api.GetTargetRequest(target_id="partly")).target
    assert {one.reason: one.points for one in target.status.rejections} == {
        "type_unsupported": 2,
        "no_temporality": 1,
    }


def test_exponential_histograms_of_an_sdk_are_refused_by_name(server: RunningServer, adapter: Any) -> None:
    view = View(instrument_name="spread", aggregation=ExponentialBucketHistogramAggregation())
    with meter(server, "exponential", views=(view,)) as app:
        app.create_histogram("spread").record(3)
        app.create_counter("beside").add(1)
    found = until(lambda: metrics_of(adapter, "exponential"))
    assert set(found) == {"beside", "target"}


def test_a_series_that_has_no_value_any_more_is_gone(push: Callable[..., Any], adapter: Any) -> None:
    gauge = otlp_metrics.Metric(name="level")
    point = gauge.gauge.data_points.add(as_int=7, time_unix_nano=10**9)
    push("gone", gauge)
    until(lambda: number(metrics_of(adapter, "gone"), "level") == 7)
    point.flags, point.time_unix_nano = 1, 2 * 10**9
    push("gone", gauge)
    until(lambda: "level" not in metrics_of(adapter, "gone"))


def test_a_name_that_somebody_else_has_is_not_taken_away(server: RunningServer, push: Callable[..., Any]) -> None:
    with grpc.insecure_channel(server.control) as control:
        operator: Any = AdapterServiceStub(control)
        for target in operator.ListTargets(api.ListTargetsRequest()).targets:
            operator.DeleteTarget(api.DeleteTargetRequest(target_id=target.target_id))
        mine = pb.Target(target_id="checkout", kind=pb.TARGET_KIND_REPORT)
        operator.CreateTarget(api.CreateTargetRequest(target=mine))
        push("checkout", summed(1, at=1))
        push("Checkout", summed(2, at=1))
        push("42 & more", summed(2, at=1))
        names = {
            one.target_id: one.service or one.target_id
            for one in operator.ListTargets(api.ListTargetsRequest()).targets
        }
        assert len(names) == 4
        assert names["checkout"] == "checkout"
        assert names["otlp-42-more"] == "42 & more"
        assert sorted(names.values()) == ["42 & more", "Checkout", "checkout", "checkout"]
        for number_ in range(4):
            assert not push(f"service-{number_}", summed(1, at=1)).partial_success.rejected_data_points
        full = push("one-too-many", summed(1, at=1), summed(2, at=2)).partial_success
        assert full.rejected_data_points == 2
        assert "there are 8 already" in full.error_message


def test_what_is_collected_goes_out_by_otlp_as_it_is(tmp_path: Path) -> None:
    report = api.ReportMetricsRequest(target_id="app")
    sold = report.metrics.add(name="sold", type=metric_pb.METRIC_TYPE_COUNTER, help="Sold.")
    sold.series.add(number=5, labels={"shop": "a"})
    times = report.metrics.add(name="request_duration", type=metric_pb.METRIC_TYPE_HISTOGRAM, unit="ms")
    buckets = [metric_pb.Bucket(upper_bound=b, cumulative_count=n) for b, n in ((100, 1), (float("inf"), 3))]
    times.series.add(histogram=metric_pb.Histogram(buckets=buckets, sum=4000, count=3))
    held = report.metrics.add(name="held", type=metric_pb.METRIC_TYPE_GAUGE, unit="KiBy")
    held.series.add(number=2)
    shares = report.metrics.add(name="wait", type=metric_pb.METRIC_TYPE_SUMMARY)
    shares.series.add(summary=metric_pb.Summary(quantiles=[metric_pb.Quantile(quantile=0.5, value=7)], sum=9, count=2))
    with collecting() as (collector, endpoint):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "300"}
        server = start_server(tmp_path, "adapter", env=env)
        try:
            with grpc.insecure_channel(server.control) as channel:
                adapter: Any = AdapterServiceStub(channel)
                target = pb.Target(target_id="app", kind=pb.TARGET_KIND_REPORT, service="shop")
                adapter.CreateTarget(api.CreateTargetRequest(target=target))
                adapter.ReportMetrics(report)
                found = until(lambda: metrics_of(adapter, "app"))
                sent = until(lambda: collector.metrics.found.get("shop"))
        finally:
            assert server.stop() == 0
    resource = collector.metrics.resources["shop"]
    assert {key: resource[key] for key in ("service.instance.id", "retinue.target", "retinue.kind")} == {
        "service.instance.id": "app",
        "retinue.target": "app",
        "retinue.kind": "report",
    }
    total = sent["sold_total"]
    [point] = total.sum.data_points
    assert (point.as_double, [(pair.key, pair.value.string_value) for pair in point.attributes]) == (5, [("shop", "a")])
    assert (total.sum.is_monotonic, total.sum.aggregation_temporality, total.description) == (True, 2, "Sold.")
    start = found["sold"].series[0].start_time
    assert point.start_time_unix_nano == start.ToNanoseconds() <= point.time_unix_nano
    [spread] = sent["request_duration_seconds"].histogram.data_points
    assert (list(spread.explicit_bounds), list(spread.bucket_counts)) == ([pytest.approx(0.1)], [1, 2])
    assert (spread.sum, spread.count, sent["request_duration_seconds"].unit) == (4, 3, "s")
    assert (sent["held_bytes"].gauge.data_points[0].as_double, sent["held_bytes"].unit) == (2048, "By")
    assert sent["wait"].gauge.data_points[0].as_double == 7
    assert sent["wait_sum"].sum.data_points[0].as_double == 9
    assert sent["app_request_duration_seconds"].histogram.data_points[0].count == 3
    assert "retinue_adapter_collections_total" in collector.metrics.found["retinue-server"]


def test_without_its_package_the_service_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.collector.metrics.v1", None)
    assert ingestion.services(cast("Any", None)) == []
    assert "pip install 'retinue-server[telemetry]'" in wiring._of_otlp()
