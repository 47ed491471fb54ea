"""grpcurl alone, without any .proto file: what a person does who debugs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.pods import await_true
from servers import RunningServer, start_server

QUEUE = "retinue.workqueue.v1.WorkQueueService"
AMBASSADOR = "retinue.ambassador.v1.AmbassadorService"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    started = start_server(tmp_path_factory.mktemp("grpcurl"))
    yield started
    assert started.stop() == 0


def grpcurl(server: RunningServer, *arguments: str, ok: bool = True, operator: bool = False) -> str:
    """What it prints; options come before the address, as it wants them. Operators dial the control socket."""
    program = shutil.which("grpcurl", path=str(Path(sys.executable).parent))
    assert program, "it comes with make setup"
    options, words = arguments[:-1], arguments[-1:]
    target = ["-unix", server.control.removeprefix("unix:")] if operator else [server.address]
    command = [program, "-plaintext", *options, *target, *words[0].split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode == 0) == ok, done.stderr
    return done.stdout if ok else done.stderr


def test_it_lists_every_service(server: RunningServer) -> None:
    listed = grpcurl(server, "list").split()
    assert {QUEUE, "retinue.workqueue.v1.WorkQueueAdminService", "grpc.health.v1.Health"} <= set(listed)


def test_it_describes_a_method_and_a_message(server: RunningServer) -> None:
    assert "rpc LeaseTasks" in grpcurl(server, f"describe {QUEUE}.LeaseTasks")
    assert "idempotency_key" in grpcurl(server, "describe retinue.workqueue.v1.TaskSpec")


def test_it_enqueues_leases_and_completes(server: RunningServer) -> None:
    enqueued = grpcurl(
        server, "-d", '{"tasks": [{"queue_id": "hello", "input": {"text": "hi"}}]}', f"{QUEUE}/EnqueueTasks"
    )
    task_id = json.loads(enqueued)["results"][0]["task_id"]
    leased = grpcurl(server, "-d", '{"queue_id": "hello", "worker_id": "me"}', f"{QUEUE}/LeaseTasks")
    [lease] = json.loads(leased)["leases"]
    assert (lease["task_id"], lease["input"]) == (task_id, {"text": "hi"})
    done = {"completions": [{"lease_token": lease["lease_token"], "result": {"text": "done"}}]}
    assert json.loads(grpcurl(server, "-d", json.dumps(done), f"{QUEUE}/CompleteTasks")) == {"results": [{}]}
    task = json.loads(grpcurl(server, "-d", json.dumps({"task_id": task_id}), f"{QUEUE}/GetTask"))["task"]
    assert (task["state"], task["result"]) == ("TASK_STATE_SUCCEEDED", {"text": "done"})


def test_it_decodes_an_error_with_its_details(server: RunningServer) -> None:
    told = grpcurl(server, "-d", '{"tasks": [{"queue_id": "!", "priority": 5000}]}', f"{QUEUE}/EnqueueTasks", ok=False)
    for word in (
        "InvalidArgument",
        "ErrorInfo",
        "INVALID_FIELD",
        "BadRequest",
        "tasks[0].queue_id",
        "tasks[0].priority",
    ):
        assert word in told


def test_it_declares_an_upstream_looks_at_it_and_forgets_it(server: RunningServer) -> None:
    said = {"upstream": {"upstream_id": "hello", "protocol": "PROTOCOL_TCP", "pushed": {}}, "wait_duration": "10s"}
    declared = grpcurl(server, "-d", json.dumps(said), f"{AMBASSADOR}/DeclareUpstream", operator=True)
    status = json.loads(declared)["upstream"]["status"]
    assert (status["state"], status["data_plane"]) == ("UPSTREAM_STATE_ACTIVE", "DATA_PLANE_KIND_NATIVE")
    found = grpcurl(server, "-d", '{"upstream_id": "hello"}', f"{AMBASSADOR}/GetUpstream")
    assert json.loads(found)["upstream"]["status"]["address"] == status["address"]
    gone = grpcurl(server, "-d", '{"upstream_id": "hello"}', f"{AMBASSADOR}/RemoveUpstream", operator=True)
    assert json.loads(gone) == {"removed": True}


def test_it_decodes_why_an_upstream_is_refused(server: RunningServer) -> None:
    said = {"upstream": {"upstream_id": "web", "protocol": "PROTOCOL_HTTP", "pushed": {}}}
    words = ("-d", json.dumps(said), f"{AMBASSADOR}/DeclareUpstream")
    assert "PermissionDenied" in grpcurl(server, *words, ok=False), "apps may not"
    told = grpcurl(server, *words, ok=False, operator=True)
    for word in ("Unimplemented", "ErrorInfo", "CAPABILITY_MISSING", "pip install 'retinue-server[envoy]'"):
        assert word in told


ADAPTER = "retinue.adapter.v1.AdapterService"


def test_it_creates_a_target_reports_to_it_reads_it_and_forgets_it(server: RunningServer) -> None:
    said = {"target": {"target_id": "shop", "kind": "TARGET_KIND_REPORT", "interval_duration": "1s"}}
    created = grpcurl(server, "-d", json.dumps(said), f"{ADAPTER}/CreateTarget", operator=True)
    assert json.loads(created)["target"]["target_id"] == "shop"
    metric = {"name": "orders", "type": "METRIC_TYPE_COUNTER", "series": [{"labels": {"shop": "north"}, "number": 3}]}
    report = json.dumps({"target_id": "shop", "metrics": [metric, {**metric, "name": "!"}]})
    grpcurl(server, "-d", report, f"{ADAPTER}/ReportMetrics")
    wanted = json.dumps({"matches": [{"name": "orders"}]})
    found: dict[str, Any] = {}

    def is_there() -> bool:
        found.update(json.loads(grpcurl(server, "-d", wanted, f"{ADAPTER}/GetMetrics")))
        return bool(found)

    await_true(is_there, "what was reported is there")
    [series] = found["metrics"][0]["series"]
    assert (series["number"], series["labels"]["shop"], series["labels"]["kind"]) == (3, "north", "report")
    signals = json.loads(grpcurl(server, "-d", '{"target_ids": ["shop"]}', f"{ADAPTER}/GetSignals"))
    assert all(one["absent_reason"] for one in signals["signals"][0]["signals"])
    gone = grpcurl(server, "-d", '{"target_id": "shop"}', f"{ADAPTER}/DeleteTarget", operator=True)
    assert json.loads(gone) == {"deleted": True}


def test_it_decodes_why_a_target_is_refused(server: RunningServer) -> None:
    said = {"target": {"target_id": "Shop", "kind": "TARGET_KIND_JSON", "endpoint": "ftp://127.0.0.1"}}
    words = ("-d", json.dumps(said), f"{ADAPTER}/CreateTarget")
    assert "PermissionDenied" in grpcurl(server, *words, ok=False), "apps may not"
    told = grpcurl(server, *words, ok=False, operator=True)
    for word in ("InvalidArgument", "BadRequest", "target.target_id", "target.endpoint", "target.rule_pack"):
        assert word in told
