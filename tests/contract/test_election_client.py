"""The Python client's leadership against real servers of each engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from elections import ENGINES
from pace import undisturbed_async
from servers import RunningServer, environment, start_server
from workers import PATIENCE

from retinue.client import errors, sync
from retinue.client.election import Campaign, Election, ElectionEvent, NotElected, Term, TermLost, campaign
from retinue.leaderelection.v1 import election_pb2 as pb

Serve = Callable[..., RunningServer]


@pytest.fixture(scope="module", params=ENGINES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    engine = {"RETINUE_LEADERELECTION__ENGINE": request.param}
    running = start_server(tmp_path_factory.mktemp("server"), "leaderelection", env=engine)
    yield running
    running.stop()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[RunningServer]:
    """A server that the test may end, on the engine that outlives it."""
    running = start_server(tmp_path, "leaderelection")
    yield running
    running.kill()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An election of the test's own."""
    return "".join(c if c.isalnum() else "-" for c in str(request.node.name))[:100]


class Events:
    """What a listener was told."""

    def __init__(self) -> None:
        self.all: list[ElectionEvent] = []
        self._news = asyncio.Event()

    def __call__(self, event: ElectionEvent) -> None:
        self.all.append(event)
        self._news.set()

    async def until(self, kind: str, count: int = 1) -> None:
        """Waits for so many of that kind."""
        async with asyncio.timeout(PATIENCE):
            while len([event for event in self.all if event.kind == kind]) < count:
                self._news.clear()
                await self._news.wait()


async def hold(election: Election, entered: asyncio.Future[Term]) -> None:
    """Leads until it is cancelled."""
    async with election.campaign() as term:
        entered.set_result(term)
        await asyncio.Event().wait()


@asynccontextmanager
async def candidate(address: str, name: str, **options: Any) -> AsyncIterator[asyncio.Future[Term]]:
    """A candidate of another connection; gives the term that it will have."""
    entered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
    events = Events()
    async with Election(name, address=address, listener=events, **options) as election:
        task = asyncio.create_task(hold(election, entered))
        await events.until("connected")
        try:
            yield entered
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, TermLost):
                await task


async def within(term: asyncio.Future[Term], patience: float = PATIENCE) -> Term:
    return await asyncio.wait_for(term, patience)


async def still_waits(term: asyncio.Future[Term], seconds: float) -> None:
    done, _ = await asyncio.wait([term], timeout=seconds)
    assert not done, "it was elected"


def _crash(candidacy: Campaign) -> None:
    """As if the app had died, but not its children: its stream breaks off, and its own descriptor is closed."""
    assert candidacy._running is not None
    assert candidacy._proof is not None
    candidacy._running.cancel()
    os.close(candidacy._proof.descriptor)
    candidacy._proof.descriptor = -1


async def end_reasons(address: str, name: str) -> list[str]:
    """Why the terms ended, the latest first."""
    async with Election(name, address=address) as election:
        return [pb.EndReason.Name(term.end_reason).removeprefix("END_REASON_") async for term in election.terms()]


async def test_leadership_passes_on_when_the_block_ends_under_a_higher_token(server: RunningServer, name: str) -> None:
    async with campaign(name, address=server.address, lease=600, app_lease=300) as first:
        assert first.is_leader()
    async with candidate(server.address, name) as later:
        term = await within(later)  # the lease was longer
        assert term.token.value > first.token.value
        assert term.token.domain == first.token.domain
        assert not first.is_leader()
    assert await end_reasons(server.address, name) == ["RESIGNED", "RESIGNED"]


async def test_heartbeats_carry_a_term_over_many_leases(server: RunningServer, name: str) -> None:
    elections = (f"{name[:90]}-{number}" for number in itertools.count())

    async def lasts() -> None:
        async with campaign(next(elections), address=server.address, app_lease=0.5) as term:
            first = term.remaining()
            await asyncio.sleep(2)  # four leases
            assert term.is_leader()
            assert 0 < first <= 0.45

    await undisturbed_async(lasts, within_s=0.4)


