"""The adapter in real pods: beside a Redis that knows nothing of it, and read by a real Prometheus in another pod.

The pods come from deploy/overlays/adapter-podman-ci. What podman cannot show is listed in deploy/adapter/README.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.pods import ROOT, Cluster, Pod, PodError, await_true, probe

OVERLAY = ROOT / "deploy/overlays/adapter-podman-ci"

pytestmark = pytest.mark.timeout(600)  # the first test may also build the images


@pytest.fixture(scope="module")
def programs(image: str) -> str:
    """An image of Debian with Redis and Prometheus, and nothing of ours."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap: apt-get install mmdebstrap")
    command = [str(ROOT / "deploy/image/base.sh"), "redis-server", "prometheus", "curl"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture(scope="module")
def cluster(image: str, programs: str) -> Iterator[Cluster]:
    with Cluster(OVERLAY, image, {}, images=dict.fromkeys(("redis", "prometheus"), programs)) as cluster:
        yield cluster


class World:
    """The pods, and what its tests ask of them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.app = cluster.pod("my-app", "app")
        self.prometheus = cluster.pod("prometheus")
        told = [{"targets": [f"{self.app.address}:7274"], "labels": {}}]
        cluster.update("prometheus-config", {"pods.json": json.dumps(told)})

    def redis(self, *words: str) -> str:
        """As the app's own client."""
        return self.app.run("app", "redis-cli", *words)

    def page(self, name: str = "", *, check: bool = True) -> str:
        """Of the adapter, as another pod reads it."""
        url = f"http://{self.app.address}:7274/metrics{name}"
        return self.prometheus.run("server", "curl", "-sf", "--max-time", "5", url, check=check)

    def asked(self, query: str) -> list[dict[str, Any]]:
        """What Prometheus knows."""
        words = ("curl", "-sf", "--data-urlencode", f"query={query}", "http://127.0.0.1:9090/api/v1/query")
        found: list[dict[str, Any]] = json.loads(self.prometheus.run("server", *words))["data"]["result"]
        return found

    def value(self, query: str) -> float:
        """Of the one series; NaN for none."""
        found = self.asked(query)
        return float(found[0]["value"][1]) if found else float("nan")

    def state(self, target: str) -> str:
        """As Prometheus knows it."""
        found = self.asked(f'retinue_adapter_target_state{{target="{target}"}} == 1')
        return str(found[0]["metric"]["state"]) if found else ""


@pytest.fixture(scope="module")
def world(cluster: Cluster) -> World:
    world = World(cluster)
    await_true(lambda: world.state("redis") == "up", "Prometheus knows that Redis is up")
    return world


def test_prometheus_reads_golden_signals_of_an_app_that_knows_nothing_of_it(world: World) -> None:
    before = world.value('app_errors_total{target="redis"}')
    with pytest.raises(PodError, match="unknown command"):
        world.redis("-e", "no-such-command")
    await_true(lambda: world.value('app_errors_total{target="redis"}') == before + 1, "the error is counted")
    (series,) = world.asked('app_requests_total{target="redis"}')
    wanted = {"instance": "127.0.0.1:6379", "kind": "redis", "service": "my-app", "target": "redis"}
    assert wanted.items() <= series["metric"].items()
    assert world.asked('app_request_duration_seconds_count{target="redis"}') == [], "which Redis does not tell"


def test_prometheus_has_no_complaint(world: World) -> None:
    assert world.value("scrape_samples_scraped") > 50
    assert world.value("scrape_samples_scraped - scrape_samples_post_metric_relabeling") == 0
    assert "err=" not in world.prometheus.logs()


def test_values_are_those_of_redis_itself(world: World) -> None:
    before = world.value("redis_memory_used_bytes")
    world.redis("set", "here", "x" * 100_000)
    said = dict(line.split(":", 1) for line in world.redis("info", "memory").splitlines() if ":" in line)
    assert world.value("redis_memory_max_bytes") == float(said["maxmemory"]) == 64 << 20
    await_true(lambda: world.value('redis_db_keys{db="db0"}') == 1, "the key is there")
    await_true(lambda: world.value("redis_memory_used_bytes") > before + 90_000, "so is its size")


def test_what_the_app_sends_by_statsd_is_there(world: World) -> None:
    world.app.run("app", "bash", "-c", "echo -n 'orders:3|c|#shop:north' > /dev/udp/127.0.0.1/8125")
    await_true(lambda: world.value('orders_total{shop="north",target="statsd"}') == 3, "they are counted")
    assert world.value("retinue_adapter_datagrams_total") == 1
    assert world.value("retinue_adapter_dropped_datagrams_total") == 0


def test_an_app_that_hangs_is_stale_and_then_gone_while_the_others_go_on(world: World) -> None:
    signal_all(world.app, "STOP")
    try:
        await_true(lambda: world.state("redis") == "stale", "it is stale")
        assert "app_requests_total{" in world.page("/redis"), "what it said last stands"
        await_true(lambda: world.state("redis") == "down", "it is down")
        assert "redis_" not in world.page("/redis")
        assert world.state("statsd") == "up"
    finally:
        signal_all(world.app, "CONT")
    await_true(lambda: world.state("redis") == "up", "it is back")


def test_an_app_that_is_killed_counts_anew(world: World) -> None:
    before = world.value("redis_uptime_seconds")
    world.app.crash("app")
    await_true(lambda: world.value("redis_uptime_seconds") < before, "it has started again")
    await_true(lambda: world.state("redis") == "up", "it is back")


def test_a_file_that_changes_is_taken_without_a_restart_and_a_wrong_one_is_not(world: World) -> None:
    text = (OVERLAY / "targets.yaml").read_text()
    world.cluster.update("adapter-targets", {"targets.yaml": text + "  - {target_id: own, kind: REPORT}\n"})
    await_true(lambda: world.state("own") == "up", "the new target is there")
    world.cluster.update("adapter-targets", {"targets.yaml": text + "  - {target_id: own, knd: REPORT}\n"})
    await_true(lambda: world.value("retinue_adapter_target_file_ok") == 0, "the file is found wrong")
    assert "knd" in world.app.logs()
    assert world.state("own") == "up", "what is there stays"
    world.cluster.update("adapter-targets", {"targets.yaml": text})
    await_true(lambda: world.value("retinue_adapter_target_file_ok") == 1, "it is right again")
    with pytest.raises(PodError):
        world.page("/own")


def test_a_rule_pack_that_comes_is_taken_without_a_restart(world: World) -> None:
    pack = "kind: redis\nmetrics:\n- {metric: cache_keys, path: /keyspace/db0/keys, help: Keys.}\n"
    world.cluster.update("adapter-rule-packs", {"keys.yaml": pack})
    text = (OVERLAY / "targets.yaml").read_text()
    other = '  - {target_id: keys, kind: REDIS, endpoint: "127.0.0.1:6379", rule_pack: keys, interval_duration: 1s}\n'
    world.cluster.update("adapter-targets", {"targets.yaml": text + other})
    world.redis("set", "here", "1")
    await_true(lambda: world.value('cache_keys{target="keys"}') == 1, "it is used")
    world.cluster.update("adapter-targets", {"targets.yaml": text})


def test_health_answers_from_outside_and_the_contract_only_inside_the_pod(world: World) -> None:
    port = 7174
    assert probe(world.app.address, {"grpc": {"port": port, "service": "retinue.adapter.v1.AdapterService"}})
    await_true(lambda: probe(world.app.address, {"grpc": {"port": port, "service": "target/redis"}}), "Redis is well")
    script = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    world.app.run("adapter", "python", "-c", script, "127.0.0.1", "7074")
    for closed in ("7074", "6379"):
        with pytest.raises(PodError, match="ConnectionRefusedError"):
            world.prometheus.run("server", "python3", "-c", script, world.app.address, closed)


def test_an_adapter_that_is_killed_has_all_again_and_nothing_of_it_was_in_the_apps_way(world: World) -> None:
    uptime = world.value("redis_uptime_seconds")
    world.app.crash("adapter")
    await_true(lambda: "redis_uptime_seconds{" in world.page("/redis", check=False), "all is there again")
    await_true(lambda: world.value("redis_uptime_seconds") > uptime, "Redis went on")


def test_a_pod_that_is_stopped_ends_its_app_before_its_adapter(world: World) -> None:
    pod = world.cluster.pod("my-app", "leaving")
    pod.stop()
    assert pod.exit_code("adapter") == 0
    assert pod.ended("app") < pod.ended("adapter")
    world.cluster.remove(pod)


def signal_all(pod: Pod, name: str) -> None:
    """To the process of the app's container."""
    pid = pod._inspect("app", "{{.State.Pid}}")
    assert Path(f"/proc/{pid}").exists()
    subprocess.run(["kill", f"-{name}", pid], check=True)
