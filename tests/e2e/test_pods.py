"""The work queue in real pods: apps that dial only localhost, relays with the credentials, a coordinator behind TLS.

The pods come from deploy/overlays/podman-ci. What podman cannot show is listed in deploy/workqueue/README.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from e2e.pods import ROOT, Cluster, Pod, PodError, await_true

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.conftest import Files

OVERLAY = ROOT / "deploy/overlays/podman-ci"
QUEUE = "story"
SERVICE = "retinue.workqueue.v1.WorkQueueService"
# Leases are short, so that the tasks of a killed worker come back soon.
WORK = f"retinue work {QUEUE} --lease 4s --concurrency 4 --"
WORKER = {"command": [*WORK.split(), "sh", "-c", "sleep 0.1; hostname"]}
DOOMED_SCRIPT = (
    "mkdir -p /tmp/did; touch /tmp/did/$RETINUE_TASK_ID; [ $(ls /tmp/did | wc -l) -lt 10 ] || sleep 600; hostname"
)
DOOMED = {"command": [*WORK.split(), "sh", "-c", DOOMED_SCRIPT]}
"""It ends some tasks, and is killed over others."""
IDLE = {"command": ["sh", "-c", "trap exit TERM; sleep infinity & wait"]}

pytestmark = pytest.mark.timeout(900)  # the first test may also build the image


@pytest.fixture(scope="module")
def cluster(image: str, files: Files) -> Iterator[Cluster]:
    with Cluster(OVERLAY, image, files) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def coordinator(cluster: Cluster) -> Pod:
    pod = cluster.pod("workqueue")
    pod.await_ready()
    return pod


@pytest.fixture(scope="module")
def producer(cluster: Cluster, coordinator: Pod) -> Pod:
    """An app that does nothing by itself; tests run commands in it."""
    pod = cluster.pod("worker", "producer", {"app": IDLE})
    pod.await_ready()
    return pod


def _enqueue(producer: Pod, first: int, last: int) -> None:
    """One task per number, from a directory of files."""
    script = (
        f"mkdir /tmp/{first} && for n in $(seq {first} {last}); do echo $n > /tmp/{first}/$n; done && "
        f"retinue queue enqueue {QUEUE} --from-dir /tmp/{first} --timeout 30s"
    )
    producer.run("app", "sh", "-c", script)


def _stats(producer: Pod) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads(producer.run("app", "retinue", "queue", "stats", QUEUE))
    return stats


def _tasks(producer: Pod) -> list[dict[str, Any]]:
    """Every task with what it was given and what came out."""
    script = f"""import json
from retinue.client.sync import Queue
with Queue("{QUEUE}") as queue:
    for listed in queue.list(page_size=500):
        task = queue.get(listed.task_id)
        found = [task.state, task.lease_epoch, queue.load(task.spec.input), queue.load(task.result)]
        print(json.dumps(found, default=bytes.decode))
"""
    names = ("state", "lease_epoch", "input", "result")
    lines = producer.run("app", "python", "-c", script).splitlines()
    return [dict(zip(names, json.loads(line), strict=True)) for line in lines]


def test_health_answers_on_the_probe_port_from_another_pod(producer: Pod, coordinator: Pod) -> None:
    script = f"""import grpc
