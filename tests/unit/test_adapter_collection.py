"""Claims about what becomes of what a target brings: names, units, labels, limits, refusals, and valid lines."""

import math
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from retinue_server.adapter.core import exposition, naming
from retinue_server.adapter.core.collection import Collector, Limits, Registry, by_name
from retinue_server.adapter.core.points import Family, Histogram, Raw, RawFamily, Summary, Type

strict: Any = open_metrics.text_string_to_metric_families
OWN = {"instance": "127.0.0.1:1", "kind": "prometheus", "service": "shop", "target": "shop"}


def collector(target: str = "shop", registry: Registry | None = None, limits: Limits | None = None) -> Collector:
    own = OWN | {"target": target}
    return Collector(target, own, limits or Limits(), registry or Registry())


def counter(name: str, *points: tuple[dict[str, str], float], unit: str = "") -> RawFamily:
    return RawFamily(name, Type.COUNTER, [Raw(labels, value) for labels, value in points], unit)


def gauge(name: str, *points: tuple[dict[str, str], float], unit: str = "") -> RawFamily:
    return RawFamily(name, Type.GAUGE, [Raw(labels, value) for labels, value in points], unit)


def lines(families: list[Family]) -> list[str]:
    return exposition.document(by_name([families]), open_metrics=False).decode().splitlines()


def read(*targets: list[Family]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the document, as prometheus_client's strict parser reads it; no series twice."""
    text = exposition.document(by_name(targets), open_metrics=True).decode()
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    names = []
    for family in strict(text):
        names.append(family.name)
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    assert len(names) == len(set(names)), "a family in two pieces"
    list(parse_text(exposition.document(by_name(targets), open_metrics=False).decode()))
    return found


# Names, units, labels


@pytest.mark.parametrize(
    ("name", "unit", "found"),
    [
        ("request_time", "ms", ("request_time_seconds", "seconds", 1e-3)),
        ("request_time_ms", "", ("request_time_seconds", "seconds", 1e-3)),
        ("request_time_ms", "ms", ("request_time_seconds", "seconds", 1e-3)),
        ("request_seconds", "s", ("request_seconds", "seconds", 1.0)),
        ("heap", "KiBy", ("heap_bytes", "bytes", 1024.0)),
        ("heap_megabytes", "", ("heap_bytes", "bytes", 1e6)),
        ("cpu_percent", "", ("cpu_ratio", "ratio", 0.01)),
        ("cpu", "%", ("cpu_ratio", "ratio", 0.01)),
        ("requests", "{request}", ("requests", "", 1.0)),
        ("requests", "", ("requests", "", 1.0)),
        ("latency_min", "", ("latency_min", "", 1.0)),
    ],
)
def test_units_become_base_units_at_the_end_of_the_name(name: str, unit: str, found: tuple[str, str, float]) -> None:
    assert naming.based(name, unit) == found


def test_values_are_scaled_with_their_unit() -> None:
    [family] = collector().take([gauge("pause_ms", ({}, 250.0))], 1)
    assert (family.name, family.unit, family.series[0].value) == ("pause_seconds", "seconds", 0.25)
    buckets = Histogram(((100.0, 1.0), (math.inf, 2.0)), 300.0, 2.0)
    [family] = collector().take([RawFamily("wait", Type.HISTOGRAM, [Raw({}, buckets)], "ms")], 1)
    assert family.series[0].value == Histogram(((0.1, 1.0), (math.inf, 2.0)), 0.3, 2.0)


def test_every_series_has_our_labels_and_a_clashing_one_of_the_source_is_exported() -> None:
    [family] = collector().take([gauge("x", ({"target": "theirs", "zone": "a"}, 1.0))], 1)
    assert dict(family.series[0].labels) == OWN | {"exported_target": "theirs", "zone": "a"}


def test_odd_names_become_names() -> None:
    families = collector().take([gauge("http.server-time", ({"user.id": "7"}, 1.0)), gauge("9lives", ({}, 1.0))], 1)
    assert [family.name for family in families] == ["_9lives", "http_server_time"]
    assert ("user_id", "7") in families[1].series[0].labels


def test_what_has_no_name_is_refused() -> None:
    taking = collector()
    assert taking.take([gauge("€", ({}, 1.0), ({"a": "b"}, 1.0))], 1) == []
    assert taking.reject.counts == {"bad_name": 2}


# Refusals cost what they refuse


def test_a_series_that_comes_twice_counts_once() -> None:
    taking = collector()
    families = taking.take([gauge("x", ({"a": "1"}, 1.0), ({"a": "1"}, 2.0), ({"a": "1", "b": ""}, 3.0))], 1)
    assert [one.value for one in families[0].series] == [1.0]
    assert taking.reject.counts == {"duplicate_series": 2}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (counter("x", ({}, -1.0)), "negative_counter"),
        (counter("x", ({}, math.nan)), "not_a_number"),
        (RawFamily("x", Type.HISTOGRAM, [Raw({}, 1.0)]), "bad_histogram"),
        (RawFamily("x", Type.HISTOGRAM, [Raw({}, Histogram((), 0.0, 0.0))]), "bad_histogram"),
        (RawFamily("x", Type.HISTOGRAM, [Raw({}, Histogram(((1.0, 1.0),), 0.0, 1.0))]), "bad_histogram"),
        (
            RawFamily("x", Type.HISTOGRAM, [Raw({}, Histogram(((1.0, 2.0), (math.inf, 1.0)), 0.0, 1.0))]),
            "bad_histogram",
        ),
        (RawFamily("x", Type.SUMMARY, [Raw({}, Summary(((2.0, 1.0),), 0.0, 1.0))]), "bad_histogram"),
        (gauge("x", ({"a.b": "1", "a-b": "2"}, 1.0)), "label_collision"),
        (gauge("x", ({str(i): "v" for i in range(31)}, 1.0)), "label_limit"),
    ],
)
def test_a_bad_point_costs_one_point(family: RawFamily, reason: str) -> None:
    taking = collector()
    good = gauge("good", ({}, 1.0))
    assert [one.name for one in taking.take([family, good], 1)] == ["good"]
    assert taking.reject.counts == {reason: 1}
    assert taking.reject.examples.keys() == {reason}


