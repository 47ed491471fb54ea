"""ScatterStream: what is told of each shard, as it comes; and QueryStream, by which a root is asked as a leaf."""

from __future__ import annotations

from typing import Any

import pytest
from contract.client import Client, Refused, Stream
from contract.plays import Fail, Play, Raw
from pace import undisturbed

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1.coverage_pb2 import Coverage


def events(client: Client, play: Play, pool_id: str, omit: str = "", **fields: Any) -> list[Any]:
    request = {"pool_id": pool_id, "payload": play.payload, **fields}
    with client.stream("ScatterStream", request=request, **({omit: True} if omit else {})) as stream:
        return list(stream)


def test_each_shard_is_told_as_it_comes_and_the_answer_last(scatterer: Client, play: Play) -> None:
    late = play.gate(b"1")
    play.says = {"a": late, "b": b"2", "c": Fail("UNAVAILABLE", "gone")}
    request = {"pool_id": "collect", "payload": play.payload, "policy": {"min_coverage": 0.5}}
    with scatterer.stream("ScatterStream", request=request) as stream:
        first = sorted([stream.read(), stream.read()], key=lambda event: str(event.WhichOneof("event")))
        failure, reply = first[0].failure, first[1].reply
        assert (failure.shard_id, failure.code, failure.message, failure.attempts) == ("c", 14, "gone", 1)
        assert (reply.reply.shard_id, reply.reply.payload, reply.outcome.code) == ("b", b"2", 0)
        assert reply.outcome.coverage == Coverage(expected=1, answered=1, complete=True)
        assert reply.elapsed_duration.ToNanoseconds() > 0
        assert reply.address
        late.open()
        assert stream.read().reply.reply.shard_id == "a"
        answer = stream.read().answer
        assert [r.shard_id for r in answer.collected.replies] == ["a", "b"]
        assert answer.failed_by_code == {"UNAVAILABLE": 1}
        assert stream.read() is None


def test_bytes_and_output_may_be_left_out(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"x"}
    *replies, last = events(scatterer, play, "collect", omit="omit_payloads")
    assert all(event.reply.reply.WhichOneof("output") is None for event in replies)
    assert {event.reply.reply.shard_id for event in replies} == set("abc")
    assert len(last.answer.collected.replies) == 3
    *replies, last = events(scatterer, play, "collect", omit="omit_output")
    assert [event.reply.reply.payload for event in replies] == [b"x"] * 3
    assert last.answer.WhichOneof("output") is None
    assert last.answer.coverage.complete


def test_replies_that_together_are_more_than_a_message_are_delivered_one_by_one(scatterer: Client, play: Play) -> None:
    play.says = {"*": bytes(1_500_000)}
    *replies, last = events(scatterer, play, "collect", omit="omit_output")
    assert [len(event.reply.reply.payload) for event in replies] == [1_500_000] * 3
    assert last.answer.stats.gathered_bytes > 4_500_000
    request = {"pool_id": "collect", "payload": play.payload}
    with scatterer.stream("ScatterStream", request=request) as stream:
        assert [stream.read().WhichOneof("event") for _ in range(3)] == ["reply"] * 3
        with pytest.raises(Refused) as error:
            stream.read()
    assert (error.value.code, error.value.reason) == ("RESOURCE_EXHAUSTED", "GATHER_TOO_LARGE")
    assert "omit_output" in error.value.message


def test_a_reply_that_no_message_holds_ends_the_stream_unless_it_is_left_out(scatterer: Client, play: Play) -> None:
    play.says = {"a": bytes(3 * 1024 * 1024 - 20)}
    with pytest.raises(Refused) as error:
        events(scatterer, play, "collect", shard_ids=["a"])
    assert (error.value.code, error.value.reason) == ("RESOURCE_EXHAUSTED", "GATHER_TOO_LARGE")
    assert "omit_payloads" in error.value.message


def test_replies_of_json_merges_are_json(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"2"}
    *replies, last = events(scatterer, play, "sum")
    assert [event.reply.reply.json.number_value for event in replies] == [2, 2, 2]
    assert last.answer.json.number_value == 6


def test_a_stream_that_fails_has_told_what_came_before(scatterer: Client, play: Play) -> None:
    late = play.gate(Fail("INTERNAL", "broken"))
    play.says = {"b": late}
    request = {"pool_id": "weighted", "payload": play.payload}
    with scatterer.stream("ScatterStream", request=request) as stream:
        assert stream.read().reply.reply.shard_id == "a"
        late.open()
        assert stream.read().failure.shard_id == "b"
        with pytest.raises(Refused) as error:
            stream.read()
    assert (error.value.code, error.value.reason) == ("INTERNAL", "COVERAGE_NOT_MET")
    assert error.value.scatter
    assert error.value.scatter.coverage.answered == 3


