"""Claims about one request, over leaves that the test plays and under a clock that it holds."""

from __future__ import annotations

import asyncio

import pytest
from support.scattergather_core import Played, answer_of, error_of, played, refusal_of, rest, shard

from retinue_server.runtime.errors import Code, InvalidArgument, Reason
from retinue_server.scattergather.core.requests import Coverage, Policy, Reply
from retinue_server.scattergather.core.topology import Budget, Hedging, MergeKind, Merging, PoolLimits

COLLECT = Merging()
HEDGE_SOON = Hedging(min_samples=0, min_delay_s=0.010)


@pytest.fixture
async def play() -> Played:
    return played()


async def test_all_shards_are_asked_and_their_replies_come_in_the_pools_order(play: Played) -> None:
    play.serve(shard("a"), shard("b"), shard("c"))
    asked = play.ask()
    await rest()
    assert [call.data for call in play.leaves.calls] == [b"a#1", b"b#1", b"c#1"]
    for name in "cab":
        await play.leaves.to(f"{name}:1").reply(name.encode())
    answer = await answer_of(asked)
    assert answer.result == [(0, b"a"), (1, b"b"), (2, b"c")]
    assert answer.gathered.coverage == Coverage(3, 3, complete=True)
    play.is_clean()


async def test_strict_fails_as_soon_as_a_shard_is_lost_and_cancels_the_rest(play: Played) -> None:
    play.serve(shard("a"), shard("b"), shard("c"))
    asked = play.ask()
    await rest()
    await play.leaves.to("a:1").reply(b"")
    await play.leaves.to("b:1").fail(Code.UNAVAILABLE, "gone")
    error = await error_of(asked)
    assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.COVERAGE_NOT_MET)
    assert error.gathered is not None
    assert error.gathered.coverage == Coverage(3, 1, complete=False)
    assert [(f.shard_id, f.code, f.message) for f in error.gathered.failures[:1]] == [("b", 14, "gone")]
    assert error.gathered.failed_by_code == {"UNAVAILABLE": 1, "CANCELLED": 1}
    assert play.leaves.to("c:1").cancelled
    play.is_clean()


async def test_a_partial_answer_tells_what_is_missing(play: Played) -> None:
    play.serve(shard("a", weight=3), shard("b"))
    asked = play.ask(Policy(min_coverage=0.7))
    await rest()
    await play.leaves.to("b:1").fail(Code.INTERNAL)
    await play.leaves.to("a:1").reply(b"x")
    answer = await answer_of(asked)
    assert answer.gathered.coverage == Coverage(4, 3, complete=False)
    assert [failure.shard_id for failure in answer.gathered.failures] == ["b"]


async def test_what_can_no_longer_be_enough_fails_at_once(play: Played) -> None:
    play.serve(shard("a", weight=3), shard("b"))
    asked = play.ask(Policy(min_coverage=0.7))
    await rest()
    await play.leaves.to("a:1").fail(Code.INTERNAL)
    assert (await error_of(asked)).code == Code.INTERNAL
    assert play.leaves.to("b:1").cancelled


async def test_nothing_is_not_an_answer_unless_it_was_asked_for(play: Played) -> None:
    play.serve(shard("a"), shard("b"))
    for policy, fails in ((Policy(min_coverage=1e-9), True), (Policy(min_coverage=0), False)):
        asked = play.ask(policy)
        await rest()
        for name in "ab":
            await play.leaves.to(f"{name}:1").fail(Code.UNAVAILABLE)
        if fails:
            assert (await error_of(asked)).code == Code.UNAVAILABLE
        else:
            assert (await answer_of(asked)).gathered.coverage == Coverage(2, 0, complete=False)


