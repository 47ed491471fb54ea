"""`retinue.client.Adapter` against real servers, and a real page that is collected."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from page import Page
from servers import RunningServer, start_server
from workers import eventually

from retinue.adapter.v1 import metric_pb2 as metric_pb
from retinue.adapter.v1 import target_pb2 as pb
from retinue.client import Adapter, NotFound, PermissionDenied, Unavailable, sync
from retinue.client.adapter import counter, declaration, gauge, match, signal_name, state_name, target
from retinue.client.errors import Aborted, FailedPrecondition

PAGE = """\
# TYPE http_requests_total counter
http_requests_total{{code="200"}} {good}
http_requests_total{{code="500"}} 10
# TYPE queue_age_milliseconds gauge
queue_age_milliseconds 1500
# TYPE jobs_total counter
jobs_total -3
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(tmp_path_factory.mktemp("server"), "adapter")
    yield running
    assert running.stop() == 0


@pytest.fixture
def operator(server: RunningServer) -> Iterator[sync.Adapter]:
    with sync.Adapter(server.control) as adapter:
        yield adapter


@pytest.fixture
def page() -> Iterator[Page]:
    with Page(PAGE.format(good=90)) as served:
        yield served


@pytest.fixture
def name() -> str:
    """A target that no other test uses."""
    return f"t-{uuid.uuid4().hex[:20]}"


def web(name: str, page: Page) -> pb.Target:
    return target(name, "PROMETHEUS", page.endpoint, interval=1)


def numbers(metrics: object) -> dict[str, float]:
    """By the label `code`."""
    return {one.labels["code"]: one.number for metric in metrics for one in metric.series}  # type: ignore[attr-defined]


def test_what_is_created_is_found_listed_and_read(operator: sync.Adapter, page: Page, name: str) -> None:
    made = operator.create(web(name, page), wait=10)
    assert (state_name(made), made.status.series) == ("degraded", 3)
    assert [one.reason for one in made.status.rejections] == ["negative_counter"]
    assert operator.get(name).endpoint == page.endpoint
    assert name in [found.target_id for found in operator.list()]
    [metric] = operator.metrics(match("queue_*", targets=[name]), max_age=60)
    assert (metric.name, metric.unit, metric.series[0].number) == ("queue_age_seconds", "seconds", 1.5)
    assert numbers(operator.metrics(match("http_requests", targets=[name], labels={"code": "500"}))) == {"500": 10}
    assert [one.name for one in operator.describe(match(targets=[name]))] == ["http_requests", "queue_age_seconds"]
    assert operator.delete(name)
    assert not operator.delete(name)
    with pytest.raises(NotFound):
        operator.get(name)


def test_all_pages_of_a_list_are_read(operator: sync.Adapter, name: str) -> None:
    names = [f"{name}-{number:02}" for number in range(55)]
    for one in names:
        operator.create(target(one, "REPORT"))
    assert [found.target_id for found in operator.list() if found.target_id.startswith(name)] == names
    assert all(operator.delete(one) for one in names)


def test_an_update_takes_a_declaration_and_its_etag(operator: sync.Adapter, page: Page, name: str) -> None:
    made = operator.create(web(name, page), wait=10)
    wanted = declaration(made)
    assert operator.create(wanted).etag == made.etag, "what the server says of it is no part of what is declared"
    wanted.service = "shop"
    with pytest.raises(Aborted):
        operator.update(wanted, etag="0")
    assert operator.update(wanted, etag=made.etag).service == "shop"


def test_a_dry_run_shows_raw_and_normalised_and_keeps_nothing(operator: sync.Adapter, page: Page, name: str) -> None:
    found = operator.test(web(name, page))
    told = {point.raw: (point.normalised.partition("{")[0], point.rejection) for point in found.points}
    assert told["queue_age_milliseconds{} 1500.0"] == ("queue_age_seconds", "")
    assert told["jobs{} -3.0"] == ("", "negative_counter")
    assert {signal_name(one): bool(one.absent_reason) for one in found.signals} == {
        "requests": False,
        "errors": False,
        "duration": True,
        "saturation": True,
    }
    page.status = 503
    assert operator.test(web(name, page)).failure == "/metrics answers 503"
    with pytest.raises(NotFound):
        operator.get(name)


def test_what_is_too_old_is_refused_in_the_end(server: RunningServer, operator: sync.Adapter, name: str) -> None:
    operator.create(target(name, "REDIS", "127.0.0.1:1", interval=3600), wait=10)
    with sync.Adapter(server.address, timeout=1) as app, pytest.raises(Unavailable) as error:
        app.metrics(match(targets=[name]), max_age=1)
    assert error.value.reason == "METRICS_TOO_OLD"


def test_targets_are_for_operators(server: RunningServer, page: Page, name: str) -> None:
    with sync.Adapter(server.address) as app, pytest.raises(PermissionDenied):
        app.create(web(name, page))


