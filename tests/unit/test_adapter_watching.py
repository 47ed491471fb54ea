"""Claims about what watchers are told, and about what crosses the pipe from the worker."""

import math

import msgspec
import pytest
from prometheus_client import parser as library

from retinue_server.adapter import parsing
from retinue_server.adapter.core.collection import Collector, Limits, Registry
from retinue_server.adapter.core.matching import Match
from retinue_server.adapter.core.packs import Reject
from retinue_server.adapter.core.points import Family, Histogram, Packed, Raw, RawFamily, Series, Type
from retinue_server.adapter.core.target import Shown
from retinue_server.adapter.watching import NOTHING, Change, Feeds

MATCHES = [Match("jobs")]


def shown(time_ms: int, **jobs: float) -> Shown:
    series = [Series((("queue", queue),), value) for queue, value in jobs.items()]
    others = Family("others", Type.GAUGE, "", "", [Series((), float(time_ms))])
    return Shown([Family("jobs", Type.GAUGE, "", "", series), others], (), time_ms)


def told(change: Change) -> dict[str, tuple[float, bool]]:
    """By queue: the value, and whether it is gone."""
    return {
        one.labels["queue"]: (one.number, one.stale)
        for message in change.messages
        for metric in message.metrics
        for one in metric.series
    }


def test_a_new_watcher_is_told_all_that_matches_and_then_what_changed() -> None:
    feed = Feeds().of(MATCHES)
    first = feed.change("shop", shown(1, a=1.0, b=2.0), NOTHING)
    assert told(first) == {"a": (1.0, False), "b": (2.0, False)}
    second = feed.change("shop", shown(2, a=1.0, b=3.0, c=4.0), first.now)
    assert told(second) == {"b": (3.0, False), "c": (4.0, False)}


def test_what_is_not_there_any_more_is_told_with_what_it_was_last() -> None:
    feed = Feeds().of(MATCHES)
    first = feed.change("shop", shown(1, a=1.0, b=2.0), NOTHING)
    second = feed.change("shop", shown(2, b=2.0), first.now)
    assert told(second) == {"a": (1.0, True)}
    assert told(feed.change("shop", None, second.now)) == {"b": (2.0, True)}


def test_who_keeps_up_shares_the_messages_whoever_else_comes() -> None:
    feed = Feeds().of(MATCHES)
    first, second = shown(1, a=1.0), shown(2, a=2.0)
    known = feed.change("shop", first, NOTHING).now
    late = feed.change("shop", second, NOTHING)
    one, other = (feed.change("shop", second, known) for _ in range(2))
    assert one.messages is other.messages
    third = shown(3, a=3.0)
    assert feed.change("shop", third, late.now).messages is feed.change("shop", third, one.now).messages


def test_who_missed_a_collection_is_told_all_that_changed_since() -> None:
    feed = Feeds().of(MATCHES)
    slow = feed.change("shop", shown(1, a=1.0, b=1.0), NOTHING).now
    feed.change("shop", shown(2, a=2.0, b=1.0), slow)
    assert told(feed.change("shop", shown(3, a=2.0, b=3.0), slow)) == {"a": (2.0, False), "b": (3.0, False)}


def test_nothing_is_told_where_nothing_changed() -> None:
    feed = Feeds().of(MATCHES)
    nan = float("nan")
    first = feed.change("shop", shown(1, a=nan), NOTHING)
    assert feed.change("shop", shown(2, a=nan), first.now).messages == []


def test_a_feed_is_there_as_long_as_somebody_watches() -> None:
    feeds = Feeds()
    feed = feeds.of(MATCHES)
    assert feeds.of(list(MATCHES)) is feed
    assert feeds.of([Match("others")]) is not feed
    feed.change("shop", shown(1, a=1.0), NOTHING)
    del feed
    assert not feeds.of(MATCHES).change("shop", None, NOTHING).messages


def test_a_family_crosses_the_pipe_unopened_and_is_the_same_then() -> None:
    series = [Series((("queue", str(number)),), float(number), number) for number in range(1000)]
    family = Family("jobs", Type.COUNTER, "", "Jobs.", series, b"jobs_total 1.0\n")
    sent = msgspec.msgpack.encode(family.packed())
    came = msgspec.msgpack.decode(sent, type=Packed)
    assert (came.name, came.type, came.unit, came.help, came.text) == (
        family.name,
        family.type,
        family.unit,
        family.help,
        family.text,
    )
    assert came.count == len(series)
    assert came.series == series
    assert msgspec.msgpack.encode(came) == sent


def test_lines_of_a_histogram_stand_with_its_value_and_change_with_it() -> None:
    collector = Collector("shop", {"target": "shop"}, Limits(), Registry())

    def lines(*counts: float, total: float) -> bytes:
        value = Histogram(((0.1, counts[0]), (math.inf, counts[1])), total, counts[1])
        [family] = collector.take([RawFamily("wait_seconds", Type.HISTOGRAM, [Raw({"path": 'a"b'}, value)])], 1)
        return family.text

    first = lines(1, 2, total=0.5)
    assert lines(1, 2, total=0.5) == first
    assert lines(1, 3, total=0.5) == first.replace(b" 2.0\n", b" 3.0\n")
    assert first == (
        b'wait_seconds_bucket{path="a\\"b",target="shop",le="0.1"} 1.0\n'
        b'wait_seconds_bucket{path="a\\"b",target="shop",le="+Inf"} 2.0\n'
        b'wait_seconds_count{path="a\\"b",target="shop"} 2.0\n'
        b'wait_seconds_sum{path="a\\"b",target="shop"} 0.5\n'
    )


@pytest.mark.parametrize("content_type", ["text/plain", "application/openmetrics-text"])
def test_labels_are_the_same_however_often_their_text_comes(content_type: str) -> None:
    long = "x" * 1000
    text = f"""# TYPE up gauge
up{{a="1",b="\\"two\\\\\\n"}} 1
up{{a="{long}"}} 2
{{"up",a="3"}} 3
# EOF
"""
    found = [
        [
            (point.labels, point.value)
            for family in parsing.parse(text.encode(), content_type, Reject())
            for point in family.points
        ]
        for _ in range(3)
    ]
    assert found[0] == [({"a": "1", "b": '"two\\\n'}, 1), ({"a": long}, 2), ({"a": "3"}, 3)]
    assert found[1:] == found[:1] * 2


def test_the_library_that_is_pinned_remembers_and_looks_at_a_text_once() -> None:
    looked = []

    def parse(text: str, *_: bool) -> dict[str, str]:
        looked.append(text)
        return {"a": text}

    parse_labels = parsing.remembered(parse)
    found = [parse_labels(text) for text in ("x", "y", "x")]
    found[0].clear()
    assert parse_labels("x") == {"a": "x"}
    assert looked == ["x", "y"]
    open_metrics, plain = parsing._parsers()
    assert plain.parse_labels is open_metrics.parse_labels
    assert plain.parse_labels.__module__ == parsing.__name__


def test_what_the_library_refuses_stays_refused() -> None:
    for _ in range(2):
        parsing._parsers()  # from now on it remembers
        with pytest.raises(ValueError, match="Invalid labels"):
            library.parse_labels('a="1",a="2"')