async def test_the_deadline_ends_a_request_whatever_leaves_do(play: Played) -> None:
    play.serve(shard("a"), shard("b"), timeout_s=1.0)
    strict, partial = play.ask(), play.ask(Policy(min_coverage=0.5))
    await rest()
    assert all(call.timeout_s == pytest.approx(0.95) for call in play.leaves.calls)
    for call in play.leaves.calls[::2]:
        await call.reply(b"a")
    await play.clock.advance(0.949)
    assert not strict.done()
    assert not partial.done()
    await play.clock.advance(0.002)
    error = await error_of(strict)
    assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, Reason.COVERAGE_NOT_MET)
    assert (await answer_of(partial)).gathered.failed_by_code == {"DEADLINE_EXCEEDED": 1}
    play.is_clean()


async def test_the_callers_deadline_counts_and_is_shorter_for_leaves(play: Played) -> None:
    play.serve(shard("a"), timeout_s=10.0)
    asked = play.ask(timeout_s=0.05)
    await rest()
    assert play.leaves.calls[0].timeout_s == pytest.approx(0.045), "5 ms at least are kept"
    await play.clock.advance(0.05)
    await error_of(asked)


async def test_after_the_soft_deadline_the_minimum_is_enough(play: Played) -> None:
    play.serve(*(shard(name) for name in "abcd"))
    asked = play.ask(Policy(min_coverage=0.5, soft_deadline_s=0.1))
    await rest()
    await play.leaves.to("a:1").reply()
    await play.clock.advance(0.2)
    assert not asked.done(), "the minimum is not met"
    await play.leaves.to("b:1").reply()
    answer = await answer_of(asked)
    assert answer.gathered.failed_by_code == {"CANCELLED": 2}
    play.is_clean()


async def test_the_first_k_are_enough(play: Played) -> None:
    play.serve(*(shard(name) for name in "abcd"))
    asked = play.ask(Policy(min_coverage=0, first_k=2))
    await rest()
    await play.leaves.to("c:1").reply(b"c")
    assert not asked.done()
    await play.leaves.to("a:1").reply(b"a")
    assert (await answer_of(asked)).result == [(0, b"a"), (2, b"c")]
    play.is_clean()


async def test_a_failed_call_is_made_again_elsewhere_once_for_each_replica(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1", "r3:1"))
    asked = play.ask()
    await rest()
    seen = set()
    for _ in range(3):
        call = play.leaves.calls[-1]
        seen.add(call.address)
        await call.fail(Code.UNAVAILABLE)
    assert seen == {"r1:1", "r2:1", "r3:1"}
    error = await error_of(asked)
    assert error.gathered is not None
    assert error.gathered.stats.retries == 2
    play.is_clean()


@pytest.mark.parametrize("code", [Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED])
async def test_neither_time_outs_nor_overload_are_answered_by_more_calls(play: Played, code: Code) -> None:
    play.serve(shard("a", "r1:1", "r2:1"))
    asked = play.ask()
    await rest()
    await play.leaves.calls[0].fail(code)
    assert (await error_of(asked)).code == code
    assert len(play.leaves.calls) == 1


@pytest.mark.parametrize("code", [Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED])
async def test_a_leafs_refusal_of_the_request_is_the_answer(play: Played, code: Code) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), shard("b"))
    asked = play.ask(Policy(min_coverage=0))
    await rest()
    await play.leaves.calls[0].fail(code, "no such field")
    error = await error_of(asked)
    assert (error.code, error.reason, error.message) == (code, Reason.LEAF_REFUSED, "no such field")
    assert error.metadata["shard_id"] == "a"
    play.is_clean()


async def test_a_pool_that_is_not_idempotent_gets_no_second_call_and_no_partial_answer(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), idempotent=False, hedging=HEDGE_SOON)
    refused = await refusal_of(play.ask(Policy(min_coverage=0.5)))
    assert refused.reason == Reason.POOL_NOT_IDEMPOTENT
    asked = play.ask()
    await play.clock.advance(1)
    await play.leaves.calls[0].fail(Code.UNAVAILABLE)
    await error_of(asked)
    assert len(play.leaves.calls) == 1


