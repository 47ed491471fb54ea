"""What only etcd does: its own tools, its outages, its leases, and the defect of its Election service."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pace import undisturbed_async
from support.certificates import Authority
from support.etcd import Etcd, three
from support.faults.proxy import Mode, Proxy

from retinue_server.leaderelection import wiring
from retinue_server.leaderelection.config import EtcdSettings
from retinue_server.leaderelection.core.elections import Elections
from retinue_server.leaderelection.core.requests import Elected, Event, Standby, Standing
from retinue_server.leaderelection.core.session import Outbox
from retinue_server.leaderelection.engine import Claim, EndReason, Granted, Hold, Record, Refused
from retinue_server.leaderelection.engines.etcd import engine as etcd_engine
from retinue_server.leaderelection.engines.etcd.engine import EtcdEngine
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.config import ConfigError
from retinue_server.runtime.errors import Reason, Unavailable

PATIENCE_S = 60


class Cluster:
    """Servers' engines on one etcd and prefix."""

    def __init__(self, server: Etcd) -> None:
        self.server, self.prefix = server, server.prefix()
        self._engines: list[EtcdEngine] = []

    async def engine(self, *endpoints: str, **options: Any) -> EtcdEngine:
        made = EtcdEngine(endpoints or [self.server.endpoint], prefix=self.prefix, **options)
        await made.start()
        self._engines.append(made)
        return made

    async def stop(self) -> None:
        for made in self._engines:
            await made.stop()

    def line(self, election: str = "e") -> list[dict[str, Any]]:
        """The keys of a line, the first one first, as etcd has them."""
        found = self.server.ctl("get", "--prefix", f"{self.prefix}/{election}/", "--sort-by=CREATE", "-w=json")
        return list(json.loads(found).get("kvs", []))


@pytest.fixture
async def cluster(etcd: Etcd) -> AsyncIterator[Cluster]:
    made = Cluster(etcd)
    yield made
    await made.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Etcd]:
    """One that a test may kill."""
    made = Etcd.create(tmp_path / "etcd")
    yield made
    with contextlib.suppress(ProcessLookupError):
        made.kill()


@pytest.fixture
async def own(server: Etcd) -> AsyncIterator[Cluster]:
    made = Cluster(server)
    yield made
    await made.stop()


def claim(session: str, election: str = "e", **fields: Any) -> Claim:
    asked = {"value": "", "lease_ms": 60_000, "release_delay_ms": 0, "wall_ms": 1, **fields}
    return Claim(election_id=election, candidate_id=f"candidate-{session}", session_id=session, **asked)


def hold(record: Record) -> Hold:
    return Hold(record.election_id, record.session_id, record.epoch)


async def won(engine: EtcdEngine, wanted: Claim) -> Record:
    outcome = await engine.claim(wanted)
    assert isinstance(outcome, Granted), outcome
    return outcome.record


async def refused(engine: EtcdEngine, wanted: Claim) -> None:
    outcome = await engine.claim(wanted)
    assert isinstance(outcome, Refused), outcome


async def won_at_last(engine: EtcdEngine, wanted: Claim) -> Granted:
    """Claims again until it is granted, through outages."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(Unavailable):
                outcome = await engine.claim(wanted)
                if isinstance(outcome, Granted):
                    return outcome
            await asyncio.sleep(0.05)


async def answering(engine: EtcdEngine) -> None:
    """Returns when it answers again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(Unavailable):
                await engine.read("e")
                return
            await asyncio.sleep(0.05)


