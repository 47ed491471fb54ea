"""Claims about StatsD: each dialect, each type, what the kernel drops, and mapping files of statsd_exporter."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from retinue_server.adapter import packfile
from retinue_server.adapter.core.packs import Pack
from retinue_server.adapter.core.points import Histogram, RawFamily, Summary, Type
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.engines.statsd import StatsdListener
from retinue_server.runtime.errors import FailedPrecondition


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(pack: str = "", clock: Callable[[], float] | None = None, **more: Any) -> StatsdListener:
    rules = packfile.read("rules", pack.encode()) if pack else None
    return StatsdListener(Spec("it", Kind.STATSD, "udp:127.0.0.1:0", **more), rules, clock or Clock())


def values(listener: StatsdListener) -> dict[str, Any]:
    """By `name{label=value,...}`."""
    found = {}
    for family in listener.drain():
        for point in family.points:
            labels = ",".join(f"{key}={value}" for key, value in sorted(point.labels.items()))
            found[f"{family.name}{{{labels}}}" if labels else family.name] = point.value
    return found


DIALECTS = {
    "dogstatsd": b"served:1|c|#shop:a,zone:b",
    "influxdb": b"served,shop=a,zone=b:1|c",
    "librato": b"served#shop=a,zone=b:1|c",
    "signalfx": b"served[shop=a,zone=b]:1|c",
}


@pytest.mark.parametrize("line", DIALECTS.values(), ids=DIALECTS)
def test_tags_are_labels_in_every_dialect(line: bytes) -> None:
    listener = made()
    listener.take(line)
    assert values(listener) == {"served{shop=a,zone=b}": 1}


def test_the_dialects_of_one_series_are_one_series() -> None:
    listener = made()
    listener.take(b"\n".join(DIALECTS.values()))
    assert values(listener) == {"served{shop=a,zone=b}": 4}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b"a.b-c:2|c\na.b-c:3|c", {"a_b_c": 5}),
        (b"a:1|c|@0.1\na:1|c", {"a": 11}),
        (b"a:1:2:3|c", {"a": 6}),
        (b"a:5|g\na:+2|g\na:-3|g", {"a": 4}),
        (b"a:-3|g", {"a": -3}),
        (b"a:x|s\na:y|s\na:x|s", {"a": 2}),
        (b"a:1|c|#t:1|@0.5|c:container", {"a{t=1}": 2}),
        (b"a:1|c|T1656581400\na:1|c|T1656581401", {"a": 2}),
        (b"a:1|c|#new", {"a{new=true}": 1}),
        (b"a:1|c\n\na:1|c\n", {"a": 2}),
        (b"a:1|c|@0\na:1|c|@7\na:1|c|@x", {"a": 3}),
    ],
)
def test_what_lines_mean(lines: bytes, expected: dict[str, float]) -> None:
    listener = made()
    listener.take(lines)
    assert values(listener) == expected
    assert not listener.reject.counts


def test_timers_are_histograms_in_seconds_and_a_rate_counts_for_several() -> None:
    listener = made()
    listener.take(b"t:250|ms|@0.5\nt:90000|ms\nsize:7|h\nspread:7:8|d")
    families = {family.name: family for family in listener.drain()}
    timer = families["t"]
    assert (timer.type, timer.unit) == (Type.HISTOGRAM, "s")
    value = timer.points[0].value
    assert isinstance(value, Histogram)
    assert value.sum == pytest.approx(90.5)
    assert value.count == 3
    assert [count for bound, count in value.buckets if bound in (0.1, 0.25, math.inf)] == [0, 2, 3]
    assert families["size"].unit == ""
    assert families["spread"].points[0].value.count == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a:|c", "not_a_number"),
        (b"a:x|c", "not_a_number"),
        (b"a:-1|c", "not_a_number"),
        (b"a:nan|c", "not_a_number"),
        (b"a:inf|ms", "not_a_number"),
        (b"a:1:x|c", "not_a_number"),
        (b"a:|g", "not_a_number"),
        (b"nonsense", "bad_line"),
        (b"a:1", "bad_line"),
        (b"a:1|zz", "unknown_type"),
        (b"_e{5,4}:title|text", "unknown_type"),
        (b"\xff\xfe\x00", "bad_line"),
    ],
)
def test_a_line_that_makes_no_sense_costs_itself_and_is_counted(line: bytes, reason: str) -> None:
    listener = made()
    for _ in range(2):
        listener.take(b"good:1|c\n" + line + b"\ngood:1|c")
    assert values(listener)["good"] == 4
    assert listener.reject.counts == {reason: 2}


def test_a_set_counts_anew_after_each_collection() -> None:
    listener = made()
    listener.take(b"users:a|s\nusers:b|s")
    assert values(listener) == {"users": 2}
    listener.take(b"users:c|s")
    assert values(listener) == {"users": 1}


def test_known_series_stay_when_there_is_no_room_for_new_ones() -> None:
    from retinue_server.adapter.core.collection import Limits  # noqa: PLC0415 - here alone

    listener = made(limits=Limits(max_series=2))
    listener.take(b"a:1|c\nb:1|c\nc:1|c\na:1|c|#x:y")
    listener.take(b"a:1|c\nc:1|c")
    assert values(listener) == {"a": 2, "b": 1}
    assert listener.reject.counts == {"series_limit": 3}


def test_a_series_without_news_goes_and_begins_anew(clock: Clock) -> None:
    listener = made(clock=clock, interval_s=10.0)
    take(listener, b"a:1|c\nb:1|c")
    clock.now += 40
    take(listener, b"b:1|c")
    clock.now += 20
    assert values(listener) == {"b": 2}
    take(listener, b"a:1|c")
    assert values(listener) == {"a": 1, "b": 2}


def take(listener: StatsdListener, datagram: bytes) -> None:
    """At the present of the listener's clock, as if it came by the socket."""
    listener._now = listener._clock()
    listener.take(datagram)