async def test_a_watch_tells_what_changed_and_what_is_gone(server: RunningServer, page: Page, name: str) -> None:
    async with Adapter(server.address) as app, Adapter(server.control) as operator:
        await operator.create(web(name, page), wait=10)
        async with aclosing(app.watch(match("http_requests", targets=[name]))) as changes:
            first = await anext(changes)
            assert (first.begins, first.synced, numbers(first.metrics)) == (True, True, {"200": 90, "500": 10})
            page.text = PAGE.format(good=120)
            change = await anext(changes)
            assert (change.begins, change.coalesced, numbers(change.metrics)) == (False, 0, {"200": 120})
            await operator.delete(name)
            gone = [series.stale for metric in (await anext(changes)).metrics for series in metric.series]
            assert gone == [True, True]


async def test_watched_signals_are_those_of_the_moment_and_have_rates(
    server: RunningServer, page: Page, name: str
) -> None:
    async with Adapter(server.address) as app, Adapter(server.control) as operator:
        await operator.create(web(name, page), wait=10)
        async with aclosing(app.watch_signals(name)) as news:
            assert (await anext(news)).signals[0].number == 100
            page.text = PAGE.format(good=120)
            while (found := await anext(news)).signals[0].number != 130:
                pass
            assert found.signals[0].rate > 0
            [told] = await app.signals(name)
            assert told.signals[1].source == "http_requests{code=~5..}"
            await operator.delete(name)
            while (found := await anext(news)).signals:
                pass
        assert found.target_id == name, "of one that is gone nothing but its name is told"


async def test_watched_targets_tell_how_they_do(server: RunningServer, page: Page, name: str) -> None:
    async with Adapter(server.address) as app, Adapter(server.control) as operator:
        await operator.create(web(name, page), wait=10)
        async with aclosing(app.watch_targets(name)) as news:
            assert (await anext(news)).target.status.state == pb.TARGET_STATE_DEGRADED, "it has a bad point"
            assert (await anext(news)).HasField("synced")
            await operator.delete(name)
            assert (await anext(news)).removed_target_id == name


def test_a_report_of_many_series_is_taken_in_parts(operator: sync.Adapter, name: str) -> None:
    operator.create(target(name, "REPORT", interval=1))
    series = [metric_pb.Series(labels={"row": str(number)}, number=number) for number in range(2500)]
    many = metric_pb.Metric(name="rows", type=metric_pb.METRIC_TYPE_GAUGE, unit="ms", series=series)
    assert operator.report(name, many, counter("orders", 17)) == (2501, [])

    def found() -> bool:
        return sum(len(metric.series) for metric in operator.metrics(match(targets=[name]))) == 2501

    eventually(found, "all of them are shown")
    [rows] = operator.metrics(match("rows_seconds", targets=[name], labels={"row": "2000"}))
    assert rows.series[0].number == 2.0


def test_of_a_report_what_is_refused_is_named_by_reason(operator: sync.Adapter, name: str) -> None:
    operator.create(target(name, "REPORT", interval=1))
    bad = [counter("refunds", -1, row=str(number)) for number in range(1500)]
    reported = operator.report(name, gauge("carts", 3), *bad)
    assert reported.accepted == 1
    assert [(one.reason, one.points) for one in reported.rejections] == [("negative_counter", 1500)]
    assert operator.report(name) == (0, [])


def test_what_is_collected_takes_no_report(operator: sync.Adapter, page: Page, name: str) -> None:
    operator.create(web(name, page))
    with pytest.raises(FailedPrecondition) as error:
        operator.report(name, gauge("carts", 3))
    assert error.value.reason == "TARGET_NOT_REPORT"


async def test_a_watch_begins_anew_when_the_server_comes_back(tmp_path: Path, page: Page) -> None:
    (tmp_path / "data/adapter").mkdir(parents=True)
    entry = {"target_id": "web", "kind": "PROMETHEUS", "endpoint": page.endpoint, "interval_duration": "1s"}
    (tmp_path / "data/adapter/targets.yaml").write_text(json.dumps({"targets": [entry]}))
    first = start_server(tmp_path, "adapter")
    async with (
        Adapter(first.address) as app,
        aclosing(app.watch(match("http_requests"))) as changes,
        aclosing(app.watch_signals("web")) as news,
    ):
        while not (await anext(changes)).metrics:
            pass
        assert (await anext(news)).target_id == "web"
        first.kill()
        page.text = PAGE.format(good=200)
        second = first.restart()
        while not (change := await anext(changes)).begins:
            pass
        while not change.metrics:
            change = await anext(changes)
        assert numbers(change.metrics) == {"200": 200, "500": 10}
        while (await anext(news)).signals[0].number != 210:
            pass
    assert second.stop() == 0


async def test_a_watch_of_a_target_that_is_not_there_ends_at_once(server: RunningServer) -> None:
    async with Adapter(server.address) as app:
        with pytest.raises(NotFound):
            await anext(app.watch_signals("nowhere"))
