"""The ambassador in real pods: an app that knows nothing of us dials localhost; the servers are pods of their own.

The pods come from deploy/overlays/ambassador-podman-ci: the ambassador carries the bytes itself, as its image has no
Envoy. What podman cannot show is listed in deploy/ambassador/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from e2e.ambassadors import LIBRARY, LOAD, World
from e2e.pods import ROOT, Cluster, PodError, await_true

OVERLAY = ROOT / "deploy/overlays/ambassador-podman-ci"
GUIDE = ROOT / "deploy/ambassador/README.md"

pytestmark = pytest.mark.timeout(300)  # the first test may also build the images


@pytest.fixture(scope="module")
def cluster(image: str, tools: str) -> Iterator[Cluster]:
    images = dict.fromkeys(("app", "memcached", "redis", "python"), tools)
    with Cluster(OVERLAY, image, {}, images=images) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def world(cluster: Cluster) -> World:
    return World(cluster, {"memcached": 3, "web": 2})


def test_the_cache_of_an_app_that_knows_only_localhost_is_in_three_pods(world: World) -> None:
    world.sh(LOAD)
    assert world.is_cached()
    held = world.held()
    assert sum(held.values()) == int(world.sh(f"ls {LIBRARY}/*.py | wc -l"))
    assert all(count > 20 for count in held.values()), held


def test_connections_to_a_web_server_go_to_both_pods(world: World) -> None:
    same = f"curl -sf http://127.0.0.1:8080/ast.py | cmp - {LIBRARY}/ast.py"
    for _ in range(4):
        world.sh(same)
    assert all(one["requests"] for one in world.stats("web")["endpoints"])
    rows = world.upstreams()
    assert {name: row["data_plane"] for name, row in rows.items()} == {"cache": "native", "web": "native"}


def test_a_memcached_pod_that_is_killed_is_kept_off_and_comes_back(world: World) -> None:
    world.kill("memcached-1")
    await_true(lambda: world.works(LOAD) and world.is_cached(), "the others have its keys", within=60)
    assert sum(world.held().values()) >= int(world.sh(f"ls {LIBRARY}/*.py | wc -l"))
    assert world.upstreams()["cache"]["state"] == "active"
    world.bring_back("memcached-1")
    await_true(lambda: world.works(LOAD) and world.held()["memcached-1"] > 20, "it has its part again", within=60)
    await_true(lambda: world.works(LOAD) and world.is_cached(), "all is there", within=60)


def test_a_file_that_changes_is_taken_without_a_restart_and_a_wrong_one_is_not(world: World) -> None:
    cache, web = world.file()
    other = {**web, "upstream_id": "other", "listen": {"port": 8081}}
    world.declare(cache, web, other)
    page = "curl -sf -o /dev/null http://127.0.0.1:8081/ast.py"
    await_true(lambda: world.works(page), "another port is served")

    world.declare(cache, web, {**other, "protocl": "TCP"})
    await_true(lambda: "ambassador_upstream_file_ok 0.0" in world.metrics(), "the file is found wrong")
    assert "protocl" in world.app.logs()
    assert world.works(page), "what is served stays"

    world.declare(cache, web)
    await_true(lambda: not world.works(page), "it is gone")
    assert "ambassador_upstream_file_ok 1.0" in world.metrics()


def test_what_only_envoy_can_do_is_refused_in_the_words_of_the_guide_and_the_others_are_served(world: World) -> None:
    cache, web = world.file()
    http = {"upstream_id": "web", "protocol": "HTTP", "listen": {"port": 8082}, "dns": web["dns"]}
    world.declare(cache, {**http, "upstream_id": "page"})
    (quoted,) = re.findall(r"> (cannot declare web: (?:.*\n> )*.*)\n", GUIDE.read_text())
    wanted = quoted.replace("\n> ", " ").replace("cannot declare web", "cannot declare page")
    await_true(lambda: wanted in world.app.logs(), "the log says why")
    assert list(world.upstreams()) == ["cache"]
    world.declare(cache, web)
    await_true(lambda: set(world.upstreams()) == {"cache", "web"}, "the file counts again")
    await_true(lambda: world.works("curl -sf -o /dev/null http://127.0.0.1:8080/ast.py"), "it is served")


def test_health_and_metrics_answer_from_another_pod(world: World) -> None:
    text = world.metrics()
    assert 'retinue_ambassador_upstream_state{state="active",upstream="cache"} 1.0' in text
    named = set(re.findall(r"(?<![/\w])retinue_[a-z_]+(?![a-z_0-9/])", GUIDE.read_text()))
    assert len(named) >= 6
    assert {name for name in named if f"# TYPE {name} " not in text} == set(), "the guide names what is there"


def test_everything_listens_to_the_pod_only_and_the_app_mounts_nothing_of_the_ambassador(world: World) -> None:
    script = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    for port in ("7073", "11211", "8080"):
        world.app.run("ambassador", "python", "-c", script, "127.0.0.1", port)
        with pytest.raises(PodError, match="ConnectionRefusedError"):
            world.servers["web-0"].run("server", "python3", "-c", script, world.app.address, port)
    for path in ("/etc/retinue", "/run/retinue", "/var/lib/retinue"):
        with pytest.raises(PodError, match="No such file"):
            world.sh(f"ls {path}")


def test_an_ambassador_that_is_killed_comes_back_at_the_same_ports(world: World) -> None:
    world.sh(LOAD)
    world.app.crash("ambassador")
    await_true(world.is_cached, "the port is served again, and the cache lost nothing", within=60)


def test_a_pod_that_is_stopped_ends_its_app_before_its_ambassador(world: World) -> None:
    pod = world.cluster.pod("my-app", "leaving")
    pod.stop()
    assert pod.exit_code("ambassador") == 0
    assert pod.ended("app") < pod.ended("ambassador")
    world.cluster.remove(pod)


def test_an_app_that_waits_by_the_command_begins_when_it_is_served(world: World, image: str) -> None:
    begin = "retinue ambassador wait cache web --timeout 1m && echo it begins && sleep infinity & wait"
    pod = world.cluster.pod("my-app", "waiting", {"app": {"image": image, "command": ["sh", "-c", begin]}})
    await_true(lambda: "it begins" in pod.logs(), "it begins")
    world.cluster.remove(pod)
