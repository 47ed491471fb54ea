"""What a pool is asked and what is made of its answers, without a server."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct, Value

from retinue.client.pool import Answer, Pool, Reply, ShardReply
from retinue.scattergather.v1 import scattergather_service_pb2 as api
from retinue.scattergather.v1.coverage_pb2 import Coverage, ShardOutcome


@pytest.fixture
def pool() -> Pool:
    return Pool("p", address="127.0.0.1:1")


def value(content: Any) -> Value:
    return json_format.ParseDict(content, Value())


@pytest.mark.parametrize(
    ("question", "payload"),
    [
        ({"json": {"ä": [1, 2.5]}}, '{"ä": [1, 2.5]}'.encode()),
        ({"json": None}, b"null"),
        ({"json": 2**63 + 1}, b"9223372036854775809"),
        ({"payload": b"\xff"}, b"\xff"),
        ({"payload": Struct(fields={"a": Value(bool_value=True)})}, b"\n\x07\n\x01a\x12\x02 \x01"),
        ({}, b""),
    ],
)
def test_leaves_get_json_as_its_text_and_bytes_as_they_are(
    pool: Pool, question: dict[str, Any], payload: bytes
) -> None:
    assert pool.request(**question).payload == payload


def test_each_shard_may_get_its_own(pool: Pool) -> None:
    request = pool.request(inputs={"a": b"raw", "b": {"n": 1}})
    assert {one.shard_id: one.payload for one in request.shard_inputs.inputs} == {"a": b"raw", "b": b'{"n": 1}'}
    assert pool.request(inputs={}).WhichOneof("input") == "shard_inputs", "none is not all"


@pytest.mark.parametrize("question", [{"json": None, "payload": b""}, {"payload": b"", "inputs": {}}])
def test_two_inputs_are_refused(pool: Pool, question: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give one of json, payload and inputs"):
        pool.request(**question)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused(pool: Pool, content: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        pool.request(json=content)


def test_a_policy_says_what_is_enough(pool: Pool) -> None:
    request = pool.request(
        min_coverage=0, min_shards=2, soft_deadline=timedelta(milliseconds=50), first_k=3, hedge=False
    )
    policy = request.policy
    assert policy.HasField("min_coverage"), "0 is not unset"
    assert (policy.min_coverage, policy.min_shards, policy.first_k, policy.no_hedge) == (0, 2, 3, True)
    assert policy.soft_deadline_duration.ToMilliseconds() == 50
    strict = pool.request().policy
    assert not strict.HasField("min_coverage")
    assert not strict.HasField("soft_deadline_duration")
    assert not strict.no_hedge


def test_an_answer_tells_how_much_it_stands_for() -> None:
    missing = ShardOutcome(shard_id="c", code=14, message="gone", attempts=2)
    part = ShardOutcome(shard_id="b", attempts=1, coverage=Coverage(expected=4, answered=3))
    found = Answer(
        api.ScatterResponse(payload=b"x", coverage=Coverage(expected=6, answered=4), failures=[missing, part])
    )
    assert not found.complete
    assert str(found.coverage) == "4 of 6"
    assert found.coverage.share == pytest.approx(2 / 3)
    gone, in_part = found.failures
    assert (gone.shard_id, gone.code, gone.message, gone.attempts) == ("c", grpc.StatusCode.UNAVAILABLE, "gone", 2)
    assert gone.coverage is None
    assert in_part.code is grpc.StatusCode.OK
    assert str(in_part.coverage) == "3 of 4"


@pytest.mark.parametrize("output", [{"json": value([{"n": 1}])}, {"payload": b'[{"n": 1}]'}])
def test_an_answer_is_json_or_bytes_as_it_is_wanted(output: dict[str, Any]) -> None:
    found = Answer(api.ScatterResponse(**output))
    assert found.json == [{"n": 1}]
    assert json.loads(found.payload) == [{"n": 1}]
    assert found.replies == []


def test_whole_numbers_of_json_are_whole() -> None:
    assert Answer(api.ScatterResponse(json=value({"n": 3}))).payload == b'{"n": 3}'


def test_bytes_that_are_no_json_are_refused_as_json() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        _ = Answer(api.ScatterResponse(payload=b"x")).json


def test_collected_replies_have_the_names_of_their_shards() -> None:
    replies = [api.CollectedReply(shard_id="b", payload=b"1"), api.CollectedReply(shard_id="a", json=value("two"))]
    found = Answer(api.ScatterResponse(collected=api.CollectedReplies(replies=replies)))
    assert [(reply.shard_id, reply.payload) for reply in found.replies] == [("b", b"1"), ("a", b'"two"')]
    assert found.json == {"b": 1, "a": "two"}
    assert all(isinstance(reply, Reply) for reply in found.replies)


def test_an_event_has_the_reply_of_a_shard_and_how_it_came_about() -> None:
    message = api.ShardReply(
        reply=api.CollectedReply(shard_id="a", payload=b"1"),
        outcome=ShardOutcome(shard_id="a", attempts=2, coverage=Coverage(expected=1, answered=1, complete=True)),
        address="there",
    )
    message.elapsed_duration.FromMilliseconds(1500)
    event = ShardReply(message)
    assert (event.shard_id, event.payload, event.attempts, event.elapsed) == ("a", b"1", 2, 1.5)
    assert event.coverage.complete
    assert event.address == "there"
