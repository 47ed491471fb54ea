"""Claims about /metrics of an adapter: this process's own beside the targets', valid whatever they are called."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import core
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from support.adapter_core import absent

from retinue_server.adapter.core import exposition
from retinue_server.adapter.core.collection import Collector, Limits, Registry
from retinue_server.adapter.core.matching import Match, select
from retinue_server.adapter.core.points import Histogram, Raw, RawFamily, Signal, Type
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.core.target import Target
from retinue_server.adapter.pages import MetricPages
from retinue_server.runtime.metrics import Exposition, Metrics, prefers_open_metrics

INFINITE = float("inf")
strict: Any = text_string_to_metric_families


class Shown:
    """Targets as pages see them, each with a worker of its own: they know nothing of each other."""

    def __init__(self) -> None:
        self.targets: dict[str, Target] = {}

    def add(self, target_id: str, *families: RawFamily, signals: list[Signal] | None = None) -> Target:
        target = Target(Spec(target_id, Kind.REPORT))
        taken = Collector(target_id, target.spec.own_labels, Limits(), Registry()).take(families, 1)
        target.succeeded(taken, signals or absent(), now_ms=1, took_ms=1, rejected={}, examples={}, limited=False)
        self.targets[target_id] = target
        return target

    def all(self) -> Any:
        return self.targets.values()

    def find(self, target_id: str) -> Target | None:
        return self.targets.get(target_id)


@pytest.fixture
def shown() -> Shown:
    return Shown()


def page(shown: Shown, name: str = "", own: list[Any] | None = None) -> dict[tuple[str, str], float]:
    """Samples by name and target, as the strict parser reads the page; no series twice, no family in two pieces."""
    answer = MetricPages(shown).page(own or [], name, open_metrics=True)  # type: ignore[arg-type] # what pages see
    assert answer is not None
    assert answer[0] == exposition.OPEN_METRICS
    seen, found, names = set(), {}, []
    for family in strict(answer[1].decode()):
        names.append(family.name)
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in seen
            seen.add(key)
            found[sample.name, sample.labels.get("target", "")] = sample.value
    assert len(names) == len(set(names))
    return found


def gauge(name: str, value: float = 1.0) -> RawFamily:
    return RawFamily(name, Type.GAUGE, [Raw({}, value)])


def counter(name: str, value: float = 1.0) -> RawFamily:
    return RawFamily(name, Type.COUNTER, [Raw({}, value)])


def test_all_targets_are_on_one_page_and_each_on_its_own(shown: Shown) -> None:
    shown.add("a", gauge("x", 1.0))
    shown.add("b", gauge("x", 2.0), gauge("y", 3.0))
    assert page(shown) == {("x", "a"): 1.0, ("x", "b"): 2.0, ("y", "b"): 3.0}
    assert page(shown, "b") == {("x", "b"): 2.0, ("y", "b"): 3.0}
    assert MetricPages(shown).page([], "none", open_metrics=True) is None  # type: ignore[arg-type]


def test_what_is_too_old_is_not_shown(shown: Shown) -> None:
    target = shown.add("a", gauge("x"), signals=[Signal(5.0, "", ""), *absent()[1:]])
    assert page(shown).keys() == {("x", "a"), ("app_requests_total", "a")}
    target.failed("away", now_ms=10, took_ms=1, misconfigured=True, stale_after_ms=5)
    assert page(shown) == page(shown, "a") == {}


def test_golden_signals_are_shown_and_those_that_are_absent_are_not(shown: Shown) -> None:
    buckets = Histogram(((0.5, 1.0), (INFINITE, 2.0)), 1.0, 2.0)
    shown.add("a", signals=[Signal(5.0, "", ""), Signal(None, "no", ""), Signal(buckets, "", ""), Signal(0.5, "", "")])
    assert page(shown) == {
        ("app_requests_total", "a"): 5.0,
        ("app_request_duration_seconds_bucket", "a"): 2.0,
        ("app_request_duration_seconds_count", "a"): 2.0,
        ("app_request_duration_seconds_sum", "a"): 1.0,
        ("app_saturation_ratio", "a"): 0.5,
    }


def test_a_source_that_calls_its_own_as_ours_has_them_exported(shown: Shown) -> None:
    signals = [Signal(5.0, "", ""), *absent()[1:]]
    shown.add(
        "a", counter("app_requests", 7.0), gauge("app_errors_total"), counter("retinue_adapter_up"), signals=signals
    )
    assert page(shown) == {
        ("app_requests_total", "a"): 5.0,
        ("exported_app_requests_total", "a"): 7.0,
        ("exported_app_errors_total", "a"): 1.0,
        ("exported_retinue_adapter_up_total", "a"): 1.0,
    }


def test_our_own_keep_their_labels(shown: Shown) -> None:
    own = core.CounterMetricFamily("retinue_server_handled", "Calls.", labels=["service", "target"])
    own.add_metric(["s", "t"], 3)
    pages = MetricPages(shown)  # type: ignore[arg-type] # what pages see
    for _ in range(2):
        answer = pages.page([own], "", open_metrics=False)
        assert answer is not None
        assert b'retinue_server_handled_total{service="s",target="t"} 3.0\n' in answer[1]


@pytest.mark.parametrize(
    "theirs",
    [
        gauge("process_open_fds_total"),
        counter("process_open_fds"),
        gauge("process_cpu_seconds"),
        gauge("process_cpu_seconds_total"),
    ],
)
def test_names_that_are_ours_with_another_meaning_do_not_spoil_the_page(shown: Shown, theirs: RawFamily) -> None:
    own = [
        core.GaugeMetricFamily("process_open_fds", "Files.", value=1),
        core.CounterMetricFamily("process_cpu_seconds", "Time.", value=2),
    ]
    shown.add("a", theirs, gauge("good"))
    found = page(shown, own=own)
    assert found["process_open_fds", ""] == 1.0
    assert found["process_cpu_seconds_total", ""] == 2.0
    assert found["good", "a"] == 1.0


def test_targets_that_do_not_know_of_each_other_do_not_spoil_the_page(shown: Shown) -> None:
    """One is stale, and the worker that knew of its names is another one now."""
    buckets = RawFamily("x", Type.HISTOGRAM, [Raw({}, Histogram(((INFINITE, 1.0),), 1.0, 1.0))])
    shown.add("a", buckets, gauge("y"))
    shown.add("b", gauge("x_count"), counter("y"), gauge("x_bucket"))
    assert page(shown).keys() == {("x_bucket", "a"), ("x_count", "a"), ("x_sum", "a"), ("y", "a")}


# What the reader takes


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "found"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
        (PROMETHEUS, True),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;q=0.6", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;version=2.0.0,text/plain", False),
        ("application/openmetrics-text;q=much", False),
        (",;=,", False),
    ],
)
def test_open_metrics_is_for_who_would_rather_have_it(accept: str, found: bool) -> None:  # noqa: FBT001 - drawn
    assert prefers_open_metrics(accept) is found


def test_without_pages_there_is_one_page_in_the_text_format() -> None:
    exposed = Exposition(Metrics())
    answer = exposed.page("", PROMETHEUS)
    assert answer is not None
    assert answer[0] == Exposition.content_type
    assert exposed.page("shop", "") is None


# What somebody wants


def test_a_match_takes_by_name_target_and_labels(shown: Shown) -> None:
    one = shown.add("a", gauge("x_one"), RawFamily("x_two", Type.GAUGE, [Raw({"z": "1"}, 1.0), Raw({"z": "2"}, 2.0)]))

    def names(*matches: Match, target: str = "a") -> list[tuple[str, int]]:
        return [(family.name, len(series)) for family, series in select(one.shown.families, matches, target)]

    assert names() == [("x_one", 1), ("x_two", 2)]
    assert names(Match("x_*")) == names()
    assert names(Match("x_one")) == names(Match("x_one*")) == [("x_one", 1)]
    assert names(Match("x")) == names(Match("x_two", frozenset({"b"}))) == []
    assert names(Match(targets=frozenset({"a", "b"}))) == names()
    assert names(Match(labels=(("z", "2"),))) == [("x_two", 1)]
    assert names(Match(labels=(("z", "2"), ("target", "a")))) == [("x_two", 1)]
    assert names(Match(labels=(("z", "2"),)), Match("x_one")) == [("x_one", 1), ("x_two", 1)]
    assert names(Match(labels=(("z", "2"),)), Match("x_two")) == [("x_two", 2)]
