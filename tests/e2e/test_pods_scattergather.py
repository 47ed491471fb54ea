"""Scatter/gather in real pods: an app that dials only localhost, a root beside it, leaves in pods of their own.

The pods come from deploy/overlays/scattergather-podman-ci. What podman cannot show is listed in
deploy/scattergather/README.md.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import yaml
from e2e.pods import ROOT, Cluster, Pod, PodError, await_true

OVERLAY = ROOT / "deploy/overlays/scattergather-podman-ci"
GUIDE = ROOT / "deploy/scattergather/README.md"
SHARDS, REPLICAS = ("shard-0", "shard-1"), "ab"
TERMS = ["asyncio", "transport", "protocol"]
GET = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=60).read().decode())"
TRUTH = """import json, sys
sys.path.insert(0, "/etc/leaf")
import leaf
documents = leaf.corpus()
terms, shards = json.loads(sys.argv[1])
numbers = leaf.block(len(documents), shards[0], 2) if len(shards) == 1 else range(len(documents))
index = leaf.Index(documents, numbers)
counts = index.count(terms)
hits = index.find(terms, *leaf.weights(terms, counts), 10)
print(json.dumps({"counts": counts, "hits": [{"score": hit.score, "id": hit.id} for hit in hits]}))
"""
"""What one index over the documents of some shards says, in the image that the leaves run."""

Answer = dict[str, Any]

pytestmark = pytest.mark.timeout(900)  # the first test may also build the image


def _leaf() -> Any:
    """The program of the leaves, for its arithmetic."""
    spec = importlib.util.spec_from_file_location("leaf", ROOT / "deploy/scattergather/leaf.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class World:
    """The pods, and what its tests ask of them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.leaves = {f"{shard}-{replica}": self._start(shard, replica) for shard in SHARDS for replica in REPLICAS}
        self.app = cluster.pod("my-app", "app")
        self.app.await_ready()
        self.await_reachable(2)

    def _start(self, shard: str, replica: str) -> Pod:
        return self.cluster.pod(shard, f"{shard}-{replica}")

    def kill(self, name: str) -> None:
        """A leaf's pod, as when its node dies."""
        self.cluster.remove(self.leaves.pop(name))

    def bring_back(self, name: str) -> None:
        """A new pod in its place."""
        self.leaves[name] = self._start(*name.rsplit("-", 1))

    def call(self, method: str, request: object) -> Answer:
        """By the app, of the root beside it; raises PodError with what the command says."""
        words = ["retinue", "call", "--address", "127.0.0.1:7077", method, json.dumps(request)]
        answer: Answer = json.loads(self.app.run("app", *words))
        return answer

    def scatter(self, pool: str, question: object, **policy: object) -> Answer:
        """A request."""
        return self.call("ScatterGatherService/Scatter", {"pool_id": pool, "json": question, "policy": policy})

    def search(self, terms: Sequence[str], **policy: object) -> tuple[Answer, Answer]:
        """Both rounds: how often the terms occur, and the ten best documents."""
        counts = self.scatter("counts", {"count": terms}, **policy)
        weights, average = LEAF.weights(terms, counts["json"])
        question = {"find": terms, "weights": weights, "average_length": average}
        return counts, self.scatter("search", question, **policy)

    def await_reachable(self, shards: int) -> None:
        """Until so many shards have a connected endpoint."""

        def summary() -> Answer:
            pools = self.call("TopologyService/ListPools", {})["pools"]
            found: Answer = next(pool for pool in pools if pool["pool_id"] == "search")
            return found

        await_true(lambda: summary().get("reachable_shards", 0) == shards, f"{shards} shards can be reached")

    def await_endpoints(self, connected: int) -> None:
        """Until so many endpoints of both pools are connected."""

        def count(pool: str) -> int:
            shards = self.call("TopologyService/GetTopology", {"pool_id": pool})["pool"]["shards"]
            return sum(endpoint.get("connected", False) for shard in shards for endpoint in shard["endpoints"])

        claim = f"{connected} endpoints are connected"
        await_true(lambda: all(count(pool) == connected for pool in ("counts", "search")), claim)

    def truth(self, *shards: int) -> Answer:
        """What one index over the documents of these shards says."""
        pod = next(iter(self.leaves.values()))
        answer: Answer = json.loads(pod.run("leaf", "python", "-c", TRUTH, json.dumps([TERMS, shards])))
        return answer


LEAF = _leaf()


