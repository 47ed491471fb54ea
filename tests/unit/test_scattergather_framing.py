"""Claims about LeafService's messages as bytes: they are what protobuf makes of them, and garbage is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinue.scattergather.v1 import leaf_service_pb2 as pb
from retinue_server.scattergather.core.requests import Coverage, Malformed, Reply
from retinue_server.scattergather.core.topology import Shard
from retinue_server.scattergather.framing import Inputs, LeafQuestion, Parent, PlainQuestion

PARENT = Parent(("server/pool",), accept_partial=True, scatter_id="x-1")
IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True)


@given(st.binary(max_size=300), IDS, st.integers(1, 9), st.sampled_from(["own", ""]), st.sampled_from(["", "inner"]))
def test_a_request_is_what_protobuf_would_write(
    payload: bytes, shard_id: str, attempt: int, own: str, pool: str
) -> None:
    inputs = Inputs(by_shard={shard_id: payload}) if own else Inputs(payload)
    data = LeafQuestion(inputs, PARENT).data([Shard(shard_id, (), pool=pool)], attempt)
    parent = pb.ParentQuery(path=["server/pool"], accept_partial=True, scatter_id="x-1", pool_id=pool)
    wanted = pb.QueryRequest(payload=payload, shard_id=shard_id, attempt=attempt, parent=parent)
    assert pb.QueryRequest.FromString(data) == wanted


def test_a_batch_names_its_shards_and_their_inputs() -> None:
    shards = [Shard("a", ()), Shard("b", ())]
    common = pb.QueryRequest.FromString(LeafQuestion(Inputs(b"q"), PARENT, batch=True).data(shards, 1))
    assert (common.payload, [s.shard_id for s in common.shards]) == (b"q", ["a", "b"])
    assert not common.shards[0].HasField("payload")
    own = LeafQuestion(Inputs(by_shard={"a": b"1", "b": b""}), PARENT, batch=True).data(shards, 1)
    assert [s.payload for s in pb.QueryRequest.FromString(own).shards] == [b"1", b""]
    assert all(s.HasField("payload") for s in pb.QueryRequest.FromString(own).shards)


@given(st.binary(max_size=300), st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()))
def test_a_reply_is_read_as_protobuf_would(payload: bytes, said: tuple[int, int, bool] | None) -> None:
    coverage = Coverage(max(said[:2]), min(said[:2]), said[2]) if said else None
    reply = pb.QueryResponse(payload=payload)
    if coverage is not None:
        reply.coverage.CopyFrom(pb.QueryResponse().coverage)
        reply.coverage.expected, reply.coverage.answered, reply.coverage.complete = coverage
    assert LeafQuestion(Inputs(), PARENT).read(reply.SerializeToString()) == Reply(payload, coverage)


@given(st.binary(min_size=1, max_size=60))
def test_garbage_is_malformed_or_read_as_protobuf_would(garbage: bytes) -> None:
    try:
        wanted = pb.QueryResponse.FromString(garbage)
    except Exception:  # noqa: BLE001 - whatever protobuf says of garbage
        with pytest.raises(Malformed):
            LeafQuestion(Inputs(), PARENT).read(garbage)
        return
    try:
        assert LeafQuestion(Inputs(), PARENT).read(garbage).payload == wanted.payload
    except Malformed:
        assert wanted.HasField("coverage")


def test_a_method_that_knows_nothing_of_us_gets_the_callers_bytes_and_the_shard_beside_them() -> None:
    question = PlainQuestion(Inputs(b"bytes"), (("x-user", "me"),))
    shard = [Shard("s1", ())]
    assert question.data(shard, 2) == b"bytes"
    assert question.metadata(shard, 2) == (("x-user", "me"), ("retinue-shard", "s1"), ("retinue-attempt", "2"))
    assert question.read(b"any") == Reply(b"any")
