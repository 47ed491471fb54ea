"""AdapterService as its contract says, to callers that know nothing else."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from contract.client import Client, Refused
from contract.line import seconds
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sources import Source
from workers import eventually

from retinue.adapter.v1 import metric_pb2, target_pb2

pytestmark = pytest.mark.engines("sqlite")

Create = Callable[..., Any]
UP, DEGRADED, LIMITED = (getattr(target_pb2, f"TARGET_STATE_{name}") for name in ("UP", "DEGRADED", "LIMITED"))
PENDING, STALE, DOWN, MISCONFIGURED = (
    getattr(target_pb2, f"TARGET_STATE_{name}") for name in ("PENDING", "STALE", "DOWN", "MISCONFIGURED")
)
REQUESTS, ERRORS, DURATION, SATURATION = 1, 2, 3, 4
WAIT = 15.0
SHOP = """\
# HELP http_requests_total Requests.
# TYPE http_requests_total counter
http_requests_total{code="200"} 10
http_requests_total{code="500"} 2
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{le="0.5"} 9
http_request_duration_seconds_bucket{le="+Inf"} 12
http_request_duration_seconds_sum 3.5
http_request_duration_seconds_count 12
# TYPE process_open_fds gauge
process_open_fds 32
# TYPE process_max_fds gauge
process_max_fds 64
"""


@pytest.fixture
def name() -> str:
    """A target that no other test uses."""
    return f"t-{uuid.uuid4().hex[:20]}"


@pytest.fixture
def create(adapter_operator: Client) -> Iterator[Create]:
    """Creates targets, waits for their first collection, and deletes them after the test."""
    created: dict[str, None] = {}

    def make(target_id: str, source: Source | None = None, **fields: Any) -> Any:
        wait = fields.pop("wait_duration", seconds(WAIT))
        if source is not None:
            fields = {"kind": "TARGET_KIND_PROMETHEUS", "endpoint": source.endpoint} | fields
        target = {"target_id": target_id, "interval_duration": seconds(1), **fields}
        found = adapter_operator.CreateTarget(target=target, wait_duration=wait).target
        created[target_id] = None
        return found

    yield make
    for target_id in created:
        adapter_operator.DeleteTarget(target_id=target_id)


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as served:
        yield served


@pytest.fixture
def shop() -> Iterator[Source]:
    """With all golden signals."""
    with Source(SHOP) as served:
        yield served


def of(target_id: str, /, **match: Any) -> dict[str, Any]:
    return {"matches": [{"target_ids": [target_id], **match}]}


def values(metrics: Any) -> dict[str, float]:
    return {metric.name: series.number for metric in metrics for series in metric.series}


def becomes(client: Client, name: str, *states: int) -> Any:
    """The target, once it is in one of these states."""

    def status() -> Any:
        return client.GetTarget(target_id=name).target.status

    eventually(lambda: status().state in states, f"{name} is in {states}")
    return status()


# Targets


def test_a_created_target_is_collected_and_tells_how_it_does(create: Create, source: Source, name: str) -> None:
    target = create(name, source)
    status = target.status
    assert (status.state, status.message, status.series) == (UP, "", 1)
    assert status.last_collection_time == status.last_success_time
    assert status.last_success_time.seconds > 0
    assert status.address == source.endpoint
    assert not status.rejections
    assert target.etag


def test_what_was_left_out_is_answered_with_its_default(create: Create, source: Source, name: str) -> None:
    target = create(name, source, interval_duration=None)
    assert (target.interval_duration.seconds, target.timeout_duration.seconds) == (10, 5)
    limits = target.limits
    assert (limits.max_bytes, limits.max_series, limits.max_labels) == (10 << 20, 10_000, 30)


def test_without_wait_duration_it_is_answered_at_once(
    create: Create, adapter: Client, source: Source, name: str
) -> None:
    source.lets.clear()
    assert create(name, source, wait_duration=None).status.state == PENDING
    source.lets.set()
    becomes(adapter, name, UP)


def test_wait_duration_ends_while_the_app_hangs(create: Create, source: Source, name: str) -> None:
    source.lets.clear()
    assert create(name, source, interval_duration=None, wait_duration=seconds(0.1)).status.state == PENDING


def test_the_same_target_again_is_the_same(create: Create, source: Source, name: str) -> None:
    assert create(name, source).etag == create(name, source).etag


def test_what_is_wrong_is_named_by_field(create: Create, name: str) -> None:
    wrong = {
        "kind": "TARGET_KIND_REDIS",
        "endpoint": "nowhere",
        "interval_duration": seconds(0.5),
        "timeout_duration": seconds(20),
        "service": "a\nb",
        "rule_pack": "../..",
        "limits": {"max_series": -1},
        "etag": "1",
        "status": {"state": UP},
    }
    with pytest.raises(Refused) as error:
        create(name.upper(), **wrong)
    assert error.value.code == "INVALID_ARGUMENT"
    assert error.value.fields == {
        f"target.{field}"
        for field in (
            "target_id", "endpoint", "interval_duration", "timeout_duration", "service", "rule_pack",
            "limits.max_series", "etag", "status",
        )
    }  # fmt: skip
    for kind in ("TARGET_KIND_UNSPECIFIED", "TARGET_KIND_OTLP", 77):
        with pytest.raises(Refused) as error:
            create(name, kind=kind)
        assert error.value.fields == {"target.kind"}


def test_an_update_is_what_is_collected_then_and_keeps_what_is_shown(
    create: Create, adapter: Client, adapter_operator: Client, source: Source, name: str
) -> None:
    first = create(name, source)
    target = {"target_id": name, "kind": first.kind, "endpoint": source.endpoint, "service": "shop"}
    second = adapter_operator.UpdateTarget(target=target, etag=first.etag).target
    assert second.status.series == 1, "what was shown stays"
    assert second.interval_duration.seconds == 10, "what is left out has its default"
    assert second.etag != first.etag
    assert adapter_operator.UpdateTarget(target=target).target.etag == second.etag, "the same is no change"

    def services() -> set[str]:
        metrics = adapter.GetMetrics(**of(name)).metrics
        return {series.labels["service"] for metric in metrics for series in metric.series}

    eventually(lambda: services() == {"shop"}, "the label is another")


def test_an_etag_lets_only_those_through_who_know_the_latest(
    create: Create, adapter_operator: Client, source: Source, name: str
) -> None:
    first = create(name, source)
    target = {"target_id": name, "kind": first.kind, "endpoint": source.endpoint, "service": "shop"}
    second = adapter_operator.UpdateTarget(target=target, etag=first.etag).target
    for call in (
        partial(adapter_operator.UpdateTarget, target={**target, "service": "other"}),
        partial(adapter_operator.DeleteTarget, target_id=name),
    ):
        with pytest.raises(Refused) as error:
            call(etag=first.etag)
        assert (error.value.code, error.value.reason) == ("ABORTED", "STALE_ETAG")
        assert error.value.metadata == {"etag": second.etag}
    assert adapter_operator.DeleteTarget(target_id=name, etag=second.etag).deleted


def test_a_target_that_is_gone_is_gone_with_its_series(
    create: Create, adapter: Client, adapter_operator: Client, source: Source, name: str
) -> None:
    create(name, source)
    assert adapter_operator.DeleteTarget(target_id=name).deleted
    assert not adapter_operator.DeleteTarget(target_id=name).deleted
    assert not adapter.GetMetrics(**of(name)).metrics
    with pytest.raises(Refused, match="TARGET_NOT_FOUND"):
        adapter.GetTarget(target_id=name)
    assert create(name, source).status.state == UP, "its name is free"


def test_targets_are_listed_by_name_page_by_page(create: Create, adapter: Client, name: str) -> None:
    mine = sorted(f"{name}-{letter}" for letter in "cabed")
    for target_id in mine:
        create(target_id, kind="TARGET_KIND_REPORT")
    listed, token = list[str](), ""
    while True:
        answer = adapter.ListTargets(page_size=2, page_token=token)
        assert len(answer.targets) <= 2
        listed += [target.target_id for target in answer.targets]
        token = answer.next_page_token
        if not token:
            break
    assert listed == sorted(listed)
    assert [target_id for target_id in listed if target_id.startswith(name)] == mine
    for size in (-1, 101):
        with pytest.raises(Refused) as error:
            adapter.ListTargets(page_size=size)
        assert error.value.fields == {"page_size"}
    with pytest.raises(Refused) as error:
        adapter.ListTargets(page_token="nonsense")
    assert error.value.code in {"INVALID_ARGUMENT", "OUT_OF_RANGE"}


@pytest.mark.parametrize("method", ["CreateTarget", "UpdateTarget", "DeleteTarget", "TestTarget"])
def test_an_app_may_not_change_targets(adapter: Client, method: str) -> None:
    with pytest.raises(Refused) as error:
        getattr(adapter, method)()
    assert (error.value.code, error.value.reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED")


# How they do


def test_refused_points_are_told_with_their_reason(create: Create, source: Source, name: str) -> None:
    source.text = "# TYPE bad_total counter\nbad_total -1\ngood 1\n"
    status = create(name, source).status
    assert (status.state, status.series) == (DEGRADED, 1)
    assert [(one.reason, one.points) for one in status.rejections] == [("negative_counter", 1)]
    assert "bad" in status.rejections[0].example
    assert "negative_counter" in status.message


def test_beyond_the_limits_what_is_known_stays(create: Create, adapter: Client, source: Source, name: str) -> None:
    source.text = 'x{n="1"} 1\nx{n="2"} 1\n'
    assert create(name, source, limits={"max_series": 2}).status.state == UP
    source.text = 'x{n="0"} 2\nx{n="1"} 2\nx{n="2"} 2\n'
    status = becomes(adapter, name, LIMITED)
    assert status.series == 2
    [metric] = adapter.GetMetrics(**of(name)).metrics
    assert {series.labels["n"] for series in metric.series} == {"1", "2"}


def test_what_was_collected_stands_while_the_app_is_away(
    create: Create, adapter: Client, source: Source, name: str
) -> None:
    create(name, source)
    source.status = 503
    status = becomes(adapter, name, STALE)
    assert "503" in status.message
    assert status.last_success_time.ToMilliseconds() < status.last_collection_time.ToMilliseconds()
    assert values(adapter.GetMetrics(**of(name)).metrics) == {"x": 1.0}
    source.status, source.text = 200, "x 2\n"
    becomes(adapter, name, UP)
    assert values(adapter.GetMetrics(**of(name)).metrics) == {"x": 2.0}


def test_what_is_too_old_is_stale_and_only_shown_to_who_asks(
    create: Create, adapter: Client, source: Source, name: str
) -> None:
    create(name, source)
    with adapter.stream("WatchMetrics", **of(name)) as stream:
        assert stream.read().synced
        source.status = 503
        becomes(adapter, name, DOWN)
        [metric] = next(one for one in stream if any(s.stale for m in one.metrics for s in m.series)).metrics
        assert (metric.name, metric.series[0].number) == ("x", 1.0)
        assert not adapter.GetMetrics(**of(name)).metrics
        assert not adapter.DescribeMetrics(**of(name)).metrics
        [metric] = adapter.GetMetrics(**of(name), include_stale=True).metrics
        assert metric.series[0].stale
        [signals] = adapter.GetSignals(target_ids=[name]).signals
        assert {signal.absent_reason for signal in signals.signals} == {"it is not collected: /metrics answers 503"}
        source.status = 200
        [metric] = stream.read().metrics
        assert not metric.series[0].stale


def test_nobody_there_is_down_and_nonsense_is_misconfigured(create: Create, source: Source, name: str) -> None:
    nobody = create(f"{name}-a", kind="TARGET_KIND_REDIS", endpoint="127.0.0.1:1").status
    assert nobody.state == DOWN
    assert "cannot connect" in nobody.message
    source.text = "<html>"
    assert create(f"{name}-b", source).status.state == MISCONFIGURED
    assert create(f"{name}-c", source, kind="TARGET_KIND_NGINX").status.state == MISCONFIGURED
    expvar = create(f"{name}-d", source, kind="TARGET_KIND_JSON", rule_pack="expvar").status
    assert (expvar.state, "no JSON" in expvar.message) == (MISCONFIGURED, True)


def test_an_answer_that_is_too_long_is_refused(create: Create, source: Source, name: str) -> None:
    source.text = "x 1\n" + "# long\n" * 200
    status = create(name, source, limits={"max_bytes": 1000}).status
    assert "1000 bytes" in status.message
    assert status.series == 0


# Trying


def test_a_trial_shows_raw_and_normalised_side_by_side_and_keeps_nothing(
    adapter: Client, adapter_operator: Client, shop: Source, name: str
) -> None:
    shop.text += '# TYPE pause_ms gauge\npause_ms{target="theirs"} 250\n# TYPE bad_total counter\nbad_total -1\n'
    target = {"target_id": name, "kind": "TARGET_KIND_PROMETHEUS", "endpoint": shop.endpoint}
    found = adapter_operator.TestTarget(target=target)
    assert found.failure == ""
    tested = {point.raw: point for point in found.points}
    pause = tested["pause_ms{target='theirs'} 250.0"]
    assert pause.normalised.startswith('pause_seconds{exported_target="theirs",')
    assert pause.normalised.endswith("} 0.25\n")
    bad = tested["bad{} -1.0"]
    assert (bad.normalised, bad.rejection) == ("", "negative_counter")
    assert [signal.kind for signal in found.signals] == [REQUESTS, ERRORS, DURATION, SATURATION]
    assert found.signals[0].number == 12
    with pytest.raises(Refused, match="TARGET_NOT_FOUND"):
        adapter.GetTarget(target_id=name)


def test_what_is_wrong_with_the_app_is_part_of_a_trials_answer(
    adapter_operator: Client, source: Source, name: str
) -> None:
    target: dict[str, Any] = {"target_id": name, "kind": "TARGET_KIND_PROMETHEUS", "endpoint": source.endpoint}
    source.text = "{"
    assert "can't be read" in adapter_operator.TestTarget(target=target).failure
    source.status = 500
    assert "500" in adapter_operator.TestTarget(target=target).failure
    source.lets.clear()
    target |= {"timeout_duration": seconds(0.05)}
    assert "did not answer within" in adapter_operator.TestTarget(target=target).failure


def test_a_trial_tells_at_most_a_thousand_points(adapter_operator: Client, source: Source, name: str) -> None:
    source.text = "".join(f'x{{n="{n}"}} 1\n' for n in range(1200))
    target = {"target_id": name, "kind": "TARGET_KIND_PROMETHEUS", "endpoint": source.endpoint}
    found = adapter_operator.TestTarget(target=target)
    assert (len(found.points), found.omitted_points) == (1000, 200)


# Metrics


def test_metrics_have_base_units_our_labels_and_times(create: Create, adapter: Client, shop: Source, name: str) -> None:
    shop.text += '# HELP pause_ms Pauses.\n# TYPE pause_ms gauge\npause_ms{target="theirs",zone="a"} 250\n'
    create(name, shop, service="the-shop")
    found = {metric.name: metric for metric in adapter.GetMetrics(**of(name)).metrics}
    pause = found["pause_seconds"]
    assert (pause.type, pause.unit, pause.help) == (metric_pb2.METRIC_TYPE_GAUGE, "seconds", "Pauses.")
    [series] = pause.series
    assert series.number == 0.25
    assert dict(series.labels) == {
        "target": name,
        "kind": "prometheus",
        "service": "the-shop",
        "instance": shop.endpoint,
        "exported_target": "theirs",
        "zone": "a",
    }
    assert series.time.seconds > 0
    assert not series.HasField("start_time")
    requests = found["http_requests"]
    assert requests.type == metric_pb2.METRIC_TYPE_COUNTER
    assert all(one.start_time.seconds > 0 for one in requests.series)
    histogram = found["http_request_duration_seconds"].series[0].histogram
    assert [bucket.cumulative_count for bucket in histogram.buckets] == [9, 12]
    assert (histogram.sum, histogram.count) == (3.5, 12)
    assert list(found) == sorted(found)


def test_what_is_matched_is_given(create: Create, adapter: Client, shop: Source, name: str) -> None:
    create(name, shop)
    assert values(adapter.GetMetrics(**of(name, name="process_*")).metrics) == {
        "process_open_fds": 32.0,
        "process_max_fds": 64.0,
    }
    assert values(adapter.GetMetrics(**of(name, labels={"code": "500"})).metrics) == {"http_requests": 2.0}
    both = [{"target_ids": [name], "name": "process_open_fds"}, {"target_ids": [name], "labels": {"code": "500"}}]
    assert len(adapter.GetMetrics(matches=both).metrics) == 2
    with pytest.raises(Refused) as error:
        adapter.GetMetrics(matches=[{"name": "a*b", "target_ids": ["A"]}])
    assert error.value.fields == {"matches[0].name", "matches[0].target_ids[0]"}
    with pytest.raises(Refused) as error:
        adapter.GetMetrics(matches=[{}] * 101)
    assert error.value.fields == {"matches"}


def test_described_metrics_have_no_series(create: Create, adapter: Client, shop: Source, name: str) -> None:
    create(name, shop)
    [metric] = adapter.DescribeMetrics(**of(name, name="http_requests")).metrics
    assert (metric.type, metric.help, len(metric.series)) == (metric_pb2.METRIC_TYPE_COUNTER, "Requests.", 0)


def test_a_counter_that_falls_began_anew(create: Create, adapter: Client, source: Source, name: str) -> None:
    source.text = "# TYPE jobs_total counter\njobs_total 5\n"
    create(name, source)

    def jobs() -> Any:
        return adapter.GetMetrics(**of(name)).metrics[0].series[0]

    first = jobs()
    source.text = "# TYPE jobs_total counter\njobs_total 2\n"
    eventually(lambda: jobs().number == 2, "it is collected again")
    assert jobs().start_time.ToMilliseconds() > first.start_time.ToMilliseconds()


# Watching metrics


def test_a_watch_begins_with_a_snapshot_and_tells_only_what_changes(
    create: Create, adapter: Client, source: Source, name: str
) -> None:
    source.text = 'x{n="1"} 1\nx{n="2"} 1\nnan NaN\n'
    create(name, source)
    with adapter.stream("WatchMetrics", **of(name)) as stream:
        first = stream.read()
        assert first.synced
        assert {metric.name: len(metric.series) for metric in first.metrics} == {"nan": 1, "x": 2}
        source.text = 'x{n="1"} 1\nx{n="2"} 7\nnan NaN\n'
        [metric] = stream.read().metrics
        assert [(series.labels["n"], series.number) for series in metric.series] == [("2", 7.0)]
        source.text = 'x{n="1"} 1\nnew 1\nnan NaN\n'
        change = stream.read()
        assert not change.synced
        found = {metric.name: metric for metric in change.metrics}
        assert found.keys() == {"new", "x"}
        [gone] = found["x"].series
        assert (gone.stale, gone.labels["n"], gone.number) == (True, "2", 7.0)


def test_a_watch_of_nothing_is_synced_and_hears_of_targets_that_come_and_go(
    create: Create, adapter: Client, adapter_operator: Client, source: Source, name: str
) -> None:
    with adapter.stream("WatchMetrics", **of(name)) as stream:
        first = stream.read()
        assert (first.synced, len(first.metrics)) == (True, 0)
        create(name, source)
        [metric] = stream.read().metrics
        assert metric.name == "x"
        adapter_operator.DeleteTarget(target_id=name)
        [metric] = stream.read().metrics
        assert metric.series[0].stale


def test_a_watch_that_is_read_slowly_tells_how_much_it_missed(
    create: Create, adapter: Client, source: Source, name: str
) -> None:
    """What it has not read fills the connection; then the latest of each counts."""

    def text(value: int) -> str:
        return "".join(f'x{{n="{n:04}",long="{"v" * 200}"}} {value}\n' for n in range(2500))

    source.text = text(0)
    create(name, source)
    with adapter.stream("WatchMetrics", **of(name)) as stream:
        asked = source.asked
        for turn in range(1, 8):
            source.text = text(turn)
            eventually(lambda seen=asked + turn: source.asked > seen, "it is collected again")
        source.text = text(100)
        missed = 0
        last: dict[str, float] = {}
        for response in stream:
            missed += response.coalesced
            last |= {series.labels["n"]: series.number for metric in response.metrics for series in metric.series}
            if set(last.values()) == {100.0}:
                break
    assert len(last) == 2500
    assert missed > 0


# Signals


def test_golden_signals_are_present_or_absent_with_a_reason(
    create: Create, adapter: Client, shop: Source, source: Source, name: str
) -> None:
    create(f"{name}-a", shop, interval_duration=seconds(3600))
    create(f"{name}-b", source)
    full, empty = adapter.GetSignals(target_ids=[f"{name}-a", f"{name}-b"]).signals
    assert [signal.kind for signal in full.signals] == [REQUESTS, ERRORS, DURATION, SATURATION]
    requests, errors, duration, saturation = full.signals
    assert (requests.number, requests.source, requests.absent_reason) == (12.0, "http_requests", "")
    assert not requests.HasField("rate"), "there were no two collections"
    assert errors.number == 2.0
    assert duration.histogram.count == 12
    assert saturation.number == 0.5
    assert all(signal.WhichOneof("value") is None and signal.absent_reason for signal in empty.signals)
    assert full.time.seconds > 0
    assert full.age_duration.ToMilliseconds() >= 0
    everybodys = adapter.GetSignals().signals
    assert {f"{name}-a", f"{name}-b"} <= {one.target_id for one in everybodys}


def test_watched_signals_tell_the_present_state_and_what_changes(
    create: Create, adapter: Client, shop: Source, source: Source, name: str
) -> None:
    create(f"{name}-a", shop)
    create(f"{name}-b", source)
    ids = [f"{name}-a", f"{name}-b"]
    with adapter.stream("WatchSignals", target_ids=ids) as stream:
        assert [stream.read().signals.target_id for _ in ids] == ids
        shop.text = SHOP.replace('{code="200"} 10', '{code="200"} 110')
        for response in stream:
            assert response.signals.target_id == ids[0], "nothing of the other changes"
            requests = response.signals.signals[0]
            if requests.number == 112:
                break
        assert 0 < requests.rate < 200.0, "a hundred more in about a second"
        shop.text = SHOP
        for response in stream:
            requests = response.signals.signals[0]
            if requests.number == 12:
                break
        assert not requests.HasField("rate"), "after a reset nothing is known"


def test_a_watch_of_all_signals_hears_of_targets_that_come(
    create: Create, adapter: Client, source: Source, name: str
) -> None:
    with adapter.stream("WatchSignals") as stream:
        create(name, source)
        assert any(response.signals.target_id == name for response in stream)


# Health


def test_a_watch_of_targets_tells_each_change_of_their_state(
    create: Create, adapter: Client, adapter_operator: Client, source: Source, name: str
) -> None:
    with adapter.stream("WatchTargets", target_ids=[name, "another"]) as stream:
        assert stream.read().HasField("synced")
        create(name, source)
        assert [stream.read().target.status.state for _ in range(2)] == [PENDING, UP]
        source.status = 500
        failed = stream.read().target
        assert (failed.target_id, failed.status.state) == (name, STALE)
        assert failed.status.message
        source.status = 200
        assert stream.read().target.status.state == UP
        adapter_operator.DeleteTarget(target_id=name)
        assert stream.read().removed_target_id == name


def test_a_watch_of_all_targets_begins_with_those_that_are_there(create: Create, adapter: Client, name: str) -> None:
    create(name, kind="TARGET_KIND_REPORT")
    with adapter.stream("WatchTargets") as stream:
        there = itertools.takewhile(lambda response: not response.HasField("synced"), stream)
        assert name in [response.target.target_id for response in there]


def test_health_of_a_target_is_that_of_its_last_collection(
    create: Create, adapter: Client, source: Source, name: str
) -> None:
    health: Any = health_pb2_grpc.HealthStub(adapter.channel)
    asked = health_pb2.HealthCheckRequest(service=f"target/{name}")
    with pytest.raises(grpc.RpcError) as error:
        health.Check(asked, timeout=WAIT)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(asked)
    serving = health_pb2.HealthCheckResponse
    assert next(watch).status == serving.SERVICE_UNKNOWN
    create(name, source)
    states = (answer.status for answer in watch)
    assert next(state for state in states if state != serving.NOT_SERVING) == serving.SERVING
    source.status = 500
    assert next(states) == serving.NOT_SERVING
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT).status == serving.SERVING
    watch.cancel()


# Reports


def reported(name: str, value: float, **fields: Any) -> dict[str, Any]:
    series = {"labels": {"zone": "a"}, "number": value}
    return {"name": name, "type": "METRIC_TYPE_GAUGE", "series": [series]} | fields


def test_an_app_reports_and_what_cannot_be_taken_is_named(create: Create, adapter: Client, name: str) -> None:
    create(name, kind="TARGET_KIND_REPORT")
    metrics = [
        reported("depth", 5.0),
        reported("pause", 250.0, unit="ms"),
        reported("jobs", -1.0, type="METRIC_TYPE_COUNTER"),
        reported("€", 1.0),
    ]
    for _ in range(2):
        answer = adapter.ReportMetrics(target_id=name, metrics=metrics)
        assert answer.accepted_points == 2
        assert {one.reason: one.points for one in answer.rejections} == {"negative_counter": 1, "bad_name": 1}

    def shown() -> dict[str, float]:
        return values(adapter.GetMetrics(**of(name)).metrics)

    eventually(lambda: shown() == {"depth": 5.0, "pause_seconds": 0.25}, "it is shown")
    refused = {"negative_counter": 2, "bad_name": 2}
    told = adapter.GetTarget(target_id=name).target.status.rejections
    assert {one.reason: one.points for one in told} == refused
    adapter.ReportMetrics(target_id=name, metrics=[reported("depth", 6.0)])
    eventually(lambda: shown() == {"depth": 6.0, "pause_seconds": 0.25}, "it is replaced")


def test_what_is_wrong_with_a_report_is_named_by_field(create: Create, adapter: Client, name: str) -> None:
    create(name, kind="TARGET_KIND_REPORT")
    metrics = [reported("", 1.0), reported("x", 1.0, type=0), reported("h", 1.0, type="METRIC_TYPE_HISTOGRAM")]
    with pytest.raises(Refused) as error:
        adapter.ReportMetrics(target_id=name, metrics=metrics)
    assert error.value.fields == {"metrics[0].name", "metrics[1].type", "metrics[2].series[0].value"}
    with pytest.raises(Refused) as error:
        adapter.ReportMetrics(target_id=name, metrics=[{**reported("x", 1.0), "series": [{"number": 1.0}] * 1001}])
    assert error.value.fields == {"metrics"}


def test_reports_are_limited_by_the_targets_limits(create: Create, adapter: Client, name: str) -> None:
    create(name, kind="TARGET_KIND_REPORT", limits={"max_series": 2})
    series = [{"labels": {"n": str(n)}, "number": 1.0} for n in range(3)]
    answer = adapter.ReportMetrics(target_id=name, metrics=[reported("x", 1.0, series=series)])
    assert answer.accepted_points == 2
    assert [(one.reason, one.points) for one in answer.rejections] == [("series_limit", 1)]
