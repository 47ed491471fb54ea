"""How replies become one answer: each merge of the contract, what it refuses, and the user's own MergeService."""

from __future__ import annotations

import json
from typing import Any

import pytest
from contract.client import Client, Refused
from contract.plays import Fail, Play
from contract.pools import MERGER
from google.protobuf import json_format

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1.coverage_pb2 import Coverage


def said(*values: Any) -> dict[str, bytes]:
    """What the leaves a, b, c say in JSON."""
    return {shard: json.dumps(value).encode() for shard, value in zip("abc", values, strict=True)}


def merged(client: Client, play: Play, pool_id: str, *values: Any, **policy: Any) -> Any:
    play.says |= said(*values) if values else {}
    answer = client.Scatter(pool_id=pool_id, payload=play.payload, policy=policy)
    return json_format.MessageToDict(answer.json)


HITS = [{"score": 5, "id": 1, "title": "x"}, {"score": 2, "id": "b", "more": [1, {"a": None}]}]
BARS = {"bounds": [1, 2.5], "counts": [1, 0, 2], "sum": 7.5}
CASES: dict[str, tuple[list[Any], Any]] = {
    "sum": ([1, 2.5, None], 3.5),
    "min": ([3, -1, 2], -1),
    "max": ([3, -1, 3.25], 3.25),
    "count": ([3, 4, 0], 7),
    "group_sum": ([{"de": 3, "fr": 1}, {"de": 1.5}, {}], {"de": 4.5, "fr": 1}),
    "union": ([["b", 2], ["a", "b", 1.5], []], [1.5, 2, "a", "b"]),
    "histogram": ([BARS, BARS, BARS], {"bounds": [1, 2.5], "counts": [3, 0, 6], "sum": 22.5}),
    "top_k": (
        [HITS, [{"score": 5, "id": 0}, {"score": 9.5, "id": "z"}], []],
        [{"score": 9.5, "id": "z"}, HITS[0], {"score": 5, "id": 0}],
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_merge_gives_what_the_contract_says(scatterer: Client, play: Play, kind: str) -> None:
    values, wanted = CASES[kind]
    assert merged(scatterer, play, kind, *values) == wanted


def test_the_order_of_coming_does_not_count(scatterer: Client, play: Play) -> None:
    for first in "abc":
        play.calls.clear()
        late = play.gate(said(0.1, 0.2, 0.3)[first])
        play.says = said(0.1, 0.2, 0.3) | {first: late}
        asked = scatterer.begin("Scatter", pool_id="sum", payload=play.payload)
        play.await_end("OK", 2)
        late.open()
        assert asked.result().json.number_value == 0.6, "correctly rounded"


def test_whole_numbers_are_added_exactly(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"9007199254740993", "b": b"-9007199254740992", "c": b"0"}
    assert merged(scatterer, play, "sum") == 1


def test_none_of_none_is_none(scatterer: Client, play: Play) -> None:
    assert merged(scatterer, play, "sum", None, None, None) is None
    assert merged(scatterer, play, "top_k", [], [], []) == []


WRONG = {
    "sum": ["", "x", '"1"', "[1]", "NaN", "1e999", "true", "9" * 400],
    "count": ["null", "-1", "1.5", "{}"],
    "group_sum": ["[]", '{"a": null}', '{"a": "1"}'],
    "union": ["{}", "[null]", "[[1]]"],
    "top_k": ["{}", "[1]", '[{"id": 1}]', '[{"score": "1", "id": 1}]', '[{"score": 1, "id": null}]'],
    "histogram": ["[]", '{"bounds": [1], "counts": [1]}', '{"bounds": [9], "counts": [1, 1]}'],
    "json": ["", "{", "nan", "9" * 400, "[" * 31 + "]" * 31, '{"a":' * 31 + "1" + "}" * 31],
}


@pytest.mark.parametrize(
    ("kind", "reply"),
    [pytest.param(kind, reply, id=f"{kind}, {reply[:20]}") for kind, replies in WRONG.items() for reply in replies],
)
def test_a_reply_that_the_merge_cannot_read_is_lost_and_the_others_count(
    scatterer: Client, play: Play, kind: str, reply: str
) -> None:
    good = {"sum": "1", "json": "1", "count": "1", "group_sum": "{}", "union": "[]", "top_k": "[]"}
    late = play.gate(reply.encode())  # of a histogram the first reply says which bounds count
    play.says = {"*": good.get(kind, json.dumps(BARS)).encode(), "c": late}
    request = {"pool_id": kind, "payload": play.payload, "policy": {"min_coverage": 0.5}}
    with scatterer.stream("ScatterStream", request=request) as stream:
        assert [stream.read().WhichOneof("event") for _ in range(2)] == ["reply", "reply"]
        late.open()
        assert stream.read().failure.shard_id == "c"
        answer = stream.read().answer
    assert answer.failed_by_code == {"DATA_LOSS": 1}
    assert [(f.shard_id, f.code) for f in answer.failures] == [("c", 15)]
    assert "must" in answer.failures[0].message


def test_json_is_collected_as_it_is(scatterer: Client, play: Play) -> None:
    deep = json.loads("[" * 30 + "1.5" + "]" * 30)
    objects = json.loads('{"a":' * 30 + "true" + "}" * 30)
    play.says = said(deep, objects, {"ä": [None, "x", -0.5]})
    answer = scatterer.Scatter(pool_id="json", payload=play.payload)
    found = {reply.shard_id: json_format.MessageToDict(reply.json) for reply in answer.collected.replies}
    assert found == {"a": deep, "b": objects, "c": {"ä": [None, "x", -0.5]}}


def test_bytes_are_joined_in_the_pools_order(scatterer: Client, play: Play) -> None:
    late = play.gate(b"1")
    play.says = {"a": late, "b": b"2", "c": b"\xff3"}
    asked = scatterer.begin("Scatter", pool_id="concat", payload=play.payload)
    play.await_end("OK", 2)
    late.open()
    assert asked.result().payload == b"12\xff3"


# The first


def test_the_first_reply_is_enough_and_the_others_are_cancelled(scatterer: Client, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE"), "b": b"x", "c": play.gate()}
    answer = scatterer.Scatter(pool_id="first", payload=play.payload)
    assert answer.payload == b"x"
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (2, 2, True)
    assert not answer.failures
    play.await_quiet()


def test_a_part_is_not_the_first_where_only_all_will_do(scatterer: Client, play: Play) -> None:
    part = leaf.QueryResponse(payload=b"part", coverage=Coverage(expected=2, answered=1))
    late = play.gate(b"all")
    play.says = {"a": part, "b": part, "c": late}
    asked = scatterer.begin("Scatter", pool_id="first", payload=play.payload)
    play.await_end("OK", 2)
    assert not asked.done()
    late.open()
    assert asked.result().payload == b"all"
    play.says["c"] = play.gate()
    partly = scatterer.Scatter(pool_id="first", payload=play.payload, policy={"min_coverage": 0.1})
    assert (partly.payload, partly.coverage.complete) == (b"part", False)


def test_no_reply_is_an_error_unless_nothing_was_asked_for(scatterer: Client, play: Play) -> None:
    play.says = {"*": Fail("UNAVAILABLE")}
    for policy in ({}, {"min_coverage": 0.1}):
        with pytest.raises(Refused) as error:
            scatterer.Scatter(pool_id="first", payload=play.payload, policy=policy)
        assert (error.value.code, error.value.reason) == ("UNAVAILABLE", "COVERAGE_NOT_MET")
    answer = scatterer.Scatter(pool_id="first", payload=play.payload, policy={"min_coverage": 0})
    assert (answer.payload, answer.coverage.answered, answer.coverage.complete) == (b"", 0, False)


# The user's own


@pytest.mark.parametrize("pool_id", ["service", "service_streamed"])
def test_the_users_service_merges(scatterer: Client, play: Play, pool_id: str) -> None:
    play.says = {"a": b"1", "b": b"2", "c": b"3"}
    answer = scatterer.Scatter(pool_id=pool_id, payload=play.payload)
    assert sorted(answer.payload.split(b",")) == [b"a=1", b"b=2", b"c=3"]
    assert answer.coverage.complete


def test_a_service_gets_all_that_is_known(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"1", "b": Fail("UNAVAILABLE"), "c": b"3"}
    scatterer.Scatter(pool_id="service", payload=play.payload, policy={"min_coverage": 0.5})
    [request] = play.merge_requests
    assert [(reply.shard_id, reply.payload) for reply in request.replies] == [("a", b"1"), ("c", b"3")]
    assert (request.pool_id, request.payload) == ("service", play.payload)
    assert request.coverage == Coverage(expected=3, answered=2)


def test_a_streamed_service_gets_replies_as_they_come(scatterer: Client, play: Play) -> None:
    late = play.gate(b"1")
    play.says = {"a": late, "b": b"2", "c": b"3"}
    asked = scatterer.begin("Scatter", pool_id="service_streamed", payload=play.payload)
    play._await(lambda: len(play.merge_requests) == 3)
    start, *replies = play.merge_requests
    assert (start.start.pool_id, start.start.payload) == ("service_streamed", play.payload)
    assert {message.reply.shard_id for message in replies} == {"b", "c"}
    late.open()
    assert asked.result().payload.endswith(b",a=1")


@pytest.mark.parametrize("pool_id", ["service", "service_streamed"])
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("UNAVAILABLE", "INTERNAL"),
        ("UNKNOWN", "INTERNAL"),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT"),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_service_that_fails_fails_the_request(
    scatterer: Client, play: Play, pool_id: str, code: str, told: str
) -> None:
    play.says = {MERGER: Fail(code, "no idea")}
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id=pool_id, payload=play.payload)
    assert (error.value.code, error.value.reason) == (told, "MERGE_FAILED")
    assert "no idea" in error.value.message
    recent = scatterer.ListRecentScatters(pool_id=pool_id).scatters[0]
    assert recent.code != 0


@pytest.mark.parametrize("pool_id", ["service", "service_streamed"])
def test_a_service_that_hangs_is_not_waited_for_beyond_the_deadline(
    scatterer: Client, play: Play, pool_id: str
) -> None:
    play.says = {MERGER: play.gate()}
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id=pool_id, payload=play.payload, timeout=0.5)
    assert error.value.code in ("DEADLINE_EXCEEDED", "INTERNAL"), "its own clock or the root's"


def test_a_service_that_answers_before_the_last_reply_has_not_merged(scatterer: Client, play: Play) -> None:
    late = play.gate()
    play.says = {"a": late, MERGER: "early"}
    asked = scatterer.begin("Scatter", pool_id="service_streamed", payload=play.payload)
    play.await_end("OK", 2)
    late.open()
    with pytest.raises(Refused) as error:
        asked.result()
    assert (error.value.code, error.value.reason) == ("INTERNAL", "MERGE_FAILED")
