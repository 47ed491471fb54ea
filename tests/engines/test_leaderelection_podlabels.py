"""Claims about the label of the pod that leads: on a real API server where it is built, and on the emulated one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.kubernetes import Api, Cluster

from retinue_server.leaderelection.core.requests import Token, Transition
from retinue_server.leaderelection.podlabels import PodLabels

MANIFESTS = Path(__file__).parents[2] / "deploy" / "leaderelection"
ELECTION, KEY = "my-election", "my-election.leads"


@pytest.fixture(params=["kubernetes", "kubernetes-emulated"])
def api(request: pytest.FixtureRequest) -> Api:
    found: Api = request.getfixturevalue("cluster" if request.param == "kubernetes" else "emulator")
    return found


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    name = api.namespace()
    for pod in ("pod-a", "pod-b"):
        api.create_pod(name, pod)
    yield name
    api.remove(name)


@asynccontextmanager
async def labels(kubeconfig: Path, namespace: str, pod: str) -> AsyncIterator[PodLabels]:
    part = PodLabels({ELECTION: KEY}, pod, kubeconfig, namespace)
    await part.start()
    try:
        yield part
    finally:
        await part.stop()


def tell(part: PodLabels, kind: str, token: int = 1) -> None:
    part.note(Transition(kind, ELECTION, "candidate", Token("domain", token)))


async def until(api: Api, namespace: str, labelled: list[str]) -> None:
    """Those pods, and no others, have the label."""

    def seen() -> list[str]:
        return [pod for pod in ("pod-a", "pod-b") if api.labels(namespace, pod).get(KEY) == "true"]

    await _holds(lambda: seen() == labelled)


async def _holds(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(what):
            await asyncio.sleep(0.05)


async def test_the_pod_that_leads_has_the_label_and_gives_it_up(api: Api, namespace: str) -> None:
    async with labels(api.kubeconfig, namespace, "pod-a") as part:
        tell(part, "elected")
        await until(api, namespace, ["pod-a"])
        tell(part, "ended")
        await until(api, namespace, [])
        tell(part, "elected", 2)
        await until(api, namespace, ["pod-a"])
    await until(api, namespace, [])


async def test_a_new_leader_takes_it_from_a_pod_that_does_not_answer_any_more(api: Api, namespace: str) -> None:
    async with labels(api.kubeconfig, namespace, "pod-a") as gone:
        tell(gone, "elected")
        await until(api, namespace, ["pod-a"])
        async with labels(api.kubeconfig, namespace, "pod-b") as part:
            tell(part, "elected", 2)
            await until(api, namespace, ["pod-b"])
            tell(gone, "ended")  # it wakes up
            await gone.stop()
            await until(api, namespace, ["pod-b"])


async def test_what_a_former_process_left_goes(api: Api, namespace: str) -> None:
    api.create_pod(namespace, "pod-c", **{KEY: "true"})
    async with labels(api.kubeconfig, namespace, "pod-c"):
        await _holds(lambda: KEY not in api.labels(namespace, "pod-c"))


async def test_it_is_tried_again_while_the_pod_is_not_there(api: Api, namespace: str) -> None:
    async with labels(api.kubeconfig, namespace, "pod-c") as part:
        tell(part, "elected")
        api.create_pod(namespace, "pod-c")
        await _holds(lambda: api.labels(namespace, "pod-c").get(KEY) == "true")


@pytest.mark.parametrize("api", ["kubernetes"], indirect=True)
async def test_the_role_of_the_manifest_is_enough(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    for manifest in ("kubernetes.yaml", "podlabels.yaml"):
        cluster.kubectl("apply", "-n", namespace, "-f", str(MANIFESTS / manifest))
    role = cluster.kubeconfig_of("my-app", namespace, tmp_path / "role")
    cluster.create_pod(namespace, "pod-c", **{KEY: "true"})
    async with labels(role, namespace, "pod-a") as part:
        tell(part, "elected")
        await until(cluster, namespace, ["pod-a"])
        assert KEY not in cluster.labels(namespace, "pod-c")
