"""Claims about declarations and what becomes of them, over a data plane that the test plays."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from support.ambassador_core import Played, played, rest, spec

from retinue_server.ambassador.core.spec import (
    Dns,
    Endpoint,
    Listen,
    Mirror,
    Protocol,
    Pushed,
    Retry,
    RetryCondition,
    Split,
    Static,
)
from retinue_server.ambassador.core.upstream import State
from retinue_server.runtime.errors import (
    Aborted,
    AlreadyExists,
    Code,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unimplemented,
)

RETRY = Retry((RetryCondition.RESET,))
DNS = Dns("redis.example", 6379)


@pytest.fixture
async def play() -> Played:
    return await played()


async def test_a_declaration_is_active_when_the_data_plane_has_taken_it(play: Played) -> None:
    play.plane.holds = True
    kept = await play.upstreams.declare(spec())
    await rest()
    assert (kept.state, kept.address) == (State.PENDING, "127.0.0.1:20001")
    play.plane.release()
    await kept.settled(5)
    view = kept.view()
    assert (view.state, view.active_generation, view.rejection) == (State.ACTIVE, view.generation, None)
    assert play.plane.served["it"].spec.listen.port == 20001


async def test_the_same_declaration_again_changes_nothing(play: Played) -> None:
    kept = await play.upstreams.declare(spec())
    await kept.settled(5)
    before = kept.view()
    again = await play.upstreams.declare(spec())
    await rest()
    assert again is kept
    assert kept.view() == before
    assert len(play.plane.puts) == 1


async def test_a_refused_update_leaves_what_was_served(play: Played) -> None:
    kept = await play.upstreams.declare(spec())
    await kept.settled(5)
    play.plane.refusal = "no such filter"
    await play.upstreams.declare(spec(retry=RETRY))
    await kept.settled(5)
    view = kept.view()
    assert (view.state, view.active_generation, view.generation) == (State.ACTIVE, 1, 2)
    assert view.rejection is not None
    assert view.rejection == (2, "no such filter")
    assert play.plane.served["it"].spec.policy.retry is None


async def test_what_never_was_active_is_rejected_and_can_be_mended(play: Played) -> None:
    play.plane.refusal = "no"
    kept = await play.upstreams.declare(spec())
    await kept.settled(5)
    assert kept.state is State.REJECTED
    play.plane.refusal = ""
    await play.upstreams.declare(spec(retry=RETRY))
    await kept.settled(5)
    assert kept.view().state is State.ACTIVE
    assert kept.view().rejection is None


async def test_while_the_data_plane_is_away_the_latest_waits(play: Played) -> None:
    play.plane.comes_and_goes(live=False)
    play.plane.holds = True
    kept = await play.upstreams.declare(spec())
    await rest()
    await play.upstreams.declare(spec(retry=RETRY))
    await rest()
    assert [one.generation for one in play.plane.puts] == [1, 2]
    play.plane.comes_and_goes(live=True)
    play.plane.release()
    await kept.settled(5)
    assert play.plane.served["it"].generation == 2
    assert kept.state is State.ACTIVE


async def test_changes_while_the_data_plane_works_follow_one_another(play: Played) -> None:
    play.plane.holds = True
    kept = await play.upstreams.declare(spec(discovery=Pushed()))
    await rest()
    for number in range(1, 6):
        await play.upstreams.set_endpoints("it", [Endpoint(f"10.0.0.{number}:80")])
        await rest()
    play.plane.release()
    await kept.settled(5)
    assert [one.generation for one in play.plane.puts] == [1, 6]
    assert play.plane.served["it"].endpoints == (Endpoint("10.0.0.5:80"),)


async def test_it_is_served_once_discovery_has_found_somebody(play: Played) -> None:
    kept = await play.upstreams.declare(spec(discovery=DNS))
    await rest()
    assert (kept.state, play.plane.puts) == (State.PENDING, [])
    play.told.watched[DNS]([Endpoint("10.0.0.1:6379"), Endpoint("10.0.0.2:6379")])
    await kept.settled(5)
    assert kept.view().resolved
    assert len(play.plane.served["it"].endpoints) == 2


async def test_a_name_that_comes_to_resolve_to_a_forbidden_address_gains_nothing(play: Played) -> None:
    kept = await play.upstreams.declare(spec(discovery=DNS))
    play.told.watched[DNS]([Endpoint("10.0.0.1:6379")])
    await kept.settled(5)
    play.told.watched[DNS]([Endpoint("169.254.169.254:6379"), Endpoint("127.0.0.1:6379")])
    await kept.settled(5)
    assert play.plane.served["it"].endpoints == ()
    assert not kept.view().resolved


async def test_a_static_endpoint_that_is_forbidden_is_refused(play: Played) -> None:
    wanted = spec(discovery=Static((Endpoint("10.0.0.1:80"), Endpoint("169.254.169.254:80"))))
    with pytest.raises(PermissionDenied) as refused:
        await play.upstreams.declare(wanted)
    assert (refused.value.reason, refused.value.metadata["address"]) == (
        Reason.ENDPOINT_FORBIDDEN,
        "169.254.169.254:80",
    )
    assert play.upstreams.names() == []


async def test_two_upstreams_cannot_have_one_port(play: Played) -> None:
    await play.upstreams.declare(spec("one", listen=Listen(6379)))
    with pytest.raises(AlreadyExists) as refused:
        await play.upstreams.declare(spec("two", listen=Listen(6379)))
    assert (refused.value.reason, refused.value.metadata["upstream_id"]) == (Reason.ADDRESS_TAKEN, "one")


async def test_a_port_that_somebody_else_has_is_told(play: Played) -> None:
    play.ports.taken[6379] = "127.0.0.1:6379 can't be had: in use"
    with pytest.raises(FailedPrecondition) as refused:
        await play.upstreams.declare(spec(listen=Listen(6379)))
    assert refused.value.reason is Reason.PORT_IN_USE


async def test_a_port_that_its_data_plane_has_from_a_server_before_is_its_own(play: Played) -> None:
    play.ports.taken[6379] = "127.0.0.1:6379 can't be had: in use"
    play.plane.inherited.add("it")
    kept = await play.upstreams.declare(spec(listen=Listen(6379)))
    await kept.settled(5)
    assert kept.state is State.ACTIVE


async def test_whom_a_server_before_was_told_goes_on_until_it_is_said_anew(play: Played) -> None:
    play.plane.inherited.add("it")
    kept = await play.upstreams.declare(spec(discovery=Pushed()))
    await rest()
    assert (kept.state, play.plane.puts) == (State.PENDING, [])
    await play.upstreams.set_endpoints("it", [Endpoint("10.0.0.1:80")])
    await kept.settled(5)
    assert kept.state is State.ACTIVE
    await play.upstreams.declare(spec())
    await play.upstreams.declare(spec(discovery=Pushed()))
    await kept.settled(5)
    assert play.plane.served["it"].endpoints == (), "of another discovery nothing is left"


@pytest.mark.parametrize("changed", [{"listen": Listen(1234)}, {"protocol": Protocol.GRPC}])
async def test_address_and_protocol_stay(play: Played, changed: dict[str, object]) -> None:
    await play.upstreams.declare(spec())
    with pytest.raises(FailedPrecondition) as refused:
        await play.upstreams.declare(spec(**changed))  # type: ignore[arg-type] # as they are
    assert refused.value.reason is Reason.LISTEN_IMMUTABLE


async def test_what_the_data_plane_cannot_do_is_named(play: Played) -> None:
    play.plane.lacks = {"policy.mirror"}
    await play.upstreams.declare(spec("shadow"))
    with pytest.raises(Unimplemented, match=r"policy\.mirror") as refused:
        await play.upstreams.declare(spec(mirror=Mirror("shadow")))
    assert refused.value.metadata == {"capability": "policy.mirror", "protocol": "HTTP"}


async def test_a_protocol_that_nobody_speaks_is_named(play: Played) -> None:
    play.plane.lacks = {"http"}
    with pytest.raises(Unimplemented) as refused:
        await play.upstreams.declare(spec())
    assert refused.value.metadata["capability"] == "http"


async def test_a_split_to_what_is_not_there_is_refused(play: Played) -> None:
    for other in (None, spec("other", Protocol.GRPC)):
        if other:
            await play.upstreams.declare(other)
        with pytest.raises(FailedPrecondition) as refused:
            await play.upstreams.declare(spec(splits=(Split("other", 20.0),)))
        assert refused.value.reason is Reason.UPSTREAM_REFERENCE


async def test_what_is_split_to_cannot_be_removed(play: Played) -> None:
    await play.upstreams.declare(spec("other"))
    await play.upstreams.declare(spec(splits=(Split("other", 20.0),)))
    with pytest.raises(FailedPrecondition) as refused:
        await play.upstreams.remove("other", 0)
    assert (refused.value.reason, refused.value.metadata["upstream_id"]) == (Reason.UPSTREAM_REFERENCE, "it")


async def test_an_etag_guards_against_another_declaration(play: Played) -> None:
    kept = await play.upstreams.declare(spec(), etag="none")
    etag = kept.etag
    await play.upstreams.declare(spec(retry=RETRY), etag=etag)
    for stale in (etag, "none"):
        with pytest.raises(Aborted) as refused:
            await play.upstreams.declare(spec(), etag=stale)
        assert refused.value.metadata["etag"] == kept.etag
    assert kept.declared.policy.retry is RETRY


async def test_validating_declares_nothing(play: Played) -> None:
    await play.upstreams.declare(spec(), validate_only=True)
    assert play.upstreams.names() == []
    play.plane.refusal = "bad"
    with pytest.raises(InvalidArgument, match="bad"):
        await play.upstreams.declare(spec(), validate_only=True)


async def test_there_is_a_limit_of_upstreams() -> None:
    play = await played(most=1)
    await play.upstreams.declare(spec("one"))
    await play.upstreams.declare(spec("one", retry=RETRY))
    with pytest.raises(ResourceExhausted) as refused:
        await play.upstreams.declare(spec("two"))
    assert refused.value.reason is Reason.UPSTREAM_LIMIT


async def test_a_drain_waits_for_the_last_connection_and_a_declaration_ends_it(play: Played) -> None:
    kept = await play.upstreams.declare(spec())
    await kept.settled(5)
    play.plane.open["it"] = 1
    await play.upstreams.drain("it", 60)
    assert (kept.view().state, kept.view().connections) == (State.DRAINING, 1)
    await play.upstreams.declare(spec())
    await kept.settled(5)
    assert kept.view().state is State.ACTIVE
    assert "it" not in play.plane.draining


async def test_what_is_removed_is_gone_when_its_last_connection_has_ended(play: Played) -> None:
    kept = await play.upstreams.declare(spec())
    await kept.settled(5)
    play.plane.open["it"] = 1
    assert await play.upstreams.remove("it", 60)
    assert play.upstreams.get("it").view().state is State.DRAINING
    async with contextlib.aclosing(play.upstreams.watch(())) as events:
        assert await anext(events)
        assert await anext(events) is None
        play.plane.open.clear()
        async with asyncio.timeout(5):
            while (event := await anext(events)) and event.view:
                pass
    assert event
    assert event.removed == "it"
    with pytest.raises(NotFound):
        play.upstreams.get("it")
    assert not await play.upstreams.remove("it", 0)


async def test_what_the_file_declares_no_rpc_changes(play: Played) -> None:
    await play.upstreams.declare(spec(), from_file=True)
    for change in (
        play.upstreams.declare(spec(retry=RETRY)),
        play.upstreams.drain("it", 1),
        play.upstreams.remove("it", 1),
    ):
        with pytest.raises(FailedPrecondition) as refused:
            await change
        assert refused.value.reason is Reason.UPSTREAM_FROM_FILE


async def test_standalone_stands_in_for_discovery_and_says_so() -> None:
    play = await played(standalone={"it": Endpoint("127.0.0.1:5000")})
    kept = await play.upstreams.declare(spec(discovery=DNS))
    await kept.settled(5)
    assert play.plane.served["it"].endpoints == (Endpoint("127.0.0.1:5000"),)
    assert kept.view().standalone
    assert play.told.watched == {}


async def test_endpoints_are_pushed_only_where_that_was_declared(play: Played) -> None:
    await play.upstreams.declare(spec())
    with pytest.raises(FailedPrecondition) as refused:
        await play.upstreams.set_endpoints("it", [])
    assert refused.value.code is Code.FAILED_PRECONDITION
    assert refused.value.reason is Reason.UPSTREAM_NOT_PUSHED


async def test_another_discovery_ends_the_first(play: Played) -> None:
    await play.upstreams.declare(spec(discovery=DNS))
    other = Dns("other.example", 1)
    await play.upstreams.declare(spec(discovery=other))
    assert list(play.told.watched) == [other]
