"""The exercise of leader election's port: every engine runs every claim. Differences are declared capabilities."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from pace import undisturbed_async
from support.etcd import Etcd
from support.kubernetes import Api
from support.postgres import Postgres

from retinue_server.leaderelection.engine import (
    Claim,
    EndReason,
    Engine,
    Granted,
    Hold,
    Record,
    Refused,
    Scope,
)
from retinue_server.leaderelection.engines.etcd.engine import EtcdEngine
from retinue_server.leaderelection.engines.kubernetes import KubernetesEngine
from retinue_server.leaderelection.engines.memory import MemoryEngine
from retinue_server.leaderelection.engines.postgres import PostgresEngine
from retinue_server.leaderelection.engines.sqlite import SqliteEngine

LEASE_MS = 60_000
SHORT_MS = 1_000
"""Where the end of a lease is the claim."""


def no_fatal(error: BaseException) -> None:
    raise AssertionError(error)


Make = Callable[[], Awaitable[Engine]]
"""Starts one more server's engine on the same store."""
Store = Callable[[pytest.FixtureRequest, Path], Iterator[Callable[[], Engine]]]


def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    yield MemoryEngine


def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    yield partial(SqliteEngine, tmp_path / "elections.db", no_fatal)


def postgres(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    server: Postgres = request.getfixturevalue("postgres")
    schema = server.schema()
    yield partial(PostgresEngine, server.url, schema=schema)
    server.drop(schema)


def kubernetes(request: pytest.FixtureRequest, tmp_path: Path, fixture: str) -> Iterator[Callable[[], Engine]]:
    api: Api = request.getfixturevalue(fixture)
    namespace = api.namespace()
    yield partial(KubernetesEngine, kubeconfig=api.kubeconfig, namespace=namespace, create=True)
    api.remove(namespace)


def etcd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    server: Etcd = request.getfixturevalue("etcd")
    yield partial(EtcdEngine, [server.endpoint], prefix=server.prefix())


STORES: dict[str, Store] = {
    "memory": memory,
    "sqlite": sqlite,
    "etcd": etcd,
    "postgres": postgres,
    "kubernetes": partial(kubernetes, fixture="cluster"),
    "kubernetes-emulated": partial(kubernetes, fixture="emulator"),
}


@asynccontextmanager
async def store(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:
        new = stack.enter_context(contextmanager(STORES[name])(request, tmp_path))

        async def make() -> Engine:
            engine = new()
            await engine.start()
            stack.push_async_callback(engine.stop)
            return engine

        yield make


@pytest.fixture(params=STORES)
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    async with store(request, request.param, tmp_path) as made:
        yield made


@pytest.fixture
async def engine(make: Make) -> Engine:
    return await make()


@pytest.fixture
async def others(make: Make, engine: Engine) -> Engine:
    """Another server's engine on the same store, where there can be one."""
    return engine if engine.capabilities.scope is Scope.PROCESS else await make()


def claim(session: str, election: str = "e", **fields: object) -> Claim:
    asked: dict[str, object] = {
        "election_id": election,
        "candidate_id": f"candidate-{session}",
        "session_id": session,
        "value": "",
        "lease_ms": LEASE_MS,
        "release_delay_ms": 0,
        "wall_ms": 1_700_000_000_000,
    }
    return Claim(**{**asked, **fields})  # type: ignore[arg-type] # a dict of keywords


def hold(granted: Granted) -> Hold:
    return Hold(granted.record.election_id, granted.record.session_id, granted.record.epoch)


async def won(engine: Engine, wanted: Claim, watched: str | None = None) -> Granted:
    outcome = await engine.claim(wanted, watched)
    assert isinstance(outcome, Granted), outcome
    return outcome


async def when_over(engine: Engine, election: str) -> str:
    """Watches a record until its lease is over, as the core does: what was seen last."""
    record = await engine.read(election)
    assert record is not None
    if record.left_ms is None:  # its whole lease must be watched
        await asyncio.sleep((record.lease_ms + 1) / 1000)  # the time is the claim
        return record.version
    async with asyncio.timeout(60):
        while record.left_ms:
            await asyncio.sleep(min(record.left_ms + 1, 100) / 1000)
            record = await engine.read(election)
            assert record is not None
    return record.version


async def told(engine: Engine, election: str, act: Awaitable[object]) -> None:
    """Returns when the engine has told of the change that `act` makes."""
    heard = asyncio.Event()
    engine.listen(lambda name: heard.set() if name == election else None)
    engine.watch(election)
    await act
    await asyncio.wait_for(heard.wait(), 60)


async def test_before_the_first_claim_there_is_nothing(engine: Engine) -> None:
    assert await engine.read("e") is None
    assert list(await engine.terms("e", None, 10)) == []
    assert list(await engine.records("", 10)) == []


async def test_the_first_claim_wins_and_the_second_is_told_who_leads(engine: Engine, others: Engine) -> None:
    first = await won(engine, claim("a", value="10.0.0.1:80"))
    assert first.record.epoch > 0
    assert first.record.domain
    assert first.delay_ms == 0
    refused = await others.claim(claim("b"))
    assert isinstance(refused, Refused)
    assert refused.record is not None
    assert (refused.record.candidate_id, refused.record.value) == ("candidate-a", "10.0.0.1:80")
    assert (refused.record.domain, refused.record.epoch) == (first.record.domain, first.record.epoch)


async def test_the_same_session_is_granted_the_same_term_again(engine: Engine, others: Engine) -> None:
    first = await won(engine, claim("a"))
    again = await won(engine, claim("a"))
    assert (again.record.epoch, again.record.domain) == (first.record.epoch, first.record.domain)
    assert again.record.version != first.record.version, "its lease begins again"
    assert isinstance(await others.claim(claim("b"), first.record.version), Refused), "who watched saw it change"


async def test_released_it_is_free_at_once_and_the_next_token_is_higher(engine: Engine, others: Engine) -> None:
    epochs = []
    for session in "abcd":
        server = engine if session in "ac" else others
        granted = await won(server, claim(session))
        epochs.append(granted.record.epoch)
        assert granted.delay_ms == 0
        assert await server.release(hold(granted), EndReason.RESIGNED, 1_700_000_000_001)
    assert epochs == sorted(set(epochs))


async def test_releasing_again_or_for_another_does_nothing(engine: Engine, others: Engine) -> None:
    first = await won(engine, claim("a"))
    assert not await engine.release(hold(first)._replace(session_id="b"), EndReason.RESIGNED, 1)
    assert await engine.release(hold(first), EndReason.RESIGNED, 1)
    assert not await engine.release(hold(first), EndReason.RESIGNED, 1)
    second = await won(others, claim("b"))
    assert not await engine.release(hold(first), EndReason.RESIGNED, 1)
    record = await engine.read("e")
    assert record is not None
    assert record.epoch == second.record.epoch
    assert record.candidate_id == "candidate-b"


async def test_a_lease_that_is_over_passes_on_with_the_delay_it_asked_for(engine: Engine, others: Engine) -> None:
    first = await won(engine, claim("a", release_delay_ms=70, lease_ms=SHORT_MS))
    await others.claim(claim("b"))
    version = await when_over(others, "e")
    second = await won(others, claim("b"), version)
    assert second.record.epoch > first.record.epoch
    assert second.delay_ms == 70
    assert await engine.renew([hold(first)]) == [None]
    assert not await engine.release(hold(first), EndReason.RESIGNED, 1)
    assert await engine.proclaim(hold(first), "late") is None


async def test_a_renewed_lease_is_not_over(engine: Engine, others: Engine) -> None:
    names = (f"e{number}" for number in itertools.count())

    async def outlast() -> None:
        name = next(names)
        first = await won(engine, claim("a", name, lease_ms=SHORT_MS))
        refused = await others.claim(claim("b", name))
        assert isinstance(refused, Refused)
        assert refused.record is not None
        version = refused.record.version
        for _ in range(4):
            await asyncio.sleep(SHORT_MS / 3000)  # the time is the claim
            (renewed,) = await engine.renew([hold(first)])
            assert renewed is not None
            assert renewed.epoch == first.record.epoch
        assert isinstance(await others.claim(claim("b", name), version), Refused)

    await undisturbed_async(outlast, within_s=1)


async def test_renewals_of_many_come_together_and_the_lost_ones_are_told(engine: Engine) -> None:
    held = [await won(engine, claim("a", f"e{number}")) for number in range(5)]
    await engine.release(hold(held[3]), EndReason.RESIGNED, 1)
    renewed = await engine.renew([hold(granted) for granted in held])
    assert [record is not None for record in renewed] == [True, True, True, False, True]


async def test_a_value_lasts_as_long_as_its_term(engine: Engine, others: Engine) -> None:
    first = await won(engine, claim("a", value="one"))
    changed = await engine.proclaim(hold(first), "two \u2713")
    assert changed is not None
    assert changed.value == "two \u2713"
    seen = await others.read("e")
    assert seen is not None
    assert seen.value == "two \u2713"
    await engine.release(hold(first), EndReason.RESIGNED, 1)
    vacant = await others.read("e")
    assert vacant is not None
    assert (vacant.candidate_id, vacant.value, vacant.epoch) == ("", "", first.record.epoch)


async def test_a_step_down_is_asked_of_one_term_alone(engine: Engine, others: Engine) -> None:
    first = await won(engine, claim("a"))
    epoch = first.record.epoch
    assert await others.ask_step_down("e", epoch + 1) is None
    asked = await others.ask_step_down("e", epoch)
    assert asked is not None
    assert asked.step_down
    (renewed,) = await engine.renew([hold(first)])
    assert renewed is not None
    assert renewed.step_down, "the leader's server hears of it with its renewal at the latest"
    await engine.release(hold(first), EndReason.STEPPED_DOWN, 1)
    assert await others.ask_step_down("e", epoch) is None
    second = await won(others, claim("b"))
    assert not second.record.step_down


async def test_terms_are_remembered_with_why_they_ended(engine: Engine, others: Engine) -> None:
    for session, reason in (("a", EndReason.RESIGNED), ("b", EndReason.APP_SILENT)):
        granted = await won(engine, claim(session, wall_ms=1_700_000_000_000))
        await engine.release(hold(granted), reason, 1_700_000_005_000)
    await won(others, claim("c"))
    terms = list(await others.terms("e", None, 10))
    assert [(t.candidate_id, t.reason) for t in terms] == [
        ("candidate-c", EndReason.UNKNOWN),
        ("candidate-b", EndReason.APP_SILENT),
        ("candidate-a", EndReason.RESIGNED),
    ]
    assert [t.end_ms for t in terms] == [None, 1_700_000_005_000, 1_700_000_005_000]
    assert all(t.acquire_ms == 1_700_000_000_000 for t in terms)
    assert [t.candidate_id for t in await others.terms("e", terms[0].epoch, 1)] == ["candidate-b"]


async def test_a_term_that_ran_out_is_remembered_as_such(engine: Engine, others: Engine) -> None:
    await won(engine, claim("a", lease_ms=SHORT_MS))
    await others.claim(claim("b"))
    await won(others, claim("b"), await when_over(others, "e"))
    ended = list(await others.terms("e", None, 10))[1]
    assert (ended.candidate_id, ended.reason) == ("candidate-a", EndReason.EXPIRED)


async def test_elections_are_listed_by_name(engine: Engine, others: Engine) -> None:
    for name in ("b", "a", "c"):
        await won(engine, claim("s", name))
    assert [record.election_id for record in await others.records("", 2)] == ["a", "b"]
    assert [record.election_id for record in await others.records("b", 2)] == ["c"]


async def test_who_watches_is_told_of_a_change_by_another(engine: Engine, others: Engine) -> None:
    granted = await won(engine, claim("a"))
    for turn in range(20):
        await told(others, "e", engine.release(hold(granted), EndReason.RESIGNED, 1))
        wanted = claim(f"b{turn}")
        await told(others, "e", engine.claim(wanted))
        granted = await won(engine, wanted)


async def test_of_many_claims_at_once_one_wins(engine: Engine, others: Engine) -> None:
    for turn in range(5):
        wanted = [claim(f"{turn}-{number}", f"e{turn}") for number in range(8)]
        servers = [engine, others]
        outcomes = await asyncio.gather(*(servers[i % 2].claim(one) for i, one in enumerate(wanted)))
        assert sum(isinstance(outcome, Granted) for outcome in outcomes) == 1


async def test_who_withdraws_is_not_waited_for(engine: Engine, others: Engine) -> None:
    first = await won(engine, claim("a"))
    assert isinstance(await others.claim(claim("b")), Refused)
    assert isinstance(await others.claim(claim("c")), Refused)
    await others.withdraw("e", "b")
    await engine.release(hold(first), EndReason.RESIGNED, 1)
    assert (await won(others, claim("c"))).record.candidate_id == "candidate-c"


async def test_a_server_that_starts_again_finds_the_same_domain_and_higher_tokens(make: Make, engine: Engine) -> None:
    first = await won(engine, claim("a"))
    await engine.release(hold(first), EndReason.RESIGNED, 1)
    await engine.stop()
    if engine.capabilities.scope is Scope.PROCESS:
        return
    again = await make()
    second = await won(again, claim("b"))
    assert second.record.domain == first.record.domain
    assert second.record.epoch > first.record.epoch


async def test_a_session_goes_on_under_the_next_process_of_its_server(make: Make, engine: Engine) -> None:
    if engine.capabilities.scope is Scope.PROCESS:
        return
    first = await won(engine, claim("a"))
    await engine.stop()
    again = await make()
    resumed = await won(again, claim("a"))
    assert (resumed.record.epoch, resumed.record.domain) == (first.record.epoch, first.record.domain)
    (renewed,) = await again.renew([hold(resumed)])
    assert renewed is not None
    assert await again.release(hold(resumed), EndReason.RESIGNED, 1)


def test_every_field_of_a_record_has_a_meaning_when_vacant() -> None:
    vacant = Record("e", "d", 1, "v")
    assert not vacant.candidate_id
    assert not vacant.step_down