async def test_a_slow_call_gets_company_and_the_loser_is_cancelled(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), hedging=HEDGE_SOON)
    asked = play.ask()
    await play.clock.advance(0.009)
    assert len(play.leaves.calls) == 1
    await play.clock.advance(0.002)
    slow, hedge = play.leaves.calls
    assert {slow.address, hedge.address} == {"r1:1", "r2:1"}
    assert hedge.data == b"a#2"
    await hedge.reply(b"fast")
    answer = await answer_of(asked)
    assert answer.result == [(0, b"fast")]
    assert slow.cancelled
    assert (answer.gathered.stats.hedges, answer.gathered.stats.hedges_won) == (1, 1)
    play.is_clean()


async def test_a_late_reply_of_a_loser_changes_nothing(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), shard("b"), merging=Merging(MergeKind.SUM), hedging=HEDGE_SOON)
    asked = play.ask()
    await play.clock.advance(0.015)
    slow, _, hedge = play.leaves.calls[:3]
    if slow.address == "b:1":
        slow = play.leaves.calls[1]
    await hedge.reply(b"1")
    slow.done(0, "", b"1000")
    await play.leaves.to("b:1").reply(b"2")
    assert (await answer_of(asked)).result == 3
    play.is_clean()


async def test_a_failed_call_waits_for_the_hedge_beside_it(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), hedging=HEDGE_SOON)
    asked = play.ask()
    await play.clock.advance(0.015)
    slow, hedge = play.leaves.calls
    await slow.fail(Code.UNAVAILABLE)
    assert not asked.done()
    await hedge.reply(b"x")
    assert (await answer_of(asked)).gathered.coverage.complete


async def test_where_the_hedge_is_slow_too_the_first_replica_is_asked_once_more(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), hedging=HEDGE_SOON)
    asked = play.ask()
    await play.clock.advance(0.019)
    first, second = play.leaves.calls
    await play.clock.advance(0.1)
    [_, _, third] = play.leaves.calls
    assert (third.address, third.data) == (first.address, b"a#3")
    await third.reply(b"at last")
    answer = await answer_of(asked)
    assert answer.result == [(0, b"at last")]
    assert first.cancelled
    assert second.cancelled
    assert (answer.gathered.stats.hedges, answer.gathered.stats.hedges_won) == (2, 1)
    play.is_clean()


async def test_a_third_replica_is_asked_before_the_first_again(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1", "r3:1"), hedging=HEDGE_SOON)
    asked = play.ask()
    await play.clock.advance(0.1)
    assert {call.address for call in play.leaves.calls} == {"r1:1", "r2:1", "r3:1"}
    await play.leaves.calls[0].reply()
    await answer_of(asked)


async def test_a_pool_may_want_one_hedge_only(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), hedging=Hedging(min_samples=0, min_delay_s=0.010, max_hedges=1))
    asked = play.ask()
    await play.clock.advance(0.1)
    assert len(play.leaves.calls) == 2
    await play.leaves.calls[0].reply()
    await answer_of(asked)


async def test_many_late_calls_are_not_hedged_while_their_replies_come_in(play: Played) -> None:
    play.serve(*(shard(f"s{i}", f"a{i}:1", f"b{i}:1") for i in range(20)), hedging=HEDGE_SOON)
    asked = play.ask()
    await play.clock.advance(0.009)
    calls = list(play.leaves.calls)
    for one, other in zip(calls[:18:2], calls[1:18:2], strict=True):
        await play.clock.advance(0.0011)
        await one.reply()
        await other.reply()
    assert len(play.leaves.calls) == 20
    await play.clock.advance(0.01)
    assert len(play.leaves.calls) == 22, "the two that are left are no crowd"
    for call in calls[18:]:
        await call.reply()
    await answer_of(asked)
    play.is_clean()