def test_beyond_the_limit_known_series_stay_and_new_ones_are_left_out() -> None:
    taking = collector(limits=Limits(max_series=2))
    taking.take([gauge("x", ({"n": "1"}, 1.0), ({"n": "2"}, 1.0))], 1)
    assert not taking.limited
    [family] = taking.take([gauge("x", ({"n": "0"}, 9.0), ({"n": "1"}, 2.0), ({"n": "2"}, 2.0))], 2)
    assert [one.value for one in family.series] == [2.0, 2.0]
    assert taking.limited
    assert taking.reject.counts == {"series_limit": 1}
    [family] = taking.take([gauge("x", ({"n": "1"}, 3.0))], 3)
    [family] = taking.take([gauge("x", ({"n": "0"}, 9.0), ({"n": "1"}, 4.0))], 4)
    assert [one.value for one in family.series] == [9.0, 4.0], "what went made room"


# What other families and targets have


def test_who_came_first_says_what_a_name_means() -> None:
    registry = Registry()
    first, second = collector("first", registry), collector("second", registry)
    assert first.take([counter("x", ({}, 1.0))], 1)
    assert second.take([gauge("x", ({}, 1.0)), gauge("y", ({}, 1.0))], 1)[0].name == "y"
    assert second.reject.counts == {"type_conflict": 1}
    first.close()
    assert {one.name for one in second.take([gauge("x", ({}, 1.0))], 2)} == {"x"}


def test_a_target_may_change_what_its_own_name_means() -> None:
    taking = collector()
    taking.take([counter("x", ({}, 1.0))], 1)
    assert taking.take([gauge("x", ({}, 1.0))], 2)[0].type is Type.GAUGE


def test_names_that_another_family_s_lines_bear_are_refused() -> None:
    taking = collector()
    histogram = Histogram(((math.inf, 1.0),), 1.0, 1.0)
    families = taking.take([RawFamily("x", Type.HISTOGRAM, [Raw({}, histogram)]), gauge("x_count", ({}, 5.0))], 1)
    assert [one.name for one in families] == ["x"]
    assert taking.reject.counts == {"name_conflict": 1}