async def test_etcdctl_shows_who_leads_and_what_is_proclaimed(cluster: Cluster) -> None:
    leader, waiter = await cluster.engine(), await cluster.engine()
    first = await won(leader, claim("a", value="10.0.0.1:80"))
    await refused(waiter, claim("b", value="10.0.0.2:80"))
    command = cluster.server.command("elect", "--listen", f"{cluster.prefix}/e")
    listener = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert listener.stdout is not None

    async def shown() -> tuple[str, str]:
        assert listener.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            return (await listener.stdout.readline()).decode().strip(), (
                await listener.stdout.readline()
            ).decode().strip()

    try:
        [leading, waiting] = [kv["key"] for kv in cluster.line()]
        assert leading != waiting
        key, value = await shown()
        assert key.startswith(f"{cluster.prefix}/e/")
        assert value == "10.0.0.1:80"
        await leader.proclaim(hold(first), "10.0.0.1:81")
        assert await shown() == (key, "10.0.0.1:81")
        await leader.release(hold(first), EndReason.RESIGNED, 1)
        assert (await shown())[1] == "10.0.0.2:80"
    finally:
        listener.kill()
        await listener.wait()


async def test_a_waiter_whose_lease_was_revoked_does_not_believe_that_it_leads(cluster: Cluster) -> None:
    """etcd's Election service tells such a waiter that it leads when all before it are gone, though no key is there."""
    leader, waiter, third = [await cluster.engine() for _ in range(3)]
    await won(leader, claim("a"))
    await refused(waiter, claim("b"))
    await refused(third, claim("c"))
    leases = [f"{kv['lease']:x}" for kv in cluster.line()]
    cluster.server.ctl("lease", "revoke", leases[1])
    cluster.server.ctl("lease", "revoke", leases[0])
    await refused(waiter, claim("b"))
    third_term = await won(third, claim("c"))
    assert cluster.line()[0]["create_revision"] == third_term.epoch
    await third.release(hold(third_term), EndReason.RESIGNED, 1)
    term = await won(waiter, claim("b"))
    [there] = cluster.line()
    assert there["create_revision"] == term.epoch > third_term.epoch


async def test_with_every_key_lost_the_waiter_leads_by_a_key_that_is_there(cluster: Cluster) -> None:
    leader, waiter = await cluster.engine(), await cluster.engine()
    first = await won(leader, claim("a"))
    await refused(waiter, claim("b"))
    for lease in [f"{kv['lease']:x}" for kv in reversed(cluster.line())]:
        cluster.server.ctl("lease", "revoke", lease)
    assert await leader.renew([hold(first)]) == [None]
    term = await won(waiter, claim("b"))
    [there] = cluster.line()
    assert there["create_revision"] == term.epoch > first.epoch


async def test_with_its_lease_a_server_loses_all_that_it_held(cluster: Cluster) -> None:
    leader = await cluster.engine()
    held = [await won(leader, claim("a", f"e{number}")) for number in range(3)]
    lease = cluster.line("e0")[0]["lease"]
    cluster.server.ctl("lease", "revoke", f"{lease:x}")
    assert await leader.renew([hold(record) for record in held]) == [None] * 3
    again = await won(leader, claim("a", "e1"))
    assert again.epoch > held[1].epoch
    assert cluster.line("e1")[0]["lease"] != lease


async def test_a_key_that_an_operator_deletes_is_a_term_that_is_over(cluster: Cluster) -> None:
    leader, waiter = await cluster.engine(), await cluster.engine()
    first = await won(leader, claim("a", release_delay_ms=50))
    await refused(waiter, claim("b"))
    cluster.server.ctl("del", "--prefix", f"{cluster.prefix}/e/")
    assert await leader.renew([hold(first)]) == [None]
    assert (await won_at_last(waiter, claim("b"))).delay_ms == 50


async def test_the_delay_is_told_again_to_one_who_did_not_hear_it(cluster: Cluster) -> None:
    leader, waiter = await cluster.engine(), await cluster.engine()
    first = await won(leader, claim("a", release_delay_ms=50))
    cluster.server.ctl("lease", "revoke", f"{cluster.line()[0]['lease']:x}")
    for _ in range(2):  # the answer to the first may have been lost
        granted = await waiter.claim(claim("b"))
        assert isinstance(granted, Granted)
        assert granted.delay_ms == 50
        assert granted.record.epoch > first.epoch


