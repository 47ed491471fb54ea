"""What is good enough an answer, and the truth about what is missing from one that is."""

from __future__ import annotations

from typing import Any

import pytest
from contract.client import Client, Refused
from contract.line import seconds
from contract.plays import Fail, Play

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1.coverage_pb2 import Coverage, ShardOutcome


def in_part(payload: bytes, expected: int, answered: int, *, complete: bool = False) -> leaf.QueryResponse:
    covered = Coverage(expected=expected, answered=answered, complete=complete)
    return leaf.QueryResponse(payload=payload, coverage=covered)


def of(client: Client, play: Play, pool_id: str, **policy: Any) -> Any:
    return client.Scatter(pool_id=pool_id, payload=play.payload, policy=policy)


def failed(client: Client, play: Play, pool_id: str, **policy: Any) -> Refused:
    with pytest.raises(Refused) as error:
        of(client, play, pool_id, **policy)
    return error.value


def shards(answer: Any) -> list[str]:
    return [reply.shard_id for reply in answer.collected.replies]


# Strict


def test_without_a_policy_one_missing_shard_is_an_error_that_names_it(scatterer: Client, play: Play) -> None:
    broken = play.gate(Fail("UNAVAILABLE", "no disk"))
    play.says = {"b": broken, "c": play.gate()}
    asked = scatterer.begin("Scatter", pool_id="collect", payload=play.payload)
    play.await_calls(3)
    broken.open()
    with pytest.raises(Refused) as refused:
        asked.result()
    error = refused.value
    assert (error.code, error.reason) == ("UNAVAILABLE", "COVERAGE_NOT_MET")
    assert error.scatter
    assert (error.scatter.coverage.expected, error.scatter.coverage.complete) == (3, False)
    assert error.scatter.failures[0] == ShardOutcome(shard_id="b", code=14, message="no disk", attempts=1)
    assert error.scatter.failed_by_code["UNAVAILABLE"] == 1
    assert "b: no disk" in error.message
    play.await_end("CANCELLED")  # of the leaf that hangs: at once, not at the deadline
    [recent] = scatterer.ListRecentScatters(scatter_id=error.scatter.scatter_id).scatters
    assert (recent.code, recent.coverage) == (14, error.scatter.coverage)


@pytest.mark.parametrize(
    ("expected", "answered", "complete"), [(4, 3, False), (0, 0, False), (1, 1, False), (1, 0, True), (0, 0, True)]
)
def test_a_shard_that_answers_in_part_is_not_enough_for_a_strict_request(
    scatterer: Client,
    play: Play,
    expected: int,
    answered: int,
    complete: bool,  # noqa: FBT001 - a case
) -> None:
    play.says = {"a": in_part(b"", expected, answered, complete=complete)}
    error = failed(scatterer, play, "collect")
    assert (error.code, error.reason) == ("INTERNAL", "COVERAGE_NOT_MET")
    assert error.scatter
    assert not error.scatter.coverage.complete


@pytest.mark.parametrize("said", [1, 9])
def test_a_shard_that_says_that_it_answered_completely_has(scatterer: Client, play: Play, said: int) -> None:
    play.says = {"a": in_part(b"x", said, said, complete=True)}
    answer = of(scatterer, play, "collect")
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (3, 3, True)


def test_a_reply_whose_coverage_contradicts_itself_is_a_failure(scatterer: Client, play: Play) -> None:
    for said in (in_part(b"", 1, 2), in_part(b"", -1, 0), in_part(b"", 1, -1)):
        play.says = {"a": said}
        error = failed(scatterer, play, "collect")
        assert error.scatter
        assert error.scatter.failed_by_code["DATA_LOSS"] == 1


# Partial


def test_a_partial_answer_says_exactly_what_is_missing(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"1", "b": Fail("INTERNAL", "broken")}
    answer = of(scatterer, play, "weighted", min_coverage=0.75)
    assert shards(answer) == ["a"]
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (4, 3, False)
    assert list(answer.failures) == [ShardOutcome(shard_id="b", code=13, message="broken", attempts=1)]
    assert answer.failed_by_code == {"INTERNAL": 1}


def test_weights_count_not_shards(scatterer: Client, play: Play) -> None:
    play.says = {"a": Fail("INTERNAL"), "b": play.gate()}
    error = failed(scatterer, play, "weighted", min_coverage=0.5)
    assert error.code == "INTERNAL"
    play.says = {"a": Fail("INTERNAL")}
    assert shards(of(scatterer, play, "weighted", min_coverage=0.25)) == ["b"]


def test_what_a_shard_says_of_itself_is_counted_by_its_weight(scatterer: Client, play: Play) -> None:
    """A parent of 6 leaves with the weight 3 of which 4 answered counts as 2."""
    play.says = {"a": in_part(b"x", 6, 4), "b": b"y"}
    answer = of(scatterer, play, "weighted", min_coverage=0.1)
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (4, 3, False)
    [degraded] = answer.failures
    assert (degraded.shard_id, degraded.code) == ("a", 0)
    assert (degraded.coverage.expected, degraded.coverage.answered) == (3, 2)
    assert not answer.failed_by_code


def test_a_shard_that_says_how_many_answered_is_read_as_of_its_weight(scatterer: Client, play: Play) -> None:
    play.says = {"a": in_part(b"x", 0, 2)}
    answer = of(scatterer, play, "weighted", min_coverage=0.5)
    assert (answer.coverage.expected, answer.coverage.answered) == (4, 3)


def test_a_minimum_that_is_met_exactly_is_met(scatterer: Client, play: Play) -> None:
    play.says = {"c": Fail("UNAVAILABLE")}
    assert shards(of(scatterer, play, "collect", min_coverage=2 / 3)) == ["a", "b"]
    assert failed(scatterer, play, "collect", min_coverage=0.67).reason == "COVERAGE_NOT_MET"