from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc
stub = rpc.HealthStub(grpc.insecure_channel("{coordinator.address}:7176"))
print(stub.Check(pb.HealthCheckRequest(service="{SERVICE}"), timeout=60).status == pb.HealthCheckResponse.SERVING)
"""
    assert producer.run("app", "python", "-c", script) == "True"


def test_metrics_answer_from_another_pod(producer: Pod, coordinator: Pod) -> None:
    script = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=60).read().decode())"
    for pod in (coordinator, producer):
        metrics = producer.run("app", "python", "-c", script, f"http://{pod.address}:7276/metrics")
        assert "\n# TYPE retinue_server_handled_total " in metrics
        producer.run("app", "python", "-c", script, f"http://{pod.address}:7276/healthz")


def test_the_queries_of_the_guide_use_metrics_that_the_coordinator_has(coordinator: Pod) -> None:
    script = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:7276/metrics').read().decode())"
    metrics = coordinator.run("coordinator", "python", "-c", script)
    named = set(re.findall(r"\bretinue_[a-z_]+(?![a-z_0-9])", (ROOT / "deploy/workqueue/README.md").read_text()))
    assert len(named) >= 4
    assert {name for name in named if f"# TYPE {name} " not in metrics} == set()


def test_the_app_has_no_credentials_and_cannot_write_to_its_root(producer: Pod) -> None:
    producer.run("relay", "ls", "/etc/retinue/token/token")
    for forbidden in (["ls", "/etc/retinue"], ["touch", "/opt/retinue/x"]):
        with pytest.raises(PodError, match=r"No such file|Read-only"):
            producer.run("app", *forbidden)


def test_the_coordinator_turns_away_who_has_no_token(producer: Pod) -> None:
    script = """import grpc
from retinue.workqueue.v1 import workqueue_service_pb2 as pb, workqueue_service_pb2_grpc as rpc
ca = grpc.ssl_channel_credentials(open("/etc/retinue/ca/ca.crt", "rb").read())
stub = rpc.WorkQueueServiceStub(grpc.secure_channel("workqueue:7076", ca))
try:
    stub.ListTasks(pb.ListTasksRequest(), timeout=60)
except grpc.RpcError as error:
    print(error.code().name)
"""
    assert producer.run("relay", "python", "-c", script) == "UNAUTHENTICATED"


def test_a_relay_listens_on_localhost_only(producer: Pod, coordinator: Pod) -> None:
    script = "import socket, sys; socket.create_connection((sys.argv[1], 7076), 5)"
    producer.run("app", "python", "-c", script, "127.0.0.1")
    with pytest.raises(PodError, match="ConnectionRefusedError"):
        coordinator.run("coordinator", "python", "-c", script, producer.address)


def test_each_task_succeeds_exactly_once_while_a_worker_pod_and_the_coordinator_are_killed(
    cluster: Cluster, coordinator: Pod, producer: Pod
) -> None:
    _enqueue(producer, 1, 100)
    doomed = cluster.pod("worker", "worker-0", {"app": DOOMED})
    lasting = cluster.pod("worker", "worker-1", {"app": WORKER})
    await_true(lambda: int(_stats(producer).get("succeeded", 0)) >= 25, "25 tasks are done")

    cluster.remove(doomed)
    coordinator.crash("coordinator")
    _enqueue(producer, 101, 200)  # the client tries again until the coordinator is back

    await_true(lambda: int(_stats(producer).get("succeeded", 0)) == 200, "all tasks are done", within=240)
    tasks = _tasks(producer)
    assert sorted(int(task["input"]) for task in tasks) == list(range(1, 201))
    assert Counter(task["state"] for task in tasks) == {5: 200}, "TASK_STATE_SUCCEEDED"
    assert {task["result"].strip() for task in tasks} == {doomed.name, lasting.name}
    assert any(task["lease_epoch"] > 1 for task in tasks), "the killed worker had tasks that were leased again"


def test_a_worker_pod_that_is_stopped_ends_its_app_before_its_relay(cluster: Cluster, producer: Pod) -> None:
    pod = cluster.pod("worker", "worker-2", {"app": WORKER})
    await_true(lambda: '"connected"' in pod.logs(), "the worker is at work")
    pod.stop()
    assert {name: pod.exit_code(name) for name in ("app", "relay")} == {"app": 0, "relay": 0}
    assert pod.ended("app") < pod.ended("relay")


def test_a_new_coordinator_pod_goes_on_with_the_tasks_of_the_old_one(
    cluster: Cluster, coordinator: Pod, producer: Pod
) -> None:
    producer.run("app", "retinue", "queue", "enqueue", "kept", "hello", "--task-id", "kept-1")
    coordinator.stop()
    assert coordinator.exit_code("coordinator") == 0
    cluster.remove(coordinator)
    cluster.pod("workqueue").await_ready()
    producer.await_ready()
    assert json.loads(producer.run("app", "retinue", "queue", "get", "kept-1"))["state"] == "ready"