@pytest.fixture(scope="module")
def cluster(image: str) -> Iterator[Cluster]:
    with Cluster(OVERLAY, image, {}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def world(cluster: Cluster) -> World:
    return World(cluster)


def test_the_answer_of_two_shards_in_four_pods_is_that_of_one_index(world: World) -> None:
    counts, found = world.search(TERMS)
    truth = world.truth(0, 1)
    assert counts["json"] == truth["counts"]
    assert len(found["json"]) == 10
    assert found["json"] == truth["hits"], "ids, order, and every bit of the scores"
    assert found["coverage"] == {"expected": "2", "answered": "2", "complete": True}


def test_the_command_of_the_guide_asks_the_root_beside_the_app(world: World) -> None:
    (line,) = re.findall(r"kubectl .* -c app -- (retinue scatter .*)", GUIDE.read_text())
    answer = json.loads(world.app.run("app", *shlex.split(line)))
    assert len(answer["json"]) == 10
    assert answer["complete"]


def test_a_leaf_pod_that_is_killed_costs_no_answer_while_the_other_replica_lives(world: World) -> None:
    truth = world.truth(0, 1)
    world.kill("shard-0-a")
    for _ in range(3):
        _, found = world.search(TERMS)
        assert found["coverage"]["complete"]
        assert found["json"] == truth["hits"]
    world.bring_back("shard-0-a")
    world.await_endpoints(4)


def test_without_a_shard_strict_refuses_partial_tells_the_truth_and_all_comes_back(world: World) -> None:
    world.kill("shard-0-a")
    world.kill("shard-0-b")

    with pytest.raises(PodError, match=r"COVERAGE_NOT_MET|cannot answer: .* shard-0"):
        world.scatter("counts", {"count": TERMS})
    counts, found = world.search(TERMS, min_coverage=0.5)
    truth = world.truth(1)
    assert counts["json"] == truth["counts"], "of the documents that are left, as if there were no others"
    assert found["json"] == truth["hits"]
    for answer in (counts, found):
        assert answer["coverage"] == {"expected": "2", "answered": "1"}
        assert [failure["shard_id"] for failure in answer["failures"]] == ["shard-0"]
    world.await_reachable(1)

    for name in ("shard-0-a", "shard-0-b"):
        world.bring_back(name)
    world.await_endpoints(4)
    _, found = world.search(TERMS)
    assert found["coverage"]["complete"]
    assert found["json"] == world.truth(0, 1)["hits"]


def test_a_leaf_pod_that_is_stopped_ends_in_order_and_costs_no_answer(world: World) -> None:
    leaving = world.leaves["shard-1-b"]
    leaving.stop()
    assert leaving.exit_code("leaf") == 0
    _, found = world.search(TERMS)
    assert found["coverage"]["complete"]
    world.kill("shard-1-b")
    world.bring_back("shard-1-b")
    world.await_endpoints(4)


def test_a_pool_file_that_changes_is_taken_without_a_restart_and_a_wrong_one_is_not(world: World) -> None:
    text = (ROOT / "deploy/scattergather/pools.yaml").read_text()
    said = yaml.safe_load(text)
    said["pools"]["search"]["top_k"] = 3
    world.cluster.update("scattergather-pools", {"pools.yaml": yaml.safe_dump(said)})
    await_true(lambda: len(world.search(TERMS)[1]["json"]) == 3, "the file counts")

    world.cluster.update("scattergather-pools", {"pools.yaml": text.replace("top_k: 10", "top_q: 10")})
    await_true(lambda: "did you mean top_k?" in world.app.logs(), "the log says what is wrong with it")
    assert len(world.search(TERMS)[1]["json"]) == 3, "the pools stay as they were"
    assert "retinue_scattergather_pool_file_ok 0.0" in metrics(world)

    world.cluster.update("scattergather-pools", {"pools.yaml": text})
    await_true(lambda: len(world.search(TERMS)[1]["json"]) == 10, "the file counts again")
    assert "retinue_scattergather_pool_file_ok 1.0" in metrics(world)


def test_health_and_metrics_answer_from_another_pod(world: World) -> None:
    text = metrics(world)
    assert 'retinue_scattergather_shards{pool="search"} 2.0' in text
    onlooker = world.leaves["shard-0-b"]
    onlooker.run("leaf", "python", "-c", GET, f"http://{world.app.address}:7277/healthz")
    named = set(re.findall(r"(?<![/\w])retinue_[a-z_]+(?![a-z_0-9/])", GUIDE.read_text()))
    assert len(named) >= 4
    assert {name for name in named if f"# TYPE {name} " not in text} == set(), "the guide names metrics that are there"


def metrics(world: World) -> str:
    """Of the root, as another pod reads them."""
    url = f"http://{world.app.address}:7277/metrics"
    return world.leaves["shard-0-b"].run("leaf", "python", "-c", GET, url)


def test_the_root_listens_to_apps_on_localhost_only_and_they_mount_nothing_of_its(world: World) -> None:
    script = "import socket, sys; socket.create_connection((sys.argv[1], 7077), 5)"
    world.app.run("app", "python", "-c", script, "127.0.0.1")
    with pytest.raises(PodError, match="ConnectionRefusedError"):
        world.leaves["shard-0-b"].run("leaf", "python", "-c", script, world.app.address)
    with pytest.raises(PodError, match="No such file"):
        world.app.run("app", "ls", "/etc/retinue")


def test_a_root_that_is_killed_comes_back_and_knows_its_leaves(world: World) -> None:
    world.app.crash("scattergather")
    world.app.await_ready()
    _, found = world.search(TERMS)
    assert found["coverage"]["complete"]


def test_a_pod_that_is_stopped_ends_its_app_before_its_root(world: World) -> None:
    pod = world.cluster.pod("my-app", "leaving")
    pod.await_ready()
    pod.stop()
    assert pod.exit_code("scattergather") == 0
    assert pod.ended("app") < pod.ended("scattergather")
    world.cluster.remove(pod)