# Sockets


@contextlib.asynccontextmanager
async def listening(endpoint: str) -> AsyncIterator[StatsdListener]:
    listener = StatsdListener(Spec("it", Kind.STATSD, endpoint))
    await listener.open()
    try:
        yield listener
    finally:
        await listener.close()


def sender(listener: StatsdListener) -> socket.socket:
    kind, _, rest = listener.address.partition(":")
    if kind == "unixgram":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.connect(rest)
        return sock
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    host, _, port = rest.rpartition(":")
    sock.connect((host, int(port)))
    return sock


async def test_udp_and_the_unix_socket_take_the_same(tmp_path: Path) -> None:
    for endpoint in ("udp:127.0.0.1:0", f"unixgram:{tmp_path}/s"):
        async with listening(endpoint) as listener:
            with sender(listener) as sock:
                await asyncio.to_thread(lambda: [sock.send(b"a:1|c\nb:2|g") for _ in range(100)])
                async with asyncio.timeout(30):
                    while listener.received < 100:
                        await asyncio.sleep(0.01)
            assert values(listener) == {"a": 100, "b": 2}
            assert listener.dropped == 0


async def test_what_was_sent_is_what_came_and_what_the_kernel_dropped() -> None:
    """The reader stands still while more is sent than the kernel keeps."""
    sent = 60_000
    async with listening("udp:127.0.0.1:0") as listener:
        with sender(listener) as sock:
            for _ in range(sent):
                sock.send(b"a:1|c|#some:tag")  # on loopback it is there, or dropped, when this returns
            assert listener.received == 0
            dropped = listener.dropped
            assert 0 < dropped < sent
            async with asyncio.timeout(60):
                while listener.received + listener.dropped < sent:
                    await asyncio.sleep(0.01)
        assert (listener.received + listener.dropped, listener.dropped) == (sent, dropped)
        assert values(listener) == {"a{some=tag}": sent - dropped}


async def test_a_sender_to_a_unix_socket_waits_and_nothing_is_lost(tmp_path: Path) -> None:
    sent = 5000
    async with listening(f"unixgram:{tmp_path}/s") as listener:
        with sender(listener) as sock:
            await asyncio.to_thread(lambda: [sock.send(b"a:1|c") for _ in range(sent)])
            async with asyncio.timeout(30):
                while listener.received < sent:
                    await asyncio.sleep(0.01)
        assert values(listener) == {"a": sent}
        assert listener.dropped == 0


async def test_a_port_that_is_taken_is_refused_by_name() -> None:
    async with listening("udp:127.0.0.1:0") as listener:
        with pytest.raises(FailedPrecondition, match=r"cannot listen on .*; choose another"):
            async with listening(listener.address):
                pass


async def test_a_file_is_not_removed_for_a_socket_and_an_old_socket_is(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("data")
    with pytest.raises(FailedPrecondition):
        async with listening(f"unixgram:{file}"):
            pass
    assert file.read_text() == "data"
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(left))
    async with listening(f"unixgram:{left}"):
        assert left.is_socket()
    assert not left.exists()


# Mapping files

MAPPING = """
defaults:
  observer_type: histogram
  histogram_options: {buckets: [0.1, 1]}
  ttl: 1m
  glob_disable_ordering: false
mappings:
- match: shop.*.orders.*
  name: "orders_total"
  help: Orders.
  labels: {shop: $1, outcome: "${2}", job: shop}
- match: 'db\\.(?P<table>\\w+)\\.(\\d+)'
  match_type: regex
  name: "db_${table}"
  labels: {shard: $2}
- match: http.*
  match_metric_type: timer
  timer_type: summary
  quantiles: [{quantile: 0.5, error: 0.01}, {quantile: 0.9, error: 0.01}]
  name: http_wait
  labels: {path: $1}
- match: http.*
  match_metric_type: counter
  name: http_calls
  labels: {path: $1}
- match: size.*
  scale: 1024
  name: sizes
  labels: {of: $1}
  honor_labels: true
- match: kept.*
  name: kept
  ttl: 1h
- match: "internal"
  match_type: regex
  action: drop
"""