async def test_killed_it_is_unavailable_and_recovers_with_nothing_lost(own: Cluster) -> None:
    leader, waiter = await own.engine(), await own.engine()
    first = await won(leader, claim("a", value="here", lease_ms=60_000))
    await refused(waiter, claim("b", lease_ms=60_000))
    waiter.watch("e")
    own.server.kill()
    for call in (leader.renew([hold(first)]), leader.read("e"), waiter.claim(claim("b")), leader.records("", 1)):
        with pytest.raises(Unavailable) as error:
            await call
        assert error.value.retry_ms
    await asyncio.to_thread(own.server.start)
    await answering(leader)
    await answering(waiter)
    (renewed,) = await leader.renew([hold(first)])
    assert renewed is not None
    assert (renewed.epoch, renewed.domain, renewed.value) == (first.epoch, first.domain, "here")
    heard = asyncio.Event()
    waiter.listen(lambda _: heard.set())
    await leader.release(hold(first), EndReason.RESIGNED, 1)
    async with asyncio.timeout(PATIENCE_S):
        await heard.wait()
    assert (await won_at_last(waiter, claim("b", lease_ms=60_000))).record.epoch > first.epoch
    assert [term.reason for term in await waiter.terms("e", None, 9)] == [EndReason.UNKNOWN, EndReason.RESIGNED]


async def test_it_starts_without_an_etcd_and_works_once_there_is_one(own: Cluster) -> None:
    own.server.kill()
    early = await own.engine(timeout_s=3.0)
    with pytest.raises(Unavailable):
        await early.claim(claim("a"))
    await asyncio.to_thread(own.server.start)
    term = (await won_at_last(early, claim("a"))).record
    heard = asyncio.Event()
    early.listen(lambda _: heard.set())
    early.watch("e")
    async with asyncio.timeout(PATIENCE_S):
        while not heard.is_set():
            await early.proclaim(hold(term), "again")
            await asyncio.sleep(0.05)


async def test_an_etcd_that_hangs_is_unavailable_by_a_deadline(own: Cluster) -> None:
    leader = await own.engine(timeout_s=2.0)
    first = await won(leader, claim("a", lease_ms=60_000))
    own.server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(leader.renew([hold(first)]), PATIENCE_S)
    finally:
        own.server.signal(signal.SIGCONT)
    await answering(leader)
    (renewed,) = await leader.renew([hold(first)])
    assert renewed is not None


def lose_answer(engine: EtcdEngine, number: int) -> None:
    """Loses the answer to a transaction that is yet to come (1 = the next one); it is done all the same."""
    whole = engine._client.txn
    left = [number]

    async def cut(request: Any) -> Any:
        answer = await whole(request)
        left[0] -= 1
        if not left[0]:
            raise Unavailable("the answer is lost", reason=Reason.ENGINE_UNAVAILABLE, retry_ms=1)
        return answer

    engine._client.txn = cut  # type: ignore[method-assign] # between the engine and its etcd


async def test_whoever_loses_the_answers_to_its_claims_has_one_key_and_one_term(cluster: Cluster) -> None:
    leader, waiter = await cluster.engine(), await cluster.engine()
    for claimant, wanted in ((leader, claim("a", release_delay_ms=9)), (waiter, claim("b"))):
        lose_answer(claimant, 2)
        with pytest.raises(Unavailable):
            await claimant.claim(wanted)
    assert len(cluster.line()) == 2
    first = await won(leader, claim("a"))
    await refused(waiter, claim("b"))
    assert cluster.line()[0]["create_revision"] == first.epoch
    lose_answer(leader, 1)
    with pytest.raises(Unavailable):
        await leader.release(hold(first), EndReason.RESIGNED, 1)
    assert not await leader.release(hold(first), EndReason.RESIGNED, 1), "it was released"
    assert (await won_at_last(waiter, claim("b"))).delay_ms == 0
    assert [term.reason for term in await waiter.terms("e", None, 9)] == [EndReason.UNKNOWN, EndReason.RESIGNED]


