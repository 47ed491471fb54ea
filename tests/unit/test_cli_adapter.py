"""What `retinue adapter` shows and asks for."""

from __future__ import annotations

import io
from collections.abc import Sequence

import click
import pytest
from rich.console import Console

from retinue.adapter.v1 import adapter_service_pb2 as api
from retinue.adapter.v1 import metric_pb2 as pb
from retinue.cli import adapter, adapter_read
from retinue.client.adapter import Change, match

INFINITE = float("inf")


def histogram(*counts: int, bounds: Sequence[float] = (0.001, 0.01, INFINITE)) -> pb.Histogram:
    """Of these in each bucket, by themselves."""
    found = pb.Histogram(count=sum(counts))
    for place, bound in enumerate(bounds):
        found.buckets.add(upper_bound=bound, cumulative_count=sum(counts[: place + 1]))
    return found


@pytest.mark.parametrize(
    ("counts", "share", "found"),
    [
        ((0, 0, 0), 0.5, None),
        ((10, 0, 0), 0.5, 0.001),
        ((10, 10, 0), 0.5, 0.001),
        ((1, 99, 0), 0.5, 0.01),
        ((98, 2, 0), 0.99, 0.01),
        ((0, 0, 5), 0.5, None),
    ],
)
def test_a_quantile_is_the_bound_of_its_bucket(counts: tuple[int, ...], share: float, found: float | None) -> None:
    assert adapter_read.quantile(histogram(*counts), share) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a", match("a", targets=["t"])),
        ("a*", match("a*", targets=["t"])),
        ("{x=1}", match(targets=["t"], labels={"x": "1"})),
        ('a{x="1", y=b=c}', match("a", targets=["t"], labels={"x": "1", "y": "b=c"})),
        ("a{}", match("a", targets=["t"])),
    ],
)
def test_a_match_is_read_as_people_write_it(text: str, found: api.Match) -> None:
    assert adapter_read.selected([text], ["t"]) == [found]


@pytest.mark.parametrize("text", ["a{x", "a}x{", "a{x}", "a{x=1}b", "{{x=1}}"])
def test_what_is_no_match_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError, match="is no match"):
        adapter_read.selected([text], [])


def test_no_match_is_all_and_a_target_alone_is_all_of_it() -> None:
    assert adapter_read.selected([], []) == []
    assert adapter_read.selected([], ["t"]) == [match(targets=["t"])]


@pytest.mark.parametrize(
    ("sample", "shown"),
    [
        ("a 1.0", "a 1.0"),
        ('a{instance="i",kind="k",service="s",target="t"} 1.0', "a 1.0"),
        ('a{code="200",instance="i",kind="k"} 1.0', 'a{code="200"} 1.0'),
        ('a{kind="k",text="say \\"hi, kind=\\" {} ",target="t"} NaN', 'a{text="say \\"hi, kind=\\" {} "} NaN'),
    ],
)
def test_a_sample_is_shown_without_the_labels_that_all_have(sample: str, shown: str) -> None:
    assert adapter._without_ours(sample) == shown


def series(number: float, *, stale: bool = False, **labels: str) -> pb.Metric:
    return pb.Metric(name="a", series=[pb.Series(number=number, labels={"target": "t", **labels}, stale=stale)])


def test_a_new_snapshot_makes_forget_what_was_known() -> None:
    known: dict[adapter_read.Key, tuple[pb.Metric, pb.Series]] = {}
    adapter_read.apply(Change([series(1, x="1"), series(2, x="2")], begins=True, synced=True, coalesced=0), known)
    changed = adapter_read.apply(Change([series(3, x="1")], begins=False, synced=False, coalesced=0), known)
    assert [found.number for _, found in known.values()] == [2, 3]
    assert changed == {("a", (("target", "t"), ("x", "1")))}
    assert (
        adapter_read.apply(Change([series(0, stale=True, x="2")], begins=False, synced=False, coalesced=0), known)
        == set()
    )
    assert [found.number for _, found in known.values()] == [3]
    adapter_read.apply(Change([], begins=True, synced=True, coalesced=0), known)
    assert known == {}


@pytest.mark.parametrize(
    ("unit", "number", "shown"),
    [
        ("bytes", 1234567, "1,234,567 bytes"),
        ("ratio", 0.125, "12.5%"),
        ("", float("nan"), "nan"),
        ("seconds", INFINITE, "inf seconds"),
        ("", 0.1234567, "0.123457"),
    ],
)
def test_values_are_shown_with_their_unit(unit: str, number: float, shown: str) -> None:
    metric = pb.Metric(name="a", unit=unit, series=[pb.Series(number=number, labels={"target": "t"})])
    said = io.StringIO()
    Console(file=said, width=80).print(adapter_read.metrics_table({("a", ()): (metric, metric.series[0])}))
    assert said.getvalue().splitlines()[1].split(None, 2)[2] == shown
