"""Deadlines, calls beside slow ones, calls after failures, and what ends with the request."""

from __future__ import annotations

from typing import Any

import pytest
from contract.client import TIMEOUT, Client, Refused
from contract.plays import Fail, Play
from contract.pools import QUICK_S
from pace import undisturbed


def failed(client: Client, play: Play, pool_id: str, timeout: float = TIMEOUT, **fields: Any) -> Refused:
    with pytest.raises(Refused) as error:
        client.Scatter(pool_id=pool_id, payload=play.payload, timeout=timeout, **fields)
    return error.value


# Deadlines


def test_the_pools_deadline_counts_where_the_caller_has_none(scatterer: Client, play: Play) -> None:
    play.says = {"b": play.gate()}

    def failed_in_part() -> None:
        play.calls.clear()
        error = failed(scatterer, play, "quick")
        assert (error.code, error.reason) == ("DEADLINE_EXCEEDED", "COVERAGE_NOT_MET")
        assert error.scatter
        assert [(f.shard_id, f.code) for f in error.scatter.failures] == [("b", 4)]
        assert error.scatter.coverage.answered == 2
        assert all(0 < call.time_remaining <= QUICK_S for call in play.calls)

    undisturbed(failed_in_part, within_s=0)
    play.await_quiet()


def test_leaves_have_less_time_than_the_request(scatterer: Client, play: Play) -> None:
    scatterer.Scatter(pool_id="collect", payload=play.payload, timeout=9)
    assert all(0 < call.time_remaining < 8.8 for call in play.calls), "a twentieth less"
    play.calls.clear()
    scatterer.Scatter(pool_id="collect", payload=play.payload, timeout=100)
    assert all(0 < call.time_remaining < 9.6 for call in play.calls), "the pool's deadline is shorter"


def test_at_the_deadline_the_minimum_is_enough(scatterer: Client, play: Play) -> None:
    play.says = {"b": play.gate()}
    asked = {"pool_id": "quick", "payload": play.payload}

    def answered_in_part() -> None:
        answer = scatterer.Scatter(**asked, policy={"min_coverage": 0.5})
        assert [reply.shard_id for reply in answer.collected.replies] == ["a", "c"]
        assert answer.failed_by_code == {"DEADLINE_EXCEEDED": 1}
        assert [f.code for f in answer.failures] == [4]

    undisturbed(answered_in_part, within_s=0)


def test_at_the_deadline_nothing_is_enough_if_nothing_was_asked_for(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    answer = scatterer.Scatter(pool_id="quick", payload=play.payload, policy={"min_coverage": 0})
    assert answer.failed_by_code == {"DEADLINE_EXCEEDED": 3}
    assert not answer.collected.replies
    error = failed(scatterer, play, "quick", policy={"min_coverage": 1e-9})
    assert error.code == "DEADLINE_EXCEEDED"


def test_a_leaf_that_ran_out_of_time_is_not_asked_again(scatterer: Client, play: Play) -> None:
    play.says = {"a": Fail("DEADLINE_EXCEEDED")}
    assert failed(scatterer, play, "replicas").code == "DEADLINE_EXCEEDED"
    assert len(play.calls) == 1


# Cancellation


def test_a_caller_that_leaves_takes_every_call_along(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    asked = scatterer.begin("Scatter", pool_id="collect", payload=play.payload)
    play.await_calls(3)
    asked.cancel()
    play.await_end("CANCELLED", 3)


def test_the_callers_deadline_ends_every_call(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}

    def ended() -> None:
        play.calls.clear()
        assert failed(scatterer, play, "collect", timeout=0.5).code == "DEADLINE_EXCEEDED"
        play._await(lambda: {call.ended for call in play.calls} <= {"CANCELLED", "DEADLINE_EXCEEDED"})
        assert len(play.calls) == 3

    undisturbed(ended, within_s=0)


def test_a_stream_that_is_left_takes_every_call_along(scatterer: Client, play: Play) -> None:
    play.says = {"b": play.gate(), "c": play.gate()}
    request = {"pool_id": "collect", "payload": play.payload}
    with scatterer.stream("ScatterStream", request=request) as stream:
        assert stream.read().reply.reply.shard_id == "a"
    play.await_quiet()


# Retries


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "UNKNOWN", "ABORTED", "DATA_LOSS", "CANCELLED"])
def test_a_call_that_failed_is_made_again_elsewhere(scatterer: Client, play: Play, code: str) -> None:
    play.says = {"a": [Fail(code), b"x"]}
    answer = scatterer.Scatter(pool_id="replicas", payload=play.payload)
    first, second = play.calls
    assert first.at != second.at
    assert [call.query.attempt for call in play.calls] == [1, 2]
    assert (answer.stats.attempts, answer.stats.retries, answer.coverage.complete) == (2, 1, True)


def test_no_replica_is_asked_twice(scatterer: Client, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE")}
    error = failed(scatterer, play, "replicas")
    assert sorted(call.at for call in play.calls) == ["r0", "r1", "r2"]
    assert error.scatter
    assert error.scatter.failures[0].attempts == 3


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "NOT_FOUND", "UNIMPLEMENTED", "FAILED_PRECONDITION"])
def test_what_another_replica_would_say_too_is_not_asked_again(scatterer: Client, play: Play, code: str) -> None:
    play.says = {"a": Fail(code)}
    failed(scatterer, play, "replicas")
    assert len(play.calls) == 1


