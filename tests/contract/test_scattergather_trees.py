"""Roots that are leaves of roots: what is passed down, what is summed up, and where it ends."""

from __future__ import annotations

from typing import Any

import pytest
from contract.client import Client, Refused
from contract.plays import Fail, Play

from retinue.scattergather.v1 import leaf_service_pb2 as leaf
from retinue.scattergather.v1.coverage_pb2 import Coverage


def parent(pool_id: str = "left", **fields: Any) -> leaf.ParentQuery:
    return leaf.ParentQuery(pool_id=pool_id, **fields)


def refused(client: Client, play: Play, **fields: Any) -> Refused:
    with pytest.raises(Refused) as error:
        client.Query(**{"payload": play.payload} | fields)
    return error.value


# Down and up


def test_a_tree_answers_like_one_pool_of_all_its_leaves(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"1", "b": b"2", "c": b"4", "d": b"8"}
    answer = scatterer.Scatter(pool_id="tree", payload=play.payload)
    assert answer.json.number_value == 15
    assert answer.coverage == Coverage(expected=4, answered=4, complete=True)
    assert {call.query.payload for call in play.calls} == {play.payload}


def test_each_level_has_less_time_and_knows_the_roots_above(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1"}
    answer = scatterer.Scatter(pool_id="tree", payload=play.payload, timeout=8)
    for call in play.calls:
        assert call.time_remaining < 7.5, "8 s less a twentieth, less a twentieth"
        pool = "left" if call.shard in "ab" else "right"
        assert [name.rpartition("/")[2] for name in call.query.parent.path] == ["tree", pool]
    parents = [s for s in scatterer.ListRecentScatters(page_size=100).scatters if s.parent_scatter_id]
    beneath = [s for s in parents if s.parent_scatter_id == answer.scatter_id]
    assert sorted(s.pool_id for s in beneath) == ["left", "right"]
    assert {call.query.parent.scatter_id for call in play.calls} == {s.scatter_id for s in beneath}


def test_what_is_missing_beneath_is_missing_above(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1", "a": Fail("UNAVAILABLE", "gone")}
    policy = {"min_coverage": 0.5}
    answer = scatterer.Scatter(pool_id="tree", payload=play.payload, policy=policy)
    assert answer.json.number_value == 3
    assert answer.coverage == Coverage(expected=4, answered=3)
    [degraded] = answer.failures
    assert (degraded.shard_id, degraded.code, degraded.coverage) == ("left", 0, Coverage(expected=2, answered=1))
    assert all(call.query.parent.accept_partial for call in play.calls)


def test_a_strict_tree_fails_for_one_leaf(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1", "d": Fail("UNAVAILABLE", "gone"), "a": play.gate()}
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id="tree", payload=play.payload)
    assert (error.value.code, error.value.reason) == ("UNAVAILABLE", "COVERAGE_NOT_MET")
    assert error.value.scatter
    assert [f.shard_id for f in error.value.scatter.failures] == ["right", "left"]
    assert "d: gone" in error.value.scatter.failures[0].message
    play.await_quiet()  # two levels down


def test_a_parent_without_any_answer_is_missing_as_a_whole(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1", "a": Fail("UNAVAILABLE"), "b": Fail("UNAVAILABLE")}
    answer = scatterer.Scatter(pool_id="tree", payload=play.payload, policy={"min_coverage": 0.5})
    assert answer.json.number_value == 2
    assert answer.coverage == Coverage(expected=4, answered=2)
    assert answer.failed_by_code == {"UNAVAILABLE": 1}


def test_a_refusal_at_the_bottom_is_the_answer_at_the_top(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1", "c": Fail("INVALID_ARGUMENT", "no such field"), "a": play.gate()}
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id="tree", payload=play.payload, policy={"min_coverage": 0})
    assert (error.value.code, error.value.reason) == ("INVALID_ARGUMENT", "LEAF_REFUSED")
    assert error.value.message == "no such field"
    play.await_quiet()


def test_a_caller_that_leaves_the_top_leaves_the_bottom(scatterer: Client, play: Play) -> None:
    play.says = {"*": play.gate()}
    asked = scatterer.begin("Scatter", pool_id="tree", payload=play.payload)
    play.await_calls(4)
    asked.cancel()
    play.await_end("CANCELLED", 4)


# Asked directly


def test_a_root_is_a_leaf(scatterer: Client, play: Play) -> None:
    play.says = {"a": b"1", "b": b"2"}
    response = scatterer.Query(payload=play.payload, shard_id="s", attempt=3, parent=parent())
    assert (response.payload, response.coverage) == (b"3", Coverage(expected=2, answered=2, complete=True))


def test_a_part_is_better_than_nothing_where_the_root_above_says_so(scatterer: Client, play: Play) -> None:
    play.says = {"a": Fail("UNAVAILABLE"), "b": b"2"}
    response = scatterer.Query(payload=play.payload, parent=parent(accept_partial=True))
    assert (response.payload, response.coverage) == (b"2", Coverage(expected=2, answered=1))
    error = refused(scatterer, play, parent=parent())
    assert (error.code, error.reason) == ("UNAVAILABLE", "COVERAGE_NOT_MET")
    assert error.scatter
    play.says["b"] = Fail("UNAVAILABLE")
    assert refused(scatterer, play, parent=parent(accept_partial=True)).code == "UNAVAILABLE"


def test_a_pool_that_is_not_idempotent_answers_completely_or_fails(scatterer: Client, play: Play) -> None:
    response = scatterer.Query(payload=play.payload, parent=parent("once", accept_partial=True))
    assert response.coverage.complete
    play.says = {"a": Fail("UNAVAILABLE")}
    assert refused(scatterer, play, parent=parent("once", accept_partial=True)).code == "UNAVAILABLE"


def test_replies_that_are_collected_are_a_message(scatterer: Client, play: Play) -> None:
    from retinue.scattergather.v1 import scattergather_service_pb2 as api  # noqa: PLC0415 - here alone

    play.says = {"a": b"1", "b": b"2", "c": b"3"}
    response = scatterer.Query(payload=play.payload, parent=parent("collect"))
    found = api.CollectedReplies.FromString(response.payload)
    assert [(r.shard_id, r.payload) for r in found.replies] == [("a", b"1"), ("b", b"2"), ("c", b"3")]


def test_a_batch_of_one_is_taken_with_its_own_input(scatterer: Client, play: Play) -> None:
    play.says = {"*": b"1"}
    own = [{"shard_id": "s", "payload": play.payload + b" own"}]
    assert scatterer.Query(payload=b"common", shards=own, parent=parent()).payload == b"2"
    assert {call.query.payload for call in play.calls} == {play.payload + b" own"}


def test_a_batch_of_two_is_refused(scatterer: Client, play: Play) -> None:
    error = refused(scatterer, play, shards=[{"shard_id": "s"}, {"shard_id": "t"}], parent=parent())
    assert (error.code, error.fields) == ("INVALID_ARGUMENT", {"shards"})
    assert play.calls == []


# Where it ends


def test_a_loop_is_refused(scatterer: Client, play: Play) -> None:
    with pytest.raises(Refused) as error:
        scatterer.Scatter(pool_id="loop", payload=play.payload)
    assert error.value.reason == "COVERAGE_NOT_MET"
    assert error.value.scatter
    [failure] = error.value.scatter.failures
    assert (failure.shard_id, failure.code) == ("self", 9)
    assert "above itself" in failure.message
    assert play.calls == []


def test_the_ninth_root_is_refused(scatterer: Client, play: Play) -> None:
    path = [f"other-{number}/p" for number in range(8)]
    play.says = {"*": b"1"}
    assert scatterer.Query(payload=play.payload, parent=parent(path=path[:7])).payload == b"2"
    assert list(play.calls[0].query.parent.path[:7]) == path[:7]
    error = refused(scatterer, play, parent=parent(path=path))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "SCATTER_TOO_DEEP")
    assert error.metadata == {"path": " > ".join(path)}
    assert len(play.calls) == 2


def test_a_pool_that_nobody_named_is_not_found(scatterer: Client, play: Play) -> None:
    assert refused(scatterer, play, parent=parent("nobody")).code == "NOT_FOUND"
    assert refused(scatterer, play).reason == "POOL_NOT_FOUND"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("parent.pool_id", {"pool_id": "no such name"}),
        ("parent.path", {"pool_id": "left", "path": ["x" * 400]}),
        ("parent.scatter_id", {"pool_id": "left", "scatter_id": "x" * 400}),
    ],
)
def test_what_no_root_would_say_is_refused(scatterer: Client, play: Play, field: str, said: dict[str, Any]) -> None:
    error = refused(scatterer, play, parent=leaf.ParentQuery(**said))
    assert (error.code, error.fields) == ("INVALID_ARGUMENT", {field})
