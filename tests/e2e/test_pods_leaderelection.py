"""Leader election in real pods: apps that dial only localhost, a server beside each, etcd in a pod of its own.

The pods come from deploy/overlays/leaderelection-podman-ci. What podman cannot show is listed in
deploy/leaderelection/README.md.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from e2e.pods import PODMAN, ROOT, Cluster, Pod, PodError, await_true, podman
from support import etcd

if TYPE_CHECKING:
    from collections.abc import Iterator

OVERLAY = ROOT / "deploy/overlays/leaderelection-podman-ci"
GUIDE = ROOT / "deploy/leaderelection/README.md"
SERVICE = "retinue.leaderelection.v1.LeaderElectionService"
IDLE = {"command": ["sh", "-c", "trap exit TERM; sleep infinity & wait"]}
LONG = "10m"
"""A lease that nobody here waits for: who takes over has been handed the election."""
GET = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=60).read().decode())"
STATUS = """import sys, urllib.error as e, urllib.request as r
try:
    print(r.urlopen(sys.argv[1], timeout=60).status)
except e.HTTPError as error:
    print(error.code)
except OSError:
    pass
"""

pytestmark = pytest.mark.timeout(900)  # the first test may also build the image


@pytest.fixture(scope="module")
def etcd_image(image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The binary that the tests of the engine run, on top of our image: it may need the C library of one."""
    binary = etcd.built() / "etcd"
    name = f"localhost/retinue-etcd:{binary.parent.name}"
    if not podman("images", "--quiet", name):
        context = tmp_path_factory.mktemp("etcd")
        shutil.copy(binary, context)
        (context / "Containerfile").write_text(f"FROM {image}\nCOPY etcd /etcd\n")
        podman("build", "--quiet", "--tag", name, context, timeout=600)
    return name


@pytest.fixture(scope="module")
def cluster(image: str, etcd_image: str) -> Iterator[Cluster]:
    with Cluster(OVERLAY, image, {}, images={"etcd": etcd_image}) as cluster:
        cluster.pod("etcd")
        yield cluster


@pytest.fixture(scope="module")
def onlooker(cluster: Cluster) -> Pod:
    """An app that does nothing by itself; tests run commands in it."""
    pod = cluster.pod("my-app", "onlooker", {"app": IDLE})
    pod.await_ready()
    return pod


def candidate(cluster: Cluster, election: str, name: str, *options: str) -> Pod:
    """A pod whose app is an ordinary command that runs while it leads; its candidate has the pod's name."""
    command = ["retinue", "elect", election, "--candidate", name, *options, "--", "sleep", "infinity"]
    return cluster.pod("my-app", name, {"app": {"command": command}})


def leader(onlooker: Pod, election: str) -> dict[str, Any]:
    """Who leads, says the engine to a third pod."""
    words = ["retinue", "election", "leader", election, "--output", "json"]
    found: dict[str, Any] = json.loads(onlooker.run("app", *words))
    return found


def await_leader(onlooker: Pod, election: str, name: str, *, within: float = 120) -> int:
    """Its token, once it leads."""
    await_true(lambda: leader(onlooker, election).get("candidate_id") == name, f"{name} leads", within=within)
    return int(leader(onlooker, election)["token"])


def page(pod: Pod, election: str) -> str:
    """The status of the page by which others in the pod ask its server; empty while it does not answer."""
    return pod.run("app", "python", "-c", STATUS, f"http://127.0.0.1:7080/leader/{election}")


def test_a_pod_takes_over_with_a_higher_token_when_the_leaders_pod_is_killed(cluster: Cluster, onlooker: Pod) -> None:
    doomed = candidate(cluster, "killed", "killed-first")
    token = await_leader(onlooker, "killed", "killed-first")
    lasting = candidate(cluster, "killed", "killed-second")
    await_true(lambda: '"standby"' in lasting.logs(), "the second stands by")
    assert leader(onlooker, "killed")["candidate_id"] == "killed-first"
    assert (page(doomed, "killed"), page(lasting, "killed")) == ("200", "503")

    cluster.remove(doomed)

    assert await_leader(onlooker, "killed", "killed-second") > token
    assert page(lasting, "killed") == "200"
    cluster.remove(lasting)