async def test_a_key_that_is_lost_between_reading_and_beginning_begins_nothing(cluster: Cluster) -> None:
    leader, waiter, third = [await cluster.engine() for _ in range(3)]
    first = await won(leader, claim("a"))
    await refused(waiter, claim("b"))
    await refused(third, claim("c"))
    revoke = "lease", "revoke", f"{cluster.line()[1]['lease']:x}"
    await leader.release(hold(first), EndReason.RESIGNED, 1)
    whole, terms = waiter._client.txn, list[Record]()

    async def late(request: Any) -> Any:
        if request.compare and not terms:
            await asyncio.to_thread(cluster.server.ctl, *revoke)
            terms.append(await won(third, claim("c")))
        return await whole(request)

    waiter._client.txn = late  # type: ignore[method-assign] # between the engine and its etcd
    with contextlib.suppress(Unavailable):
        await refused(waiter, claim("b"))
    assert len(terms) == 1
    await refused(waiter, claim("b"))
    assert cluster.line()[0]["create_revision"] == terms[0].epoch


async def test_a_term_whose_begin_was_not_heard_of_can_be_given_back(cluster: Cluster) -> None:
    cut, other = await cluster.engine(), await cluster.engine()
    lose_answer(cut, 2)
    with pytest.raises(Unavailable):
        await cut.claim(claim("a"))
    await cut.withdraw("e", "a")
    record = await cut.read("e")
    assert record is not None
    assert await cut.release(hold(record), EndReason.DISCONNECTED, 1)
    assert (await won_at_last(other, claim("b"))).delay_ms == 0
    assert len(cluster.line()) == 1


async def test_the_next_endpoint_is_called_when_one_does_not_answer(own: Cluster) -> None:
    with Proxy(own.server.endpoint) as proxy:
        leader, other = await own.engine(proxy.address, own.server.endpoint, timeout_s=3.0), await own.engine()
        first = await won(leader, claim("a", lease_ms=60_000))
        leader.watch("e")
        proxy.set(Mode.HALF_OPEN)
        (renewed,) = await leader.renew([hold(first)])
        assert renewed is not None
        heard = asyncio.Event()
        leader.listen(lambda _: heard.set())
        await other.ask_step_down("e", first.epoch)
        async with asyncio.timeout(PATIENCE_S):
            await heard.wait()


@pytest.fixture
async def trio(tmp_path: Path) -> AsyncIterator[tuple[Cluster, list[Etcd]]]:
    with three(tmp_path) as members:
        made = Cluster(members[0])
        yield made, members
        await made.stop()


async def test_when_the_leader_of_etcd_dies_holds_and_places_go_on_at_the_others(
    trio: tuple[Cluster, list[Etcd]],
) -> None:
    own, members = trio
    endpoints = [member.endpoint for member in members]
    first, second = await own.engine(*endpoints), await own.engine(*endpoints[1:], endpoints[0])
    term = await won(first, claim("a", lease_ms=60_000))
    await refused(second, claim("b", lease_ms=60_000))
    waiting = own.line()[1]
    second.watch("e")
    _leading(members).kill()
    await answering(first)
    await answering(second)
    (renewed,) = await first.renew([hold(term)])
    assert renewed is not None
    assert (renewed.epoch, renewed.domain) == (term.epoch, term.domain)
    heard = asyncio.Event()
    second.listen(lambda _: heard.set())
    await first.release(hold(term), EndReason.RESIGNED, 1)
    async with asyncio.timeout(PATIENCE_S):
        await heard.wait()
    assert (await won_at_last(second, claim("b", lease_ms=60_000))).record.epoch == waiting["create_revision"]


def _leading(members: list[Etcd]) -> Etcd:
    for member in members:
        [status] = json.loads(member.ctl("endpoint", "status", "-w=json"))
        if status["Status"]["leader"] == status["Status"]["header"]["member_id"]:
            return member
    raise AssertionError("no member leads")