def test_who_does_not_listen_is_unavailable(scatterer: Client, play: Play) -> None:
    answer = scatterer.Scatter(pool_id="away", payload=play.payload, policy={"min_coverage": 0.5})
    assert answer.failed_by_code == {"UNAVAILABLE": 1}
    assert failed(scatterer, play, "away").code == "UNAVAILABLE"


def test_the_budget_bounds_retries_and_hedges(scatterer: Client, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE")}
    assert failed(scatterer, play, "spent").code == "UNAVAILABLE"
    assert len(play.calls) == 1


# Hedges


def slow_first(play: Play, *, then: Any = b"late") -> None:
    play.says = {"a": [play.gate(then), b"fast"]}


def test_a_slow_call_gets_company_and_the_loser_is_cancelled(scatterer: Client, play: Play) -> None:
    slow_first(play)
    answer = scatterer.Scatter(pool_id="hedged", payload=play.payload)
    assert answer.collected.replies[0].payload == b"fast"
    assert answer.stats.hedges >= 1
    assert answer.stats.hedges_won >= 1
    first, second = play.to("a")
    assert first.at != second.at
    play.await_quiet()
    [recent] = scatterer.ListRecentScatters(scatter_id=answer.scatter_id).scatters
    of_a = [attempt for attempt in recent.attempts if attempt.shard_id == "a"]
    assert [(attempt.kind, attempt.outcome, attempt.code) for attempt in of_a] == [(1, 2, 1), (2, 1, 0)]


def hedges_come(client: Client, play: Play) -> None:
    """Returns when calls that were made before would have had company: those of another request have got it."""
    other = client.begin("Scatter", pool_id="hedged", payload=play.payload)
    play._await(lambda: len([call for call in play.calls if call.query.attempt == 2]) >= 2)
    other.cancel()


def test_a_request_may_forbid_hedges(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    asked = scatterer.begin("Scatter", pool_id="hedged", payload=play.payload, policy={"no_hedge": True})
    mine = play.await_calls(2)[0].query.parent.scatter_id
    hedges_come(scatterer, play)
    assert [call.query.attempt for call in play.calls if call.query.parent.scatter_id == mine] == [1, 1]
    asked.cancel()


def test_a_pool_that_is_not_idempotent_is_never_hedged(scatterer: Client, play: Play) -> None:
    gate = play.gate(b"slow")
    play.says = {"*": gate}
    asked = scatterer.begin("Scatter", pool_id="once", payload=play.payload)
    mine = play.await_calls(1)[0].query.parent.scatter_id
    hedges_come(scatterer, play)
    assert [call.query.attempt for call in play.calls if call.query.parent.scatter_id == mine] == [1]
    gate.open()
    assert asked.result().coverage.complete


def test_a_failed_call_waits_for_the_hedge_beside_it(scatterer: Client, play: Play) -> None:
    first, hedge = play.gate(Fail("UNAVAILABLE")), play.gate(b"hedge")
    play.says = {"a": [first, hedge]}
    asked = scatterer.begin("Scatter", pool_id="hedged", payload=play.payload)
    play._await(lambda: len([call for call in play.calls if call.shard == "a"]) == 2)
    first.open()
    play.await_end("UNAVAILABLE")
    hedge.open()
    answer = asked.result()
    assert answer.collected.replies[0].payload == b"hedge"
    assert answer.coverage.complete


# How much at once


def test_a_request_beyond_the_limit_is_refused_before_any_leaf_is_asked(scatterer: Client, play: Play) -> None:
    gate = play.gate()
    play.says = {"*": gate}
    asked = scatterer.begin("Scatter", pool_id="narrow", payload=play.payload)
    play.await_calls(3)
    error = failed(scatterer, play, "narrow")
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "SCATTER_LIMIT")
    assert error.retry_s
    assert error.metadata == {"pool_id": "narrow"}
    assert len(play.calls) == 3
    gate.open()
    assert asked.result().coverage.complete
    assert scatterer.Scatter(pool_id="narrow", payload=play.payload).coverage.complete


def test_a_reply_that_is_too_large_is_a_failure_of_its_shard(scatterer: Client, play: Play) -> None:
    play.says = {"a": bytes(700), "b": bytes(500)}
    answer = scatterer.Scatter(pool_id="tight", payload=play.payload, policy={"min_coverage": 0.5})
    assert answer.failed_by_code == {"RESOURCE_EXHAUSTED": 1}
    assert [f.shard_id for f in answer.failures] == ["a"]


def test_replies_over_the_byte_budget_end_the_request(scatterer: Client, play: Play) -> None:
    play.says = {"a": bytes(500), "b": bytes(500), "c": play.gate()}
    error = failed(scatterer, play, "tight", policy={"min_coverage": 0})
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "GATHER_TOO_LARGE")
    assert "max_gathered_bytes" in error.message
    play.await_quiet()


def test_an_answer_that_no_message_holds_is_an_error_that_says_what_to_do(scatterer: Client, play: Play) -> None:
    play.says = {"*": bytes(1_500_000)}
    for pool_id in ("collect", "concat"):
        error = failed(scatterer, play, pool_id)
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "GATHER_TOO_LARGE")
        assert "ScatterStream" in error.message
        assert scatterer.ListRecentScatters(pool_id=pool_id).scatters[0].code == 8
    answer = scatterer.Scatter(pool_id="collect", payload=play.payload, shard_ids=["a", "c"])
    assert [len(reply.payload) for reply in answer.collected.replies] == [1_500_000] * 2