def test_shards_whose_time_is_over_are_told_too(scatterer: Client, play: Play) -> None:
    play.says = {"b": play.gate(), "c": play.gate()}

    def told_in_part() -> None:
        *told, last = events(scatterer, play, "quick", policy={"min_coverage": 0.1})
        assert [event.failure.code for event in told if event.WhichOneof("event") == "failure"] == [4, 4]
        assert last.answer.failed_by_code == {"DEADLINE_EXCEEDED": 2}

    undisturbed(told_in_part, within_s=0)


def test_shards_that_are_not_waited_for_are_told_by_the_answer_alone(scatterer: Client, play: Play) -> None:
    play.says = {"b": play.gate()}
    *told, last = events(scatterer, play, "collect", policy={"min_coverage": 0, "first_k": 2})
    assert sorted(event.reply.reply.shard_id for event in told) == ["a", "c"]
    assert [(f.shard_id, f.code) for f in last.answer.failures] == [("b", 1)]


def test_of_a_batch_every_shard_is_told_and_the_bytes_are_with_the_first(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"ab", "c": b"c"}
    *told, last = events(scatterer, play, "batched")
    found = {event.reply.reply.shard_id: event.reply for event in told}
    assert {shard: reply.reply.payload for shard, reply in found.items()} == {"a": b"ab", "b": b"", "c": b"c"}
    assert all(r.outcome.coverage == Coverage(expected=1, answered=1, complete=True) for r in found.values())
    assert last.answer.coverage.complete


def test_a_request_that_is_refused_tells_nothing(scatterer: Client) -> None:
    with pytest.raises(Refused) as error:
        scatterer.stream("ScatterStream", request={"pool_id": "nobody"}).read()
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "POOL_NOT_FOUND")


# A root as a leaf, on a stream


def query(play: Play, pool_id: str = "left", **fields: Any) -> leaf.QueryRequest:
    return leaf.QueryRequest(payload=play.payload, shard_id="s", parent=leaf.ParentQuery(pool_id=pool_id), **fields)


def opened(client: Client) -> Stream:
    return client.stream("QueryStream")


def test_queries_are_answered_in_the_order_of_their_ends(scatterer: Client, play: Play) -> None:
    late = play.gate(b"1")
    play.says = {"a": [late, b"10"], "b": b"5"}
    with opened(scatterer) as stream:
        stream.send(query_id=7, query=query(play))
        play.await_calls(2)
        stream.send(query_id=8, query=query(play))
        response = stream.read()
        assert (response.query_id, response.response.payload, response.code) == (8, b"15", 0)
        assert response.response.coverage == Coverage(expected=2, answered=2, complete=True)
        late.open()
        assert stream.read().query_id == 7


def test_what_is_open_at_the_end_of_the_questions_is_still_answered(scatterer: Client, play: Play) -> None:
    late = play.gate(b"1")
    play.says = {"a": late, "b": b"2"}
    with opened(scatterer) as stream:
        stream.send(query_id=1, query=query(play))
        stream.half_close()
        play.await_calls(2)
        late.open()
        assert stream.read().response.payload == b"3"
        assert stream.read() is None