def test_so_many_shards_must_have_answered_whatever_their_weight(scatterer: Client, play: Play) -> None:
    play.says = {"b": Fail("UNAVAILABLE")}
    assert failed(scatterer, play, "weighted", min_coverage=0.5, min_shards=2).code == "UNAVAILABLE"
    assert shards(of(scatterer, play, "weighted", min_coverage=0.5, min_shards=1)) == ["a"]


def test_nothing_is_no_answer_unless_it_was_asked_for(scatterer: Client, play: Play) -> None:
    play.says = {"*": Fail("UNAVAILABLE")}
    assert failed(scatterer, play, "collect", min_coverage=1e-9).code == "UNAVAILABLE"
    assert failed(scatterer, play, "collect", min_coverage=0, min_shards=1).code == "UNAVAILABLE"
    answer = of(scatterer, play, "collect", min_coverage=0)
    assert shards(answer) == []
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (3, 0, False)
    assert answer.failed_by_code == {"UNAVAILABLE": 3}


def test_leaves_are_told_whether_a_part_is_better_than_nothing(scatterer: Client, play: Play) -> None:
    of(scatterer, play, "collect", min_coverage=0.5)
    assert all(call.query.parent.accept_partial for call in play.calls)


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        (["RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"], "RESOURCE_EXHAUSTED"),
        (["UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL"], "DEADLINE_EXCEEDED"),
        (["INTERNAL", "UNAVAILABLE", "NOT_FOUND"], "UNAVAILABLE"),
        (["NOT_FOUND", "UNKNOWN", "UNIMPLEMENTED"], "INTERNAL"),
        (["CANCELLED", "ABORTED", "DATA_LOSS"], "INTERNAL"),
    ],
)
def test_of_several_failures_the_gravest_is_the_code(
    scatterer: Client, play: Play, codes: list[str], wanted: str
) -> None:
    play.says = {shard: Fail(code) for shard, code in zip("abc", codes, strict=True)}
    error = failed(scatterer, play, "collect", min_coverage=0, min_shards=1)
    assert (error.code, error.reason) == (wanted, "COVERAGE_NOT_MET")
    assert error.scatter
    assert sum(error.scatter.failed_by_code.values()) == 3
    assert "CANCELLED" not in error.scatter.failed_by_code, "nobody cancelled them"


# Not to wait for all


def test_the_first_k_are_enough(scatterer: Client, play: Play) -> None:
    play.says = {"b": play.gate()}
    answer = of(scatterer, play, "collect", min_coverage=0, first_k=2)
    assert shards(answer) == ["a", "c"]
    assert answer.failed_by_code == {"CANCELLED": 1}
    assert [(f.shard_id, f.code, f.attempts) for f in answer.failures] == [("b", 1, 1)]
    play.await_quiet()


def test_the_first_k_are_not_enough_below_the_minimum(scatterer: Client, play: Play) -> None:
    gate = play.gate()
    play.says = {"a": gate}
    asked = scatterer.begin(
        "Scatter", pool_id="weighted", payload=play.payload, policy={"min_coverage": 0.5, "first_k": 1}
    )
    play.await_end("OK")
    assert not asked.done()
    gate.open()
    assert asked.result().coverage.complete


def test_after_the_soft_deadline_the_minimum_is_enough(scatterer: Client, play: Play) -> None:
    play.says = {"c": play.gate()}
    answer = of(scatterer, play, "collect", min_coverage=0.5, soft_deadline_duration=seconds(0.1))
    assert shards(answer) == ["a", "b"]
    assert answer.stats.elapsed_duration.ToMilliseconds() >= 100
    play.await_quiet()


def test_after_the_soft_deadline_the_minimum_is_waited_for(scatterer: Client, play: Play) -> None:
    gate = play.gate()
    play.says = {"b": gate, "c": play.gate()}
    policy = {"min_coverage": 0.6, "soft_deadline_duration": seconds(0.05)}
    asked = scatterer.begin("Scatter", pool_id="collect", payload=play.payload, policy=policy)
    play.await_calls(3)
    with pytest.raises(Refused) as error:  # by then the soft deadline is over
        of(scatterer, play, "quick")
    assert error.value.code == "DEADLINE_EXCEEDED"
    assert not asked.done()
    gate.open()
    assert shards(asked.result()) == ["a", "b"]


def test_a_soft_deadline_of_nothing_takes_what_is_there(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    answer = of(scatterer, play, "collect", min_coverage=0, soft_deadline_duration=seconds(0))
    assert shards(answer) == []
    assert not answer.coverage.complete


def test_who_answers_before_the_soft_deadline_is_not_held_up(scatterer: Client, play: Play) -> None:
    answer = of(scatterer, play, "collect", min_coverage=0.5, soft_deadline_duration=seconds(15))
    assert answer.coverage.complete


# Pools whose leaves are asked once


def test_a_pool_that_is_not_idempotent_gives_no_partial_answers(scatterer: Client, play: Play) -> None:
    for policy in ({"min_coverage": 0.5}, {"first_k": 1}):
        error = failed(scatterer, play, "once", **policy)
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "POOL_NOT_IDEMPOTENT")
        assert error.metadata == {"pool_id": "once"}
    assert play.calls == []
    assert of(scatterer, play, "once", min_coverage=1).coverage.complete


def test_a_pool_that_is_not_idempotent_gets_no_second_call(scatterer: Client, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE")}
    assert failed(scatterer, play, "once").code == "UNAVAILABLE"
    assert len(play.calls) == 1
