"""Claims on discovery by Kubernetes beyond the exercise: ports, roles, many Services, losing and finding a watch."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from grpc import aio
from servers import environment, start_server
from support.faults.proxy import Mode, Proxy
from support.kubernetes import Api, Cluster, Emulator, emulated
from support.kubernetes.slices import Body, body, endpoint, put, remove
from support.kubernetes.transcript import SLICES_FILE, play_slices

from retinue.scattergather.v1.topology_service_pb2 import WatchTopologyRequest, WatchTopologyResponse
from retinue.scattergather.v1.topology_service_pb2_grpc import TopologyServiceStub
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.discovery import kubernetes
from retinue_server.runtime.discovery.kubernetes import KubernetesDiscovery

MANIFEST = Path(__file__).parents[2] / "deploy" / "scattergather" / "kubernetes.yaml"
PATIENCE_S = 60
GRPC: Body = {"name": "grpc", "port": 9000}

REAL = pytest.mark.parametrize("api", ["kubernetes"], indirect=True)
"""Claims about roles."""


@pytest.fixture(params=["kubernetes", "kubernetes-emulated"])
def api(request: pytest.FixtureRequest) -> Api:
    found: Api = request.getfixturevalue("cluster" if request.param == "kubernetes" else "emulator")
    return found


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    name = api.namespace()
    yield name
    api.remove(name)


@asynccontextmanager
async def finding(kubeconfig: Path | None, namespace: str = "") -> AsyncIterator[KubernetesDiscovery]:
    discovery = KubernetesDiscovery(kubeconfig, namespace, "scattergather")
    await discovery.start()
    try:
        yield discovery
    finally:
        await discovery.stop()


class Heard:
    """What one who watches was told last."""

    def __init__(self) -> None:
        self.last: Sequence[str] | None = None
        self._more = asyncio.Event()

    def __call__(self, addresses: Sequence[str]) -> None:
        self.last = list(addresses)
        self._more.set()

    async def until(self, *addresses: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.last != list(addresses):
                self._more.clear()
                await self._more.wait()


def watch(discovery: KubernetesDiscovery, name: str) -> Heard:
    heard = Heard()
    discovery.watch(name, heard)
    return heard


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while text not in caplog.text:
            await asyncio.sleep(0.01)


async def stores(api: Api, namespace: str, *slices: Body) -> None:
    for one in slices:
        await asyncio.to_thread(put, api, namespace, one)


async def test_a_port_may_be_a_name(api: Api, namespace: str, caplog: pytest.LogCaptureFixture) -> None:
    old = body("old", "leaf", [endpoint("10.0.0.1")], [GRPC, {"name": "http", "port": 80}])
    new = body("new", "leaf", [endpoint("10.0.0.2")], [{"name": "grpc", "port": 9001}])
    await stores(api, namespace, old, new)
    async with finding(api.kubeconfig, namespace) as discovery:
        await watch(discovery, "leaf:grpc").until("10.0.0.1:9000", "10.0.0.2:9001")
        await watch(discovery, "leaf:http").until("10.0.0.1:80")
        await watch(discovery, "leaf:7").until("10.0.0.1:7", "10.0.0.2:7")
        await watch(discovery, "leaf:gprc").until()
    assert "Service leaf has no endpoints at port gprc: its ports are named grpc, http" in caplog.text


async def test_a_service_that_there_is_not_is_told(api: Api, namespace: str, caplog: pytest.LogCaptureFixture) -> None:
    await stores(api, namespace, body("a", "unready", [endpoint("10.0.0.1", ready=False)], [GRPC]))
    async with finding(api.kubeconfig, namespace) as discovery:
        await watch(discovery, "leaf:grpc").until()
        await watch(discovery, "unready:grpc").until()
    assert "Service leaf has no endpoints at port grpc: it has no EndpointSlices" in caplog.text
    assert "Service unready has no endpoints at port grpc: none of its pods is ready" in caplog.text


async def test_readiness_and_going_away_are_followed(api: Api, namespace: str) -> None:
    def told(**first: bool) -> Body:
        return body("a", "leaf", [endpoint("10.0.0.1", **first), endpoint("10.0.0.2", ready=False)], [GRPC])

    async with finding(api.kubeconfig, namespace) as discovery:
        heard = watch(discovery, "leaf:grpc")
        await stores(api, namespace, told(ready=True))
        await heard.until("10.0.0.1:9000")
        await stores(api, namespace, told(ready=False, serving=False))
        await heard.until()
        await stores(api, namespace, told(ready=False, serving=True, terminating=True))
        await heard.until("10.0.0.1:9000")


async def test_a_service_may_be_in_another_namespace(api: Api, namespace: str) -> None:
    other = await asyncio.to_thread(api.namespace)
    await stores(api, namespace, body("a", "leaf", [endpoint("10.0.0.1")], [GRPC]))
    await stores(api, other, body("a", "leaf", [endpoint("10.0.0.2")], [GRPC]))
    async with finding(api.kubeconfig, namespace) as discovery:
        await watch(discovery, "leaf:grpc").until("10.0.0.1:9000")
        await watch(discovery, f"leaf.{other}:grpc").until("10.0.0.2:9000")
    await asyncio.to_thread(api.remove, other)


async def test_a_slice_that_becomes_another_services_is_taken_from_the_first(api: Api, namespace: str) -> None:
    await stores(api, namespace, body("a", "one", [endpoint("10.0.0.1")], [GRPC]))
    async with finding(api.kubeconfig, namespace) as discovery:
        one, other = watch(discovery, "one:grpc"), watch(discovery, "other:grpc")
        await one.until("10.0.0.1:9000")
        await stores(api, namespace, body("a", "other", [endpoint("10.0.0.1")], [GRPC]))
        await one.until()
        await other.until("10.0.0.1:9000")


async def test_many_services_are_found_and_followed(api: Api, namespace: str) -> None:
    await stores(api, namespace, *(body(f"s{n}", f"s{n}", [endpoint(f"10.0.0.{n}")], [GRPC]) for n in range(4)))
    async with finding(api.kubeconfig, namespace) as discovery:
        heard = [watch(discovery, f"s{n}:grpc") for n in range(4)]
        for number, one in enumerate(heard):
            await one.until(f"10.0.0.{number}:9000")
        late = watch(discovery, "s0:9")
        await late.until("10.0.0.0:9")
        await stores(api, namespace, body("s1", "s1", [endpoint("10.1.0.1")], [GRPC]))
        await heard[1].until("10.1.0.1:9000")
        await asyncio.to_thread(remove, api, namespace, "s2")
        await heard[2].until()


async def test_more_services_than_a_request_can_name_are_found_and_followed(api: Api, namespace: str) -> None:
    await stores(api, namespace, body("last", "s99", [endpoint("10.0.0.1")], [GRPC]))
    async with finding(api.kubeconfig, namespace) as discovery:
        heard = [watch(discovery, f"s{n}:grpc") for n in range(100)]
        await heard[99].until("10.0.0.1:9000")
        await stores(api, namespace, body("last", "s0", [endpoint("10.0.0.1")], [GRPC]))
        await heard[0].until("10.0.0.1:9000")
        await heard[99].until()


async def test_thousands_of_endpoints_are_found(api: Api, namespace: str) -> None:
    ends = [[f"10.{n}.{i // 250}.{i % 250}" for i in range(1000)] for n in range(3)]
    slices = [body(f"s{n}", "leaf", [endpoint(one) for one in some], [GRPC]) for n, some in enumerate(ends)]
    await stores(api, namespace, *slices)
    async with finding(api.kubeconfig, namespace) as discovery:
        await watch(discovery, "leaf:grpc").until(*sorted(f"{one}:9000" for some in ends for one in some))


# Roles


@pytest.fixture
def account(cluster: Cluster, namespace: str, tmp_path: Path) -> Path:
    """The kubeconfig of a service account that may do nothing yet."""
    cluster.kubectl("create", "serviceaccount", "my-app", "-n", namespace)
    return cluster.kubeconfig_of("my-app", namespace, tmp_path / "account")


@REAL
async def test_what_the_role_does_not_allow_is_told_with_what_to_apply_and_that_is_enough(
    api: Cluster, namespace: str, account: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await stores(api, namespace, body("a", "leaf", [endpoint("10.0.0.1")], [GRPC]))
    async with finding(account, namespace) as discovery:
        heard = watch(discovery, "leaf:grpc")
        await logged(caplog, "what was found last stands")
        (message,) = [record.message for record in caplog.records if "cannot follow" in record.message]
        assert "403" in message
        assert "; apply deploy/scattergather/kubernetes.yaml; " in message
        await asyncio.to_thread(api.kubectl, "apply", "-n", namespace, "-f", str(MANIFEST))
        await heard.until("10.0.0.1:9000")
        await stores(api, namespace, body("a", "leaf", [endpoint("10.0.0.2")], [GRPC]))
        await heard.until("10.0.0.2:9000")


@REAL
async def test_a_pod_finds_the_api_server_and_its_namespace_by_its_service_account(
    api: Cluster, namespace: str, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64  # noqa: PLC0415 - this claim alone knows of these

    from lightkube import KubeConfig  # noqa: PLC0415

    api.kubectl("apply", "-n", namespace, "-f", str(MANIFEST))
    said = json.loads(account.read_text())
    address = said["clusters"][0]["cluster"]["server"].removeprefix("https://")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", address.partition(":")[0])
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", address.partition(":")[2] or "443")
    (tmp_path / "token").write_text(said["users"][0]["user"]["token"])
    (tmp_path / "namespace").write_text(namespace)
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(said["clusters"][0]["cluster"]["certificate-authority-data"]))
    found = KubeConfig.from_service_account
    monkeypatch.setattr(KubeConfig, "from_service_account", lambda: found(tmp_path))
    await stores(api, namespace, body("a", "leaf", [endpoint("10.0.0.1")], [GRPC]))
    async with finding(None) as discovery:
        await watch(discovery, "leaf:grpc").until("10.0.0.1:9000")


async def test_a_token_that_was_replaced_is_taken(emulator: Emulator, tmp_path: Path) -> None:
    """As it is where the kubelet renews it: the API server is lost with the old one, and found with the new one."""
    namespace, kubeconfig = emulator.namespace(), tmp_path / "kubeconfig"
    said = yaml.safe_load(emulator.kubeconfig.read_text())
    right, said["users"][0]["user"]["token"] = said["users"][0]["user"]["token"], "old"
    kubeconfig.write_text(json.dumps(said))
    await stores(emulator, namespace, body("a", "leaf", [endpoint("10.0.0.1")], [GRPC]))
    async with finding(kubeconfig, namespace) as discovery:
        heard = watch(discovery, "leaf:grpc")
        said["users"][0]["user"]["token"] = right
        kubeconfig.write_text(json.dumps(said))
        await heard.until("10.0.0.1:9000")


# Losing a watch, on the emulated one: what the real one does too seldom


@asynccontextmanager
async def followed(emulator: Emulator) -> AsyncIterator[tuple[Heard, Callable[[str], Awaitable[None]]]]:
    """One who is told, and how to say another address."""
    namespace = emulator.namespace()

    async def say(address: str) -> None:
        await stores(emulator, namespace, body("a", "leaf", [endpoint(address)], [GRPC]))

    await say("10.0.0.1")
    async with finding(emulator.kubeconfig, namespace) as discovery:
        heard = watch(discovery, "leaf:grpc")
        await heard.until("10.0.0.1:9000")
        await requests(emulator, "watch")
        yield heard, say


async def requests(emulator: Emulator, *last: str) -> None:
    """Returns when these are the last that it got."""
    async with asyncio.timeout(PATIENCE_S):
        while tuple(emulator.requests[-len(last) :]) != last:
            await asyncio.sleep(0.01)


async def test_all_that_is_watched_at_once_is_one_list_and_one_watch() -> None:
    with emulated() as emulator:  # of its own: what others asked last may still be counted
        async with finding(emulator.kubeconfig, emulator.namespace()) as discovery:
            heard = [watch(discovery, f"leaf{n}:grpc") for n in range(20)]
            for one in heard:
                await one.until()
            await requests(emulator, "list", "watch")
            assert emulator.requests == ["list", "watch"]


async def test_a_watch_that_broke_off_is_begun_again_and_no_warning(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    async with followed(emulator) as (heard, say):
        for turn in range(3):
            emulator.drop_watches()
            await say(f"10.0.1.{turn}")
            await heard.until(f"10.0.1.{turn}:9000")
            await requests(emulator, "list", "watch")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_watch_that_ended_goes_on_where_it_was(emulator: Emulator) -> None:
    async with followed(emulator) as (heard, say):
        emulator.end_watches()
        await requests(emulator, "watch", "watch")
        await say("10.0.1.1")
        await heard.until("10.0.1.1:9000")


async def test_what_is_forgotten_is_listed_again(emulator: Emulator) -> None:
    async with followed(emulator) as (heard, say):
        for turn in range(2):
            emulator.end_watches(forget=True)
            await say(f"10.0.1.{turn}")
            await heard.until(f"10.0.1.{turn}:9000")
            await requests(emulator, "watch", "list", "watch")


async def test_after_a_bookmark_nothing_is_forgotten_that_was_seen(emulator: Emulator) -> None:
    async with followed(emulator) as (heard, say):
        other = emulator.namespace()
        await stores(emulator, other, body("a", "leaf", [endpoint("10.9.9.9")], [GRPC]))
        await asyncio.to_thread(emulator.bookmark_watches)
        emulator.forget_what_was()
        emulator.end_watches()
        await requests(emulator, "watch", "watch")
        await say("10.0.1.1")
        await heard.until("10.0.1.1:9000")
        assert emulator.requests[-2:] == ["watch", "watch"]


@pytest.mark.parametrize("nonsense", [b"<html>Sign in</html>", b"{}", b'{"kind": "EndpointSliceList"}', b"[]", b""])
async def test_nonsense_is_not_taken_for_an_answer(
    emulator: Emulator, caplog: pytest.LogCaptureFixture, nonsense: bytes
) -> None:
    async with followed(emulator) as (heard, say):
        with emulator.talking(nonsense):
            await logged(caplog, "what was found last stands")
            assert heard.last == ["10.0.0.1:9000"]
        await say("10.0.1.1")
        await heard.until("10.0.1.1:9000")


async def test_a_connection_that_died_without_a_word_is_noticed(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kubernetes, "_WATCH_S", 1)
    monkeypatch.setattr(kubernetes, "_PATIENCE_S", 1.0)
    namespace = emulator.namespace()
    said = yaml.safe_load(emulator.kubeconfig.read_text())
    cluster = said["clusters"][0]["cluster"]
    with Proxy(cluster["server"].removeprefix("https://")) as proxy:
        cluster["server"] = f"https://{proxy.address}"
        (tmp_path / "kubeconfig").write_text(json.dumps(said))
        async with finding(tmp_path / "kubeconfig", namespace) as discovery:
            heard = watch(discovery, "leaf:grpc")
            await heard.until()
            await requests(emulator, "watch")
            proxy.set(Mode.HALF_OPEN)
            await logged(caplog, "what was found last stands")
            await stores(emulator, namespace, body("a", "leaf", [endpoint("10.0.0.1")], [GRPC]))
            proxy.set(Mode.PASS)
            await heard.until("10.0.0.1:9000")


# Beginning


@pytest.mark.parametrize("text", ["", "[]", "{", "{clusters: []}", "{contexts: [], clusters: [], current-context: a}"])
def test_a_kubeconfig_that_cannot_be_used_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    with pytest.raises(StartError, match=r"cannot find the API server: .*scattergather\.kubernetes\.kubeconfig"):
        KubernetesDiscovery(tmp_path / "kubeconfig", "", "scattergather").prepare()


def test_outside_a_pod_a_kubeconfig_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(StartError, match=r"set scattergather\.kubernetes\.kubeconfig"):
        KubernetesDiscovery(None, "", "scattergather").prepare()


POOL = "pools: {p: {shards: [{shard_id: a, endpoints: ['kubernetes:leaf:grpc']}]}}"


def test_a_server_whose_pools_need_it_does_not_start_without_it(tmp_path: Path) -> None:
    (tmp_path / "lightkube.py").write_text("raise ModuleNotFoundError('it is hidden', name='lightkube')")
    (tmp_path / "pools.yaml").write_text(POOL)
    env = environment(RETINUE_SCATTERGATHER__POOLS=str(tmp_path / "pools.yaml"))
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    command = [sys.executable, "-m", "retinue_server", "scattergather", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(tmp_path / "data")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert (
        "retinue-server: cannot find endpoints by Kubernetes: lightkube is missing;"
        " install it with pip install 'retinue-server[kubernetes]'" in done.stderr
    )


async def test_a_server_finds_the_leaves_of_its_pools_and_takes_a_changed_file(
    api: Api, namespace: str, tmp_path: Path
) -> None:
    await stores(api, namespace, body("a", "leaf", [endpoint("10.0.0.1")], [GRPC]))
    pools = tmp_path / "pools.yaml"
    pools.write_text("pools: {p: {shards: [{shard_id: a, endpoints: ['127.0.0.1:1']}]}}")
    settings = {"POOLS": pools, "KUBERNETES__KUBECONFIG": api.kubeconfig, "KUBERNETES__NAMESPACE": namespace}
    env = {f"RETINUE_SCATTERGATHER__{name}": str(value) for name, value in settings.items()}
    server = await asyncio.to_thread(start_server, tmp_path, "scattergather", env=env)
    try:
        async with aio.insecure_channel(server.address) as channel, asyncio.timeout(PATIENCE_S):
            watching = TopologyServiceStub(channel).WatchTopology(WatchTopologyRequest(pool_id="p"))
            await _endpoints(watching, "127.0.0.1:1")
            pools.write_text(POOL)
            await _endpoints(watching, "10.0.0.1:9000")
            await stores(api, namespace, body("a", "leaf", [endpoint("10.0.0.2")], [GRPC]))
            await _endpoints(watching, "10.0.0.2:9000")
            watching.cancel()
    finally:
        assert await asyncio.to_thread(server.stop) == 0
    said = (tmp_path / "server.log").read_text()
    assert "HTTP Request" not in said
    assert "Traceback" not in said


async def _endpoints(watching: AsyncIterable[WatchTopologyResponse], *addresses: str) -> None:
    """Returns when the pool has these."""
    async for said in watching:
        if [one.address for shard in said.pool.shards for one in shard.endpoints] == list(addresses):
            return


def test_the_manifest_fits_the_schema_of_kubernetes() -> None:
    for manifest in yaml.safe_load_all(MANIFEST.read_text()):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_a_root_without_use_for_it_loads_nothing_of_it() -> None:
    program = "import sys, retinue_server.scattergather.wiring\nassert 'lightkube' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), timeout=60)


# The emulated one


def test_it_answers_as_the_real_one_did(api: Api) -> None:
    """Both are held to what was recorded, so that a machine without the real one holds the emulated one to it."""
    for one, other in zip(play_slices(api), json.loads(SLICES_FILE.read_text()), strict=True):
        assert one == other