async def test_who_leads_is_seen_proclaimed_and_verified(server: RunningServer, name: str) -> None:
    async with Election(name, address=server.address, candidate_id="me", value="a") as election:
        seen = election.observe()
        assert (await anext(seen)).candidate_id == ""
        async with election.campaign() as term:
            assert (await anext(seen)).value == "a"
            await term.proclaim("b")
            assert (await anext(seen)).value == "b"
            assert (await election.leader()).candidate_id == "me"
            assert (await election.verify(term.token)).candidate_id == "me"
            assert name in [leader.election_id async for leader in election.list(page_size=1)]
        assert (await anext(seen)).candidate_id == ""
        await seen.aclose()  # type: ignore[attr-defined] # it is a generator
        with pytest.raises(errors.FailedPrecondition) as caught:
            await election.verify(term.token)
        assert caught.value.reason == "STALE_TOKEN"
        with pytest.raises(TermLost):
            term.check()


async def test_one_that_does_not_wait_is_told_who_leads(server: RunningServer, name: str) -> None:
    async with campaign(name, address=server.address, candidate_id="first"):
        with pytest.raises(NotElected) as caught:
            async with campaign(name, address=server.address, wait=0):
                pytest.fail("two lead")
        assert caught.value.leader.candidate_id == "first"
        with pytest.raises(NotElected):
            async with campaign(name, address=server.address, wait=0.2):
                pytest.fail("two lead")


async def test_a_candidate_that_gave_up_is_never_elected(server: RunningServer, name: str) -> None:
    async with campaign(name, address=server.address) as first:
        with pytest.raises(NotElected):
            async with campaign(name, address=server.address, wait=0):
                pytest.fail("two lead")
        async with candidate(server.address, name, candidate_id="third") as later:
            first_token = first.token.value
            first.close()
    async with candidate(server.address, name, candidate_id="fourth") as later:
        assert (await within(later)).token.value == first_token + 1


async def test_two_live_candidates_of_one_name_are_refused(server: RunningServer, name: str) -> None:
    async with candidate(server.address, name, candidate_id="same", lease=600, app_lease=300):
        with pytest.raises(errors.AlreadyExists):
            async with campaign(name, address=server.address, candidate_id="same", app_lease=0.4):
                pytest.fail("it lives")


async def test_an_operator_asks_and_the_block_ends_and_others_come_first(server: RunningServer, name: str) -> None:
    led: list[str] = []

    async def work(term: Term) -> None:
        led.append(term.candidate_id)
        await asyncio.Event().wait()

    async with Election(name, address=server.address, candidate_id="asked") as election:
        leading = asyncio.create_task(election.lead(work))
        async with asyncio.timeout(PATIENCE):
            while not led:
                await asyncio.sleep(0.01)
        async with (
            candidate(server.address, name, candidate_id="other") as later,
            Election(name, address=server.control) as operator,
        ):
            assert (await operator.request_step_down()).requested
            assert (await within(later)).candidate_id == "other"
        async with asyncio.timeout(PATIENCE):
            while len(led) < 2:
                await asyncio.sleep(0.01)
        leading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leading
    assert await end_reasons(server.address, name) == ["RESIGNED", "RESIGNED", "STEPPED_DOWN"]


async def test_apps_may_not_ask_for_a_step_down(server: RunningServer, name: str) -> None:
    async with Election(name, address=server.address) as election:
        with pytest.raises(errors.PermissionDenied):
            await election.request_step_down()


# Death

HOLDER = """
import sys, time
from retinue.client.sync import Election
proof = {"proof": None, "none": False}[sys.argv[2]]
with Election(sys.argv[1], app_lease=float(sys.argv[3]), lease=600, proof_dir=proof) as election:
    with election.campaign() as term:
        print(term.proof, flush=True)
        time.sleep(600)
"""


def holder(server: RunningServer, name: str, proof: str, app_lease: float) -> subprocess.Popen[str]:
    """A process that leads, by the blocking face."""
    command = [sys.executable, "-c", HOLDER, name, proof, str(app_lease)]
    env = environment(RETINUE_ADDRESS=server.address)
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert started.stdout is not None
    assert (started.stdout.readline() != "None\n") == (proof == "proof")
    return started


async def test_proof_of_death_passes_the_election_on_long_before_the_lease_is_over(
    server: RunningServer, name: str
) -> None:
    with holder(server, name, "proof", 300) as process:
        async with candidate(server.address, name) as later:
            process.kill()
            await within(later)  # the lease is 300 s
    assert await end_reasons(server.address, name) == ["RESIGNED", "APP_DEAD"]