async def test_many_late_calls_are_hedged_when_nothing_comes_in(play: Played) -> None:
    play.serve(*(shard(f"s{i}", f"a{i}:1", f"b{i}:1") for i in range(20)), hedging=HEDGE_SOON)
    asked = play.ask()
    await play.clock.advance(0.011)
    assert len(play.leaves.calls) == 20
    await play.clock.advance(0.003)
    assert len(play.leaves.calls) == 40
    for call in play.leaves.calls[20:]:
        await call.reply()
    await answer_of(asked)
    play.is_clean()


async def test_hedges_wait_for_the_usual_latency(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), hedging=Hedging(min_samples=10, min_delay_s=0.001))
    for _ in range(10):
        asked = play.ask()
        await play.clock.advance(0.1)
        assert len(play.leaves.open_calls) == 1, "too few samples"
        await play.leaves.calls[-1].reply()
        await answer_of(asked)
    asked = play.ask()
    await play.clock.advance(0.099)
    assert len(play.leaves.open_calls) == 1
    await play.clock.advance(0.002)
    assert len(play.leaves.open_calls) == 2
    await play.leaves.calls[-1].reply()
    await answer_of(asked)


async def test_the_budget_bounds_hedges_and_retries_together(play: Played) -> None:
    play.serve(*(shard(f"s{i}", f"a{i}:1", f"b{i}:1") for i in range(20)), hedging=HEDGE_SOON, budget=Budget(0.0, 5))
    asked = play.ask()
    await play.clock.advance(0.015)
    assert len(play.leaves.calls) == 25
    assert play.live.denied == 15
    await play.clock.advance(0.05)
    assert play.live.denied == 20, "nor a second hedge for the five that have one"
    for call in play.leaves.open_calls:
        if call.open:
            await call.fail(Code.UNAVAILABLE)
    await error_of(asked)
    assert len(play.leaves.calls) == 25, "no retry either"
    play.is_clean()


async def test_a_hedge_that_the_budget_denied_is_made_when_there_is_some(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), hedging=HEDGE_SOON, budget=Budget(0.5, 1))
    assert play.live.budget.spend()
    asked = play.ask()
    await play.clock.advance(0.015)
    assert len(play.leaves.calls) == 1, "half a hedge is none"
    other = play.ask()
    await play.clock.advance(0.006)
    assert len(play.leaves.calls) == 3
    assert play.live.denied == 1
    await play.leaves.calls[2].reply(b"x")
    assert (await answer_of(asked)).gathered.stats.hedges_won == 1
    await play.leaves.calls[1].reply()
    await answer_of(other)
    play.is_clean()


async def test_a_shard_without_endpoints_is_expected_all_the_same(play: Played) -> None:
    play.serve(shard("a"), shard("b", "dns:b:1"))
    asked = play.ask(Policy(min_coverage=0.5))
    await rest()
    await play.leaves.to("a:1").reply()
    answer = await answer_of(asked)
    assert answer.gathered.coverage == Coverage(2, 1, complete=False)
    play.told.watched["b:1"](["10.0.0.1:1"])
    assert play.root.topology("p").version == 2
    asked = play.ask()
    await rest()
    await play.leaves.to("a:1").reply()
    await play.leaves.to("10.0.0.1:1").reply()
    assert (await answer_of(asked)).gathered.coverage.complete


async def test_a_request_keeps_the_topology_that_it_saw(play: Played) -> None:
    play.serve(shard("a"), shard("b"), timeout_s=5.0)
    asked = play.ask()
    await rest()
    play.serve(shard("a"))
    line = next(line for line in play.leaves.lines if line.target.address == "b:1")
    await play.leaves.to("a:1").reply()
    assert not line.closed
    await play.leaves.to("b:1").reply()
    answer = await answer_of(asked)
    assert (answer.gathered.coverage.expected, answer.gathered.version) == (2, 1)
    await play.clock.advance(10)
    assert line.closed, "when no request can use it any more"


