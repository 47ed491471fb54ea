"""Claims about built-in merges: what they give, that the order of coming does not count, and what they refuse."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue_server.scattergather.core import merges
from retinue_server.scattergather.core.requests import Malformed
from retinue_server.scattergather.core.topology import MergeKind, Merging

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-(2**53), 2**53)


def merged(kind: MergeKind, *replies: Any, order: list[int] | None = None, **said: Any) -> Any:
    """The result of replies, given as JSON values, in this order of coming."""
    merge = merges.make(Merging(kind, **said))
    for index in order or range(len(replies)):
        merge.add(index, json.dumps(replies[index]).encode())
    return merge.result()


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def test_each_kind_gives_what_the_contract_says() -> None:
    assert merged(MergeKind.SUM, 1, 2.5, None) == 3.5
    assert merged(MergeKind.SUM, None) is None
    assert merged(MergeKind.MIN, 3, -1, 2) == -1
    assert merged(MergeKind.MAX, 3, -1, 2) == 3
    assert merged(MergeKind.COUNT, 3, 4) == 7
    assert merged(MergeKind.GROUP_SUM, {"de": 3, "fr": 1}, {"de": 1}) == {"de": 4, "fr": 1}
    assert merged(MergeKind.UNION, ["b", 2], ["a", "b", 1.5]) == [1.5, 2, "a", "b"]
    bars = {"bounds": [1, 2], "counts": [1, 0, 2], "sum": 7.5}
    assert merged(MergeKind.HISTOGRAM, bars, bars) == {"bounds": [1, 2], "counts": [2, 0, 4], "sum": 15}


def test_bytes_are_joined_and_collected_in_the_pools_order() -> None:
    for kind, result in ((MergeKind.CONCAT, b"abc"), (MergeKind.COLLECT, [(0, b"a"), (1, b"b"), (2, b"c")])):
        merge = merges.make(Merging(kind))
        for index in (2, 0, 1):
            merge.add(index, b"abc"[index : index + 1])
        assert merge.result() == result


@given(st.lists(FINITE, min_size=1, max_size=40), st.integers())
def test_sums_do_not_depend_on_the_order(numbers: list[float], seed: int) -> None:
    usual = merged(MergeKind.SUM, *numbers)
    assert merged(MergeKind.SUM, *numbers, order=shuffled(len(numbers), seed)) == usual
    assert math.isclose(usual, math.fsum(numbers))


@given(st.lists(st.dictionaries(st.sampled_from("abc"), FINITE), max_size=20), st.integers())
def test_group_sums_do_not_depend_on_the_order(groups: list[dict[str, float]], seed: int) -> None:
    usual = merged(MergeKind.GROUP_SUM, *groups)
    assert merged(MergeKind.GROUP_SUM, *groups, order=shuffled(len(groups), seed)) == usual


HITS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=8)


@given(st.lists(HITS, max_size=8), st.integers(1, 10), st.integers())
def test_top_k_is_what_sorting_everything_gives(shards: list[list[tuple[int, int]]], k: int, seed: int) -> None:
    """Ties go by the pool's order of shards, then by each shard's own."""
    replies = [[{"score": score, "id": name, "place": i} for score, name in hits] for i, hits in enumerate(shards)]
    everything = [
        (-hit["score"], place, rank, hit) for place, hits in enumerate(replies) for rank, hit in enumerate(hits)
    ]
    wanted = [hit for *_, hit in sorted(everything, key=lambda entry: entry[:3])][:k]
    assert merged(MergeKind.TOP_K, *replies, order=shuffled(len(replies), seed), top_k=k) == wanted


@given(st.lists(HITS, min_size=2, max_size=8), st.integers(1, 10), st.integers(1, 7))
def test_top_k_of_parents_is_that_of_all_leaves(shards: list[list[tuple[int, int]]], k: int, cut: int) -> None:
    replies = [[{"score": score, "id": name} for score, name in hits] for hits in shards]
    halves = [merged(MergeKind.TOP_K, *half, top_k=k) for half in (replies[:cut], replies[cut:]) if half]
    assert merged(MergeKind.TOP_K, *halves, top_k=k) == merged(MergeKind.TOP_K, *replies, top_k=k)


WRONG: dict[MergeKind, list[str]] = {
    MergeKind.SUM: ["", "x", '"1"', "[1]", "NaN", "1e999", "true", "9" * 400],
    MergeKind.COUNT: ["null", "-1", "1.5", "{}"],
    MergeKind.GROUP_SUM: ["[]", '{"a": null}', '{"a": "1"}', '{"a": 1e999}'],
    MergeKind.UNION: ["{}", "[null]", "[[1]]", "[1e999]"],
    MergeKind.TOP_K: [
        "{}",
        "[1]",
        '[{"id": 1}]',
        '[{"score": "1", "id": 1}]',
        '[{"score": 1}]',
        '[{"score": 1, "id": null}]',
    ],
    MergeKind.HISTOGRAM: [
        "[]",
        '{"bounds": [1], "counts": [1]}',
        '{"bounds": [2, 1], "counts": [1, 1, 1]}',
        '{"bounds": [1], "counts": [1, -1]}',
        '{"bounds": [1], "counts": [1, 1], "sum": 1e999}',
    ],
}


@pytest.mark.parametrize(("kind", "reply"), [(kind, reply) for kind, replies in WRONG.items() for reply in replies])
def test_a_reply_that_is_none_is_refused_and_leaves_no_trace(kind: MergeKind, reply: str) -> None:
    merge = merges.make(Merging(kind, top_k=3))
    before = merge.result()
    with pytest.raises(Malformed):
        merge.add(0, reply.encode())
    assert merge.result() == before


def test_histograms_must_have_the_same_bounds() -> None:
    merge = merges.make(Merging(MergeKind.HISTOGRAM))
    merge.add(0, b'{"bounds": [1], "counts": [1, 1]}')
    with pytest.raises(Malformed):
        merge.add(1, b'{"bounds": [2], "counts": [1, 1]}')


def test_a_sum_that_no_double_holds_is_refused() -> None:
    with pytest.raises(Malformed):
        merged(MergeKind.SUM, 1.7e308, 1.7e308)


@given(st.binary(max_size=40))
def test_garbage_never_does_more_than_being_refused(garbage: bytes) -> None:
    for kind in WRONG:
        merge = merges.make(Merging(kind, top_k=3))
        try:
            merge.add(0, garbage)
            merge.result()
        except Malformed:
            pass