async def test_without_proof_a_term_is_kept_until_the_lease_is_over(server: RunningServer, name: str) -> None:
    with holder(server, name, "none", 5) as process:
        async with candidate(server.address, name) as later:
            killed = asyncio.get_running_loop().time()
            process.kill()
            process.wait()
            await within(later)
            assert asyncio.get_running_loop().time() - killed > 1, "heartbeats are a third of the lease apart"
    assert await end_reasons(server.address, name) == ["RESIGNED", "APP_SILENT"]


async def test_a_child_that_has_the_lock_is_no_dead_app(server: RunningServer, name: str) -> None:
    async with Election(name, address=server.address, app_lease=300, lease=600) as election:
        candidacy = election.campaign()
        with pytest.raises(asyncio.CancelledError):  # noqa: PT012 - what happens in the block is the claim
            async with candidacy as term:
                assert term.proof is not None
                child = await asyncio.create_subprocess_exec("sleep", "600", pass_fds=(term.proof,))
                _crash(candidacy)
                async with candidate(server.address, name) as later:
                    await still_waits(later, 0.5)
                    child.kill()
                    await child.wait()
                    await within(later)
                raise asyncio.CancelledError


# Servers


async def test_a_server_that_is_killed_and_starts_again_finds_the_same_term(fresh: RunningServer, name: str) -> None:
    events = Events()
    running = fresh
    try:
        async with (
            Election(name, address=fresh.address, listener=events, app_lease=300, lease=600) as election,
            election.campaign() as term,
        ):
            fresh.kill()
            await events.until("disconnected")
            running = await asyncio.to_thread(fresh.restart)
            await events.until("connected", 2)
            assert term.is_leader()
            assert not term.lost
            assert (await election.verify(term.token)).candidate_id == election.candidate_id
        assert await end_reasons(running.address, name) == ["RESIGNED"]
    finally:
        running.kill()


async def test_a_block_that_ends_while_its_server_starts_resigns_all_the_same(fresh: RunningServer, name: str) -> None:
    running = fresh
    try:
        async with campaign(name, address=fresh.address, app_lease=300, lease=600):
            fresh.kill()
            running = await asyncio.to_thread(fresh.restart)
        assert await end_reasons(running.address, name) == ["RESIGNED"]
    finally:
        running.kill()


async def test_a_server_that_stops_asks_its_leader_to_resign_and_is_not_held_up(
    fresh: RunningServer, name: str
) -> None:
    with pytest.raises(TermLost, match="DRAINING"):  # noqa: PT012 - what happens in the block is the claim
        async with campaign(name, address=fresh.address, lease=60, app_lease=30):
            fresh.process.send_signal(signal.SIGTERM)
            await asyncio.Event().wait()
    assert await asyncio.to_thread(fresh.process.wait, 60) == 0


async def test_a_server_that_hangs_ends_the_block_before_the_deadline(fresh: RunningServer, name: str) -> None:
    left = []
    with pytest.raises(TermLost, match="DEADLINE"):  # noqa: PT012 - what happens in the block is the claim
        async with campaign(name, address=fresh.address, app_lease=6, margin=3) as term:
            fresh.process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.Event().wait()
            finally:
                left.append(term.remaining())
    assert left[0] > 0
    assert not term.is_leader()


async def test_a_server_that_starts_later_is_waited_for(tmp_path: Path, name: str) -> None:
    address = f"unix:{tmp_path}/app.sock"
    async with candidate_before_its_server(address, name) as later:
        running = await asyncio.to_thread(start_server, tmp_path, "leaderelection", "--listen", address)
        try:
            term = await within(later)
            assert term.proof is not None, "its directory was learnt when it came up"
        finally:
            await asyncio.to_thread(running.kill)


@asynccontextmanager
async def candidate_before_its_server(address: str, name: str) -> AsyncIterator[asyncio.Future[Term]]:
    entered: asyncio.Future[Term] = asyncio.get_running_loop().create_future()
    events = Events()
    async with Election(name, address=address, listener=events) as election:
        task = asyncio.create_task(hold(election, entered))
        await events.until("disconnected")
        yield entered
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, TermLost):
            await task


def test_the_blocking_face_leads_and_looks_on(server: RunningServer, name: str) -> None:
    with sync.Election(name, address=server.address, candidate_id="me") as election:
        with election.campaign(patience=5) as term:
            term.check()
            assert election.leader().candidate_id == "me"
        assert [known.candidate_id for known in election.terms()] == ["me"]
        assert next(election.observe()).candidate_id == ""
