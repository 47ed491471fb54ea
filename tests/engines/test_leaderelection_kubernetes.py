"""Claims on Kubernetes beyond the exercise: roles, missing Leases, other holders, losing and finding the API server.

What needs Leases alone is tried on the real API server and on the emulated one; the rest where there is the real one.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import yaml
from support.kubernetes import Api, Cluster, Emulator, Kubernetes
from support.kubernetes.transcript import FILE, play

from retinue_server.leaderelection.engine import Claim, EndReason, Granted, Hold, Refused
from retinue_server.leaderelection.engines.kubernetes import KubernetesEngine
from retinue_server.leaderelection.engines.kubernetes.lease import TERM, TERMS_KEPT
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import InvalidArgument, NotFound, Reason, Unavailable

MANIFEST = Path(__file__).parents[2] / "deploy" / "leaderelection" / "kubernetes.yaml"
ELECTION = "my-election"
"""As the manifest calls it."""


REAL = pytest.mark.parametrize("api", ["kubernetes"], indirect=True)
"""Claims about roles, and what kubectl does."""


@pytest.fixture(params=["kubernetes", "kubernetes-emulated"])
def api(request: pytest.FixtureRequest) -> Api:
    found: Api = request.getfixturevalue("cluster" if request.param == "kubernetes" else "emulator")
    return found


@pytest.fixture
def namespace(api: Api) -> Iterator[str]:
    name = api.namespace()
    yield name
    api.remove(name)


@pytest.fixture
def role(cluster: Cluster, namespace: str, tmp_path: Path) -> Path:
    """The kubeconfig of the service account that the manifest makes."""
    cluster.kubectl("apply", "-n", namespace, "-f", str(MANIFEST))
    return cluster.kubeconfig_of("my-app", namespace, tmp_path / "role")


@asynccontextmanager
async def servers(kubeconfig: Path, namespace: str, **options: object) -> AsyncIterator[list[KubernetesEngine]]:
    async with AsyncExitStack() as stack:
        engines = []
        for _ in range(2):
            where = {"kubeconfig": kubeconfig, "namespace": namespace}
            engine = KubernetesEngine(**where, **options)  # type: ignore[arg-type] # as they are
            await engine.start()
            stack.push_async_callback(engine.stop)
            engines.append(engine)
        yield engines


def claim(session: str, election: str = ELECTION) -> Claim:
    return Claim(election, f"candidate-{session}", session, "", 60_000, 0, 1_700_000_000_000)


async def won(engine: KubernetesEngine, wanted: Claim, watched: str | None = None) -> Hold:
    outcome = await engine.claim(wanted, watched)
    assert isinstance(outcome, Granted), outcome
    return Hold(wanted.election_id, wanted.session_id, outcome.record.epoch)


async def told(engine: KubernetesEngine, act: Callable[[], Awaitable[object]]) -> None:
    """Acts until the engine tells of a change."""
    heard = asyncio.Event()
    engine.listen(lambda _: heard.set())
    engine.watch(ELECTION)
    async with asyncio.timeout(60):
        while not heard.is_set():
            await act()
            await asyncio.sleep(0.05)


@REAL
async def test_the_role_of_the_manifest_is_enough(role: Path, namespace: str) -> None:
    async with servers(role, namespace) as (one, other):
        assert await one.read(ELECTION) is None
        held = await won(one, claim("a"))
        assert isinstance(await other.claim(claim("b")), Refused)

        async def propose() -> None:
            await one.proclaim(held, "here")

        await told(other, propose)
        assert (await one.renew([held])) != [None]
        assert [record.election_id for record in await one.records("", 10)] == [ELECTION]
        assert await one.release(held, EndReason.RESIGNED, 1)
        assert (await won(other, claim("b"))).epoch == held.epoch + 1


@REAL
async def test_what_the_role_does_not_allow_is_told_with_what_to_apply(role: Path, namespace: str) -> None:
    async with servers(role, namespace) as (engine, _):
        with pytest.raises(Unavailable, match=r"apply deploy/leaderelection/kubernetes\.yaml"):
            await engine.claim(claim("a", "another"))


async def test_a_missing_lease_is_told_with_what_to_apply(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace) as (engine, _):
        with pytest.raises(NotFound, match=r"apply deploy/leaderelection/kubernetes\.yaml") as refused:
            await engine.claim(claim("a", "none"))
    assert refused.value.reason == Reason.ELECTION_NOT_FOUND
    with pytest.raises(StartError, match="cannot find the Lease of election none in namespace"):
        await KubernetesEngine(kubeconfig=api.kubeconfig, namespace=namespace, names=["none"]).start()


async def test_a_name_that_no_lease_can_have_is_refused(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True) as (engine, _):
        with pytest.raises(InvalidArgument):
            await engine.claim(claim("a", "Not_a.name"))


@REAL
async def test_a_pod_finds_the_api_server_by_its_service_account(
    cluster: Cluster, role: Path, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightkube import KubeConfig  # noqa: PLC0415 - this claim alone knows of it

    said = json.loads(role.read_text())
    server = said["clusters"][0]["cluster"]["server"].removeprefix("https://")
    authority = KubeConfig.from_file(role).get()
    assert authority is not None
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", server.partition(":")[0])
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.partition(":")[2] or "443")
    (tmp_path / "token").write_text(said["users"][0]["user"]["token"])
    (tmp_path / "namespace").write_text(namespace)
    (tmp_path / "ca.crt").write_bytes(_certificate(cluster))
    found = KubeConfig.from_service_account
    monkeypatch.setattr(KubeConfig, "from_service_account", lambda: found(tmp_path))
    engine = KubernetesEngine(names=[ELECTION])
    await engine.start()
    assert (await won(engine, claim("a"))).epoch == 1
    await engine.stop()


def _certificate(cluster: Cluster) -> bytes:
    import base64  # noqa: PLC0415 - here alone

    said = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    return base64.b64decode(said["clusters"][0]["cluster"]["certificate-authority-data"])


async def test_all_of_a_namespace_can_be_watched_at_once(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True, watch_namespace=True) as (one, other):
        held = await won(one, claim("a"))

        async def propose() -> None:
            await one.proclaim(held, "here")

        await told(other, propose)


# Others


def as_client_go(api: Api, namespace: str, holder: str) -> None:
    """Changes the spec as LeaseLock of client-go does when it takes or releases; annotations stay as they are."""
    lease = api.lease(namespace, ELECTION)
    spec = lease["spec"]
    spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + (spec.get("holderIdentity", "") != holder)
    spec |= {"holderIdentity": holder, "leaseDurationSeconds": 2 if holder else 1}
    spec |= dict.fromkeys(("acquireTime", "renewTime"), "2026-01-01T00:00:00.123456Z")
    api.replace(namespace, lease)


async def test_what_is_released_is_as_client_go_leaves_it(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True) as (engine, _):
        held = await won(engine, claim("a"))
        assert api.lease(namespace, ELECTION)["spec"]["holderIdentity"] == "candidate-a"
        await engine.release(held, EndReason.RESIGNED, 1)
    spec = api.lease(namespace, ELECTION)["spec"]
    assert spec.get("holderIdentity", "") == ""
    assert spec["leaseDurationSeconds"] == 1


async def test_a_holder_of_client_go_is_waited_for_and_has_no_token(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True) as (engine, other):
        first = await won(engine, claim("a"))
        as_client_go(api, namespace, "theirs")
        assert await engine.renew([first]) == [None]
        refused = await other.claim(claim("b"))
        assert isinstance(refused, Refused)
        assert refused.record is not None
        assert (refused.record.candidate_id, refused.record.lease_ms) == ("theirs", 2_000)
        assert refused.record.epoch > first.epoch, "the last token of ours is not the present one"
        second = await won(other, claim("b"), refused.record.version)
        assert second.epoch > refused.record.epoch
        as_client_go(api, namespace, "")
        third = await won(engine, claim("a"))
        assert third.epoch > second.epoch


async def test_a_lease_whose_annotations_were_lost_repeats_no_token(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True) as (engine, other):
        for _ in range(3):
            held = await won(engine, claim("a"))
            await engine.release(held, EndReason.RESIGNED, 1)
        lease = api.lease(namespace, ELECTION)
        del lease["metadata"]["annotations"]
        api.replace(namespace, lease)
        assert (await won(other, claim("b"))).epoch > held.epoch


async def test_spoiled_annotations_are_told_and_nobody_leads_by_them(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True) as (engine, other):
        await won(engine, claim("a"))
        lease = api.lease(namespace, ELECTION)
        lease["metadata"]["annotations"][TERM] = "spoiled"
        api.replace(namespace, lease)
        with pytest.raises(Unavailable, match="somebody spoiled"):
            await other.claim(claim("b"))


async def test_a_lease_that_was_made_anew_has_another_domain(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True) as (engine, _):
        first = await won(engine, claim("a"))
        before = await engine.read(ELECTION)
        assert api.request("DELETE", f"{namespace}/leases/{ELECTION}").code == 200
        assert await engine.renew([first]) == [None]
        await won(engine, claim("b"))
        after = await engine.read(ELECTION)
    assert before is not None
    assert after is not None
    assert before.domain != after.domain


async def test_an_object_stays_small_however_many_terms_there_were(api: Api, namespace: str) -> None:
    async with servers(api.kubeconfig, namespace, create=True) as (engine, _):
        for _ in range(TERMS_KEPT + 4):
            held = await won(engine, claim("a"))
            await engine.release(held, EndReason.RESIGNED, 1)
        terms = await engine.terms(ELECTION, None, 100)
    assert [term.epoch for term in terms] == list(range(TERMS_KEPT + 4, 4, -1))


# Losing the API server


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Kubernetes]:
    """One that the test may hurt."""
    made = Kubernetes.create(tmp_path / "kubernetes")
    yield made
    made.stop()


async def test_an_api_server_that_hangs_or_is_gone_is_unavailable_and_is_found_again(own_cluster: Kubernetes) -> None:
    async with servers(own_cluster.kubeconfig, "default", create=True) as (one, other):
        held = await won(one, claim("a"))
        own_cluster.signal("kube-apiserver", signal.SIGSTOP)
        with pytest.raises(Unavailable):
            await one.renew([held])
        own_cluster.signal("kube-apiserver", signal.SIGCONT)
        await answers(one, held)
        await asyncio.to_thread(own_cluster.kill, "kube-apiserver")
        for call in (one.renew([held]), one.read(ELECTION), other.claim(claim("b"))):
            with pytest.raises(Unavailable) as refused:
                await call
            assert refused.value.reason == Reason.ENGINE_UNAVAILABLE
        await asyncio.to_thread(own_cluster.start_api)
        await answers(one, held)
        assert isinstance(await other.claim(claim("b")), Refused)

        async def propose() -> None:
            await one.proclaim(held, "here")

        await told(other, propose)
        assert_of_long_ago_is_forgotten(own_cluster)


def assert_of_long_ago_is_forgotten(api: Api) -> None:
    """So is every version from before an API server started."""
    code, (event,) = api.request("GET", "default/leases", watch="true", timeoutSeconds="1", resourceVersion="1")
    status = event["object"]
    assert (code, event["type"], status["code"], status["reason"]) == (200, "ERROR", 410, "Expired")


async def answers(engine: KubernetesEngine, held: Hold) -> None:
    """Returns when a renewal succeeds."""
    async with asyncio.timeout(60):
        while True:
            try:
                assert await engine.renew([held]) != [None]
            except Unavailable:
                await asyncio.sleep(0.1)
            else:
                return


# Losing it, on the emulated one: what the real one does too seldom


@asynccontextmanager
async def followed(emulator: Emulator) -> AsyncIterator[tuple[KubernetesEngine, Hold, asyncio.Event]]:
    """A leader, and what another server that watches is told."""
    async with servers(emulator.kubeconfig, emulator.namespace(), create=True) as (one, other):
        held, heard = await won(one, claim("a")), asyncio.Event()
        other.listen(lambda _: heard.set())
        other.watch(ELECTION)
        await asyncio.wait_for(heard.wait(), 60)
        yield one, held, heard


async def test_a_watch_that_broke_off_is_begun_again(emulator: Emulator) -> None:
    async with followed(emulator) as (one, held, heard):
        for turn in range(3):
            emulator.drop_watches()
            await hears(one, held, heard, f"{turn}")


@pytest.mark.parametrize("forget", [False, True])
async def test_a_watch_that_ended_goes_on_even_if_its_version_is_forgotten(emulator: Emulator, *, forget: bool) -> None:
    async with followed(emulator) as (one, held, heard):
        for turn in range(3):
            emulator.end_watches(forget=forget)
            await hears(one, held, heard, f"{turn}")


async def hears(engine: KubernetesEngine, held: Hold, heard: asyncio.Event, value: str) -> None:
    """Returns when a change was told that came after the watch was over."""
    heard.clear()
    await engine.proclaim(held, value)
    await asyncio.wait_for(heard.wait(), 60)


async def test_an_api_that_is_too_slow_is_unavailable_and_one_that_is_slow_is_not(emulator: Emulator) -> None:
    async with servers(emulator.kubeconfig, emulator.namespace(), create=True) as (one, other):
        held = await won(one, claim("a"))
        with emulator.slow(0.2):
            assert await one.renew([held]) != [None]
            assert isinstance(await other.claim(claim("b")), Refused)
        with emulator.slow(5), pytest.raises(Unavailable):
            await one.renew([held])
        await answers(one, held)


async def test_who_is_overtaken_tries_again_but_not_for_ever(emulator: Emulator) -> None:
    async with servers(emulator.kubeconfig, emulator.namespace(), create=True) as (one, _):
        held = await won(one, claim("a"))
        emulator.refuse_writes(5)
        assert await one.renew([held]) != [None]
        emulator.refuse_writes(100)
        with pytest.raises(Unavailable, match="others are faster"):
            await one.renew([held])
        emulator.refuse_writes(0)
        assert await one.renew([held]) != [None]


# The emulated one


def test_it_answers_as_the_real_one_did(api: Api) -> None:
    """Both are held to what was recorded, so that a machine without the real one holds the emulated one to it."""
    recorded = json.loads(FILE.read_text())
    played = play(api)
    for one, other in zip(played, recorded, strict=True):
        assert one == other


def test_who_has_no_token_is_told_so(api: Api, tmp_path: Path) -> None:
    said = yaml.safe_load(api.kubeconfig.read_text())
    said["users"][0]["user"] = {"token": "wrong"}
    (tmp_path / "wrong").write_text(json.dumps(said))
    code, (status,) = Api(tmp_path / "wrong").request("GET", "default/leases")
    assert (code, status["code"], status["reason"]) == (401, 401, "Unauthorized")


def test_what_the_emulated_one_forgot_cannot_be_watched(emulator: Emulator) -> None:
    emulator.end_watches(forget=True)
    assert_of_long_ago_is_forgotten(emulator)