async def test_changes_that_were_compacted_away_are_looked_for(cluster: Cluster) -> None:
    leader, observer = await cluster.engine(), await cluster.engine()
    await won(leader, claim("a"))
    observer.watch("e")
    heard = asyncio.Event()
    observer.listen(lambda _: heard.set())
    [there] = cluster.line()
    cluster.server.ctl("compact", str(there["mod_revision"]))
    observer._watcher._next = 1  # as after a long time without a connection
    observer._watcher.reopen()
    async with asyncio.timeout(PATIENCE_S):
        await heard.wait()
    heard.clear()
    record = await leader.read("e")
    assert record is not None
    await leader.release(hold(record), EndReason.RESIGNED, 1)
    async with asyncio.timeout(PATIENCE_S):
        await heard.wait()


async def test_a_store_that_went_back_is_followed_from_where_it_is(own: Cluster) -> None:
    """As after a restored backup; the tokens of before are the operator's to deal with."""
    leader, observer = await own.engine(), await own.engine()
    for number in range(20):
        first = await won(leader, claim("a", f"e{number}", lease_ms=60_000))
    own.server.kill()
    shutil.rmtree(own.server.directory / "data")
    await asyncio.to_thread(own.server.start)
    await answering(leader)
    await answering(observer)
    assert await leader.renew([hold(first)]) == [None]
    again = (await won_at_last(leader, claim("a", "e1"))).record
    assert again.domain == first.domain, "etcd does not tell"
    heard = asyncio.Event()
    observer.listen(lambda _: heard.set())
    observer.watch("e1")
    async with asyncio.timeout(PATIENCE_S):
        while not heard.is_set():
            await leader.proclaim(hold(again), "again")
            await asyncio.sleep(0.05)


async def test_many_holds_are_renewed_by_one_keep_alive_and_no_write(own: Cluster) -> None:
    leader = await own.engine()
    claims = [claim("a", f"e{number:04}", lease_ms=60_000) for number in range(1_000)]
    held = [record for block in range(0, 1_000, 100) for record in await _all_won(leader, claims[block : block + 100])]
    calls: Counter[str] = Counter()
    _count(leader, calls)
    before = _raft_index(own.server)
    renewed = await leader.renew([hold(record) for record in held])
    assert all(renewed)
    assert calls["keep_alive"] == 1
    assert calls["txn"] == 16
    assert _raft_index(own.server) == before
    assert len({kv["lease"] for kv in own.line("e0000") + own.line("e0999")}) == 1


async def _all_won(leader: EtcdEngine, claims: list[Claim]) -> list[Record]:
    return list(await asyncio.gather(*(won(leader, one) for one in claims)))


def _count(leader: EtcdEngine, calls: Counter[str]) -> None:
    for name in ("txn", "keep_alive", "grant"):
        whole = getattr(leader._client, name)

        async def counted(*args: Any, name: str = name, whole: Any = whole) -> Any:
            calls[name] += 1
            return await whole(*args)

        setattr(leader._client, name, counted)


def _raft_index(server: Etcd) -> int:
    [status] = json.loads(server.ctl("endpoint", "status", "-w=json"))
    return int(status["Status"]["raftIndex"])


async def test_who_waits_keeps_its_place_without_claiming(cluster: Cluster) -> None:
    elections = (f"e{number}" for number in itertools.count())

    async def keeps() -> None:
        election = next(elections)
        leader, waiter = await cluster.engine(), await cluster.engine()
        first = await won(leader, claim("a", election))
        await refused(waiter, claim("b", election, lease_ms=2_000))
        before = cluster.line(election)[1]
        await asyncio.sleep(4)  # the time is the claim: two leases
        assert cluster.line(election)[1] == before
        await leader.release(hold(first), EndReason.RESIGNED, 1)
        assert (await won(waiter, claim("b", election))).epoch == before["create_revision"]

    await undisturbed_async(keeps, within_s=2)


