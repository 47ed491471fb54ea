"""Scatter/gather as its contract says: whom a request asks, with what, and what is told of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from contract.client import Client, Refused
from contract.plays import Call, Fail, Play
from contract.pools import FOREIGN
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Value

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1 import topology_pb2
from retinue.scattergather.v1.coverage_pb2 import Coverage


def collected(answer: Any) -> dict[str, bytes]:
    return {reply.shard_id: reply.payload for reply in answer.collected.replies}


# Whom it asks


def test_all_shards_are_asked_and_the_answer_is_complete(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"1", "b": b"2", "c": b"3"}
    answer = scatterer.Scatter(pool_id="collect", payload=play.payload)
    assert list(collected(answer).items()) == [("a", b"1"), ("b", b"2"), ("c", b"3")], "in the pool's order"
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (3, 3, True)
    assert (answer.stats.shards, answer.stats.attempts, answer.stats.gathered_bytes) == (3, 3, 9)
    assert not answer.failures
    assert not answer.failed_by_code
    assert answer.topology_version >= 1
    assert answer.scatter_id
    assert answer.stats.slowest_shard_id in "abc"
    assert 0 < answer.stats.slowest_duration.ToNanoseconds() <= answer.stats.elapsed_duration.ToNanoseconds()


def test_leaves_are_told_the_question_the_shard_and_the_roots_above(scatterer: Client, play: Play) -> None:
    answer = scatterer.Scatter(pool_id="collect", payload=play.payload)
    for shard, at in (("a", "r0"), ("b", "r1"), ("c", "r2")):
        [call] = play.to(shard)
        assert (call.at, call.query.payload, call.query.attempt) == (at, play.payload, 1)
        assert not call.query.shards
        assert [name.rpartition("/")[2] for name in call.query.parent.path] == ["collect"]
        assert call.query.parent.scatter_id == answer.scatter_id
        assert not call.query.parent.accept_partial


def test_shards_are_selected_by_name(scatterer: Client, play: Play) -> None:
    answer = scatterer.Scatter(pool_id="collect", payload=play.payload, shard_ids=["c", "a"])
    assert list(collected(answer)) == ["a", "c"]
    assert answer.coverage.expected == 2
    assert len(play.calls) == 2


@pytest.mark.parametrize("key", ["user-1", "user-2", "user-3", "", "schlüssel", "k" * 1000])
def test_a_key_belongs_to_the_shard_with_the_largest_hash(scatterer: Client, play: Play, key: str) -> None:
    """Anyone can tell where a key goes."""
    owner = max("abc", key=lambda s: hashlib.sha256(key.encode() + b"\0" + s.encode()).digest()[:8])
    answer = scatterer.Scatter(pool_id="collect", payload=play.payload, route_keys=[key, key])
    assert list(collected(answer)) == [owner]


def test_each_shard_may_be_asked_something_else(scatterer: Client, play: Play) -> None:
    inputs = [{"shard_id": s, "payload": play.payload + s.encode()} for s in "ca"]
    answer = scatterer.Scatter(pool_id="collect", shard_inputs={"inputs": inputs})
    assert list(collected(answer)) == ["a", "c"], "they select, too"
    assert {call.shard: call.query.payload for call in play.calls} == {s: play.payload + s.encode() for s in "ac"}


def test_json_is_asked_as_text(scatterer: Client, play: Play) -> None:
    asked = Value()
    asked.struct_value.update({"name": play.name, "k": 3, "x": [1.5, None, True, "ä"]})
    scatterer.Scatter(pool_id="collect", json=asked, shard_ids=["a"])
    inputs = [{"shard_id": "b", "json": asked}]
    scatterer.Scatter(pool_id="collect", shard_inputs={"inputs": inputs})
    assert [json_format.Parse(call.query.payload, Value()) for call in play.calls] == [asked, asked]
    assert b'"k":3' in play.calls[0].query.payload, "whole numbers have no fraction"


# What goes with it


def test_only_metadata_that_the_pool_lists_is_forwarded(scatterer: Client, play: Play) -> None:
    sent = (("x-user", "me"), ("x-secret", "s3cret"), ("x-user-2", "you"))
    scatterer.begin("Scatter", metadata=sent, pool_id="collect", payload=play.payload).result()
    scatterer.begin("Scatter", metadata=sent, pool_id="concat", payload=play.payload).result()
    listed, unlisted = play.calls[:3], play.calls[3:]
    assert all(call.metadata.get("x-user") == "me" for call in listed)
    assert all("x-user" not in call.metadata for call in unlisted)
    assert all(not {"x-secret", "x-user-2", "authorization"} & set(call.metadata) for call in play.calls)


def test_the_trace_goes_along_with_every_call(scatterer: Client, play: Play) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = scatterer.begin(
        "Scatter", metadata=[("traceparent", trace)], pool_id="collect", payload=play.payload
    ).result()
    assert {call.metadata["traceparent"].split("-")[1] for call in play.calls} == {trace.split("-")[1]}
    [recent] = scatterer.ListRecentScatters(scatter_id=answer.scatter_id).scatters
    assert recent.trace_id == trace.split("-")[1]


# Methods that know nothing of Retinue


def test_a_method_that_exists_gets_the_bytes_as_they_are_and_the_shard_beside_them(
    scatterer: Client, play: Play
) -> None:
    play.says = {"a": b"\x0a\x01x", "b": b"", "c": b"\xff any"}
    asked = {"pool_id": "foreign", "payload": play.payload}
    answer = scatterer.begin("Scatter", metadata=[("x-user", "me")], **asked).result()
    assert collected(answer) == {"a": b"\x0a\x01x", "b": b"", "c": b"\xff any"}
    for call in play.calls:
        assert (call.method, call.data) == (FOREIGN, play.payload)
        assert (call.metadata["retinue-attempt"], call.metadata["x-user"]) == ("1", "me")
    assert sorted(call.metadata["retinue-shard"] for call in play.calls) == ["a", "b", "c"]


def test_a_method_that_exists_fails_like_a_leaf(scatterer: Client, play: Play) -> None:
    play.says = {"b": Fail("NOT_FOUND", "no such product")}
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id="foreign", payload=play.payload)
    assert (error.value.code, error.value.reason) == ("INTERNAL", "COVERAGE_NOT_MET")
    assert error.value.scatter
    assert [(f.shard_id, f.code, f.message) for f in error.value.scatter.failures[:1]] == [("b", 5, "no such product")]


# Batches


def test_shards_of_one_endpoint_are_asked_by_one_call_where_the_pool_says_so(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"ab", "c": b"c"}
    answer = scatterer.Scatter(pool_id="batched", payload=play.payload)
    assert collected(answer) == {"a": b"ab", "c": b"c"}
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (3, 3, True)
    assert (answer.stats.shards, answer.stats.attempts) == (3, 2)
    batch = next(call.query for call in play.calls if call.at == "r0")
    assert ([s.shard_id for s in batch.shards], batch.payload, batch.shard_id) == (["a", "b"], play.payload, "")


def test_shards_of_a_batch_may_be_asked_something_else_each(scatterer: Client, play: Play) -> None:
    inputs = [{"shard_id": s, "payload": play.payload + s.encode()} for s in "abc"]
    scatterer.Scatter(pool_id="batched", shard_inputs={"inputs": inputs})
    batch = next(call.query for call in play.calls if call.at == "r0")
    assert [(s.shard_id, s.payload) for s in batch.shards] == [(s, play.payload + s.encode()) for s in "ab"]


def failing_first(call: Call) -> Any:
    return Fail("UNAVAILABLE") if call.query.attempt == 1 else call.shard.encode()


def test_a_batch_that_failed_is_asked_shard_by_shard_elsewhere(scatterer: Client, play: Play) -> None:
    play.says = {"*": failing_first}
    answer = scatterer.Scatter(pool_id="batched_twice", payload=play.payload)
    assert collected(answer) == {"a": b"a", "b": b"b"}
    again = [call for call in play.calls if call.query.attempt == 2]
    assert sorted(call.shard for call in again) == ["a", "b"]
    assert all(len(call.query.shards) == 1 for call in again)
    assert answer.stats.retries == 2


def test_a_batch_that_answers_in_part_counts_by_the_weight_of_all_its_shards(scatterer: Client, play: Play) -> None:
    play.says = {"a": leaf.QueryResponse(payload=b"a", coverage=Coverage(expected=2, answered=1))}
    policy = {"min_coverage": 0.5}
    answer = scatterer.Scatter(pool_id="batched", payload=play.payload, policy=policy)
    assert (answer.coverage.expected, answer.coverage.answered, answer.coverage.complete) == (3, 2, False)
    assert [f.shard_id for f in answer.failures] == ["a", "b"]


# What it would do, and what it did


def test_a_plan_asks_nobody(scatterer: Client, play: Play) -> None:
    asked = {"pool_id": "weighted", "payload": play.payload}
    plan = scatterer.ExplainScatter(request=asked)
    assert [(s.shard_id, s.weight, len(s.endpoints)) for s in plan.shards] == [("a", 3, 1), ("b", 1, 1)]
    assert plan.merge == topology_pb2.MERGE_COLLECT
    assert plan.method == "/retinue.scattergather.v1.LeafService/Query"
    assert 0 < plan.leaf_timeout_duration.ToNanoseconds() < plan.timeout_duration.ToNanoseconds()
    assert plan.timeout_duration.ToNanoseconds() <= 10_000_000_000, "the pool's, at most"
    assert not plan.HasField("hedge_delay_duration")
    assert plan.budget > 0
    assert scatterer.ExplainScatter(request={"pool_id": "hedged"}).HasField("hedge_delay_duration")
    never = scatterer.ExplainScatter(request={"pool_id": "hedged", "policy": {"no_hedge": True}})
    assert not never.HasField("hedge_delay_duration")
    assert play.calls == []


def test_a_past_request_is_remembered_with_its_calls(scatterer: Client, play: Play) -> None:
    play.says = {"a": [Fail("UNAVAILABLE", "gone"), b"x"]}
    answer = scatterer.Scatter(pool_id="replicas", payload=play.payload)
    [recent] = scatterer.ListRecentScatters(scatter_id=answer.scatter_id, pool_id="replicas").scatters
    assert (recent.pool_id, recent.code, recent.coverage) == ("replicas", 0, answer.coverage)
    assert recent.stats.attempts == 2
    assert recent.start_time.seconds > 1_700_000_000
    failed, won = recent.attempts
    assert (failed.shard_id, failed.kind, failed.outcome, failed.code, failed.shards) == ("a", 1, 3, 14, 1)
    assert (won.kind, won.outcome, won.code, won.reply_bytes) == (3, 1, 0, 3)
    assert failed.address != won.address
    assert won.start_duration.ToNanoseconds() >= failed.start_duration.ToNanoseconds()
    assert not recent.omitted_attempts


def test_past_requests_are_listed_the_latest_first_page_by_page(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1"}
    ids = [scatterer.Scatter(pool_id="max", payload=play.payload).scatter_id for _ in range(5)]
    found, token = [], ""
    while True:
        page = scatterer.ListRecentScatters(pool_id="max", page_size=2, page_token=token)
        assert len(page.scatters) <= 2
        found += [scatter.scatter_id for scatter in page.scatters]
        token = page.next_page_token
        if not token:
            break
    assert [one for one in found if one in ids] == ids[::-1]
    assert len(found) == len(set(found))


def test_what_was_refused_before_a_leaf_was_asked_is_not_remembered(scatterer: Client) -> None:
    with pytest.raises(Refused):
        scatterer.Scatter(pool_id="empty")
    assert not scatterer.ListRecentScatters(pool_id="empty").scatters


# Topology


def test_pools_are_listed_by_name_page_by_page(scatterer: Client) -> None:
    everything = scatterer.ListPools(page_size=1000).pools
    names = [pool.pool_id for pool in everything]
    assert names == sorted(names)
    assert {"collect", "tree", "empty"} <= set(names)
    known = {pool.pool_id: pool for pool in everything}
    assert (known["collect"].shards, known["collect"].endpoints) == (3, 3)
    assert (known["empty"].shards, known["empty"].endpoints) == (0, 0)
    assert known["replicas"].endpoints == 3
    assert known["foreign"].method == FOREIGN
    assert known["top_k"].merge == topology_pb2.MERGE_TOP_K
    paged, token = [], ""
    while True:
        page = scatterer.ListPools(page_size=7, page_token=token)
        paged += [pool.pool_id for pool in page.pools]
        token = page.next_page_token
        if not token:
            break
    assert paged == names


def test_a_topology_has_what_is_expected_and_who_is_there(scatterer: Client, play: Play) -> None:
    scatterer.Scatter(pool_id="collect", payload=play.payload)
    pool = scatterer.GetTopology(pool_id="collect").pool
    assert (pool.pool_id, pool.merge, pool.idempotent) == ("collect", topology_pb2.MERGE_COLLECT, True)
    assert pool.timeout_duration.seconds == 10
    assert [shard.shard_id for shard in pool.shards] == ["a", "b", "c"]
    for shard in pool.shards:
        [endpoint] = shard.endpoints
        assert endpoint.connected
        assert endpoint.HasField("latency_duration")
    assert scatterer.GetTopology(pool_id="top_k").pool.top_k == 3


def test_who_is_not_there_is_expected_all_the_same(scatterer: Client) -> None:
    pool = scatterer.GetTopology(pool_id="away").pool
    assert [shard.shard_id for shard in pool.shards] == ["a", "b"]
    assert not pool.shards[1].endpoints[0].connected


def test_a_watch_begins_with_a_snapshot(scatterer: Client) -> None:
    with scatterer.stream("WatchTopology", pool_id="weighted") as watch:
        first = watch.read().pool
        assert [(shard.shard_id, shard.weight) for shard in first.shards] == [("a", 3), ("b", 1)]


def show(client: Client) -> None:
    client.GetTopology(pool_id="nobody")


def watch(client: Client) -> None:
    client.stream("WatchTopology", pool_id="nobody").read()


@pytest.mark.parametrize("look", [show, watch])
def test_an_unknown_pool_is_not_found(scatterer: Client, look: Callable[[Client], None]) -> None:
    with pytest.raises(Refused) as error:
        look(scatterer)
    assert (error.value.code, error.value.reason) == ("NOT_FOUND", "POOL_NOT_FOUND")
    assert error.value.metadata == {"pool_id": "nobody"}
