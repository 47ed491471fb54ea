"""Claims about all targets: one collection of each at a time, none waits for another, and changes are whole or none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.adapter_core import Away, Core, PlayedSource, spec

from retinue_server.adapter.core.collection import Limits
from retinue_server.adapter.core.packs import Pack
from retinue_server.adapter.core.spec import Kind, State
from retinue_server.adapter.engine import Unexpected
from retinue_server.runtime.errors import FailedPrecondition, Reason, RetinueError, Unavailable


@pytest.fixture
async def core() -> AsyncIterator[Core]:
    made = Core(max_watchers=2, most=3)
    yield made
    await made.targets.stop()


async def until(core: Core, target_id: str, *states: State) -> Any:
    """The target, once it is in one of these states."""
    with core.targets.watch() as watcher:
        while core.targets.get(target_id).status.state not in states:
            await asyncio.wait_for(watcher.news(), 20)
    return core.targets.get(target_id)


async def collected(core: Core, target_id: str, times: int) -> None:
    """Waits for so many more collections."""
    with core.targets.watch() as watcher:
        while times > 0:
            times -= (await asyncio.wait_for(watcher.news(), 20)).get(target_id, 0)


async def refused(call: Any) -> Reason | None:
    with pytest.raises(RetinueError) as error:
        await call
    return error.value.reason


# Collections


async def test_a_target_is_collected_at_once_and_again_and_again(core: Core) -> None:
    target = await core.create()
    assert target.status.state is State.UP
    await collected(core, "shop", 3)
    assert core.sources["shop"].asked >= 4


async def test_of_a_target_one_collection_is_under_way_at_a_time(core: Core) -> None:
    await core.create(timeout_s=10.0)
    await core.create("other")
    source = core.sources["shop"]
    source.lets.clear()
    await collected(core, "other", 10)
    source.lets.set()
    await collected(core, "shop", 2)
    assert source.most_at_once == 1


async def test_one_that_hangs_keeps_no_other_waiting(core: Core) -> None:
    core.prepare = lambda source: source.lets.clear() if source.spec.target_id == "hangs" else None
    await core.targets.create(spec("hangs", timeout_s=30.0))
    await core.create("good")
    await collected(core, "good", 10)
    assert core.targets.get("hangs").status.state is State.PENDING


async def test_one_that_hangs_is_given_up_after_its_timeout(core: Core) -> None:
    core.prepare = lambda source: source.lets.clear()
    target = await core.create()
    assert target.status.state is State.DOWN
    assert target.status.message == "it did not answer within 0.05 s"
    assert core.targets.collections["failed"] >= 1


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (Away("nobody is there"), State.STALE, "nobody is there"),
        (Unexpected("it speaks Klingon"), State.MISCONFIGURED, "it speaks Klingon"),
        (ZeroDivisionError(), State.STALE, "it can't be collected: ZeroDivisionError"),
    ],
)
async def test_whatever_goes_wrong_is_told_and_tried_again(error: Exception, state: State, message: str) -> None:
    core = Core(stale_intervals=10_000)
    await core.create()
    source = core.sources["shop"]
    source.error = error
    target = await until(core, "shop", state)
    assert target.status.message == message
    assert target.shown.series == 1
    source.error = None
    await until(core, "shop", State.UP)
    await core.targets.stop()


async def test_a_worker_that_is_gone_costs_a_collection(core: Core) -> None:
    await core.create()
    core.work.error = Away("the worker process ended")
    await until(core, "shop", State.STALE, State.DOWN)
    core.work.error = None
    await until(core, "shop", State.UP)


async def test_what_makes_no_sense_to_the_worker_is_misconfigured(core: Core) -> None:
    core.work.failure = "no metrics"
    assert (await core.create()).status.state is State.MISCONFIGURED


async def test_health_is_that_of_the_last_collection(core: Core) -> None:
    await core.create()
    assert core.targets.health_of("target/shop") is True
    core.sources["shop"].error = Away()
    await until(core, "shop", State.STALE, State.DOWN)
    assert core.targets.health_of("target/shop") is False
    assert core.targets.health_of("target/other") is None
    assert core.targets.health_of("upstream/shop") is None


# Declarations


async def test_the_same_declaration_is_the_same_target(core: Core) -> None:
    assert await core.create() is await core.create()
    assert await core.targets.update(spec()) is core.targets.get("shop")


async def test_an_update_keeps_what_is_shown_and_changes_the_etag(core: Core) -> None:
    first = await core.create()
    source = core.sources["shop"]
    second = await core.targets.update(spec(limits=Limits(max_series=5), interval_s=100.0))
    assert source.closed
    assert core.targets.get("shop") is second
    assert second.shown.series == first.shown.series == 1
    assert core.targets.etag(second) != core.targets.etag(first)
    assert await refused(core.targets.update(spec(), etag=core.targets.etag(first))) is Reason.STALE_ETAG
    assert await refused(core.targets.delete("shop", etag="1")) is Reason.STALE_ETAG
    assert await core.targets.delete("shop", etag=core.targets.etag(second))


async def test_a_refused_update_leaves_the_target_as_it_was(core: Core) -> None:
    first = await core.create()
    etag = core.targets.etag(first)
    core.refusing = FailedPrecondition("cannot listen", reason=Reason.PORT_IN_USE)
    assert await refused(core.targets.update(spec(interval_s=100.0))) is Reason.PORT_IN_USE
    core.refusing = None
    assert core.targets.etag(core.targets.get("shop")) == etag
    await collected(core, "shop", 2)


async def test_an_update_whose_source_does_not_open_goes_back_to_the_former(core: Core) -> None:
    class Opening(PlayedSource):
        async def open(self) -> None:
            if self.spec.timeout_s == 1.0:
                raise FailedPrecondition("cannot listen", reason=Reason.PORT_IN_USE)

    core.targets._make = lambda made, _: Opening(made)
    first = await core.create()
    assert await refused(core.targets.update(spec(timeout_s=1.0))) is Reason.PORT_IN_USE
    assert core.targets.get("shop").spec == first.spec
    assert core.targets.etag(core.targets.get("shop")) == core.targets.etag(first)
    await collected(core, "shop", 2)


async def test_changes_at_once_are_one_after_the_other(core: Core) -> None:
    await core.create()
    await asyncio.gather(
        *(core.targets.update(spec(interval_s=100.0 + n)) for n in range(5)),
        *(core.targets.create(spec("other")) for _ in range(5)),
        core.targets.delete("other"),
        return_exceptions=True,
    )
    assert core.targets.get("shop").spec.interval_s == 104.0
    running = {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("adapter-")}
    assert running == {f"adapter-{name}" for name in core.targets.names()}


async def test_while_it_is_updated_it_is_there(core: Core) -> None:
    await core.create()
    change = asyncio.create_task(core.targets.update(spec(interval_s=100.0)))
    while not change.done():
        assert core.targets.get("shop")
        await asyncio.sleep(0)
    await change


async def test_a_target_that_is_gone_is_forgotten(core: Core) -> None:
    await core.create()
    source = core.sources["shop"]
    with core.targets.watch() as watcher:
        assert await core.targets.delete("shop")
        assert not await core.targets.delete("shop")
        assert "shop" in await watcher.news()
    assert source.closed
    assert core.work.forgotten == ["shop"]
    assert core.targets.find("shop") is None
    assert await refused(core.targets.update(spec())) is Reason.TARGET_NOT_FOUND


async def test_there_are_no_more_than_the_limit(core: Core) -> None:
    for name in ("a", "b", "c"):
        await core.create(name)
    assert await refused(core.targets.create(spec("d"))) is Reason.TARGET_LIMIT
    assert await core.create("a"), "one that is there is no other"
    await core.targets.delete("b")
    await core.create("d")
    assert core.targets.names() == ["a", "c", "d"]
    assert core.targets.names(after="a") == ["c", "d"]


async def test_the_kind_stays(core: Core) -> None:
    await core.create()
    assert await refused(core.targets.update(spec(kind=Kind.NGINX))) is Reason.TARGET_IMMUTABLE


async def test_what_the_file_declares_only_the_file_changes(core: Core) -> None:
    target = await core.targets.create(spec(), from_file=True)
    assert await core.targets.create(spec()) is target, "the same is no change"
    for call in (
        core.targets.create(spec(interval_s=1.0)),
        core.targets.update(spec(interval_s=1.0)),
        core.targets.delete("shop"),
    ):
        assert await refused(call) is Reason.TARGET_FROM_FILE
    assert (await core.targets.update(spec(interval_s=2.0), from_file=True)).from_file
    assert await core.targets.delete("shop", from_file=True)


async def test_the_file_takes_over_what_is_there_already(core: Core) -> None:
    await core.create()
    assert (await core.targets.update(spec(), from_file=True)).from_file
    assert await refused(core.targets.delete("shop")) is Reason.TARGET_FROM_FILE


async def test_with_allow_override_calls_change_what_the_file_declares() -> None:
    core = Core(allow_override=True)
    await core.targets.create(spec(), from_file=True)
    assert await core.targets.update(spec(interval_s=1.0))
    assert await core.targets.delete("shop")


async def test_addresses_that_are_forbidden_are_refused_when_they_are_declared() -> None:
    core = Core(objection=lambda address: "it is far" if address.startswith("10.") else "")
    assert await refused(core.targets.create(spec(endpoint="http://10.1.2.3/metrics"))) is Reason.ENDPOINT_FORBIDDEN
    await core.create()
    changed = spec(endpoint="http://10.1.2.3:9/")
    assert await refused(core.targets.update(changed)) is Reason.ENDPOINT_FORBIDDEN
    assert await refused(core.targets.try_out(changed)) is Reason.ENDPOINT_FORBIDDEN
    await collected(core, "shop", 1)
    await core.targets.stop()


# Rule packs


async def test_a_pack_that_is_missing_or_for_another_kind_is_refused() -> None:
    core = Core(packs={"mine": Pack(kind="json"), "redis": Pack(kind="json")})
    assert await refused(core.targets.create(spec(rule_pack="none"))) is Reason.RULE_PACK_NOT_FOUND
    assert await refused(core.targets.create(spec(rule_pack="mine"))) is Reason.RULE_PACK_NOT_FOUND
    assert core.targets.pack_of(spec(kind=Kind.REDIS)) is None, "a pack of the usual name for another kind is none"
    assert core.targets.pack_of(spec(kind=Kind.JSON, rule_pack="mine")) is core.packs["mine"]


async def test_packs_that_changed_are_used_from_then_on() -> None:
    core = Core(packs={"mine": Pack(kind="json"), "prometheus": Pack(kind="prometheus")})
    await core.create("a", kind=Kind.JSON, rule_pack="mine")
    await core.create("b")
    sources = dict(core.sources)
    core.packs["mine"], core.packs["prometheus"] = Pack(kind="json", path="/new"), Pack(kind="prometheus", about="new")
    await core.targets.packs_changed()
    assert core.work.declared == {"a": core.packs["mine"], "b": core.packs["prometheus"]}
    assert core.sources["a"] is not sources["a"], "the pack says what to ask for"
    assert sources["a"].closed
    assert core.sources["b"] is sources["b"]
    await collected(core, "a", 1)
    del core.packs["mine"]
    await core.targets.packs_changed()
    await collected(core, "a", 1)
    await core.targets.stop()


# Trying


async def test_a_trial_keeps_nothing_and_tells_what_went_wrong(core: Core) -> None:
    assert not isinstance(await core.targets.try_out(spec()), str)
    assert core.sources["shop"].closed
    assert core.targets.names() == []
    core.prepare = lambda source: setattr(source, "error", Away("nobody is there"))
    assert await core.targets.try_out(spec()) == "nobody is there"
    core.prepare = lambda source: source.lets.clear()
    assert await core.targets.try_out(spec()) == "it did not answer within 0.05 s"
    core.prepare = lambda source: setattr(source, "error", ZeroDivisionError())
    assert await core.targets.try_out(spec()) == "it can't be collected: ZeroDivisionError"


# Watching


async def test_a_watcher_hears_of_what_was_before_it_listened(core: Core) -> None:
    await core.create()
    with core.targets.watch() as watcher:
        await collected(core, "shop", 3)
        assert (await watcher.news())["shop"] >= 3, "and how often"


async def test_watchers_are_limited_and_make_room_when_they_go(core: Core) -> None:
    with core.targets.watch(), core.targets.watch():
        with pytest.raises(RetinueError, match="2 watchers") as error:
            core.targets.watch()
        assert error.value.reason is Reason.WATCHER_LIMIT
    with core.targets.watch():
        pass


async def test_a_server_that_stops_ends_its_watchers(core: Core) -> None:
    with core.targets.watch() as listening, core.targets.watch() as busy:
        waiting = asyncio.create_task(listening.news())
        await asyncio.sleep(0)
        await core.targets.quiesce()
        for call in (waiting, busy.news()):
            with pytest.raises(Unavailable) as error:
                await call
            assert error.value.reason is Reason.SHUTTING_DOWN


async def test_stopping_twice_is_stopping(core: Core) -> None:
    await core.create()
    await core.targets.stop()
    await core.targets.stop()
    assert core.sources["shop"].closed