def test_errors_stand_in_the_response_and_the_stream_goes_on(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1", "a": [Fail("INTERNAL", "broken"), b"1"]}
    with opened(scatterer) as stream:
        stream.send(query_id=1, query=query(play, "nobody"))
        response = stream.read()
        assert (response.query_id, response.code, response.HasField("response")) == (1, 5, False)
        assert "nobody" in response.message
        stream.send(query_id=2, query=query(play))
        assert stream.read().code == 13
        stream.send(query_id=3, query=query(play))
        assert stream.read().response.payload == b"2"


def test_a_query_that_is_cancelled_takes_its_calls_along_and_is_told_nothing(scatterer: Client, play: Play) -> None:
    play.says = {"a": [play.gate(), b"1"], "b": b"1"}
    with opened(scatterer) as stream:
        stream.send(query_id=1, query=query(play))
        play.await_calls(2)
        stream.send(query_id=1, cancel=True)
        play.await_end("CANCELLED")
        stream.send(query_id=99, cancel=True)  # nobody's
        stream.send(query_id=1, query=query(play))  # its number is free again
        assert stream.read().response.payload == b"2"


def test_each_query_has_a_time_of_its_own(scatterer: Client, play: Play) -> None:
    play.says = {"a": play.gate(), "b": b"1"}
    with opened(scatterer) as stream:
        stream.send(query_id=1, query=query(play), timeout_micros=300_000)
        response = stream.read()
        assert (response.query_id, response.code) == (1, 4)
        assert all(call.time_remaining < 0.3 for call in play.calls)


def test_an_answer_that_is_too_large_is_an_error_of_its_query(scatterer: Client, play: Play) -> None:
    play.says = {"*": bytes(1_500_000)}
    with opened(scatterer) as stream:
        stream.send(query_id=1, query=query(play, "concat"))
        response = stream.read()
        assert (response.code, response.HasField("response")) == (8, False)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"query_id": 1}, "query"),
    "both": ({"query_id": 1, "query": leaf.QueryRequest(), "cancel": True}, "query"),
    "a number that is open": ({"query_id": 5, "query": leaf.QueryRequest()}, "query_id"),
    "less than no time": ({"query_id": 1, "query": leaf.QueryRequest(), "timeout_micros": -1}, "timeout_micros"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_message_that_makes_no_sense_ends_the_stream(scatterer: Client, play: Play, what: str) -> None:
    message, field = WRONG[what]
    play.says = {"*": play.gate()}
    with opened(scatterer) as stream:
        stream.send(query_id=5, query=query(play))
        play.await_calls(2)
        stream.send(**message)
        with pytest.raises(Refused) as error:
            stream.read()
    assert (error.value.code, error.value.fields) == ("INVALID_ARGUMENT", {field})
    play.await_end("CANCELLED", 2)


def test_a_stream_that_is_left_takes_its_queries_along(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    with opened(scatterer) as stream:
        for number in range(3):
            stream.send(query_id=number, query=query(play))
        play.await_calls(6)
    play.await_end("CANCELLED", 6)


def test_a_streams_deadline_ends_its_queries(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    with scatterer.stream("QueryStream", timeout=0.4) as stream:
        stream.send(query_id=1, query=query(play))
        try:
            assert stream.read().code == 4  # the query's own time is over a little earlier
        except Refused as error:
            assert error.code == "DEADLINE_EXCEEDED"  # noqa: PT017 - either
    play._await(lambda: all(call.ended for call in play.calls))


def test_many_queries_at_once_are_all_answered(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"1", "b": b"2"}
    with scatterer.stream("QueryStream", timeout=60) as stream:
        for number in range(100):
            stream.send(query_id=number, query=query(play), timeout_micros=50_000_000)
        stream.half_close()
        found = list(stream)
    assert sorted(response.query_id for response in found) == list(range(100))
    assert {response.response.payload for response in found} == {b"3"}


# Leaves that are asked on a stream


def test_leaves_may_be_asked_on_a_stream(scatterer: Client, play: Play) -> None:
    late = play.gate(b"1")
    play.says = {"a": [late, b"10"], "b": b"2", "c": b"3"}
    first = scatterer.begin("Scatter", pool_id="streamed", payload=play.payload)
    play.await_calls(3)
    second = scatterer.Scatter(pool_id="streamed", payload=play.payload)
    assert [reply.payload for reply in second.collected.replies] == [b"10", b"2", b"3"]
    late.open()
    assert [reply.payload for reply in first.result().collected.replies] == [b"1", b"2", b"3"]
    assert {call.method.rpartition("/")[2] for call in play.calls} == {"QueryStream"}
    assert all(0 < call.time_remaining < 10 for call in play.calls)


def test_a_caller_that_leaves_is_told_to_leaves_on_a_stream(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    asked = scatterer.begin("Scatter", pool_id="streamed", payload=play.payload)
    play.await_calls(3)
    asked.cancel()
    play.await_end("CANCELLED", 3)


CODES = {"NOT_FOUND": ("NOT_FOUND", 5), "99": ("UNKNOWN", 2), "-7": ("UNKNOWN", 2), "CANCELLED": ("UNKNOWN", 2)}


@pytest.mark.parametrize("said", CODES)
def test_a_leaf_that_fails_on_a_stream_has_failed_with_its_code(scatterer: Client, play: Play, said: str) -> None:
    play.says = {"b": Fail(said, "no")}
    request = {"pool_id": "streamed", "payload": play.payload}
    answer = scatterer.Scatter(**request, policy={"min_coverage": 0.5})
    name, number = CODES[said]
    assert answer.failed_by_code == {name: 1}
    assert [(f.shard_id, f.code, f.message) for f in answer.failures] == [("b", number, "no")]


def test_neither_a_reply_nor_a_code_is_no_answer(scatterer: Client, play: Play) -> None:
    play.says = {"b": Raw(b""), "c": Raw(leaf.QueryStreamResponse(response=leaf.QueryResponse()).SerializeToString())}
    request = {"pool_id": "streamed", "payload": play.payload}
    answer = scatterer.Scatter(**request, policy={"min_coverage": 0.5})
    assert answer.failed_by_code == {"DATA_LOSS": 1}
    assert [reply.shard_id for reply in answer.collected.replies] == ["a", "c"]


def test_a_leaf_on_a_stream_may_refuse_the_request(scatterer: Client, play: Play) -> None:
    play.says = {"b": Fail("PERMISSION_DENIED", "not for you")}
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id="streamed", payload=play.payload)
    assert (error.value.code, error.value.reason) == ("PERMISSION_DENIED", "LEAF_REFUSED")
