"""The rules of leader election, one claim a test, under a clock that the test holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from support.leaderelection_core import App, HeldClock, Liveness, OnDisconnect, Server, Store, rest

from retinue_server.leaderelection.core.requests import (
    Ack,
    AtRisk,
    Draining,
    Elected,
    Standby,
    Standing,
    StepDownRequested,
    Token,
    View,
)
from retinue_server.leaderelection.engine import EndReason, Record
from retinue_server.runtime.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)

SECOND = 1_000


@pytest.fixture
def clock() -> HeldClock:
    return HeldClock()


@pytest.fixture
def store(clock: HeldClock) -> Store:
    return Store(clock)


@pytest.fixture
async def open_server(store: Store) -> AsyncIterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(name: str = "", **options: object) -> Server:
        made.append(Server(store, name or f"s{len(made)}", **options))
        return made[-1]

    yield make
    for server in made:
        await server.elections.stop()


@pytest.fixture
async def server(open_server: Callable[..., Server]) -> Server:
    made = open_server()
    await made.elections.start()
    return made


@pytest.fixture
async def other(open_server: Callable[..., Server]) -> Server:
    made = open_server()
    await made.elections.start()
    return made


async def beating(app: App, clock: HeldClock, seconds: float) -> None:
    """Time passes, and the app shows that it lives."""
    for _ in range(int(seconds * 4)):
        await clock.advance(250)
        app.beat()
        await app.read()


async def leader(server: Server, name: str = "a", **options: object) -> App:
    app = server.app(name, **options).start()
    await app.read()
    assert app.leads
    return app


# Being elected, and for how long


async def test_the_only_candidate_is_elected(server: Server, clock: HeldClock) -> None:
    app = server.app("a").start()
    [elected] = await app.saw(Elected)
    assert elected.leadership.token.value > 0
    assert app.deadline_ms == clock.boot_ms + 1_800, "the app's lease less a tenth, from before it sent its start"


async def test_heartbeats_move_the_deadline_from_before_they_were_sent(server: Server, clock: HeldClock) -> None:
    app = await leader(server)
    await clock.advance(500)
    app.beat()
    await app.read()
    assert app.deadline_ms == clock.boot_ms + 1_800


async def test_no_deadline_is_later_than_the_engines_lease(server: Server, clock: HeldClock) -> None:
    app = await leader(server, lease_ms=4_000, app_lease_ms=2_000)
    server.engine.cut = True
    began = clock.boot_ms
    await beating(app, clock, 5)
    assert app.deadline_ms <= began + 3_600


async def test_every_heartbeat_is_answered_while_standing_by_too(server: Server, clock: HeldClock) -> None:
    first = await leader(server)
    second = server.app("b").start()
    [told] = await second.read()
    assert isinstance(told, Standby)
    assert told.view.record is not None
    assert told.view.record.candidate_id == "a"
    second.beat()
    assert await second.read() == [Ack(1, None)]
    assert first.leads


async def test_elected_after_standing_by_counts_from_the_latest_heartbeat(server: Server, clock: HeldClock) -> None:
    first = await leader(server)
    second = server.app("b").start()
    await clock.advance(400)
    second.beat()
    stamp = clock.boot_ms
    await clock.advance(300)
    await server.elections.leave(first.session)
    [elected] = await second.saw(Elected)
    assert elected.leadership.sequence == 1
    assert second.deadline_ms == stamp + 1_800


async def test_who_was_heard_of_too_long_ago_is_not_elected(server: Server, clock: HeldClock) -> None:
    first = await leader(server)
    second = server.app("b").start()
    for _ in range(10):
        await clock.advance(250)
        first.beat()
        await first.read()
    await server.elections.leave(first.session)
    assert await second.saw(Elected) == []
    second.beat()
    assert len(await second.saw(Elected)) == 1


# Ways to end


@pytest.mark.parametrize("where", ["same", "other"])
async def test_resigning_hands_over_at_once_with_a_higher_token(
    server: Server, other: Server, clock: HeldClock, where: str
) -> None:
    first = await leader(server)
    second = (server if where == "same" else other).app("b").start()
    await rest()
    now = clock.boot_ms
    assert await server.elections.leave(first.session)
    await second.read()
    assert second.leads
    assert clock.boot_ms == now
    assert first.token is not None
    assert second.token is not None
    assert second.token.domain == first.token.domain
    assert second.token.value > first.token.value


async def test_a_silent_app_loses_it_and_nobody_has_it_before_its_deadline(
    server: Server, other: Server, clock: HeldClock
) -> None:
    first = await leader(server)
    second = other.app("b").start()
    while first.leads:
        await clock.advance(50)
        second.beat()
        await second.read()
        assert not (first.leads and second.leads)
    await beating(second, clock, 1)
    assert second.leads
    assert await first.lost() == [EndReason.APP_SILENT]


async def test_a_session_that_comes_back_in_time_keeps_term_and_token(server: Server, clock: HeldClock) -> None:
    app = await leader(server)
    before = app.token
    app.vanish()
    await clock.advance(1_500)
    app.start()
    [elected] = await app.read()
    assert isinstance(elected, Elected)
    assert elected.leadership.token == before
    assert app.deadline_ms == clock.boot_ms + 1_800


async def test_a_session_that_comes_back_too_late_begins_anew(server: Server, clock: HeldClock) -> None:
    app = await leader(server)
    before = app.token
    app.vanish()
    await clock.advance(2_500)
    app.start()
    await app.read()
    assert before is not None
    assert app.token is not None
    assert app.token.value > before.value


async def test_a_term_goes_on_when_its_server_was_restarted(
    server: Server, open_server: Callable[..., Server], clock: HeldClock
) -> None:
    app = await leader(server)
    before = app.token
    await server.elections.stop()
    app.server = open_server(name="s0")
    await app.server.elections.start()
    await clock.advance(500)
    app.start()
    await app.read()
    assert app.leads
    assert app.token == before


async def test_what_a_former_process_promised_is_kept(
    server: Server, other: Server, open_server: Callable[..., Server], clock: HeldClock
) -> None:
    app = await leader(server)
    await server.elections.stop()
    app.server = open_server(name="s0")
    await app.server.elections.start()
    second = other.app("b").start()
    app.start()
    app.vanish()
    while app.leads:
        await clock.advance(100)
        second.beat()
        await second.read()
        assert not (app.leads and second.leads)


async def test_another_server_does_not_resume_a_session(server: Server, other: Server) -> None:
    app = await leader(server)
    before = app.session_id
    app.vanish()
    app.server = other
    app.start()
    assert app.session_id != before


async def test_proof_of_death_releases_at_once(server: Server, other: Server, clock: HeldClock) -> None:
    dead = False
    first = server.app("a").start(lambda: dead)
    await first.read()
    second = other.app("b").start()
    first.vanish()
    await clock.advance(100)
    assert not await second.saw(Elected), "it may come back"
    dead = True
    await clock.advance(20)
    assert len(await second.saw(Elected)) == 1
    terms, _ = await server.elections.terms("e", None, 10)
    assert terms[1].reason is EndReason.APP_DEAD


async def test_a_lock_that_is_free_means_nothing_while_the_stream_is_open(server: Server, clock: HeldClock) -> None:
    app = server.app("a").start(lambda: True)
    await beating(app, clock, 3)
    assert app.leads


async def test_release_on_disconnect_is_at_once(server: Server, other: Server) -> None:
    first = await leader(server, on_disconnect=OnDisconnect.RELEASE)
    second = other.app("b").start()
    first.vanish()
    await second.read()
    assert second.leads


async def test_an_open_stream_is_liveness_enough_when_asked_for(server: Server, clock: HeldClock) -> None:
    app = server.app("a", liveness=Liveness.STREAM).start()
    await clock.advance(60 * SECOND)
    assert await app.lost() == []
    second = server.app("b").start()
    app.vanish()
    await second.read()
    assert second.leads


async def test_the_release_delay_is_waited_unless_the_leader_resigned(
    server: Server, other: Server, clock: HeldClock
) -> None:
    first = await leader(server, release_delay_ms=5_000)
    second = other.app("b").start()
    while first.leads:
        await beating(second, clock, 0.25)
    await beating(second, clock, 4.5)
    assert not second.leads
    await beating(second, clock, 1)
    assert second.leads
    await beating(second, clock, 1)
    third = server.app("c").start()
    await rest()
    await other.elections.leave(second.session)
    await third.read()
    assert third.leads


async def test_the_release_delay_is_waited_after_a_term_that_ran_out_in_the_engine(
    server: Server, other: Server, clock: HeldClock
) -> None:
    await leader(server, release_delay_ms=5_000, lease_ms=4_000)
    second = other.app("b").start()
    server.engine.cut = True
    began = clock.boot_ms
    while not second.leads:
        await beating(second, clock, 0.25)
        assert clock.boot_ms < began + 12_000
    assert clock.boot_ms >= began + 9_000


async def test_the_release_delay_is_waited_though_the_answer_of_the_claim_was_lost(
    server: Server, other: Server, clock: HeldClock
) -> None:
    await leader(server, release_delay_ms=5_000, lease_ms=4_000)
    second = other.app("b").start()
    server.engine.cut = True
    await beating(second, clock, 3.75)
    other.engine.deaf = True
    await beating(second, clock, 1)
    other.engine.deaf = False
    await beating(second, clock, 4)
    assert not second.leads
    await beating(second, clock, 2)
    assert second.leads


async def test_an_app_that_is_not_healthy_gives_it_up_and_does_not_stand_again(
    server: Server, other: Server, clock: HeldClock
) -> None:
    first = await leader(server)
    second = other.app("b").start()
    first.healthy = False
    for _ in range(12):
        await clock.advance(250)
        first.beat()
        second.beat()
        await first.read()
        await second.read()
        assert not (first.leads and second.leads)
    assert second.leads
    assert await first.lost() == [EndReason.UNHEALTHY]
    await other.elections.leave(second.session)
    await clock.advance(100)
    assert len(await first.saw(Elected)) == 1
    first.healthy = True
    await beating(first, clock, 3)
    assert first.leads


async def test_a_step_down_asked_elsewhere_reaches_the_leader(server: Server, other: Server, clock: HeldClock) -> None:
    first = await leader(server)
    asked, view = await other.elections.ask_step_down("e", None)
    assert asked
    assert view.record is not None
    assert view.record.step_down
    assert len(await first.saw(StepDownRequested)) == 1
    await beating(first, clock, 1)
    assert first.leads, "nothing forces it"
    await server.elections.leave(first.session)
    terms, _ = await server.elections.terms("e", None, 1)
    assert terms[0].reason is EndReason.STEPPED_DOWN
    assert await other.elections.ask_step_down("e", None) == (False, await other.elections.leader("e"))


# The engine


async def test_without_the_engine_a_leader_is_at_risk_and_stops_before_another_can_lead(
    server: Server, other: Server, clock: HeldClock
) -> None:
    first = await leader(server, lease_ms=6_000)
    second = other.app("b", lease_ms=6_000).start()
    server.engine.cut = True
    for _ in range(40):
        await clock.advance(250)
        first.beat()
        second.beat()
        await first.read()
        await second.read()
        assert not (first.leads and second.leads)
    assert second.leads
    assert len(await first.saw(AtRisk)) == 1
    assert (await first.lost())[0] is EndReason.ENGINE_LOST


async def test_an_engine_that_comes_back_in_time_costs_nothing(server: Server, clock: HeldClock) -> None:
    app = await leader(server, lease_ms=6_000)
    server.engine.cut = True
    await beating(app, clock, 4)
    server.engine.cut = False
    await beating(app, clock, 10)
    assert app.leads
    assert await app.lost() == []


async def test_a_claim_whose_answer_was_lost_is_asked_again(server: Server, clock: HeldClock) -> None:
    server.engine.deaf = True
    app = server.app("a").start()
    assert await app.saw(Elected) == [], "elected follows a confirmed write only"
    server.engine.deaf = False
    await clock.advance(1_000)
    assert len(await app.saw(Elected)) == 1


async def test_a_term_won_unawares_by_one_who_has_gone_is_given_back(server: Server, clock: HeldClock) -> None:
    server.engine.deaf = True
    app = server.app("a").start()
    await rest()
    app.vanish()
    await clock.advance(2_500)
    server.engine.deaf = False
    await clock.advance(500)
    view = await server.elections.leader("e")
    assert not view.led


async def test_candidates_of_an_election_that_the_engine_will_not_have_are_told(server: Server) -> None:
    server.engine.refusal = NotFound("no such object", reason=Reason.ELECTION_NOT_FOUND)
    app = server.app("a").start()
    await app.read()
    assert app.outbox.closed
    assert app.outbox.error is server.engine.refusal


async def test_health_shows_an_engine_that_is_away(server: Server, clock: HeldClock) -> None:
    shown: list[bool] = []
    server.elections.subscribe(shown.append)
    app = await leader(server)
    server.engine.cut = True
    await beating(app, clock, 6)
    with pytest.raises(Unavailable):
        await server.elections.leader("e")
    server.engine.cut = False
    await beating(app, clock, 6)
    assert shown == [True, False, True]


async def test_renewals_of_one_server_go_together(server: Server, clock: HeldClock) -> None:
    apps = []
    for number in range(50):
        apps.append(server.app("a", liveness=Liveness.STREAM).start(election=f"e{number}"))
        await clock.advance(37)
    server.engine.renewals.clear()
    await clock.advance(60 * SECOND)
    assert sum(server.engine.renewals) <= 50 * 60 / 5 * 1.5
    assert len(server.engine.renewals) <= 30, "a commit for all, not one each"
    for app in apps:
        assert await app.lost() == []


async def test_who_leads_is_not_read_besides_renewing(
    server: Server, clock: HeldClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = server.app("a", liveness=Liveness.STREAM).start()
    await clock.advance(1)
    reads: list[str] = []
    read = server.engine.read

    async def noted(election_id: str) -> Record | None:
        reads.append(election_id)
        return await read(election_id)

    monkeypatch.setattr(server.engine, "read", noted)
    await clock.advance(60 * SECOND)
    assert await app.lost() == []
    assert reads == []


# By hand


async def test_trying_is_answered_with_the_leader_if_there_is_one(server: Server, other: Server) -> None:
    first = await leader(server)
    assert first.token is not None
    for where in (server, other):
        tried = await where.elections.try_acquire(Standing("e", "b"))
        assert tried.leadership is None
        assert tried.view.record is not None
        assert tried.view.record.candidate_id == "a"


async def test_what_was_tried_and_won_is_renewed_by_hand(server: Server, clock: HeldClock) -> None:
    tried = await server.elections.try_acquire(Standing("e", "a"))
    assert tried.leadership is not None
    session, token = tried.leadership.session_id, tried.leadership.token
    for _ in range(20):
        await clock.advance(1_500)
        renewed, asked = server.elections.renew(session, token)
        assert (renewed.token, renewed.valid_ms, asked) == (token, 1_800, False)
    again = await server.elections.try_acquire(Standing("e", "a", session))
    assert again.leadership is not None
    assert again.leadership.token == token
    await clock.advance(2_100)
    with pytest.raises(NotFound) as error:
        server.elections.renew(session, token)
    assert error.value.reason is Reason.SESSION_NOT_FOUND


async def test_tokens_are_those_of_their_session(server: Server, clock: HeldClock) -> None:
    tried = await server.elections.try_acquire(Standing("e", "a"))
    assert tried.leadership is not None
    session, token = tried.leadership.session_id, tried.leadership.token
    with pytest.raises(FailedPrecondition) as stale:
        server.elections.renew(session, token._replace(value=token.value + 1))
    assert stale.value.reason is Reason.STALE_TOKEN
    assert stale.value.metadata["token"] == str(token.value)
    standby = server.app("b").start()
    await standby.read()
    with pytest.raises(PermissionDenied):
        server.elections.renew(standby.session_id, token)
    with pytest.raises(PermissionDenied):
        await server.elections.resign(standby.session_id, token)
    assert await server.elections.resign(session, token)
    assert not await server.elections.resign(session, token), "repeating is safe"
    assert not await server.elections.resign("0" * 32, None)


async def test_a_value_is_proclaimed_and_kept_for_the_next_term(server: Server, other: Server) -> None:
    app = await leader(server, value="one")
    assert (await _record(other)).value == "one"
    server.elections.say(app.session, "two")
    await rest()
    assert (await _record(other)).value == "two"
    standby = other.app("b").start()
    await rest()
    other.elections.say(standby.session, "mine")
    await server.elections.leave(app.session)
    await rest()
    assert (await _record(server)).value == "mine"


async def _record(server: Server) -> Record:
    record = (await server.elections.leader("e")).record
    assert record is not None
    return record


# Those who look on


async def _observe(server: Server, see: Callable[[View], None]) -> None:
    async for view in server.elections.observe("e"):
        see(view)


def _name(view: View) -> str:
    return view.record.candidate_id if view.record is not None and view.led else ""


async def test_an_observer_gets_a_snapshot_then_each_leader(server: Server, other: Server, clock: HeldClock) -> None:
    seen: list[str] = []

    watching = asyncio.create_task(_observe(other, lambda view: seen.append(_name(view))))
    await rest()
    assert seen == [""]
    first = await leader(server)
    assert seen == ["", "a"]
    server.app("b").start()
    await rest()
    await server.elections.leave(first.session)
    await rest()
    assert seen[-1] == "b"
    watching.cancel()


async def test_an_observer_hears_when_a_lease_is_over_though_nobody_takes_it(
    server: Server, other: Server, clock: HeldClock
) -> None:
    await leader(server, lease_ms=4_000)
    seen: list[bool] = []

    watching = asyncio.create_task(_observe(other, lambda view: seen.append(view.led)))
    await rest()
    server.engine.cut = True
    await clock.advance(5_000)
    assert seen == [True, False]
    watching.cancel()


async def test_a_token_is_verified_against_the_present_term(server: Server, other: Server, clock: HeldClock) -> None:
    first = await leader(server)
    assert first.token is not None
    view = await other.elections.verify("e", first.token)
    assert view.record is not None
    assert view.record.candidate_id == "a"
    with pytest.raises(FailedPrecondition) as mismatch:
        await other.elections.verify("e", Token("elsewhere", first.token.value))
    assert mismatch.value.reason is Reason.TOKEN_DOMAIN_MISMATCH
    await server.elections.leave(first.session)
    with pytest.raises(FailedPrecondition) as stale:
        await other.elections.verify("e", first.token)
    assert stale.value.reason is Reason.STALE_TOKEN


# Stopping


async def test_a_server_that_stops_lets_its_leaders_resign(server: Server, other: Server, clock: HeldClock) -> None:
    first = await leader(server)
    second = other.app("b").start()
    stopping = asyncio.create_task(server.elections.quiesce())
    assert len(await first.saw(Draining)) == 1
    await server.elections.leave(first.session)
    await asyncio.wait_for(stopping, 60)
    await second.read()
    assert second.leads


async def test_a_server_that_stops_waits_for_the_deadline_of_one_who_does_not_resign(
    server: Server, other: Server, clock: HeldClock
) -> None:
    first = await leader(server)
    second = other.app("b").start()
    stopping = asyncio.create_task(server.elections.quiesce())
    for _ in range(60):
        await clock.advance(250)
        if not stopping.done():
            first.beat()
        second.beat()
        await first.read()
        await second.read()
        assert not (first.leads and second.leads)
    await asyncio.wait_for(stopping, 60)
    assert second.leads
    assert await first.lost() == [EndReason.SERVER_STOPPED]


async def test_a_server_stops_though_another_has_taken_its_term(
    server: Server, other: Server, clock: HeldClock, store: Store
) -> None:
    first = await leader(server, lease_ms=4_000)
    second = other.app("b").start()
    server.engine.cut = True
    await beating(second, clock, 6)
    assert second.leads
    server.engine.cut = False
    stopping = asyncio.create_task(server.elections.quiesce())
    await clock.advance(20_000)
    await asyncio.wait_for(stopping, 60)
    assert await first.lost() == [EndReason.APP_SILENT]


async def test_an_engine_that_breaks_while_renewing_costs_no_more_than_one_that_is_away(
    server: Server, clock: HeldClock
) -> None:
    app = await leader(server, lease_ms=6_000)
    server.engine.refusal = ZeroDivisionError()
    await beating(app, clock, 3)
    server.engine.refusal = None
    await beating(app, clock, 10)
    assert app.leads


# Refusals


async def test_what_is_wrong_is_named_field_by_field(server: Server) -> None:
    with pytest.raises(InvalidArgument) as error:
        server.elections.begin(
            Standing("", "x y", "nope", "v" * 4_097, 999, 99, -1, proof_file="../etc"),
            None,
        )
    assert {violation.field for violation in error.value.violations} == {
        "start.election_id",
        "start.candidate_id",
        "start.session_id",
        "start.value",
        "start.lease_duration",
        "start.app_lease_duration",
        "start.release_delay_duration",
        "start.proof_file",
    }


async def test_a_candidate_has_one_live_session(server: Server, clock: HeldClock) -> None:
    first = await leader(server)
    with pytest.raises(AlreadyExists) as error:
        server.app("a").start()
    assert error.value.reason is Reason.CANDIDATE_EXISTS
    first.vanish()
    await clock.advance(2_100)
    assert server.app("a").start()


async def test_limits_are_kept(open_server: Callable[..., Server]) -> None:
    server = open_server(names=["e"], max_sessions=1, max_observers=0)
    await server.elections.start()
    with pytest.raises(NotFound) as unknown:
        await server.elections.leader("f")
    assert unknown.value.reason is Reason.ELECTION_NOT_FOUND
    server.app("a").start()
    with pytest.raises(ResourceExhausted) as full:
        server.app("b").start()
    assert full.value.reason is Reason.ELECTION_LIMIT
    with pytest.raises(ResourceExhausted):
        await anext(server.elections.observe("e"))


async def test_a_lease_shorter_than_the_engines_shortest_is_refused(server: Server) -> None:
    server.engine.capabilities = type(server.engine.capabilities)("slow", server.engine.capabilities.scope, 5_000)
    with pytest.raises(Unimplemented) as error:
        server.app("a", lease_ms=4_000).start()
    assert error.value.reason is Reason.ENGINE_CAPABILITY


async def test_a_heartbeat_must_count_on(server: Server) -> None:
    app = await leader(server)
    app.beat()
    app.sequence = 0
    with pytest.raises(InvalidArgument):
        app.beat()
