"""The Grafana dashboard in deploy/adapter asks for nothing that a real adapter does not export."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from e2e.pods import ROOT, await_true
from prometheus_client.parser import text_string_to_metric_families
from servers import RunningServer, start_server

from retinue.adapter.v1.adapter_service_pb2 import GetTargetRequest
from retinue.adapter.v1.adapter_service_pb2_grpc import AdapterServiceStub
from retinue.workqueue.v1.workqueue_admin_service_pb2 import GetQueueStatsRequest
from retinue.workqueue.v1.workqueue_admin_service_pb2_grpc import WorkQueueAdminServiceStub

TARGETS = """
targets:
  - {{target_id: app, kind: PROMETHEUS, endpoint: "http://{metrics}/metrics"}}
  - {{target_id: statsd, kind: STATSD, endpoint: "udp:127.0.0.1:0", interval_duration: 1s}}
"""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[RunningServer]:
    """An app with all four golden signals: another server of ours."""
    (tmp_path / "app").mkdir()
    started = start_server(tmp_path / "app", "workqueue", "--metrics", "127.0.0.1:0")
    with grpc.insecure_channel(started.address) as channel:
        WorkQueueAdminServiceStub(channel).GetQueueStats(GetQueueStatsRequest(), timeout=10)
    yield started
    assert started.stop() == 0


@pytest.fixture
def adapter(tmp_path: Path, app: RunningServer) -> Iterator[RunningServer]:
    (tmp_path / "targets.yaml").write_text(TARGETS.format(metrics=app.ready["metrics"]))
    env = {"RETINUE_ADAPTER__TARGETS": str(tmp_path / "targets.yaml")}
    started = start_server(tmp_path, "adapter", "--metrics", "127.0.0.1:0", env=env)
    yield started
    assert started.stop() == 0


def page(adapter: RunningServer) -> str:
    answer = urllib.request.urlopen(f"http://{adapter.ready['metrics']}/metrics", timeout=10)
    text: str = answer.read().decode()
    return text


def exported(adapter: RunningServer) -> dict[str, dict[str, set[str]]]:
    """What is there now: samples by name, and the values of each label."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(page(adapter)):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def queries() -> list[tuple[str, str]]:
    """Each expression of the dashboard, and what its lines are called."""
    panels: list[dict[str, Any]] = json.loads((ROOT / "deploy/adapter/dashboard.json").read_text())["panels"]
    return [(one["expr"], one["legendFormat"]) for panel in panels for one in panel["targets"]]


def test_every_query_names_a_metric_that_is_exported_with_the_labels_that_it_asks_for(adapter: RunningServer) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x:1|c\nx_total:1|g", ("127.0.0.1", statsd_port(adapter)))
    await_true(
        lambda: 'reason="name_conflict"' in page(adapter), "the second of two that would bear one name is counted"
    )
    there = exported(adapter)
    asked = queries()
    assert len(asked) >= 15
    for expr, legend in asked:
        (name,) = re.findall(r"\b(?:app|retinue)_[a-z_]+", expr)
        assert name in there, f"{expr} asks for what is not there"
        selected, grouped = re.findall(r"(\w+)=~", expr), re.findall(r"by \(([^)]*)\)", expr)
        wanted = {*selected, *re.findall(r"{{(\w+)}}", legend), *(word for one in grouped for word in one.split(", "))}
        assert wanted - {"instance"} <= there[name].keys(), f"{expr} asks for labels that are not there"


def test_the_labels_of_what_the_adapter_counts_are_its_targets(adapter: RunningServer) -> None:
    labels = exported(adapter)["retinue_adapter_up"]
    assert labels["target"] == labels["service"] == {"app", "statsd"}
    assert not any(name.startswith("exported_") for name in labels)


def statsd_port(adapter: RunningServer) -> int:
    """Where the adapter listens: it was told any."""
    with grpc.insecure_channel(adapter.address) as channel:
        found = AdapterServiceStub(channel).GetTarget(GetTargetRequest(target_id="statsd"), timeout=10).target
    return int(found.status.address.rpartition(":")[2])