def test_a_pod_that_is_stopped_hands_over_at_once(cluster: Cluster, onlooker: Pod) -> None:
    leaving = candidate(cluster, "stopped", "stopped-first", "--lease", LONG)
    token = await_leader(onlooker, "stopped", "stopped-first")
    lasting = candidate(cluster, "stopped", "stopped-second", "--lease", LONG)
    await_true(lambda: '"standby"' in lasting.logs(), "the second stands by")

    leaving.stop()

    assert await_leader(onlooker, "stopped", "stopped-second") > token
    assert leaving.ended("app") < leaving.ended("leaderelection"), "the app could still resign"
    assert leaving.exit_code("leaderelection") == 0
    terms = [json.loads(line) for line in onlooker.run("app", "retinue", "election", "history", "stopped").splitlines()]
    assert [term.get("end_reason") for term in terms] == [None, "resigned"], terms
    for pod in (leaving, lasting):
        cluster.remove(pod)


def test_an_app_that_is_killed_is_proven_dead_by_the_file_that_it_shared_with_its_server(
    cluster: Cluster, onlooker: Pod
) -> None:
    """The proof crosses the border of two containers: without it the app's lease of minutes would be waited for."""
    leases = ("--lease", LONG, "--app-lease", "5m")
    struck = candidate(cluster, "proven", "proven-first", *leases)
    token = await_leader(onlooker, "proven", "proven-first")
    lasting = candidate(cluster, "proven", "proven-second", *leases)
    await_true(lambda: '"standby"' in lasting.logs(), "the second stands by")

    struck.crash("app")

    assert await_leader(onlooker, "proven", "proven-second") > token
    for pod in (struck, lasting):
        cluster.remove(pod)


def test_the_term_goes_on_when_the_server_in_the_pod_is_killed_and_comes_back(cluster: Cluster, onlooker: Pod) -> None:
    pod = candidate(cluster, "restarted", "restarted-first", "--lease", LONG, "--app-lease", "1m")
    token = await_leader(onlooker, "restarted", "restarted-first")
    pod.crash("leaderelection")
    await_true(lambda: page(pod, "restarted") == "200", "the server serves its leader again")
    assert leader(onlooker, "restarted")["token"] == token
    cluster.remove(pod)


def test_health_and_metrics_answer_from_another_pod(cluster: Cluster, onlooker: Pod) -> None:
    pod = candidate(cluster, "watched", "watched-first")
    await_leader(onlooker, "watched", "watched-first")
    metrics = onlooker.run("app", "python", "-c", GET, f"http://{pod.address}:7275/metrics")
    assert 'retinue_leaderelection_leading{election="watched"} 1.0' in metrics
    onlooker.run("app", "python", "-c", GET, f"http://{pod.address}:7275/healthz")
    named = set(re.findall(r"(?<![/\w])retinue_[a-z_]+(?![a-z_0-9/])", GUIDE.read_text()))
    assert len(named) >= 4
    assert {name for name in named if f"# TYPE {name} " not in metrics} == set(), (
        "the guide names metrics that are there"
    )
    cluster.remove(pod)


def test_the_server_listens_to_apps_on_localhost_only(cluster: Cluster, onlooker: Pod) -> None:
    pod = candidate(cluster, "private", "private-first")
    script = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    for port in ("7075", "7080"):
        pod.run("app", "python", "-c", script, "127.0.0.1", port)
        with pytest.raises(PodError, match="ConnectionRefusedError"):
            onlooker.run("app", "python", "-c", script, pod.address, port)
    cluster.remove(pod)


@pytest.mark.parametrize("arguments", [["leaderelection"], []])
def test_a_pod_with_defaults_refuses_to_elect_and_says_why(image: str, arguments: list[str]) -> None:
    pod = ["run", "--rm", "--network", "none", "--env", "KUBERNETES_SERVICE_HOST=10.96.0.1"]
    done = subprocess.run([PODMAN, *pod, image, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot elect with engine sqlite in a pod" in done.stderr
    assert "etcd, kubernetes or postgres" in done.stderr
