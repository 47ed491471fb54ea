"""Claims about targets that tell: what they say is there soon, with its signals, and what is refused is told."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from servers import start_server
from support.postgres import free_port

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.adapter.v1 import target_pb2 as pb
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub
from retinue_server.adapter.core.collection import Limits
from retinue_server.adapter.core.points import Histogram, Raw, RawFamily, Type
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.engines.reports import Reports

_PATIENCE_S = 30.0
MAPPING = """
mappings:
- {match: "shop.*.served", name: "shop_served_total", labels: {shop: "$1"}}
- {match: "shop.*.wait", name: "shop_wait", timer_type: histogram, buckets: [0.1, 0.5], labels: {shop: "$1"}}
"""
"""A mapping file of statsd_exporter."""


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    where = tmp_path_factory.mktemp("a")
    (where / "packs").mkdir()
    (where / "packs" / "existing.yaml").write_text(MAPPING)
    running = start_server(where, "adapter", env={"RETINUE_ADAPTER__RULE_PACKS": str(where / "packs")})
    with grpc.insecure_channel(running.control) as channel:
        yield AdapterServiceStub(channel)
    assert running.stop() == 0


def until(read: Callable[[], Any]) -> Any:
    """What is read, as soon as it is something."""
    end = time.monotonic() + _PATIENCE_S
    while not (found := read()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def signals(operator: Any, target: str) -> list[metric_pb.Signal]:
    return list(operator.GetSignals(api.GetSignalsRequest(target_ids=[target])).signals[0].signals)


def test_statsd_has_its_signals_and_its_faults_are_told(operator: Any) -> None:
    wanted = pb.Target(target_id="sends", kind=pb.TARGET_KIND_STATSD, endpoint="udp:127.0.0.1:0")
    wanted.interval_duration.FromSeconds(1)
    target = operator.CreateTarget(api.CreateTargetRequest(target=wanted)).target
    host, _, port = target.status.address.removeprefix("udp:").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, int(port)))
        for _ in range(5):
            sock.send(b"requests:2|c|#route:a\nrequests:1|c|#route:b\nerrors:1|c\nrequest_duration:250|ms\nnonsense")
    requests, errors, duration, saturation = until(lambda: _with(signals(operator, "sends"), 15))
    assert (requests.number, errors.number) == (15, 5)
    assert (duration.histogram.count, duration.histogram.sum) == (5, 1.25)
    assert "a rule pack names the gauges" in saturation.absent_reason
    status = operator.GetTarget(api.GetTargetRequest(target_id="sends")).target.status
    assert (status.datagrams.received, status.datagrams.dropped) == (5, 0)
    assert [(one.reason, one.points, one.example) for one in status.rejections] == [("bad_line", 5, "nonsense")]


def test_an_existing_mapping_file_is_a_rule_pack_of_a_target(operator: Any) -> None:
    wanted = pb.Target(target_id="mapped", kind=pb.TARGET_KIND_STATSD, endpoint="udp:127.0.0.1:0", rule_pack="existing")
    wanted.interval_duration.FromSeconds(1)
    target = operator.CreateTarget(api.CreateTargetRequest(target=wanted)).target
    host, _, port = target.status.address.removeprefix("udp:").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, int(port)))
        sock.send(b"shop.a.served:2|c\nshop.a.wait:250|ms")
    match = api.Match(target_ids=["mapped"])
    found = until(lambda: operator.GetMetrics(api.GetMetricsRequest(matches=[match])).metrics)
    served, wait = found
    assert (served.name, served.series[0].number, served.series[0].labels["shop"]) == ("shop_served", 2, "a")
    assert (wait.name, wait.unit) == ("shop_wait_seconds", "seconds")
    buckets = wait.series[0].histogram.buckets
    assert [(one.upper_bound, one.cumulative_count) for one in buckets] == [(0.1, 0), (0.5, 1), (float("inf"), 1)]


def test_a_change_that_cannot_be_made_leaves_the_target_as_it_was(operator: Any) -> None:
    endpoints = {}
    for name in ("first", "second"):
        wanted = pb.Target(target_id=name, kind=pb.TARGET_KIND_STATSD, endpoint=f"udp:127.0.0.1:{free_port()}")
        endpoints[name] = operator.CreateTarget(api.CreateTargetRequest(target=wanted)).target.endpoint
    changed = pb.Target(target_id="second", kind=pb.TARGET_KIND_STATSD, endpoint=endpoints["first"])
    with pytest.raises(grpc.RpcError) as error:
        operator.UpdateTarget(api.UpdateTargetRequest(target=changed))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    host, _, port = endpoints["second"].removeprefix("udp:").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, int(port)))
        sock.send(b"a:1|c")
    asked = api.GetTargetRequest(target_id="second")
    until(lambda: operator.GetTarget(asked).target.status.datagrams.received == 1)
    assert operator.GetTarget(asked).target.endpoint == endpoints["second"]


def _with(found: list[metric_pb.Signal], requests: float) -> list[metric_pb.Signal]:
    return found if found[0].number == requests else []


def test_reports_have_their_signals_before_the_interval_is_over(operator: Any) -> None:
    wanted = pb.Target(target_id="reports", kind=pb.TARGET_KIND_REPORT)
    wanted.interval_duration.FromSeconds(3600)
    operator.CreateTarget(api.CreateTargetRequest(target=wanted))
    report = api.ReportMetricsRequest(target_id="reports")
    for name, kind, value in (
        ("requests", metric_pb.METRIC_TYPE_COUNTER, 12),
        ("saturation_used", metric_pb.METRIC_TYPE_GAUGE, 3),
        ("saturation_limit", metric_pb.METRIC_TYPE_GAUGE, 4),
    ):
        report.metrics.add(name=name, type=kind).series.add(number=value)
    assert operator.ReportMetrics(report).accepted_points == 3
    requests, errors, duration, saturation = until(lambda: _with(signals(operator, "reports"), 12))
    assert (requests.number, saturation.number) == (12, 0.75)
    assert (errors.absent_reason, duration.absent_reason) == (
        "the app reports no counter errors",
        "the app reports no histogram request_duration_seconds",
    )


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def family(name: str, *values: float) -> RawFamily:
    return RawFamily(name, Type.GAUGE, [Raw({"n": str(place)}, value) for place, value in enumerate(values)])


def test_the_latest_of_a_series_counts_and_old_ones_go() -> None:
    clock = Clock()
    reports = Reports(Spec("it", Kind.REPORT, interval_s=10.0), clock)
    reports.put([family("a", 1, 2)])
    clock.now = 40
    reports.put([family("a", 7)])
    assert [point.value for point in reports.drain()[0].points] == [7, 2]
    clock.now = 60
    assert [point.value for point in reports.drain()[0].points] == [7]
    clock.now = 100
    assert reports.drain() == []


def test_series_beyond_the_limit_are_counted_and_make_room_when_they_go() -> None:
    clock = Clock()
    reports = Reports(Spec("it", Kind.REPORT, limits=Limits(max_series=2)), clock)
    assert reports.put([family("a", 1, 2, 3)]) == 1
    assert reports.put([family("a", 4, 5), family("b", 6)]) == 1
    clock.now = 1000
    assert reports.drain() == []
    assert reports.put([family("b", 6)]) == 0


def test_another_type_by_the_same_name_is_another_family() -> None:
    reports = Reports(Spec("it", Kind.REPORT))
    reports.put([family("a", 1)])
    reports.put([RawFamily("a", Type.HISTOGRAM, [Raw({}, Histogram(((float("inf"), 1),), 1, 1))])])
    assert [one.type for one in reports.drain()] == [Type.GAUGE, Type.HISTOGRAM]