def test_two_targets_with_one_name_are_one_family() -> None:
    registry = Registry()
    first, second = collector("first", registry), collector("second", registry)
    found = read(first.take([counter("x", ({}, 1.0))], 1), second.take([counter("x", ({}, 2.0))], 1))
    assert sorted(found.values()) == [1.0, 2.0]


# Counters


def test_a_counter_that_falls_was_reset_and_counts_from_then() -> None:
    taking = collector()

    def at(now: int, value: float) -> int:
        [family] = taking.take([counter("x", ({}, value))], now)
        return family.series[0].start_ms

    assert [at(1000, 5.0), at(2000, 9.0), at(3000, 1.0), at(4000, 3.0)] == [1000, 1000, 3000, 3000]


def test_gauges_have_no_beginning() -> None:
    [family] = collector().take([gauge("x", ({}, 1.0))], 1000)
    assert family.series[0].start_ms == 0


# Lines


def test_lines_are_those_of_the_formats() -> None:
    histogram = Histogram(((0.5, 1.0), (math.inf, 3.0)), 2.5, 3.0)
    families = Collector("t", {}, Limits(), Registry()).take(
        [
            counter("jobs", ({"name": 'a"b\\c\nd'}, 3.0)),
            RawFamily("wait_seconds", Type.HISTOGRAM, [Raw({"q": "x"}, histogram)], "s", "How long."),
            RawFamily("build", Type.INFO, [Raw({"version": "1"}, 1.0)]),
        ],
        1,
    )
    assert lines(families) == [
        "# TYPE build_info gauge",
        'build_info{version="1"} 1.0',
        "# TYPE jobs_total counter",
        r'jobs_total{name="a\"b\\c\nd"} 3.0',
        "# TYPE wait_seconds histogram",
        "# HELP wait_seconds How long.",
        'wait_seconds_bucket{q="x",le="0.5"} 1.0',
        'wait_seconds_bucket{q="x",le="+Inf"} 3.0',
        'wait_seconds_count{q="x"} 3.0',
        'wait_seconds_sum{q="x"} 2.5',
    ]


_text = st.one_of(
    st.sampled_from(
        ["x", "x_total", "x_count", "x_bucket", "x_sum", "x_info", "x_created", "x_ms", "x_seconds", "le", "quantile"]
    ),
    st.text(string.ascii_lowercase + "._-:1", max_size=6),
    st.text(max_size=8),
)
_number = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0]))
_counts = st.lists(st.floats(0, 10), min_size=1, max_size=3)
_histograms = st.builds(
    lambda counts, total: Histogram(
        (*((float(i), sum(counts[: i + 1])) for i in range(len(counts))), (math.inf, sum(counts))), total, sum(counts)
    ),
    _counts,
    _number,
)
_summaries = st.builds(
    Summary, st.tuples(st.tuples(st.sampled_from([0.5, 0.9, 2.0]), _number)), _number, st.floats(-1, 9)
)
_families = st.builds(
    RawFamily,
    _text,
    st.sampled_from(Type),
    st.lists(
        st.builds(
            Raw, st.dictionaries(_text, st.text(max_size=5), max_size=4), st.one_of(_number, _histograms, _summaries)
        ),
        max_size=4,
    ),
    st.sampled_from(["", "ms", "By", "%", "s", "nonsense"]),
    st.text(max_size=10),
)


@settings(max_examples=50)  # the strict parser takes its time
@given(st.lists(st.lists(_families, max_size=6), min_size=1, max_size=3), st.integers(1, 2))
def test_whatever_comes_what_is_shown_is_valid(targets: list[list[RawFamily]], turns: int) -> None:
    registry = Registry()
    collectors = [collector(f"t{i}", registry) for i in range(len(targets))]
    for turn in range(turns):
        shown = [one.take(families, turn + 1) for one, families in zip(collectors, targets, strict=True)]
        assert len(read(*shown)) >= sum(len(family.series) for families in shown for family in families)


@given(st.lists(_families, max_size=6))
def test_every_point_is_taken_or_refused(families: list[RawFamily]) -> None:
    taking = collector()
    taken = sum(len(family.series) for family in taking.take(families, 1))
    assert taken + sum(taking.reject.counts.values()) == sum(len(family.points) for family in families)