async def test_a_malformed_reply_is_a_failure_and_is_never_merged(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), merging=Merging(MergeKind.SUM))
    asked = play.ask()
    await rest()
    await play.leaves.calls[0].reply(b"!")
    await play.leaves.calls[1].reply(b'"no number"')
    error = await error_of(asked)
    assert (error.code, error.gathered.failed_by_code) == (Code.INTERNAL, {"DATA_LOSS": 1})  # type: ignore[union-attr] # it has one


async def test_replies_over_the_byte_budget_end_the_request(play: Played) -> None:
    play.serve(shard("a"), shard("b"), limits=PoolLimits(max_gathered_bytes=10))
    asked = play.ask(Policy(min_coverage=0))
    await rest()
    await play.leaves.to("a:1").reply(bytes(6))
    await play.leaves.to("b:1").reply(bytes(6))
    error = await error_of(asked)
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.GATHER_TOO_LARGE)
    play.is_clean()


async def test_a_caller_that_leaves_takes_every_call_along(play: Played) -> None:
    play.serve(*(shard(f"s{i}") for i in range(40)))
    asked = play.ask()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked.cancel()
    await rest()
    assert asked.cancelled()
    assert len(play.leaves.calls) > 0
    play.is_clean()
    assert play.clock.timers == 0


async def test_requests_beyond_the_limit_are_refused_before_any_leaf_is_asked(play: Played) -> None:
    play.serve(*(shard(f"s{i}") for i in range(4)), limits=PoolLimits(max_calls=7))
    first = play.ask()
    await rest()
    refused = await refusal_of(play.ask())
    assert (refused.code, refused.reason) == (Code.RESOURCE_EXHAUSTED, Reason.SCATTER_LIMIT)
    assert refused.retry_ms
    assert len(play.leaves.calls) == 4
    for call in list(play.leaves.calls):
        await call.reply()
    await answer_of(first)
    play.ask()
    await rest()
    assert len(play.leaves.calls) == 8


async def test_a_request_larger_than_the_limit_may_run_alone(play: Played) -> None:
    play.serve(*(shard(f"s{i}") for i in range(4)), limits=PoolLimits(max_calls=2))
    play.ask()
    await rest()
    assert len(play.leaves.calls) == 4


async def test_keys_and_names_select_shards_and_what_is_wrong_is_named(play: Played) -> None:
    play.serve(*(shard(f"s{i}") for i in range(4)))
    play.ask(shard_ids=("s2", "s0"))
    await rest()
    assert [call.data for call in play.leaves.calls] == [b"s0#1", b"s2#1"]
    play.ask(route_keys=("user-1",))
    play.ask(route_keys=("user-1",))
    await rest()
    assert play.leaves.calls[2].data == play.leaves.calls[3].data, "a key always goes to the same shard"
    wrong = await refusal_of(play.ask(shard_ids=("s9", "s1", "s1")))
    assert isinstance(wrong, InvalidArgument)
    assert [violation.field for violation in wrong.violations] == ["shard_ids[0]", "shard_ids[2]"]
    both = await refusal_of(play.ask(shard_ids=("s1",), route_keys=("k",)))
    assert isinstance(both, InvalidArgument)
    unfit = await refusal_of(play.ask(input_ids=("s1",), shard_ids=("s1", "s2")))
    assert isinstance(unfit, InvalidArgument)
    assert unfit.violations[0].field == "shard_inputs.inputs"


async def test_roots_refuse_loops_and_depth(play: Played) -> None:
    play.serve(shard("a"))
    for path in (("x/p", "root/p"), tuple(f"r{i}/p" for i in range(8))):
        assert (await refusal_of(play.ask(path=path))).reason == Reason.SCATTER_TOO_DEEP


async def test_the_first_reply_is_enough_where_shards_are_equals(play: Played) -> None:
    play.serve(shard("a"), shard("b"), shard("c"), merging=Merging(MergeKind.FIRST))
    asked = play.ask()
    await rest()
    await play.leaves.to("a:1").fail(Code.UNAVAILABLE)
    await play.leaves.to("c:1").reply(b"c")
    answer = await answer_of(asked)
    assert answer.result == b"c"
    assert answer.gathered.coverage.complete
    play.is_clean()


