"""Claims about reading Prometheus' text format and OpenMetrics: all they have, and garbage is no more than that."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue_server.adapter import parsing
from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import Histogram, RawFamily, Summary, Type
from retinue_server.adapter.engine import Unexpected

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def families(text: str, content_type: str = "text/plain", reject: Reject | None = None) -> dict[str, RawFamily]:
    return {one.name: one for one in parsing.parse(text.encode(), content_type, reject or Reject())}


def values(family: RawFamily) -> list[tuple[dict[str, str], Any]]:
    return [(point.labels, point.value) for point in family.points]


def test_the_text_format() -> None:
    found = families(
        "# HELP jobs_total Jobs.\n# TYPE jobs_total counter\n"
        'jobs_total{q="a\\"b"} 3 1700000000000\n'
        "# TYPE temperature gauge\ntemperature -4.5\n"
        "odd 7\n"
        "# TYPE wait histogram\n"
        'wait_bucket{q="x",le="0.5"} 1\nwait_bucket{q="x",le="+Inf"} 3\nwait_sum{q="x"} 2.5\nwait_count{q="x"} 3\n'
        "# TYPE size summary\n"
        'size{quantile="0.5"} 10\nsize_sum 30\nsize_count 4\n'
    )
    assert {name: one.type for name, one in found.items()} == {
        "jobs": Type.COUNTER,
        "temperature": Type.GAUGE,
        "odd": Type.UNKNOWN,
        "wait": Type.HISTOGRAM,
        "size": Type.SUMMARY,
    }
    assert values(found["jobs"]) == [({"q": 'a"b'}, 3.0)]
    assert found["jobs"].help == "Jobs."
    assert values(found["wait"]) == [({"q": "x"}, Histogram(((0.5, 1.0), (math.inf, 3.0)), 2.5, 3.0))]
    assert values(found["size"]) == [({}, Summary(((0.5, 10.0),), 30.0, 4.0))]


def test_open_metrics() -> None:
    found = families(
        "# TYPE jobs counter\n"
        'jobs_total 3 # {trace="1"} 1.0\njobs_created 1700000000\n'
        "# TYPE took_seconds gauge\n# UNIT took_seconds seconds\ntook_seconds 1.5\n"
        '# TYPE build info\nbuild_info{version="1"} 1\n'
        '# TYPE door stateset\ndoor{door="open"} 1\ndoor{door="shut"} 0\n'
        "# TYPE wait histogram\n"
        'wait_bucket{le="0.5"} 1 # {trace="2"} 0.4\nwait_bucket{le="+Inf"} 3\nwait_sum 2.5\nwait_count 3\n'
        "wait_created 1700000000\n"
        "# EOF\n",
        OPEN_METRICS,
    )
    assert values(found["jobs"]) == [({}, 3.0)]
    assert (found["took_seconds"].unit, found["took_seconds"].type) == ("seconds", Type.GAUGE)
    assert (found["build"].type, values(found["build"])) == (Type.INFO, [({"version": "1"}, 1.0)])
    assert (found["door"].type, len(found["door"].points)) == (Type.GAUGE, 2)
    assert values(found["wait"]) == [({}, Histogram(((0.5, 1.0), (math.inf, 3.0)), 2.5, 3.0))]


def test_when_a_family_was_made_is_no_metric_and_a_name_that_ends_so_is() -> None:
    found = families(
        "# TYPE jobs_total counter\njobs_total 3\n# TYPE jobs_created gauge\njobs_created 1.7e9\n"
        "# TYPE orders_created gauge\norders_created 5\n"
    )
    assert list(found) == ["jobs", "orders_created"]
    assert values(found["orders_created"]) == [({}, 5.0)]


def test_what_no_reader_knows_is_refused_alone() -> None:
    reject = Reject()
    text = '# TYPE g gaugehistogram\ng_bucket{le="+Inf"} 1\ng_gcount 1\ng_gsum 1\n# TYPE x gauge\nx 1\n# EOF\n'
    found = families(text, OPEN_METRICS, reject)
    assert values(found["x"]) == [({}, 1.0)]
    assert found["g"].points == []
    assert reject.counts == {"type_unsupported": 3}


def test_a_bound_that_is_none_is_refused() -> None:
    reject = Reject()
    found = families('# TYPE h histogram\nh_bucket{le="much"} 1\nh_bucket{le="+Inf"} 2\n', "text/plain", reject)
    assert reject.counts == {"bad_histogram": 1}
    [(_, histogram)] = values(found["h"])
    assert (histogram.buckets, histogram.count) == (((math.inf, 2.0),), 2.0)


@pytest.mark.parametrize("text", ["x{", "# TYPE x y z\nx", "x\n", '{"a": 1}', "<html>", 'x{a="\udcff"} 1'])
def test_what_is_no_page_is_unexpected(text: str) -> None:
    with pytest.raises(Unexpected, match="can't be read"):
        list(parsing.parse(text.encode(errors="surrogateescape"), "text/plain", Reject()))


_LINES = st.one_of(
    st.sampled_from(
        [
            "# TYPE x counter",
            "# TYPE x histogram",
            "# UNIT x s",
            "# HELP x",
            "x_total 1",
            'x{le="1"} 1',
            "x NaN 1",
            "# EOF",
        ]
    ),
    st.text(st.sampled_from('x_{}="\\, 1.eE+-#\t'), max_size=12),
    st.text(max_size=12),
)


@given(st.lists(_LINES, max_size=6).map("\n".join), st.sampled_from(["text/plain", OPEN_METRICS, ""]))
def test_garbage_is_unexpected_or_read_and_nothing_else(text: str, content_type: str) -> None:
    try:
        found = list(parsing.parse(text.encode(errors="replace"), content_type, Reject()))
    except Unexpected:
        return
    assert all(isinstance(one, RawFamily) for one in found)


@given(st.binary(max_size=40), st.sampled_from(["text/plain", OPEN_METRICS]))
def test_bytes_that_are_no_text_are_unexpected_or_read(data: bytes, content_type: str) -> None:
    try:
        list(parsing.parse(data, content_type, Reject()))
    except Unexpected:
        return


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff", b"1" * 10_000])
def test_what_is_no_json_is_unexpected(text: bytes) -> None:
    with pytest.raises(Unexpected, match="no JSON"):
        parsing.json_document(text)