def test_a_mapping_file_is_a_rule_pack(clock: Clock) -> None:
    listener = made(MAPPING, clock)
    take(listener, b"shop.a.orders.ok:2|c\nshop.b.orders.ok:1|c\nshop.a.x.orders.ok:1|c")
    take(listener, b"db.users.7:3|g\nhttp.home:100|ms\nhttp.home:300|ms\nhttp.home:2|c\nsize.x:2|g|#of:tag")
    take(listener, b"some.internal.thing:1|c\nother:50|ms")
    families = {family.name: family for family in listener.drain()}
    assert {name: family.type.name for name, family in families.items()} == {
        "orders_total": "COUNTER",
        "shop_a_x_orders_ok": "COUNTER",
        "db_users": "GAUGE",
        "http_wait": "SUMMARY",
        "http_calls": "COUNTER",
        "sizes": "GAUGE",
        "other": "HISTOGRAM",
    }
    assert families["orders_total"].help == "Orders."
    assert [(point.labels, point.value) for point in families["orders_total"].points] == [
        ({"shop": "a", "outcome": "ok", "job": "shop"}, 2),
        ({"shop": "b", "outcome": "ok", "job": "shop"}, 1),
    ]
    assert (families["db_users"].points[0].labels, families["db_users"].points[0].value) == ({"shard": "7"}, 3)
    waits = families["http_wait"].points[0].value
    assert isinstance(waits, Summary)
    assert (waits.quantiles, waits.count) == (((0.5, 0.3), (0.9, 0.3)), 2)
    assert waits.sum == pytest.approx(0.4)
    assert (families["sizes"].points[0].labels, families["sizes"].points[0].value) == ({"of": "tag"}, 2048)
    assert _bounds(families["other"]) == [0.1, 1, math.inf]
    assert not listener.reject.counts


def _bounds(family: RawFamily) -> list[float]:
    value = family.points[0].value
    assert isinstance(value, Histogram)
    return [bound for bound, _ in value.buckets]


def test_each_rule_may_say_how_long_its_series_stay(clock: Clock) -> None:
    listener = made(MAPPING, clock)
    take(listener, b"kept.a:1|c\nshop.a.orders.ok:1|c")
    clock.now += 61
    assert set(values(listener)) == {"kept"}
    clock.now += 3600
    assert not values(listener)


def test_every_rule_that_cannot_be_used_is_named() -> None:
    text = """
kind: statsd
mappings:
- {match: fine.*, name: fine}
- {match: "a.b*", name: a}
- {match: "(", match_type: regex, name: b}
- {match: c.*, name: c, labels: {x: $2}}
- {match: d}
- {match: e, name: e, ttl: 5 parsecs}
- {match: f, name: f, histogram_options: {native_histogram_bucket_factor: 1.1}}
- {match: g, name: g, buckets: [2, 1]}
- {name: h}
"""
    with pytest.raises(packfile.PackError) as error:
        packfile.read("rules.yaml", text.encode())
    told = str(error.value)
    for number, words in enumerate(
        ("'b*' is no component", "(match: (): missing )", "$2 stands for nothing", "name must be given", "no duration",
         "unknown field `native_histogram_bucket_factor`", "buckets must rise", "(match: none)"), start=1
    ):  # fmt: skip
        assert f"mappings[{number}]" in told
        assert words in told
    assert "mappings[0]" not in told


def test_what_the_defaults_cannot_mean_is_named() -> None:
    with pytest.raises(packfile.PackError, match=r"defaults: .*glob_disable_ordering"):
        packfile.read("rules.yaml", b"kind: statsd\ndefaults: {glob_disable_ordering: true}\nmappings: []")


def test_the_whole_name_and_what_is_around_a_match_count_as_there() -> None:
    """Patterns are searched for, as there; `$0` is what was found."""
    listener = made("""
mappings:
- {match: '^app\\.(.+)_counter$', match_type: regex, name: "${1}_count"}
- {match: 'b.d', match_type: regex, name: "all_${0}"}
""")
    listener.take(b"app.x.y_counter:1|c\nxbadx:1|c\nxb.dx:1|c")
    assert values(listener) == {"x.y_count": 1, "all_bad": 1, "all_b.d": 1}


def test_mappings_are_for_statsd_alone() -> None:
    with pytest.raises(packfile.PackError, match="mappings are for kind statsd"):
        packfile.read("rules.yaml", b"kind: redis\nmappings: [{match: a, name: b}]")


def test_rules_that_change_hold_from_then_on() -> None:
    listener = made("mappings: [{match: a, name: before}]")
    listener.take(b"a:1|c")
    pack: Pack = packfile.read("rules", b"kind: statsd\nmappings: [{match: a, name: after}]")
    listener.use(pack)
    listener.take(b"a:1|c")
    assert values(listener) == {"before": 1, "after": 1}