class Partial:
    """A leaf that answers for a part of what it stands for."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage

    def data(self, *_: object) -> bytes:
        return b""

    def metadata(self, *_: object) -> tuple[()]:
        return ()

    def read(self, data: bytes) -> Reply:
        return Reply(data, self.coverage)


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        (Coverage(4, 3, complete=False), 3),
        (Coverage(0, 0, complete=True), 0),
        (Coverage(8, 4, complete=False), 2),
        (Coverage(4, 4, complete=False), 4),
    ],
)
async def test_what_a_leaf_says_of_itself_is_summed_and_ended(play: Played, said: Coverage, counted: int) -> None:
    play.serve(shard("a", weight=4))
    asked = play.ask(Policy(min_coverage=0), question=Partial(said))
    await rest()
    await play.leaves.calls[0].reply()
    assert (await answer_of(asked)).gathered.coverage == Coverage(4, counted, complete=False)
    strict = play.ask(question=Partial(said))
    await rest()
    await play.leaves.calls[1].reply()
    assert (await error_of(strict)).reason == Reason.COVERAGE_NOT_MET


async def test_shards_of_one_endpoint_are_asked_by_one_call_where_the_pool_says_so(play: Played) -> None:
    play.serve(shard("a", "r1:1"), shard("b", "r1:1"), shard("c", "r2:1"), batch=True)
    asked = play.ask()
    await rest()
    assert sorted(call.data for call in play.leaves.calls) == [b"a+b#1", b"c#1"]
    for call in list(play.leaves.calls):
        await call.reply(b"")
    answer = await answer_of(asked)
    assert answer.gathered.coverage == Coverage(3, 3, complete=True)
    play.is_clean()


async def test_a_batch_that_failed_is_asked_shard_by_shard_elsewhere(play: Played) -> None:
    play.serve(shard("a", "r1:1", "r2:1"), shard("b", "r1:1", "r3:1"), batch=True)
    play.live.draw = lambda: 0.0
    next(line for line in play.leaves.lines if line.target.address == "r2:1").connected = False
    next(line for line in play.leaves.lines if line.target.address == "r3:1").connected = False
    asked = play.ask()
    await rest()
    [batch] = play.leaves.calls
    await batch.fail(Code.UNAVAILABLE)
    assert [(call.address, call.data) for call in play.leaves.calls[1:]] == [("r2:1", b"a#2"), ("r3:1", b"b#2")]
    for call in play.leaves.open_calls:
        await call.reply()
    assert (await answer_of(asked)).gathered.coverage == Coverage(2, 2, complete=True)
    play.is_clean()


async def test_a_replica_that_fails_fast_attracts_nobody(play: Played) -> None:
    play.serve(shard("a", "good:1", "bad:1"))
    asked_bad = 0
    for _ in range(30):
        asked = play.ask()
        await rest()
        while not asked.done():
            call = play.leaves.open_calls[-1]
            asked_bad += call.address == "bad:1"
            if call.address == "bad:1":
                await call.fail(Code.UNAVAILABLE)
            else:
                await play.clock.advance(0.02)
                await call.reply()
            await rest()
        await answer_of(asked)
    assert asked_bad <= 3


async def test_what_was_asked_is_remembered_within_bounds(play: Played) -> None:
    play.serve(*(shard(f"s{i}") for i in range(100)))
    for _ in range(100):
        asked = play.ask()
        await rest()
        for call in play.leaves.open_calls:
            await call.reply()
        await answer_of(asked)
    assert 80 <= len(play.root.recent) <= 82
    latest = play.root.recent[-1]
    assert latest.gathered.coverage.complete
    assert all(attempt.cancel is None for attempt in latest.attempts), "no call is held on to"
