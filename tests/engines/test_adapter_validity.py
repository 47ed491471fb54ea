"""What an adapter shows is valid to those who read it: promtool, a real Prometheus, whatever its sources say."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from contract.client import ADAPTER, Client
from contract.conftest import serve
from contract.line import seconds
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from servers import RunningServer
from sources import Source, page
from support.prometheus import promtool, scraping
from support.upstreams import memcached, redis
from workers import eventually

__all__ = ["serve"]

strict: Any = text_string_to_metric_families
OPEN_METRICS = "application/openmetrics-text;version=1.0.0"
STYLE = (
    "no help text", "should be listed", "use base unit", "should have", "should not", "counter metrics",
    "non-histogram", "metric name", "metric type", "names should", "abbreviated",
)  # fmt: skip
"""What promtool says of names and help texts that are the sources' own."""


def odd_page(seed: int) -> str:
    """Names, labels and values that no good app would have, and that a parser takes all the same."""
    draw = random.Random(seed)
    lines = []
    names = [
        "x", "x_total", "x_count", "x_bucket", "x_sum", "x_info", "up", "app_requests_total", "retinue_adapter_up",
        "process_open_fds", "process_cpu_seconds_total", "a:b", "_", "__", "A_ms", "job_seconds_total",
    ]  # fmt: skip
    for _ in range(60):
        name = draw.choice(names) + draw.choice(
            ["", "", "_created", "_ms", "_percent", draw.choice(string.ascii_letters)]
        )
        label = draw.choice(["target", "le", "quantile", "job", "instance", "a", "exported_target"])
        text = "".join(draw.choice('ab"\\\n €é\u2028{}=,#') for _ in range(draw.randrange(6)))
        escaped = text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        value = draw.choice(["1", "-1", "NaN", "+Inf", "-Inf", "1e300", "0"])
        if draw.random() < 0.3:
            lines.append(f"# TYPE {name} {draw.choice(['counter', 'gauge', 'untyped'])}")
        lines.append(f'{name}{{{label}="{escaped}"}} {value}')
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With a target of every kind that tells or is asked here."""
    from servers import start_server  # noqa: PLC0415 - as serve does, for the module

    where = tmp_path_factory.mktemp("adapter")
    with ExitStack() as stack:
        started = start_server(where, "adapter", "--metrics", "127.0.0.1:0")
        stack.callback(started.kill)
        operator = stack.enter_context(Client(started.control, services=ADAPTER))

        def create(target_id: str, kind: str, endpoint: str = "", **fields: Any) -> None:
            target = {"target_id": target_id, "kind": f"TARGET_KIND_{kind}", "endpoint": endpoint, **fields}
            operator.CreateTarget(target={**target, "interval_duration": seconds(1)}, wait_duration=seconds(15))

        create("redis", "REDIS", stack.enter_context(redis()))
        create("memcached", "MEMCACHED", stack.enter_context(memcached()))
        create("statsd", "STATSD", "udp:127.0.0.1:0")
        create("reports", "REPORT")
        numbers = '{"memstats": {"HeapAlloc": 5, "NextGC": 10, "NumGC": 1e400, "odd": "\\ud800"}}'
        create("json", "JSON", stack.enter_context(Source(numbers)).endpoint, rule_pack="expvar")
        for seed in range(8):
            create(f"odd-{seed}", "PROMETHEUS", stack.enter_context(Source(odd_page(seed))).endpoint)
            shown = operator.GetTarget(target_id=f"odd-{seed}").target.status
            assert shown.series > 10, shown.message
        create("nobody", "NGINX", "http://127.0.0.1:1/")
        odd = {"name": "jobs.done!", "type": "METRIC_TYPE_COUNTER", "series": [{"labels": {"é": "\n"}, "number": 1.0}]}
        operator.ReportMetrics(target_id="reports", metrics=[odd])
        eventually(lambda: 'target="reports"' in page(started.ready["metrics"])[2], "the report is shown")
        yield started


def test_promtool_takes_every_page(server: RunningServer) -> None:
    address = server.ready["metrics"]
    for target_id in ("redis", "memcached", "json"):
        text = page(address, f"/metrics/{target_id}")[2]
        assert [line for line in promtool(text) if "error while linting" in line or "parsing" in line] == []
    for path in ("/metrics", *(f"/metrics/odd-{seed}" for seed in range(8))):
        complaints = [line for line in promtool(page(address, path)[2]) if not any(word in line for word in STYLE)]
        assert complaints == [], path


def test_names_and_help_of_shipped_packs_are_as_promtool_wants_them(server: RunningServer) -> None:
    for target_id in ("redis", "memcached", "json"):
        assert promtool(page(server.ready["metrics"], f"/metrics/{target_id}")[2]) == [], target_id


def test_the_strict_parser_takes_every_page_and_no_series_is_there_twice(server: RunningServer) -> None:
    for path in ("/metrics", "/metrics/redis", "/metrics/odd-0"):
        seen = set()
        for family in strict(page(server.ready["metrics"], path, accept=OPEN_METRICS)[2]):
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                assert key not in seen
                seen.add(key)
        assert seen


def test_a_real_prometheus_scrapes_it_without_a_warning(server: RunningServer, tmp_path: Path) -> None:
    with scraping(server.ready["metrics"], tmp_path) as prometheus:
        eventually(
            lambda: len(prometheus.query('count_over_time(up{target=""}[1m]) >= 5')) == 1, "it was scraped five times"
        )
        assert [value for _, value in prometheus.query('min_over_time(up{target=""}[1m])')] == [1.0]
        found = {labels["exported_target"] if "exported_target" in labels else labels["target"]: value
                 for labels, value in prometheus.query("retinue_adapter_up")}  # fmt: skip
        assert found["redis"] == found["memcached"] == found["json"] == 1.0
        assert found["nobody"] == 0.0
        assert prometheus.query('redis_connected_clients{target="redis"}')
        assert prometheus.query('app_requests_total{target="redis"}')
        warnings = [line for line in prometheus.log.splitlines() if "level=warn" in line or "level=error" in line]
        assert warnings == []


# Slow ones


def test_ten_that_hang_change_nothing_for_the_others_and_a_huge_one_little(serve: Any, tmp_path: Path) -> None:
    """Good ones are asked as often as their interval says, and `/metrics` answers as quickly as ever."""
    with ExitStack() as stack:
        good, hung = (stack.enter_context(Source()) for _ in range(2))
        huge = stack.enter_context(Source("".join(f'x{{number="{n:06}"}} 1\n' for n in range(1 << 17))))
        hung.lets.clear()
        server = serve("adapter", "--metrics", "127.0.0.1:0")
        operator = stack.enter_context(Client(server.control, services=ADAPTER))

        def create(target_id: str, source: Source, **fields: Any) -> None:
            said = {"kind": "TARGET_KIND_PROMETHEUS", "endpoint": source.endpoint, "interval_duration": seconds(1)}
            operator.CreateTarget(target={"target_id": target_id, **said, **fields})

        for n in range(10):
            create(f"hung-{n}", hung)
        create("huge", huge, limits={"max_bytes": 64 << 20, "max_series": 1000})
        create("good", good)
        eventually(lambda: good.asked >= 1, "it is asked")
        began, asked = time.monotonic(), good.asked
        slowest = 0.0
        while time.monotonic() < began + 5:
            before = time.monotonic()
            assert page(server.ready["metrics"])[0] == 200
            slowest = max(slowest, time.monotonic() - before)
        passed = time.monotonic() - began
        assert 2 <= good.asked - asked <= passed + 1.5, "behind ten that hang for a second each it would be one"
        assert slowest < 5.0, "nobody waits for targets' timeouts, or for a huge page"
        status = operator.GetTarget(target_id="good").target.status
        assert status.state == 2
        assert "did not answer within 1 s" in operator.GetTarget(target_id="hung-0").target.status.message