async def test_a_server_that_stops_leaves_the_lines_and_keeps_what_it_leads(cluster: Cluster) -> None:
    stopping, other = await cluster.engine(), await cluster.engine()
    await won(stopping, claim("a", "mine", lease_ms=60_000))
    first = await won(other, claim("b", lease_ms=60_000))
    await refused(stopping, claim("a", lease_ms=60_000))
    await stopping.stop()
    assert len(cluster.line()) == 1
    assert len(cluster.line("mine")) == 1
    await other.release(hold(first), EndReason.RESIGNED, 1)


class App:
    """A candidate of a server, without the wire."""

    def __init__(self, elections: Elections, name: str, app_lease_ms: int) -> None:
        asked = Standing("e", name, lease_ms=60_000, app_lease_ms=app_lease_ms)
        self.elections = elections
        self.session, self.outbox = elections.begin(asked, None)
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        for sequence in range(1, 10_000):
            await asyncio.sleep(0.1)
            self.elections.heartbeat(self.session, sequence, healthy=True)

    async def hang(self) -> None:
        """It shows no more signs of life; its stream stays open."""
        self._beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beating

    async def saw(self, kind: type[Event]) -> Event:
        return await _saw(self.outbox, kind)


async def _saw(outbox: Outbox, kind: type[Event]) -> Event:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for event in await outbox.take():
                if isinstance(event, kind):
                    return event


async def test_nobody_waits_for_a_waiter_that_hangs(cluster: Cluster) -> None:
    servers = [Elections(await cluster.engine()) for _ in range(3)]
    for elections in servers:
        await elections.start()
    apps = []
    for elections, name in zip(servers, "abc", strict=True):
        apps.append(App(elections, name, app_lease_ms=500 if name == "b" else 30_000))
        await apps[-1].saw(Elected if name == "a" else Standby)
    await apps[1].hang()
    await asyncio.sleep(0.6)  # the time is the claim: its app's lease
    await servers[0].leave(apps[0].session)
    await apps[2].saw(Elected)
    for app in apps:
        await app.hang()
    for elections in servers:
        await elections.stop()


async def test_it_speaks_tls_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    member, mine = authority.issue("member"), authority.issue("me")
    options = [f"--cert-file={member.cert_file}", f"--key-file={member.key_file}"]
    options += [f"--trusted-ca-file={authority.file}", "--client-cert-auth"]
    server = Etcd.create(tmp_path / "etcd", *options, scheme="https")
    asked = EtcdSettings(endpoints=(server.endpoint,), ca_file=authority.file, **mine._asdict())
    known = wiring._etcd(asked)
    unknown = wiring._etcd(EtcdSettings(endpoints=(server.endpoint,), ca_file=authority.file))
    try:
        await known.start()
        assert isinstance(await known.claim(claim("a")), Granted)
        await unknown.start()
        with pytest.raises(Unavailable):
            await unknown.read("e")
    finally:
        await known.stop()
        await unknown.stop()
        server.kill()


@pytest.mark.parametrize("version", ["3.4.38", "3.5.22", "3.6.4", "3.6.0-rc.1"])
def test_an_etcd_that_renews_revoked_leases_is_refused(version: str) -> None:
    with pytest.raises(StartError, match="upgrade etcd"):
        etcd_engine._check_version(version)


@pytest.mark.parametrize("version", ["3.5.23", "3.6.5", "3.6.16", "3.7.0", "3.8.0-alpha.0", "4.0.0"])
def test_later_ones_are_taken(version: str) -> None:
    etcd_engine._check_version(version)


@pytest.mark.parametrize(
    "settings",
    [
        EtcdSettings(endpoints=()),
        EtcdSettings(endpoints=("http://127.0.0.1:2379",)),
        EtcdSettings(endpoints=("127.0.0.1",)),
        EtcdSettings(prefix="/"),
        EtcdSettings(cert_file=Path("me.crt"), key_file=Path("me.key")),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: EtcdSettings) -> None:
    with pytest.raises(ConfigError, match=r"leaderelection\.etcd"):
        wiring._etcd(settings)
